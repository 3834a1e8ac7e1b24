"""How a team learns: from one iteration's episodes to new weights."""
