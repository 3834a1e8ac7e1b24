"""Formulas on tensors. Each is one pure function with its equation, shapes and source."""
