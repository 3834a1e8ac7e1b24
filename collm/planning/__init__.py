"""What a recipe will need, before anything starts: memory by part, steps, tokens, hours. Nothing here imports torch."""
