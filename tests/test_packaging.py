"""What is built installs with pip and with uv, and runs; constraints, citation and workflow agree with pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from places import ROOT

import collm

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "transformers", "peft", "tokenizers", "safetensors", "matplotlib", "tensorboard"}
UV = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def command(*words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", each)[0].lower().replace("_", "-") for each in requirements}


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert collm.__version__ == PROJECT["version"] == str(citation["version"])
    assert (ROOT / "CHANGELOG.md").read_text().splitlines()[2].split()[:2] == ["##", PROJECT["version"]]


def test_the_citation_names_the_paper_and_the_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["license"]
    assert {"message", "title", "authors", "type"} <= set(citation)
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2601.21972"
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Chen", "Amiri", "Amato"]


def test_constraints_pin_what_is_required():
    """Every extra but vllm's, once for each marker. `make constraints` adds what is missing."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [re.fullmatch(r"([a-z0-9-]+)==[\w.]+( ; .+)?", line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if not pin]
    extras = {name: each for name, each in PROJECT["optional-dependencies"].items() if name != "vllm"}
    required = names(PROJECT["dependencies"]).union(*map(names, extras.values()))
    assert required <= {pin[1] for pin in pins if pin}


def test_the_workflow_calls_what_this_repository_must_pass():
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which is built from the checkout."""
    if UV is None:
        pytest.skip("uv is not installed here: pip install uv")
    folder = tmp_path_factory.mktemp("dist")
    command(UV, "build", "--quiet", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, ROOT, cwd=folder)
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(params=["pip", "uv"])
def installed(request, wheel, tmp_path) -> Path:
    """The bin folder of an environment that has the wheel, and sees the packages of this one but no checkout."""
    home = tmp_path / "environment"
    if request.param == "pip":
        command(sys.executable, "-m", "venv", home, cwd=tmp_path)
        command(home / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    else:
        command(UV, "venv", "--quiet", "--python", sys.executable, home, cwd=tmp_path)
        command(UV, "pip", "install", "--quiet", "--no-deps", "--python", home / "bin" / "python", wheel, cwd=tmp_path)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "present.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return home / "bin"


@pytest.mark.slow
def test_the_wheel_runs_the_demonstration(installed, tmp_path):
    where = command(installed / "python", "-c", "import collm; print(collm.__file__)", cwd=tmp_path).stdout
    assert Path(where).is_relative_to(installed.parent)

    shown = command(installed / "collm", "--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    imported = {line.split("|")[-1].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert "collm" in imported
    assert imported & HEAVY == set()

    settings = ["--run.iterations", "2", "--rollout.tasks", "8", "--evaluation.every", "0"]
    command(installed / "collm", "train", *settings, cwd=tmp_path)
    assert len((tmp_path / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "runs" / "demo" / "final" / "builder_1" / "model.safetensors").is_file()


CONSUMER = """
import random

import collm
from collm.envs.base import Outcome, TextEnv


class Same(TextEnv):
    def __init__(self, split: str = "train") -> None:
        super().__init__(["left", "right"], turns=1)

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        return dict.fromkeys(self.agents, "Name a colour.")

    def play(self, answers: dict[str, str]) -> Outcome:
        return Outcome(float(len(set(answers.values())) == 1), {}, {})


def last(path: str) -> float:
    return float(collm.open_run(path).metrics[-1]["reward/raw"])


def train(seed: int) -> None:
    config: collm.Config = collm.load_config(None, {"run.seed": seed})
    collm.Trainer(config, quiet=True).run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["uv"], indirect=True)
def test_a_strict_consumer_sees_the_types(installed, tmp_path):
    """torch and what stands on it are not followed, which would take minutes; collm's own types are."""
    (tmp_path / "right.py").write_text(CONSUMER)
    wrong = CONSUMER.replace("open_run(path)", "open_run(3)").replace('"run.seed": seed}', '"run.seed": seed}, 1')
    (tmp_path / "wrong.py").write_text(wrong)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n[mypy-torch.*,transformers.*,peft.*,numpy.*]\nfollow_imports = skip\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", str(installed / "python"), "right.py", "wrong.py"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    found = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [re.sub(r":.*\[", " [", line) for line in found] == ["wrong.py [arg-type]", "wrong.py [call-arg]"], done.stdout


def interpreter(version: str) -> str | None:
    """A Python of this version that starts: on the path, or one of pyenv's."""
    candidates = [shutil.which(f"python{version}"), *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    for path in filter(None, candidates):
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return None


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_commands_without_models_run_on_other_pythons(version, wheel, tmp_path):
    """Every file compiles, and what needs no torch runs with the few packages that it needs."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    home = tmp_path / "environment"
    command(UV, "venv", "--quiet", "--python", python, home, cwd=tmp_path)
    install = (UV, "pip", "install", "--quiet", "--python", home / "bin" / "python")
    try:
        light = sorted(names(PROJECT["dependencies"]) - HEAVY)
        command(*install, "--constraint", ROOT / "constraints.txt", *light, cwd=tmp_path)
    except AssertionError as error:
        if "error sending request" in str(error) or "dns" in str(error).lower():
            pytest.skip("the package index cannot be reached")
        raise
    command(*install, "--no-deps", wheel, cwd=tmp_path)
    (packages,) = home.glob("lib/python*/site-packages/collm")
    command(home / "bin" / "python", "-m", "compileall", "-q", packages, cwd=tmp_path)
    assert "train" in command(home / "bin" / "collm", "--help", cwd=tmp_path).stdout
    command(home / "bin" / "collm", "train", "--settings", cwd=tmp_path)
    assert "joint reward" in command(home / "bin" / "collm", "check", "agree", cwd=tmp_path).stdout
