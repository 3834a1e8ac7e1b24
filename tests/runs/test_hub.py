"""`collm export --push`: what is uploaded, from where it loads again, and what is refused.

No hub is reached: `LocalHub` stands in for huggingface_hub.HfApi and writes to a folder in the layout of the hub's cache, from
which another process loads the agent offline.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from places import ROOT
from safetensors.torch import load_file

from collm.cli.main import main
from collm.errors import RunError
from collm.models.policy import Policy
from collm.models.sources import TINY
from collm.models.team import Team
from collm.planning.memory import plan
from collm.reports.card import _public, card_of
from collm.runs.hub import push as upload
from collm.settings.load import load_config
from collm.settings.rooms import LoraSettings

COMMIT = "0" * 40


class LocalHub:
    """The two methods of huggingface_hub.HfApi that an upload calls."""

    cache: Path
    failure: Exception | None = None

    def __init__(self, **about: str):
        self.private: bool | None = None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> huggingface_hub.RepoUrl:
        if self.failure:
            raise self.failure
        assert private
        assert exist_ok
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        repo = self.cache / f"models--{repo_id.replace('/', '--')}"
        snapshot = repo / "snapshots" / COMMIT
        for folder in (snapshot, repo / "blobs", repo / "refs"):
            folder.mkdir(parents=True)
        (repo / "refs" / "main").write_text(COMMIT)
        for path in folder_path.iterdir():
            content = path.read_bytes()
            blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 iterations on `agree` whose agents are adapters on the tiny model."""
    folder = tmp_path_factory.mktemp("runs")
    with tarfile.open(Path(__file__).with_name("runs-of-before.tar.xz")) as packed:
        packed.extractall(folder, filter="data")
    return folder / "whole"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[LocalHub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", LocalHub)
    monkeypatch.setattr(LocalHub, "cache", tmp_path / "cache", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    return LocalHub


def push(run: Path, target: Path, *words: str, repo: str = "me/first") -> int:
    return main(["export", str(run), str(target), "--agent", "agent_0", "--push", repo, *words])


def test_a_pushed_agent_loads_from_the_hub(
    run: Path, hub: type[LocalHub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(run, tmp_path / "out", "--merged", "--json") == 0
    assert json.loads(capsys.readouterr().out)["address"] == "https://huggingface.co/me/first"
    uploaded = {path.name: path.read_bytes() for path in (hub.cache / "models--me--first" / "snapshots" / COMMIT).iterdir()}
    assert uploaded == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    places = [str(place).encode() for place in (run.parent, tmp_path, Path.home() / ".", Path(__file__).parents[2])]
    for name, content in uploaded.items():
        assert not any(place in content for place in places if len(place) > 1), name
        assert Path(name).suffix in (".json", ".safetensors", ".jinja", ".md"), "weights and tokenizer alone"

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[run]\nthreads = 1\n[env]\nname = "agree"\nwording = "terse"\n[rollout]\nmax_tokens = 4\n'
        '[team]\nmodel = "me/first"\nmodels = { agent_1 = "tiny" }\n'
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub.cache)}
    words = [sys.executable, "-m", "collm.cli.main", "evaluate", str(recipe), "--episodes", "1", "--json"]
    done = subprocess.run(words, env=offline, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["episodes"] == 1


@pytest.fixture
def based(hub: type[LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The exported folder of an adapter whose base is owner/base of the hub, and which was pushed to me/first."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    LocalHub().upload_folder(repo_id="owner/base", folder_path=TINY, commit_message="a whole model")
    adapter = Policy.from_pretrained("owner/base", lora=LoraSettings(rank=2))
    with torch.no_grad():
        for weight in adapter.trained.parameters():
            weight += 0.01
    adapter.save(tmp_path / "trained")
    assert push(tmp_path / "trained", tmp_path / "first") == 0
    return tmp_path / "first"


def test_a_pushed_adapter_is_loaded_on_its_base(based: Path) -> None:
    team = Team.from_pretrained({"a": "me/first", "b": "owner/base"}, lora=LoraSettings(rank=4))
    a, b = team.policies.values()
    assert a.model is b.model
    assert a.source == "owner/base"
    assert a.adapter is not None
    saved = load_file(based / "adapter_model.safetensors")
    assert all(weight.equal(saved[name]) for name, weight in a.adapter.tensors().items())
    assert _public("me/first") == "me/first"


def test_a_team_with_a_pushed_adapter_is_planned_and_evaluated(based: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "recipes" / "tiny" / "agree.toml"

    def peak(**models: str) -> int:
        return plan(load_config(recipe, {"team.model": "owner/base", "team.models": models})).peak

    assert peak(agent_1="me/first") == peak(agent_1=str(based)) < peak()
    team = ["--team.model", "owner/base", "--team.models.agent_1", "me/first"]
    assert main(["evaluate", str(recipe), "--episodes", "1", "--json", *team]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 1


class Repository(BaseHTTPRequestHandler):
    """The files of one repository, me/first, as the hub answers for them."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        known = parts[:2] == ["me", "first"] and self.files.get(parts[-1])
        if not known:
            self.reply(404, b"", "EntryNotFound" if parts[:2] == ["me", "first"] else "RepoNotFound")
        else:
            self.reply(200, known)

    do_GET = do_HEAD

    def reply(self, status: int, body: bytes, error: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, "ETag": hashlib.sha256(body).hexdigest()}
        for name, value in (headers | ({"X-Error-Code": error} if error else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


FETCH = """
from pathlib import Path

from collm.models.sources import adapter_folder, fetch_adapter

for name in ("me/first", "me/second", "tiny"):
    fetch_adapter(name)
    print(name, sorted(path.name for path in (adapter_folder(name) or Path("none")).glob("*")))
"""


def test_an_adapter_is_downloaded_and_another_name_is_left_alone(tmp_path: Path) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "training.bin": b"a pickle"}
    handler = type("Served", (Repository,), {"files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        online = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", FETCH], env=online, capture_output=True, text=True, timeout=600)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "me/first ['adapter_config.json', 'adapter_model.safetensors']",
        "me/second []",
        "tiny []",
    ]


def test_a_card_has_task_algorithm_seed_results_and_how_to_serve(run: Path, tmp_path: Path) -> None:
    words = ["export", str(run), str(tmp_path / "out"), "--agent", "agent_1"]
    assert main(words) == 0
    _, header, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(header)
    assert found["library_name"] == "peft"
    assert "base_model" not in found  # "tiny" is not a model of a hub
    assert found["tags"][-1] == "collm-cc"
    (result,) = found["model-index"][0]["results"]
    assert (result["dataset"]["type"], result["metrics"][0]["type"]) == ("agree", "reward")
    for line in ("| task | `agree` |", "| algorithm | `collm-cc` |", "| seed | ", "| team | `agent_0`, `agent_1` |"):
        assert line in text
    assert "| iterations | 4 of 4 |" in text
    assert "| measure | before training | these weights |" in text
    assert "collm serve FOLDER --agent agent_1 --port 8000" in text
    (tmp_path / "out" / "README.md").write_text("my own words\n")
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "again"), "--agent", "agent_1"]) == 0
    assert (tmp_path / "again" / "README.md").read_text() == "my own words\n"


def test_a_run_that_was_extended_and_has_not_ended_has_no_number_of_iterations(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    settings = json.loads((copy / "config.json").read_text())
    settings["run"]["iterations"] = 8
    (copy / "config.json").write_text(json.dumps(settings))
    text = card_of(copy, "agent_0", "final")
    assert "| iterations |" not in text
    assert "no held-out evaluation of these weights" in text


def test_a_base_is_named_if_it_came_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--name"
    for folder in (repo / "refs", repo / "snapshots" / COMMIT):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "snapshots" / COMMIT / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert [_public(model) for model in ("owner/name", "build/smollm2", "tiny", "a/..")] == ["owner/name", "", "", ""]


def test_intervals_are_over_the_tasks_of_that_evaluation(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    path = copy / "episodes" / "000004-evaluation.jsonl"
    episode = json.loads(path.read_text().splitlines()[0])
    told = [{**episode, "task": i, "label": f"task {i}", "score": i % 2, "metrics": {"a|b": 1.0}} for i in range(8)]
    path.write_text("".join(json.dumps(one) + "\n" for one in told))
    text = card_of(copy, "agent_0", "final")
    assert re.search(r"\| reward \| 1.000 \| 0.500 \[0\.\d{3}, 0\.\d{3}\] \|", text)
    assert r"| a\|b |  | 1.000 [1.000, 1.000] |" in text
    assert "over 8 held-out tasks" in text
    path.unlink()
    assert "no held-out evaluation of these weights" in card_of(copy, "agent_0", "final")


class Response:
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None

    def __init__(self, status: int):
        self.status_code = status


def answered(status: int) -> Exception:
    error = OSError("no")
    error.response = Response(status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (answered(401), "does not accept the token"),
        (answered(403), "exists and is not yours"),
        (answered(500), "the hub answered 500: no"),
        (ConnectionError("Name or service not known"), "the hub cannot be reached (Name or service not known)"),
    ],
)
def test_a_failed_upload_is_one_sentence_and_keeps_the_folder(
    run: Path, hub: type[LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    failure: Exception, reason: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(LocalHub, "failure", failure)
    with pytest.raises(RunError) as caught:
        upload(tmp_path / "out", "me/first")
    assert str(caught.value).startswith("--push 'me/first' failed: ")
    assert reason in str(caught.value)
    assert f"hf upload me/first {tmp_path / 'out'} --private" in str(caught.value)


def test_what_cannot_be_pushed_is_refused_before_anything_is_written(
    run: Path, hub: type[LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert push(run, target, repo="a/b/c") == 2
    assert "'a/b/c' is not the name of a repository" in capsys.readouterr().err
    assert push(run, target) == 2  # its base is a folder of this machine
    assert "--merged" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert push(run, target, "--merged") == 2
    assert "`hf auth login`" in capsys.readouterr().err
    assert not target.exists()
    assert not hub.cache.exists()
