"""The worlds: text in, text out, no torch."""
