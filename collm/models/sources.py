"""Resolves names of models (Hugging Face folders, hub names, "tiny") without loading them. Without torch."""

from __future__ import annotations

import json
from contextlib import suppress
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


def folder_of(source: str | Path) -> Path | None:
    """The folder of a model's files on this machine: its own, or the snapshot of its branch main in the hub's cache.

    None if there is none. Another revision of a hub's model is named by its folder.
    """
    place = Path(resolve(str(source)))
    if place.is_dir():
        return place
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):
        for name in ("config.json", ADAPTER_CONFIG):
            if isinstance(found := try_to_load_from_cache(str(source), name), str):
                return Path(found).parent
    return None


def adapter_folder(source: str | Path) -> Path | None:
    """The folder of a PEFT adapter on this machine. None for a whole model, and for a hub name that is not in the cache."""
    folder = folder_of(source)
    return folder if folder is not None and (folder / ADAPTER_CONFIG).is_file() else None


def is_adapter(source: str | Path) -> bool:
    """Whether `adapter_folder` finds one."""
    return adapter_folder(source) is not None


def fetch_adapter(source: str) -> None:
    """Download an adapter with this hub name to the hub's cache, where `adapter_folder` finds it.

    Nothing is raised for any other model, or a name that cannot be reached: whoever loads it reports that.
    """
    folder = folder_of(source)
    if folder is not None and (not is_adapter(source) or (folder / ADAPTER_WEIGHTS).is_file()):
        return
    from huggingface_hub import hf_hub_download

    with suppress(Exception):  # of the hub's client and of its network library alike
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "tokenizer.json", "chat_template.jinja"):  # the last two for plans
            hf_hub_download(source, name)


def base_named_by(source: str) -> str:
    """The base model that an adapter names, given its folder or hub name.

    Raises ConfigError if it names none, or a revision of one other than the branch main, which is what is loaded.
    """
    try:
        folder = folder_of(source) or Path(source)
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
        if not isinstance(base, str) or not base:
            raise ValueError(f"base_model_name_or_path is {base!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"adapter {source!r} cannot be read: {ADAPTER_CONFIG} does not name its base ({error!r}).") from error
    if revision not in (None, "", "main") and not Path(base).is_dir():
        raise ConfigError(
            f"adapter {source!r} is for revision {revision!r} of its base {base!r}, and a name loads the branch main. "
            f"Download that revision (`hf download {base} --revision {revision} --local-dir DIR`), and name DIR as "
            f"base_model_name_or_path in a copy of the adapter's {ADAPTER_CONFIG}."
        )
    return base
