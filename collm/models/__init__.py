"""Policies, critics and teams, and which of them share parameters."""
