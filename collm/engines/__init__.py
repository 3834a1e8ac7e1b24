"""Engines: text generation in this process, with vLLM, over HTTP, or from a function."""
