"""Worlds in which agents write programs, and the box that those programs run in."""
