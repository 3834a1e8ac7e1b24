"""The update: from one iteration's episodes to new weights."""
