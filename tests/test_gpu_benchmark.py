"""benchmarks/gpu.py and real.py: models' sizes, forced answers, what is listed without a GPU; and one whole run on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from collm.envs.quote import Quote

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    """The benchmark as a module; it imports its neighbours as a script does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("gpu")


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, FOLDER / script, *arguments]
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("name", "parameters"), [("0.6B", 596_049_920), ("1.7B", 1_720_574_976)])
def test_models_have_as_many_parameters_as_the_published_ones(gpu, name, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(gpu.shape(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("tied", [True, False])
def test_no_token_but_the_named_ones_can_be_sampled(gpu, tied):
    shape = gpu.shape("0.6B")
    shape.update(
        {"num_hidden_layers": 2, "layer_types": shape.layer_types[:2], "vocab_size": 1000, "tie_word_embeddings": tied}
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    gpu.only_write(model, [36, 37, 40])
    with torch.no_grad():
        probs = model.float()(torch.arange(1000)[None]).logits.softmax(-1)[0]
    others = torch.ones(1000, dtype=torch.bool)
    others[[36, 37, 40]] = False
    assert probs[:, others].max() == 0
    assert probs[:, ~others].min() > 0.2


def test_both_sides_are_rewarded_by_the_environment(gpu):
    """`play`, which the reference's process calls, is the reward of quote: the fraction of content words written."""
    quote = Quote()
    content = [word for word in quote.texts[3].split() if len(word) > 5][:4]
    rewards = [gpu.real.play(quote, 3, (" ".join(content[:n]), "nothing")) for n in range(5)]
    assert rewards == sorted(set(rewards))
    assert rewards[0] == 0
    assert gpu.real.play(quote, 4, (" ".join(content), "nothing")) == 0, "another task has other words"


@pytest.mark.parametrize("arguments", [["--device", "cpu", "--dry-run"], [], ["--dry-run"]])
def test_without_a_gpu_it_lists_what_it_would_do_and_stops(tmp_path, arguments):
    if torch.cuda.is_available() and not arguments:
        pytest.skip("is about a machine without a GPU")
    done = run("gpu.py", "no/model", "--out", tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no GPU: ") == ("cpu" not in arguments)
    listed = [line.split()[1] for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert listed[:3] == ["tests", "gap-adapters-float32", "gap-whole-float32"]
    assert {"learn", "speed-SmolLM2", "speed-0.6B", "speed-1.7B"} < set(listed)
    assert "no/model (missing)" in done.stdout
    shown = (FOLDER.parent / "docs" / "gpu.md").read_text()
    cells = [line.partition("no/model")[0].rstrip() for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert all(cell in shown for cell in cells), "docs/gpu.md shows this list"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_on_the_cpu_measures_and_is_not_repeated(tmp_path):
    out = tmp_path / "out"
    options = ["tiny", "--device", "cpu", "--small", "--out", out, "--work", tmp_path / "work", "--only", "speed-0.6B"]
    late = run("gpu.py", *options, "--limit-seconds", 0)
    assert json.loads((out / "speed-0.6B.json").read_text())["outcome"] == "left out"
    assert late.returncode == 0, late.stderr

    first = run("gpu.py", *options, "gap-adapters-float32")
    assert first.returncode == 0, first.stdout
    gap = json.loads((out / "gap-adapters-float32.json").read_text())
    for when in ("before_update", "after_update"):
        assert set(gap[when]) == {"first", "second"}
        assert all(found["mean"] < 1e-4 < found["tokens"] for found in gap[when].values())
    sides = json.loads((out / "speed-0.6B.json").read_text())["sides"]
    assert set(sides) == {"collm", "floor"}
    for side in sides.values():
        assert side["joint_actions"] == 2 * 2 * 8
        assert side["tokens_per_second"] == pytest.approx(side["joint_actions_per_second"] * 2 * 64)
        assert side["peak_memory_gib"] > 0.1
    assert sides["collm"]["planned_memory_gib"] > 0.01
    assert max(sides["collm"]["curve"]) > 0, "the models write words of the texts"

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run("gpu.py", *options, "gap-adapters-float32").returncode == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_what_failed_or_was_left_out_is_measured_again(gpu, tmp_path):
    options = ["tiny", "--device", "cpu", "--small", "--out", tmp_path, "--only", "tests", "--limit-seconds", 0]
    for outcome, after in (("failed", "left out"), ("left out", "left out"), ("measured", "measured")):
        (tmp_path / "tests.json").write_text(json.dumps({"outcome": outcome}))
        run("gpu.py", *options)
        assert json.loads((tmp_path / "tests.json").read_text())["outcome"] == after
