"""Environments in which agents place blocks."""
