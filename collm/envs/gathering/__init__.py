"""Environments on a grid under fog: each agent sees a part of the grid and can tell the others what it saw."""
