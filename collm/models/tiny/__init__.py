"""The tiny language model that the package ships: see docs/tiny-model.md for how it is made."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def folder() -> Path:
    """Where its weights and tokenizer lie, as an ordinary Hugging Face folder."""
    return Path(str(resources.files("collm.models.tiny") / "weights"))
