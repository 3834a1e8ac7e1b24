"""Who decides and who judges."""
