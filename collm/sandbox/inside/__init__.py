"""Scripts that run inside the box, with nothing but the standard library and numpy."""
