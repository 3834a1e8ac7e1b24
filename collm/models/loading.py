"""Loads pretrained models and tokenizers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from collm.errors import ConfigError
from collm.models import folders
from collm.models.sources import is_adapter, resolve

transformers_logging.disable_progress_bar()


def load_pretrained(auto_class: Any, source: str, **options: Any) -> Any:
    """`auto_class.from_pretrained(source)`; every failure is a ConfigError with value, reason and way out.

    Code beside the weights is not run, and only safetensors are loaded, no pickles. A local folder is checked before a model is
    built from it.
    """
    place, is_model = resolve(source), not issubclass(auto_class, (AutoTokenizer, AutoConfig))
    try:
        if auto_class is not AutoConfig and Path(place).is_dir() and source != "tiny" and not (is_model and is_adapter(place)):
            (folders.check_weights if is_model else folders.check_tokenizer)(Path(place))
        if is_model:
            options |= {"use_safetensors": True, "output_loading_info": True}
        loaded = auto_class.from_pretrained(place, trust_remote_code=False, **options)
        if is_model:
            loaded, about = loaded
            if not getattr(loaded, "_hf_peft_config_loaded", False):
                _check_loaded(loaded, about)
    except BaseException as error:  # the tokenizers library panics with a BaseException of its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) < 400 else f"{reason[:400]} ..."
        if isinstance(error, KeyError):
            reason = f"it lacks {reason}."
        raise ConfigError(
            f"model {source!r} cannot be loaded: {reason} Give a local Hugging Face folder, a hub name that this machine "
            "can reach, or 'tiny'."
        ) from error
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"model {source!r} is an adapter, not a whole model. Agents can start from one; a critic needs a whole model."
        )
    return loaded


def stop_ids_of(source: str, config: Any) -> list[int]:
    """The ids that end an answer, as the model's generation_config.json has them, or its config where there is none."""
    try:
        stops = GenerationConfig.from_pretrained(resolve(source)).eos_token_id
    except OSError:
        stops = GenerationConfig.from_model_config(config).eos_token_id
    return [i for i in (stops if isinstance(stops, list) else [stops]) if i is not None]


def check_vocabulary(tokenizer: Any, rows: int, stop_ids: Iterable[Any] = ()) -> None:
    """Raises ConfigError where a token of the tokenizer, padding aside, or an id that ends answers has no row of embeddings."""
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows and i != tokenizer.pad_token_id}
    if beyond or not all(type(i) is int and 0 <= i < rows for i in stop_ids):
        what = f"token {min(beyond, key=beyond.__getitem__)!r}" if beyond else f"the end mark {list(stop_ids)!r}"
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} does not fit its model: {what} lies beyond its {rows} embeddings. "
            "Take both from one place."
        )


def max_positions_of(config: Any) -> int:
    """The longest sequence, in tokens, that a model was made for."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def _check_loaded(model: Any, about: dict[str, Any]) -> None:
    """Raises ValueError if weights were missing, and so initialized at random, or are not finite."""
    missing = sorted(map(str, about.get("missing_keys") or ()))
    if missing:
        raise ValueError(f"its files lack {len(missing)} of its tensors, such as {missing[0]!r}.")
    for name, parameter in model.named_parameters():
        # a sum is finite only if every number is, and costs a fraction of looking at each
        if not parameter.detach().sum().isfinite() and not parameter.isfinite().all():
            raise ValueError(f"its tensor {name!r} holds numbers that are not finite.")
