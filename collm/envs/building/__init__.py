"""Worlds in which agents place blocks."""
