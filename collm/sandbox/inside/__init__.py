"""Scripts that run inside the box, where only the standard library and numpy are available."""
