"""Worlds of explorers who each see a part of a grid and must tell each other what they saw."""
