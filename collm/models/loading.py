"""Where models come from: Hugging Face folders, hub names, or the package's own; with errors that name the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from collm.errors import ConfigError
from collm.models import tiny

transformers_logging.disable_progress_bar()

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def resolve(source: str) -> str:
    """A model's folder, as an absolute path, or its hub name; "tiny" is the model that the package ships."""
    if source == "tiny":
        return str(tiny.folder())
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def is_adapter(source: str | Path) -> bool:
    """Whether this is a folder that holds a PEFT adapter rather than a whole model."""
    return (Path(source) / ADAPTER_CONFIG).is_file()


def load_pretrained(auto_class: Any, source: str, **options: Any) -> Any:
    """`auto_class.from_pretrained(source)`, with an error that names the setting's value and the way out.

    Code that lies beside the weights is never run.
    """
    try:
        loaded = auto_class.from_pretrained(resolve(source), trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"model {source!r} cannot be loaded: {reason} Give a local Hugging Face folder, a hub name that this machine "
            "can reach, or 'tiny'."
        ) from error
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"model {source!r} is an adapter, not a whole model. Agents can start from one that lies in a local folder; a "
            "critic needs a whole model."
        )
    return loaded
