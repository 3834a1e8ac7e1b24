"""benchmarks/smollm2.py: what it mends in a tokenizer, and that a damaged download is refused; the made folder loads."""

from __future__ import annotations

import shutil
from importlib import import_module
from types import ModuleType

import pytest
from places import ROOT
from transformers import AutoTokenizer

from collm import tiny

MADE = ROOT / "build" / "smollm2"


@pytest.fixture
def smollm2(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("smollm2")


def test_numbers_are_cut_into_digits_once(smollm2, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder(), folder)
    smollm2.mend_tokenizer(folder)
    once = (folder / "tokenizer.json").read_bytes()
    smollm2.mend_tokenizer(folder)
    assert (folder / "tokenizer.json").read_bytes() == once
    cut = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer.pre_tokenize_str("2026")
    assert len(cut) == 4


def test_a_damaged_download_is_refused(smollm2, tmp_path):
    path = tmp_path / smollm2.GGUF
    path.write_bytes(b"GGUF")
    with pytest.raises(SystemExit, match=r"has sha256 \w{64}, not b179c952"):
        smollm2.convert(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.skipif(not MADE.exists(), reason="build/smollm2 is not there: make smollm2")
def test_the_folder_says_which_weights_it_holds_and_loads():
    assert (MADE / "origin.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(MADE)
    assert tokenizer.tokenize("2026") == list("2026")
    assert tokenizer.chat_template
