"""What comes from strangers, model folders, run folders and requests, gets one sentence: nothing is run, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from collm.errors import CollmError
from collm.models import tiny
from collm.models.policy import Policy
from collm.types import Message

# --- model folders ---------------------------------------------------------------------------------------------------------

WEIGHTS = "model.safetensors"
SENTINEL = "sentinel-of-trust"


def config(**changes: Any) -> Callable[[Path], None]:
    return edit("config.json", **changes)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(values | changes))

    return change


def tensors(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        found = change({name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()})
        (folder / WEIGHTS).unlink()
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return write


def one_nan(found: dict) -> dict:
    found[sorted(found)[0]].view(-1)[7] = float("nan")
    return found


def put(name: str, data: bytes | str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return write


def link(name: str, target: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return write


def pickled(folder: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {folder.parent / SENTINEL}",)

    (folder / WEIGHTS).unlink()
    torch.save({"model": Bomb()}, folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    put(WEIGHTS, data[: len(data) // 2])(folder)


def elsewhere(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder.parent / "x.safetensors")
    (folder / WEIGHTS).unlink()
    put("model.safetensors.index.json", json.dumps({"weight_map": {"a": "../x.safetensors"}}))(folder)


def remote_code(folder: Path) -> None:
    config(
        model_type="evil", architectures=["Evil"], auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    )(folder)
    put("evil.py", f"open({str(folder.parent / SENTINEL)!r}, 'w')\n")(folder)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BAD_MODELS: list[tuple[str, Callable[[Path], None], str]] = [
    ("NaN weights", tensors(one_nan), "not finite"),
    ("whole numbers as weights", tensors(lambda t: {n: x.to(torch.int8) for n, x in t.items()}), "I8"),
    ("a tensor missing", tensors(lambda t: dict(list(t.items())[:-1])), "weights, but its files hold"),
    ("one layer's tensors under other names",
     tensors(lambda t: {n.replace("layers.0", "layers.9"): x for n, x in t.items()}),
     "lack"),
    ("weights pickled", pickled, "could run code"),
    ("weights cut off", cut, "cut off"),
    ("weights empty", put(WEIGHTS, b""), "cut off"),
    ("header that claims 2^60 bytes", put(WEIGHTS, struct.pack("<Q", 1 << 60) + b"{}"), "cut off"),
    ("header that lies",
     put(WEIGHTS, struct.pack("<Q", 66) + b'{"a.weight":{"dtype":"F32","shape":[9,9],"data_offsets":[0,4]}}   ' + b"1234"),
     "lies"),
    ("weights without end", link(WEIGHTS, "/dev/zero"), "is not a file"),
    ("an index that leads out of the folder", elsewhere, "not a safetensors file of this folder"),
    ("code beside the weights", remote_code, ""),
    ("config without end", link("config.json", "/dev/zero"), "is not a file"),
    ("config of another shape", put("config.json", "[1]"), "not a JSON object"),
    ("config nested without measure", put("config.json", "[" * 200_000), "not JSON"),
    ("vocabulary of terabytes", config(vocab_size=1 << 30, hidden_size=1 << 20), "describes"),
    ("a billion layers", config(num_hidden_layers=1 << 30), "no model has"),
    ("negative sizes", config(hidden_size=-64), "hidden_size=-64"),
    ("text for a number", config(hidden_size="big"), ""),
    ("unknown kind of model", config(model_type="nonsense"), "nonsense"),
    ("a smaller vocabulary than the tokenizer's", config(vocab_size=4), ""),
    ("tokenizer cut off", put("tokenizer.json", '{"version": '), "not JSON"),
    ("tokenizer of nonsense", put("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": 5}}'), ""),
    ("tokenizer missing",
     lambda f: [(f / n).unlink(missing_ok=True) for n in ("tokenizer.json", "tokenizer_config.json")],
     "no tokenizer"),
    ("template that loops", put("chat_template.jinja", LOOP), "does not end"),
    ("template that fills memory", put("chat_template.jinja", "{{ 'a' * 10**10 }}"), "does not end"),
    ("template of a megabyte", put("chat_template.jinja", "a" * (1 << 20)), "bytes"),
    ("template that fails", put("chat_template.jinja", "{{ 1 / 0 }}"), "chat template"),
    ("template that reaches for Python",
     put("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
     "chat template"),
    ("end mark beyond the vocabulary", put("generation_config.json", '{"eos_token_id": 99999999}'), "beyond"),
    ("end mark of text", put("generation_config.json", '{"eos_token_id": "x"}'), ""),
    ("an adapter whose base is nowhere",
     put("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "../nowhere"}'),
     "nowhere"),
    ("an adapter without a base", put("adapter_config.json", '{"auto_mapping": {"base_model_class": "os"}}'), "base"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model, its small files copied and its weights linked."""
    return Path(shutil.copytree(tiny.folder(), tmp_path / "model"))


def everything(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(("what", "spoil", "reason"), BAD_MODELS, ids=[row[0] for row in BAD_MODELS])
def test_a_bad_model_folder_is_one_sentence(folder, what, spoil, reason):
    spoil(folder)
    before = everything(folder.parent)
    with pytest.raises(CollmError, match=r"[.']$") as caught:
        load(folder)
    assert reason in str(caught.value)
    assert str(folder) in str(caught.value) or "adapter" in what
    assert "\n" not in str(caught.value)
    assert everything(folder.parent) == before


def load(folder: Path) -> Any:
    """A policy and its first prompt."""
    return Policy.from_pretrained(str(folder)).chat.encode((Message("user", "Name a colour."),))


def test_a_sound_copy_loads(folder):
    assert len(load(folder)) > 5
