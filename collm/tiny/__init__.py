"""The tiny language model that the package ships, and the workshop that made it (docs/tiny-model.md)."""

from __future__ import annotations

from pathlib import Path

from collm.models.sources import TINY


def folder() -> Path:
    """The Hugging Face folder of its weights and tokenizer."""
    return TINY
