"""Checks model folders, which are untrusted, before a model is built or memory is allocated.

No code of the folder is run. Sizes are read from the headers of its safetensors files, which must agree with its config.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
LARGEST_CONFIG, LARGEST_JSON, LARGEST_HEADER, LARGEST_TEMPLATE = 1 << 22, 1 << 27, 100_000_000, 1 << 18
LARGEST_INTEGER, MOST_LAYERS = 1 << 31, 10_000
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1,
}  # fmt: skip
FLOATING = ("F64", "F32", "F16", "BF16")
TEMPLATE_SECONDS, TEMPLATE_MEMORY = 2, 1 << 30
"""Limits, in seconds and bytes, for rendering a chat template with up to five short messages in a separate process."""


def check_tokenizer(folder: Path) -> None:
    """Raises ValueError if a tokenizer is damaged, or its chat template exceeds the limits of time or memory."""
    if os.path.lexists(folder / CONFIG):
        _config(folder)
    values: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"):
        if os.path.lexists(folder / name):
            values[name] = _object(folder / name, LARGEST_JSON)
    if "tokenizer_config.json" not in values and "tokenizer.json" not in values:
        raise ValueError("it holds no tokenizer (tokenizer.json, tokenizer_config.json).")
    template = values.get("tokenizer_config.json", {}).get("chat_template")
    if os.path.lexists(folder / "chat_template.jinja"):
        template = _bytes(folder / "chat_template.jinja", LARGEST_TEMPLATE).decode("utf-8", "replace")
    if isinstance(template, str):
        _try(template)


def check_weights(folder: Path) -> None:
    """Raises ValueError if the config and the safetensors files of a model folder do not match."""
    config, shapes = _config(folder), tensors(folder)
    layers = max((int(v) for k, v in _walk(config) if k in LAYERS and isinstance(v, int)), default=0)
    if layers > len(shapes):
        raise ValueError(f"its config.json names {layers} layers, but its files hold {len(shapes)} tensors.")
    held, named = sum(math.prod(shape) for shape in shapes.values()), _parameters(folder)
    if named > held:
        raise ValueError(f"its config.json describes {named:,} weights, but its files hold {held:,}.")


def _parameters(folder: Path) -> int:
    """Number of parameters of a causal language model with this config, built on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())


def tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in a folder's safetensors files. Raises ValueError if there is none or one is damaged."""
    files = [SINGLE]
    if not os.path.lexists(folder / SINGLE):
        if not os.path.lexists(folder / INDEX):
            pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
            instead = f", only {pickled[0]}, which could run code when it is read" if pickled else ""
            raise ValueError(f"it holds no weights as safetensors{instead}. Convert it with save_pretrained.")
        mapping = _object(folder / INDEX, LARGEST_JSON).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise ValueError(f"{INDEX} names no files.")
        files = sorted({str(name) for name in mapping.values()})
        for name in files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{INDEX} names {name!r}, which is not a safetensors file of this folder.")
    found: dict[str, tuple[int, ...]] = {}
    for name in files:
        found |= _header(folder / name)
    return found


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in one safetensors file, after its header is compared with the file's size."""
    size = _size(path)
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise ValueError(f"{path.name} is cut off or is not a safetensors file.")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            shapes = {}
            for name, entry in header.items():
                shape, (begin, end) = tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
                if name.endswith("weight") and entry["dtype"] not in FLOATING:
                    raise ValueError(
                        f"its weights are {entry['dtype']}; only F32, F16, BF16 and F64 can be trained or served. Take the "
                        "model before it was quantized."
                    )
                if min((0, *shape)) < 0 or end - begin != math.prod(shape) * BYTES[entry["dtype"]] or end > size - 8 - length:
                    raise ValueError(f"{path.name} is cut off, or its header lies about {name!r}.")
                shapes[name] = shape
        except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path.name} has a damaged header ({type(error).__name__}).") from error
    return shapes


def _try(template: str) -> None:
    """Render a chat template in a separate process with limits, since it may loop or fill memory."""
    if len(template) > LARGEST_TEMPLATE:
        raise ValueError(f"its chat template has {len(template):,} characters, more than {LARGEST_TEMPLATE:,}.")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _RENDER, str(TEMPLATE_SECONDS), str(TEMPLATE_MEMORY)],
            input=template.encode("utf-8", "replace"), capture_output=True, timeout=4 * TEMPLATE_SECONDS, check=False,
        )  # fmt: skip
        ended = done.returncode == 0
    except subprocess.TimeoutExpired:
        ended = False
    if not ended:
        raise ValueError(f"its chat template does not end within {TEMPLATE_SECONDS} s and 1 GiB. Mend chat_template.jinja.")


_RENDER = """
import resource, sys
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
template = sys.stdin.buffer.read().decode()
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
def refuse(message): raise ValueError(message)
chat = [{"role": role, "content": "x"} for role in ("user", "assistant") * 3]
try:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.globals.update(raise_exception=refuse, strftime_now=lambda form: "2025")
    for length in (1, 3, 5):
        text = env.from_string(template).render(messages=chat[:length], add_generation_prompt=True)
        if len(text) > 1 << 20: sys.exit(3)
except MemoryError:
    sys.exit(3)
except Exception:
    pass
"""
"""Other failures of a template are raised by the tokenizer at the first prompt."""


def _walk(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [found for key, inner in value.items() for found in _walk(inner, str(key))]
    if isinstance(value, list):
        return [found for inner in value for found in _walk(inner, name)]
    return [(name, value)]


def _config(folder: Path) -> dict[str, Any]:
    config = _object(folder / CONFIG, LARGEST_CONFIG)
    for name, value in _walk(config):
        size = name in LAYERS or name.startswith("num_") or name.endswith(("_size", "_dim", "positions", "_heads"))
        if size and isinstance(value, int) and not 0 <= value <= (MOST_LAYERS if name in LAYERS else LARGEST_INTEGER):
            raise ValueError(f"its {CONFIG} has {name}={value}, which no model has.")
    return config


def _size(path: Path) -> int:
    if not path.is_file():  # a device, a pipe, a folder, or nothing at the end of a link
        raise ValueError(f"{path.name} is missing or is not a file.")
    return path.stat().st_size


def _bytes(path: Path, most: int) -> bytes:
    if _size(path) > most:
        raise ValueError(f"{path.name} has more than {most:,} bytes.")
    return path.read_bytes()


def _object(path: Path, most: int) -> dict[str, Any]:
    try:
        value = json.loads(_bytes(path, most))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({type(error).__name__}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object.")
    return value
