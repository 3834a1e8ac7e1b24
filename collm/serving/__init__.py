"""One agent behind one OpenAI-compatible endpoint."""
