"""The needs of a recipe, computed before a run: memory by part, steps, tokens, hours. Nothing here imports torch."""
