"""What comes from strangers, model folders, run folders and requests, gets one sentence: nothing is run, nothing written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from collm import tiny
from collm.cli.main import main
from collm.errors import CollmError
from collm.models.policy import Policy
from collm.reports.screen import Screen
from collm.serving import server as serving
from collm.settings.load import parse_config
from collm.training.trainer import Trainer
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


# --- run folders, recipes and names ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of two agents, one iteration."""
    config = parse_config(
        {
            "run": {"name": "run", "folder": str(tmp_path_factory.mktemp("runs")), "iterations": 1, "threads": 1,
                    "trackers": []},
            "env": {"name": "agree", "turns": 1},
            "rollout": {"tasks": 1, "max_tokens": 2},
            "evaluation": {"every": 0, "episodes": 1},
        }
    )  # fmt: skip
    return Trainer(config, quiet=True).run()


PLAYS: dict[str, Callable[[Path], list[str]]] = {
    "evaluate": lambda run: ["evaluate", str(run)],
    "blame": lambda run: ["blame", str(run)],
    "play": lambda run: ["play", str(run), "--agent", "agent_0=http://127.0.0.1:9/v1"],
    "resume": lambda run: ["train", "--resume", str(run)],
}
TAKES: dict[str, Callable[[Path], list[str]]] = {
    "serve": lambda run: ["serve", str(run), "--port", "0", "--agent", "nobody"],
    "export": lambda run: ["export", str(run), str(run.parent / "exported"), "--agent", "nobody"],
}
OTHERS: dict[str, Callable[[Path], list[str]]] = {
    "report": lambda run: ["report", str(run)],
    "plan": lambda run: ["plan", str(run)],
    "train": lambda run: ["train", str(run / "config.json")],
    "compare": lambda run: ["compare", str(run / "config.json")],
}
CODE = ["os:system", "evil:Env", "subprocess:Popen", "builtins:exec", "importlib:import_module"]
CONFIGS: list[tuple[str, str]] = [
    ("", "cannot be read"), ("{", "cannot be read"), ("[]", "cannot be read"), ("null", "cannot be read"),
    ("[" * 100_000, "cannot be read"), ('{"env": "os:system"}', "cannot be read"), ("\x00\x1b[2J", "cannot be read"),
]  # fmt: skip
HOSTILE: list[tuple[str, str, str, str]] = [
    *((command, "env", name, "name it again") for command in PLAYS for name in CODE),
    *((command, "key", "COLLM_SECRET", "name the variable again") for command in PLAYS),
    *((command, "env", name, "no agent 'nobody'") for command in TAKES for name in CODE[:2]),
    *((command, "text", text, reason) for command in ("evaluate", "serve") for text, reason in CONFIGS),
    *((command, "env", "os:system", "") for command in ("plan", "train", "compare")),
    ("serve", "agent", "../../x", "no agent"), ("export", "agent", "\x1b]0;x\x07", "no agent"),
]  # fmt: skip


def test_there_are_forty():
    assert len(HOSTILE) >= 40
    assert len(BAD_MODELS) >= 23


@pytest.mark.parametrize(("command", "kind", "value", "reason"), HOSTILE, ids=[f"{r[0]}-{n}" for n, r in enumerate(HOSTILE)])
def test_a_hostile_run_folder_is_one_sentence(trained, tmp_path, monkeypatch, capsys, command, kind, value, reason):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    sentinel = tmp_path / SENTINEL
    (tmp_path / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLLM_SECRET", "hunter2")
    values = json.loads((run / "config.json").read_text())
    if kind == "env":
        values["env"] = {"name": value, "command": f"touch {sentinel}", "args": f"touch {sentinel}"}
    if kind == "key":
        values["team"] |= {"models": {"agent_1": "http://127.0.0.1:9/v1"}, "api_key_env": value}
    (run / "config.json").write_text(value if kind == "text" else json.dumps(values))
    words = {**PLAYS, **TAKES, **OTHERS}[command](run)
    if kind == "agent":
        words[words.index("--agent") + 1] = value
    before = everything(tmp_path)
    code = main(words)
    out, err = capsys.readouterr()
    assert code in (1, 2)
    assert reason in err
    assert err.startswith("collm: ")
    assert "Traceback" not in err + out
    assert "\x1b" not in err + out
    assert [place for place in everything(tmp_path) if "__pycache__" not in place] == before
    assert "evil" not in sys.modules


def test_an_environment_that_is_named_again_is_played(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    values = json.loads((run / "config.json").read_text())
    values["env"]["name"] = "collm.envs.agree:Agree"
    (run / "config.json").write_text(json.dumps(values))
    assert main(["evaluate", str(run)]) == 2
    assert main(["evaluate", str(run), "--env.name", "collm.envs.agree:Agree", "--episodes", "1", "--json"]) == 0
    assert main(["train", "--resume", str(run), "--env.name", "collm.envs.agree:Agree", "--json"]) == 0
    capsys.readouterr()
    target = tmp_path / "exported"
    assert main(["export", str(run), str(target), "--agent", "agent_1"]) == 0  # needs no environment
    assert (target / WEIGHTS).is_file()


def test_tables_show_what_others_wrote(capsys):
    Screen(width=80).print("[red]\x1b[2J\x9bx[/red] :smile: \u202e")
    assert capsys.readouterr().out == "[red]?[2J?x[/red] :smile: ?\n"


# --- connections and hosts ---------------------------------------------------------------------------------------------------


HOSTS = [
    ("127.0.0.1:8000", 200), ("localhost", 200), ("LOCALHOST:1", 200), ("[::1]:8000", 200), ("127.9.9.9", 200),
    ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example:8000", 403), ("", 403),
    ("localhost@evil.example", 403), ("10.0.0.1:8000", 403),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny) -> int:
    """A server in a thread of this process; its port."""
    held = serving.listen("127.0.0.1", 0)
    ready = threading.Event()
    app = serving.make_app(tiny, "agent_0", local=True)
    threading.Thread(target=serving.run, args=(app, held, ready.set), daemon=True).start()
    assert ready.wait(10)
    return held.getsockname()[1]


@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_without_a_key_only_names_of_this_machine_are_answered(server, host, status):
    response = httpx.get(f"http://127.0.0.1:{server}/health", headers={"host": host})
    assert response.status_code == status
    assert status == 200 or "127.0.0.1, localhost and [::1]" in response.json()["error"]["message"]


def test_two_thousand_half_open_connections_block_nobody(server, monkeypatch):
    """Each sent part of a head; health and an honest request are answered at once, and all are closed in the end."""
    monkeypatch.setattr(serving, "HEAD_SECONDS", 3.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 5000:
        pytest.skip(f"2,000 connections need 5,000 open files, and this machine allows {hard}")
    if 0 <= soft < 5000:
        resource.setrlimit(resource.RLIMIT_NOFILE, (5000, hard))
    sockets = []
    for number in range(2000):
        sockets.append(socket.create_connection(("127.0.0.1", server), timeout=10))
        if number % 2:
            sockets[-1].sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx-y: ")
    url, waits = f"http://127.0.0.1:{server}", []
    for _ in range(5):
        started = time.monotonic()
        assert httpx.get(f"{url}/health", timeout=10).status_code == 200
        waits.append(time.monotonic() - started)
    body = {"model": "agent_0", "messages": [{"role": "user", "content": "Name one colour."}], "max_tokens": 4}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20).status_code == 200
    print("health beside 2,000 half-open connections, seconds:", [round(wait, 3) for wait in waits])
    assert max(waits) < 2
    until = time.monotonic() + 20
    while serving.Guarded.waiting and time.monotonic() < until:
        time.sleep(0.1)
    assert not serving.Guarded.waiting
    for one in sockets:
        one.close()


@pytest.mark.parametrize("command", ["train", "plan", "evaluate", "play", "check", "compare"])
@pytest.mark.parametrize("name", ["os:system", "subprocess:run", "builtins:print", "shutil:rmtree", "os:remove"])
def test_a_recipe_that_names_no_environment_calls_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    sentinel, recipe = tmp_path / "sentinel", tmp_path / "recipe.toml"
    sentinel.write_text("here")
    option = {"os:system": f'command = "touch {tmp_path}/made"', "os:remove": f'path = "{sentinel}"'}.get(name, "")
    env = f'name = "{name}"\n{option}\n'
    text = f"[env]\n{env}[run]\nfolder = '{tmp_path}'\n"
    if command == "compare":
        text = f"[compare]\nmethods = ['magrpo']\nseeds = [0]\n[tasks.a.env]\n{env}"
    recipe.write_text(text)
    words = [command, name if command == "check" else str(recipe)]
    words += ["--agent", "a=http://127.0.0.1:9/v1"] if command == "play" else []
    words += ["--folder", str(tmp_path / "grid")] if command == "compare" else []
    assert main(words) in (1, 2)
    said = capsys.readouterr().err
    assert "ParallelEnv" in said or "failed" in said
    assert "Traceback" not in said
    assert sentinel.read_text() == "here"
    assert not (tmp_path / "made").exists()
