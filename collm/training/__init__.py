"""How a team learns."""
