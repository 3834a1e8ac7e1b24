"""benchmarks/gpu.py: its models' sizes, forced answers, what counts as too little memory; and one whole run on the CPU."""

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

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    """The benchmark as a module; it imports its neighbour as a script does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("gpu")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, FOLDER / "gpu.py", *arguments]
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("name", "parameters"), [("0.6B", 596_049_920), ("1.7B", 1_720_574_976), ("4B", 4_022_468_096)])
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


def test_a_lack_of_memory_is_known_by_the_error_or_by_its_cause(gpu):
    def raised(error: Exception, cause: Exception | None = None) -> Exception:
        error.__cause__ = cause
        return error

    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert gpu.short_of_memory(full)
    assert gpu.short_of_memory(raised(RuntimeError("the engine did not start"), full))
    assert gpu.short_of_memory(MemoryError())
    assert not gpu.short_of_memory(raised(RuntimeError("shapes differ"), ValueError("a bad setting")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_it_says_so_and_stops(tmp_path):
    done = run("--out", tmp_path / "out")
    assert done.returncode == 0
    assert done.stdout.startswith("no GPU: ")
    assert len(done.stdout.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_run_on_the_cpu_measures_and_is_not_repeated(tmp_path):
    options = ["--device", "cpu", "--models", "tiny", "--answer-tokens", 6, "--episodes", 3, "--iterations", 2, "--json"]
    options += ["--out", tmp_path / "out", "--work", tmp_path / "work"]
    late = run(*options, "--limit-seconds", 0)
    assert json.loads(late.stdout) == {"results": [], "left": ["cpu-tiny-whole-collm-local-bfloat16"]}

    first = run(*options)
    assert first.returncode == 0, first.stderr
    (row,) = json.loads(first.stdout)["results"]
    assert row["outcome"] == "measured"
    assert row["joint_actions"] == 3 * 2
    assert row["prompt_tokens"] == 67
    assert row["generated_tokens_per_second"] == pytest.approx(row["joint_actions_per_second"] * 2 * 6)
    phases = row["seconds_by_phase"]
    assert sum(phases.values()) == pytest.approx(row["seconds"])
    assert all(phases[phase] > 0 for phase in ("collect", "values", "critic", "agents"))
    assert row["peak_memory_gib"] > 0.1

    again = run(*options, "--limit-seconds", 0)
    assert json.loads(again.stdout) == {"results": [row], "left": []}
    others = run(*options, "--limit-seconds", 0, "--answer-tokens", 7)
    assert json.loads(others.stdout)["left"], "a result of other settings does not stand for this one"


def test_what_failed_is_measured_again_and_what_ran_out_of_memory_is_not(gpu, tmp_path):
    cell = gpu.Cell("tiny", "whole", "collm-local", "cpu", "bfloat16", 128, 64, 2, 4096)
    path = tmp_path / f"{cell.name}.json"
    for outcome, left in (("failed", [cell.name]), ("out of memory", [])):
        path.write_text(json.dumps({"outcome": outcome, "reason": "as written here", "cell": gpu.asdict(cell)}))
        done = run("--device", "cpu", "--models", "tiny", "--out", tmp_path, "--limit-seconds", 0, "--json")
        assert json.loads(done.stdout)["left"] == left
        assert done.returncode == (outcome == "failed")
