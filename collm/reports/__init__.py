"""Tables, curves and pictures of runs and studies: drawing only. Nothing here imports torch."""
