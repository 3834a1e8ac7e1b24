"""Environments in which agents write about one text."""
