"""The one writer: whole or not at all, the umask's permissions, no trace of a failure, nothing through a link."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from collm.cli.main import main
from collm.errors import CollmError, RunError, SaveError
from collm.runs import directory, files
from collm.runs.checkpoint import failing_as_os_errors
from collm.runs.open import open_run
from collm.runs.read import read_metrics
from collm.settings.load import parse_config
from collm.types import encodable


def config(folder: Path) -> Any:
    return parse_config({"env": {"name": "agree"}, "run": {"folder": str(folder), "name": "run"}})


def test_lines_are_added_never_through_a_link_and_without_waiting(tmp_path: Path) -> None:
    files.append(tmp_path / "a", "one\n")
    files.append(tmp_path / "a", "two \ud83d\n")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "one\ntwo \ufffd\n"
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(SaveError, match="it is a symbolic link; name the file itself"):
        files.append(tmp_path / "link", "three\n")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SaveError, match="cannot write"):
        files.append(tmp_path / "pipe", "x")
    for place in (tmp_path / "a" / "below", tmp_path / ("x" * 300), tmp_path):
        with pytest.raises(SaveError, match="choose another name or folder"):
            files.append(place, "x")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_and_folders_have_the_permissions_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "a.json", "{}")
        with files.replacing(tmp_path / "folder") as aside:
            aside.mkdir()
            handle = os.open(aside / "weights", os.O_CREAT | os.O_WRONLY, 0o600)  # as some libraries do
            os.close(handle)
    finally:
        os.umask(before)
    for path in (tmp_path / "a.json", tmp_path / "folder" / "weights"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_a_failure_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_text(path, "old")

    def fail(error: Exception) -> None:
        with files.replacing(path) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(SaveError, match=r"cannot write .*a\.json: No space left .*make room"):
        fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("number", "way_out"),
    [(errno.ENOSPC, "make room"), (errno.EACCES, "permissions"), (errno.EROFS, "permissions"), (errno.ENAMETOOLONG, "name")],
)
def test_the_reason_decides_the_way_out(tmp_path: Path, number: int, way_out: str) -> None:
    with pytest.raises(SaveError, match=way_out), files.explained(tmp_path):
        raise OSError(number, os.strerror(number))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_tokenizer_on_a_full_disk_fails_as_an_os_error(tiny: Any) -> None:
    """The tokenizers library raises a bare Exception."""
    with pytest.raises(OSError, match="No space left") as caught, failing_as_os_errors():
        tiny.tokenizer.backend_tokenizer.save("/dev/full")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(ZeroDivisionError), failing_as_os_errors():
        _ = 1 / 0


def test_leftovers_are_swept_in_every_folder(tmp_path: Path) -> None:
    for name in ("episodes/.saving-000003.jsonl", ".saving-config.json", "checkpoints/.removing-000001/x", ".saving-final/a/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / "episodes" / "000001.jsonl").write_text("{}\n")
    files.sweep(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*")) if p.is_file()] == ["episodes/000001.jsonl"]


def test_a_link_is_replaced_or_refused_and_what_it_points_to_stays(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (tmp_path / "a.json").symlink_to(precious)
    files.write_text(tmp_path / "a.json", "new")
    assert (precious.read_text(), (tmp_path / "a.json").read_text()) == ("keep me", "new")
    run = tmp_path / "run"
    directory.begin(run, config(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".saving-x").write_text("keep me")
    for name, target in (("episodes", elsewhere), ("lock", precious), ("metrics.jsonl", precious), ("tensorboard", elsewhere)):
        (run / name).symlink_to(target)
        with pytest.raises(RunError, match=r"is a symbolic link, and nothing is written through a link"), directory.lock(run):
            pass
        (run / name).unlink()
    assert precious.read_text() == "keep me"
    assert (elsewhere / ".saving-x").exists()


def test_a_folder_without_settings_has_not_begun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / ".saving-config.json").write_text("{")
    with pytest.raises(RunError, match=r"holds no config\.json, so no run has begun there"):
        directory.read_config(run)
    directory.begin(run, config(tmp_path))
    assert directory.read_config(run).env.name == "agree"
    assert sorted(os.listdir(run)) == ["checkpoints", "config.json"]
    with pytest.raises(RunError, match=r"exists already. Continue it with `collm train --resume"):
        directory.begin(run, config(tmp_path))


def test_paths_in_printed_commands_are_quoted() -> None:
    assert directory.command("collm", "report", Path("my runs/a;b")) == "collm report 'my runs/a;b'"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(directory.fcntl, "flock", refuse)
    with directory.lock(tmp_path):
        pass
    assert "has no locks" in capsys.readouterr().err


def test_another_process_is_named_only_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with directory.lock(tmp_path), pytest.raises(RunError, match="being trained by another process"), directory.lock(tmp_path):
        pass

    def fail(handle: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(directory.fcntl, "flock", fail)
    with pytest.raises(RunError, match="cannot be locked: Input/output error"), directory.lock(tmp_path):
        pass


def test_sighup_is_heeded_but_not_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert directory.ignored(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert directory.ignored(signal.SIGHUP) == (before is signal.SIG_IGN)  # these tests may run under nohup


def test_data_paths_are_kept_absolute(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    options = {"data": "rows.jsonl[:5]", "eval_data": "hf:a/b:test", "world": "rows.jsonl"}
    kept = directory.with_absolute_data(options, tmp_path)
    assert kept == {**options, "data": f"{tmp_path}/rows.jsonl[:5]"}


@pytest.mark.parametrize(
    ("text", "kept"), [("\ud83d half", "\ufffd half"), ("\ud83d\ude00", "\U0001f600"), ("plain é", "plain é")]
)
def test_half_a_surrogate_pair_becomes_writable(tmp_path: Path, text: str, kept: str) -> None:
    assert encodable(text) == kept
    files.write_text(tmp_path / "a", json.dumps({"x": text}, ensure_ascii=False))
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == {"x": kept}


DAMAGES: dict[str, tuple[str, bytes | None, str]] = {
    "settings are not JSON": ("config.json", b"{", "config.json' cannot be read"),
    "settings are a list": ("config.json", b"[]", "config.json' cannot be read"),
    "settings without task": ("config.json", b'{"run": {"iterations": 3}}', "config.json' cannot be read"),
    "deep settings": ("config.json", b"[" * 100_000, "config.json' cannot be read"),
    "metrics are binary": ("metrics.jsonl", b"\xff\x00\n\n", "line 1, is damaged"),
    "metrics of numbers": ("metrics.jsonl", b"3\n", "line 1, is damaged: it is not a JSON object"),
    "an iteration in words": ("metrics.jsonl", b'{"iteration": "x", "joint_actions": 0}\n', "line 1, is damaged: 'iteration'"),
    "episodes without turns": ("episodes/000000-evaluation.jsonl", b'{"task": 1}\n', "line 1, is damaged: it lacks"),
    "episodes of words": (
        "episodes/000000-evaluation.jsonl",
        b'{"task": 1, "label": "a", "score": "x", "metrics": {}, "failure": "", "state": "", "turns": []}\n',
        "line 1, is damaged: 'score'",
    ),
    "an iteration that is true": (
        "metrics.jsonl",
        b'{"iteration": true, "joint_actions": 0}\n',
        "is damaged: 'iteration': input",
    ),
    "half an iteration": ("metrics.jsonl", b'{"iteration": 0.5, "joint_actions": 0}\n', "is damaged: 'iteration' is 0.5"),
    "a list for a number": (
        "metrics.jsonl",
        b'{"iteration": 0, "joint_actions": 0, "ceiling_turn_0": []}\n',
        "is damaged: 'ceiling_turn_0': input should be a valid number",
    ),
    "an endless number": (
        "metrics.jsonl",
        b'{"iteration": ' + b"9" * 5000 + b"}\n",
        "the number 99999999999999999999... is too",
    ),
    "a turn that is a number": (
        "episodes/000003-evaluation.jsonl",
        b'{"task": 1, "label": "a", "score": 1, "metrics": {}, "failure": "", "state": "", "turns": [3]}\n',
        "line 1, is damaged: 'turns.0'",
    ),
    "a group size in words": (
        "config.json",
        b'{"run": {"iterations": 3}, "env": {"name": "agree"}, "algorithm": {"name": "ac", "group_size": "x"}}',
        "config.json' cannot be read: 'algorithm.group_size': input should be a valid integer",
    ),
    "no metrics": ("metrics.jsonl", None, "metrics.jsonl' cannot be read: No such file"),
}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    directory.begin(run, config(tmp_path))
    (run / "metrics.jsonl").write_text('{"iteration": 0, "joint_actions": 0}\n')
    (run / "episodes").mkdir()
    episode = {"task": 0, "label": "a", "score": 1.0, "metrics": {}, "failure": "", "state": "", "turns": []}
    for name in ("000000-evaluation", "000003-evaluation"):
        (run / "episodes" / f"{name}.jsonl").write_text(json.dumps(episode) + "\n")
    return run


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_file_is_one_sentence(begun: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    name, content, message = DAMAGES[damage]
    if content is None:
        (begun / name).unlink()
    else:
        (begun / name).write_bytes(content)
    commands = [["report", str(begun)]]
    if name == "config.json":
        commands += [["evaluate", str(begun)], ["train", "--resume", str(begun)], ["export", str(begun), "--agent", "a", "x"]]
    for words in commands:
        assert main(words) in (1, 2), words
        said = capsys.readouterr().err
        assert message in said, words
        assert said.count("\n") == 1, said


def test_metrics_of_an_old_run_have_their_present_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"iteration": 1, "joint_actions": 2, "yardstick_turn_3": 0.5, "critic/imagined": 1.0, "critic/loss": 0.1}\n'
    )
    now = {"iteration": 1, "joint_actions": 2, "ceiling_turn_3": 0.5, "critic/replayed": 1.0, "critic/loss": 0.1}
    assert read_metrics(path) == [now]


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "episodes/000003-evaluation.jsonl"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(
    begun: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (begun / name).unlink()
    os.mkfifo(begun / name)
    assert main(["report", str(begun)]) == 2
    assert "cannot be read: it is not a file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a$x_$", "b\udcff", "[red]c"])
def test_any_name_of_a_folder_can_be_reported(begun: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    folder = begun.with_name(name)
    begun.rename(folder)
    for iteration in (1, 2, 3):
        with (folder / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"iteration": iteration, "joint_actions": iteration, "critic/loss": None}) + "\n")
    assert main(["report", str(folder), "--json"]) == 0
    assert (folder / "report" / "curves.png").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "collm.cli.main", "algorithms"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "collm: the output could not be written: No space left on device; files that were saved are whole.\n"


def test_odd_file_names_in_a_run_are_ignored(begun: Path) -> None:
    for name in ("episodes/.saving-000003.jsonl", "episodes/notes.jsonl", "episodes/¹²³.jsonl", "episodes/000002.jsonl.bak"):
        (begun / name).write_text("not for us")
    run = open_run(begun)
    assert list(run.evaluations()) == [0, 3]
    assert run.training_episodes() == {}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"format": 2, "iteration": 0, "joint_actions": 0, "best": None, "pending": None}, "has format 2, and this version"),
        ({"iteration": 0, "joint_actions": 0, "best": None, "pending": None}, r"state\.json is damaged"),
        ({"format": 1, "iteration": "3", "joint_actions": 0, "best": None, "pending": None}, r"state\.json is damaged"),
        ({"format": 1, "iteration": 3, "joint_actions": 0, "best": None, "pending": [1]}, r"state\.json is damaged"),
        (
            {"format": 1, "iteration": math.nan, "joint_actions": 0, "best": None, "pending": None},
            r"state\.json is damaged",
        ),
        ({"format": 1, "iteration": -1, "joint_actions": 0, "best": None, "pending": None}, r"state\.json is damaged"),
        ([], r"state\.json is damaged"),
    ],
)
def test_a_checkpoints_account_is_read_and_held_to_its_format(begun: Path, state: Any, message: str) -> None:
    from collm.training.trainer import Trainer

    folder = begun / "checkpoints" / "000000"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CollmError, match=message):
        Trainer.resume(begun, quiet=True).run()
