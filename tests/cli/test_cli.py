"""The command line: light until it must be heavy, and every mistake is one message and exit code 2."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
from pettingzoo import ParallelEnv

from collm.cli.main import main, make_parser, split_overrides
from collm.cli.train import demo_recipe
from collm.envs.catalogue import ENVIRONMENTS, make
from collm.errors import ConfigError, EnvError
from collm.settings.load import describe, load_config
from collm.settings.presets import ALGORITHMS

LIGHT = """
import contextlib, io, json, sys
from collm.cli.main import main
shown = {}
for command in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(command)
        except SystemExit as left:
            code = left.code
    heavy = sorted({"torch", "transformers", "tokenizers", "safetensors", "tensorboard", "matplotlib"} & set(sys.modules))
    shown[" ".join(command)] = [code, heavy, out.getvalue()]
print(json.dumps(shown))
"""


def light(*commands):
    done = subprocess.run([sys.executable, "-c", LIGHT, json.dumps(commands)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_and_lists_import_nothing_heavy():
    commands = [["--help"], [], ["train", "--settings"], ["algorithms"], ["tasks"], ["tasks", "--json"], ["check", "agree"]]
    commands += [
        [name, "--help"] for name in ("train", "evaluate", "compare", "report", "blame", "check", "tasks", "algorithms")
    ]
    results = light(*commands)
    for command, (code, heavy, text) in results.items():
        assert code == 0, (command, text)
        assert heavy == [], command
        assert len(text) > 30, command
    for name in ("train", "evaluate", "compare", "report", "blame", "check", "tasks", "algorithms"):
        assert name in results["--help"][2]
        assert f"example:\n  collm {name}" in results[f"{name} --help"][2]
        assert "--json" in results[f"{name} --help"][2]
    for name, default, sentence in describe():
        line = next(line for line in results["train --settings"][2].split("\n") if line.startswith(f"--{name} "))
        assert default in line
        assert sentence in line
    for name in ALGORITHMS:
        assert name in results["algorithms"][2]
    assert "env.turns" in results["tasks"][2]
    assert set(json.loads(results["tasks --json"][2])) == set(ENVIRONMENTS)


def test_mistakes_in_settings_are_found_before_anything_heavy_is_loaded():
    commands = (
        ["train", "--algorithm.lamda", "1"],
        ["train", "--algorithm.name", "magrpo", "--algorithm.group_size", "1"],
        ["train", "/no/such/recipe.toml"],
        ["train", "--run.seed"],
        ["train", "--nonsense"],
        ["nonsense"],
        ["tasks", "--run.seed", "1"],
        ["check", "nosuch"],
    )
    for command, (code, heavy, text) in light(*commands).items():
        assert code == 2, command
        assert heavy == [], command
        assert "Traceback" not in text


def fails(capsys, *words):
    """Run a command that must fail with exit code 2; its message."""
    try:
        code = main(words)
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    assert out == ""
    assert "Traceback" not in err
    assert err.count("collm: ") >= 1
    return err


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "agree.toml"
    path.write_text(
        f'[env]\nname = "agree"\n[run]\nfolder = "{tmp_path}/runs"\nthreads = 1\ndevice = "cpu"\n[rollout]\nmax_tokens = 2\n'
    )
    return str(path)


def test_an_unknown_setting(capsys, recipe):
    assert "unknown setting 'learner.lrate'. Did you mean 'learner.lr'?" in fails(
        capsys, "train", recipe, "--learner.lrate", "1"
    )


def test_an_unknown_task(capsys, recipe):
    message = fails(capsys, "train", recipe, "--env.name", "agreee")
    assert "unknown task 'agreee'. Did you mean 'agree'?" in message


def test_an_unknown_option_of_a_task(capsys, recipe):
    assert "unknown setting 'env.colors'. Did you mean 'env.colours'?" in fails(capsys, "train", recipe, "--env.colors", "3")


@pytest.mark.parametrize("name", ["magrpo", "marloo", "maremax"])
def test_a_group_estimator_with_one_episode_per_task(capsys, recipe, name):
    message = fails(capsys, "train", recipe, "--algorithm.name", name, "--algorithm.group_size", "1")
    assert "algorithm.group_size=1 gives nothing to compare" in message
    assert "Set algorithm.group_size=4" in message


def test_a_run_that_does_not_exist(capsys, tmp_path):
    message = fails(capsys, "train", "--resume", str(tmp_path / "none"))
    assert "is not a run directory: the folder does not exist" in message


def test_a_missing_checkpoint(capsys, tmp_path, recipe):
    folder = tmp_path / "runs" / "empty"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(load_config(tmp_path / "agree.toml").resolved()))
    for which in ("7", "best", "final"):
        message = fails(capsys, "evaluate", str(folder), "--checkpoint", which)
        assert "checkpoint" in message


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"{", b"[]", b'"text"', b"null", b"{}", b'{"env": {"name": "agree"}, "run": 3}']
)
def test_a_damaged_run_directory(capsys, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    fails(capsys, "train", "--resume", str(tmp_path))


def test_an_unreadable_recipe(capsys, tmp_path):
    assert "cannot be read" in fails(capsys, "train", str(tmp_path / "none.toml"))
    assert "cannot be read" in fails(capsys, "train", str(tmp_path))
    (tmp_path / "bad.toml").write_text("[env\n")
    assert "not valid TOML" in fails(capsys, "train", str(tmp_path / "bad.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\x80\x81")
    assert "not valid TOML" in fails(capsys, "train", str(tmp_path / "bytes.toml"))


def test_an_existing_run_name(capsys, tmp_path, recipe):
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "precious").write_text("keep me")
    message = fails(capsys, "train", recipe, "--run.name", "taken")
    assert "is not a run directory: it holds 'precious'" in message
    assert "--run.name" in message
    (tmp_path / "runs" / "begun").mkdir()
    (tmp_path / "runs" / "begun" / "config.json").write_text("{}")
    message = fails(capsys, "train", recipe, "--run.name", "begun")
    assert "exists already" in message
    assert "--resume" in message
    assert (tmp_path / "runs" / "taken" / "precious").read_text() == "keep me"
    assert len(list((tmp_path / "runs" / "taken").iterdir())) == 1


def test_resuming_with_other_settings(capsys, tmp_path, recipe):
    message = fails(capsys, "train", "--resume", str(tmp_path), "--run.seed", "3")
    assert "'run.seed' cannot change when a run is resumed" in message
    assert "run.iterations, run.device, run.threads" in message
    assert "leave out" in fails(capsys, "train", recipe, "--resume", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--algorithm.name", "ac"], "collm-cc"),
        (["--algorithm.name", "grpo"], "magrpo"),
        (["--rollout.protocol", "single"], "rollout.protocol"),
        (["--team.models.agent_7", "tiny"], "agent_7"),
        (["--team.model", "/no/such/model"], "/no/such/model"),
        (["--run.device", "banana"], "run.device"),
        (["--run.device", "cuda:99"], "run.device"),
        (["--env.split", "eval"], "env.split"),
        (["--env.turns", "two"], "turns"),
        (["--env.agents", "0"], "agents"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_the_task_or_the_machine(capsys, tmp_path, recipe, words, named):
    assert named in fails(capsys, "train", recipe, *words)
    left = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()] if (tmp_path / "runs").exists() else []
    assert left == [], "a refused run leaves nothing behind"


@pytest.mark.parametrize(
    "words", [["--env.name", "agree"], ["--env.turns"], ["--env.turns", "0"], ["--run.seed", "3"]], ids=" ".join
)
def test_mistakes_of_check(capsys, words):
    fails(capsys, "check", "agree", *words)


def test_a_setting_swallows_no_option():
    with pytest.raises(ConfigError, match=r"--run\.seed needs a value"):
        split_overrides(["train", "--run.seed", "--json"])
    with pytest.raises(ConfigError, match="needs a value"):
        split_overrides(["--run.seed"])


def test_overrides_are_told_from_other_words():
    words, overrides = split_overrides(
        [
            "train",
            "a.b.toml",
            "--run.seed",
            "-3",
            "--json",
            '--env.strings=["IT"]',
            "--resume",
            "runs/x.y",
            "--resume=runs/v1.2",
            "--run.name=a=b",
        ]
    )
    assert words == ["train", "a.b.toml", "--json", "--resume", "runs/x.y", "--resume=runs/v1.2"]
    assert overrides == {"run.seed": -3, "env.strings": ["IT"], "run.name": "a=b"}


def test_the_last_of_two_overrides_wins():
    assert split_overrides(["--run.seed", "1", "--run.seed", "2"])[1] == {"run.seed": 2}


def test_every_command_leads_to_a_function():
    """What `--help` offers exists."""
    from importlib import import_module

    parser = make_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    targets = {
        "train": "train:run",
        "evaluate": "evaluate:run",
        "report": "report:run",
        "check": "lists:check",
        "tasks": "lists:tasks",
    }
    targets["algorithms"] = "lists:algorithms"
    assert set(targets) <= set(commands)
    for target in targets.values():
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(f"collm.cli.{module}"), name))


def test_the_built_in_demonstration_is_a_valid_recipe():
    config = load_config(demo_recipe())
    assert config.env.name == "str_build"
    assert config.algorithm.name == "collm-cc"


def test_tasks_says_of_every_world_what_it_is(capsys):
    assert main(["tasks"]) == 0
    shown = capsys.readouterr().out
    blocks = dict(block.split(maxsplit=1) for block in shown.strip().split("\n\n"))
    assert list(blocks) == list(ENVIRONMENTS)
    assert main(["tasks", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert set(rows) == set(ENVIRONMENTS)
    for name, row in rows.items():
        block = blocks[name]
        assert row["about"]
        assert row["about"][-1] in ".:"
        assert block.startswith(row["about"] + "\n")
        assert "split" not in row["options"]
        for option, value in row["options"].items():
            assert f"env.{option}=" in block, (name, option, value)
        assert ("agents" in row) != ("refused" in row)
        if "agents" in row:
            env = make(name)
            assert (row["agents"], row["turns"]) == (list(env.possible_agents), env.turns)
            assert f"agents: {', '.join(row['agents'])}  turns: {row['turns']}  tasks: {row['tasks']}" in block
    lines = shown.split("\n")
    assert max(len(line) for line in lines if line.startswith("    ")) <= 110
    assert rows["agree"]["options"] == {"agents": 2, "colours": 4, "turns": 1, "wording": "plain"}


def test_a_task_that_cannot_be_made_is_listed_with_the_reason(capsys, monkeypatch):
    monkeypatch.setitem(ENVIRONMENTS, "fussy", "test_cli:fussy")
    assert main(["tasks"]) == 0
    shown = capsys.readouterr().out
    assert (
        "fussy                Makes nothing at all.\n"
        "    cannot be made on this machine: env fussy: there is no harp.\n    env.strings=7\n" in shown
    )
    assert "str_build" in shown


def fussy(strings=7, split="train") -> ParallelEnv:
    """Makes nothing
    at all. Not today either."""
    raise EnvError("there is no harp.")


def test_check_prints_what_it_checked(capsys):
    assert main(["check", "str_build", "--env.world", "persistent", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["env"] == "str_build"
    assert len(result["passed"]) == 8
    assert main(["check", "test_catalogue:Honest"]) == 0
    assert capsys.readouterr().out.count("ok  ") == 8


def test_check_names_the_broken_promise(capsys):
    assert "shows in what" in fails(capsys, "check", "test_catalogue:Leaking")


def test_another_task_than_that_of_the_recipe_is_explained(capsys):
    """`collm train --env.name agree` meets the demonstration's own env.strings: the message says where that came from."""
    message = fails(capsys, "train", "--env.name", "agree")
    assert "env.strings" in message
    assert "demo" in message


def test_training_from_the_command_line_prints_the_last_line_as_json(capsys, tmp_path, recipe):
    quick = ["--run.iterations", "1", "--rollout.tasks", "1", "--run.trackers", "[]", "--evaluation.every", "0"]
    code = main(["train", recipe, *quick, "--run.name", "one", "--json"])
    out = capsys.readouterr().out
    assert code == 0
    folder = tmp_path / "runs" / "one"
    record = json.loads(out)
    assert record["run"] == str(folder)
    assert record["iteration"] == 1
    config = json.loads((folder / "config.json").read_text())
    assert config["env"]["name"] == "agree"
    assert config["rollout"]["max_tokens"] == 2
    assert main(["train", "--resume", str(folder), "--json"]) == 0  # nothing left to do, and it says so
    assert json.loads(capsys.readouterr().out)["iteration"] == 1
