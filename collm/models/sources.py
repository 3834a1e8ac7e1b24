"""Resolves names of models (Hugging Face folders, hub names, "tiny") without loading them. Without torch."""

from __future__ import annotations

import json
from pathlib import Path

from collm.errors import ConfigError

TINY = Path(__file__).parents[1] / "tiny" / "weights"
"""The model that the package ships (collm/tiny)."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def resolve(source: str) -> str:
    """The absolute path of a model's folder, or its hub name; "tiny" is the model that the package ships."""
    if source == "tiny":
        return str(TINY)
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def is_adapter(source: str | Path) -> bool:
    """Whether this is the folder of a PEFT adapter."""
    return (Path(source) / ADAPTER_CONFIG).is_file()


def base_named_by(folder: str) -> str:
    """The base model that an adapter's folder names. Raises ConfigError if it names none."""
    try:
        base = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError(f"base_model_name_or_path is {base!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"adapter {folder!r} cannot be read: {ADAPTER_CONFIG} does not name its base ({error!r}).") from error
    return base
