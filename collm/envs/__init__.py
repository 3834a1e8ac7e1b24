"""The environments: text in, text out. Nothing here imports torch."""
