"""Environments in which agents write programs, whose tests run in `collm.sandbox`."""
