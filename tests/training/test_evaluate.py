"""`collm evaluate`: the right weights on the right tasks, the same numbers twice, and one message where that cannot be."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from collm.cli.evaluate import told
from collm.cli.main import main
from collm.envs.base import Outcome, TextEnv, agent_names
from collm.errors import EnvError
from collm.runs.log import read_metrics
from collm.settings.load import parse_config
from collm.training.trainer import Trainer
from collm.types import Completion, Episode, Turn

WORDS = ["AN", "AT", "BE", "DO", "GO", "IN", "IT", "ON", "UP"]
SETTINGS: dict[str, dict[str, Any]] = {
    "run": {"name": "run", "iterations": 3, "threads": 1, "trackers": [], "checkpoint_every": 2},
    "env": {"name": "str_build", "wording": "terse", "turns": 1, "strings": ["HE", "WE", "US"], "eval_strings": WORDS},
    "rollout": {"tasks": 3, "max_tokens": 24},
    "learner": {"lr": 1e-3},
    "critic": {"body": "auto", "lr": 1e-3},
    "evaluation": {"every": 2},
}
RECIPE = """
[run]
threads = 1
[env]
name = "str_build"
wording = "terse"
turns = 1
strings = ["HE"]
eval_strings = ["AN", "AT", "BE", "DO", "GO", "IN", "IT", "ON", "UP"]
[rollout]
max_tokens = 24
"""


class Choosy(TextEnv):
    """Ten held-out tasks, of which number 3 always fails; task 0 alone has the metric "odd". The reward is the task's."""

    num_tasks = 10
    max_reward = 18.0

    def __init__(self, split: str = "train"):
        super().__init__(agent_names(2, "agent"), 1)

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        return {agent: "Name one colour." for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        if self.task == 3:
            raise EnvError("task 3 is broken")
        metrics = {"odd": 1.0} if self.task == 0 else {}
        return Outcome(float(self.task), {}, {}, metrics=metrics)


class Broken(Choosy):
    """No task can be played."""

    def play(self, answers: dict[str, str]) -> Outcome:
        raise EnvError("all is broken")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Three iterations on two-letter words, evaluated before training, after 2 and after 3; checkpoints of 2 and 3."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {**SETTINGS, "run": {**SETTINGS["run"], "folder": str(folder)}}
    return Trainer(parse_config(settings), quiet=True).run()


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture
def evaluated(capsys):
    """`collm evaluate ... --json` as a dict."""

    def play(*words: str | Path) -> dict[str, Any]:
        code = main(["evaluate", *map(str, words), "--json"])
        out = capsys.readouterr()
        assert code == 0, out.err
        assert out.out.count("\n") == 1
        return json.loads(out.out)

    return play


@pytest.fixture
def refused(capsys):
    """The message of a `collm evaluate` that cannot be carried out."""

    def play(*words: str | Path) -> str:
        assert main(["evaluate", *map(str, words)]) == 2
        out = capsys.readouterr()
        assert out.out == ""
        assert out.err.startswith("collm: ")
        assert "Traceback" not in out.err
        return out.err

    return play


def means(result: dict[str, Any]) -> dict[str, float]:
    return {"reward": result["reward"]["mean"]} | {name: found["mean"] for name, found in result["metrics"].items()}


def logged(run: Path, iteration: int) -> dict[str, float]:
    """What the run itself measured then."""
    line = next(line for line in read_metrics(run / "metrics.jsonl") if line["iteration"] == iteration)
    prefix, counts = "evaluation/", ("evaluation/episodes", "evaluation/failed")
    return {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix) and k not in counts}


def test_each_choice_of_weights_repeats_what_the_run_measured_with_them(run, copy, evaluated):
    """Teams with different results, two of which may agree; best is what the newest state says, here iteration 2."""
    expected = {iteration: logged(run, iteration) for iteration in (0, 2, 3)}
    assert len({values["reward"] for values in expected.values()}) >= 2
    state = copy / "checkpoints" / "000003" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "best": [0.0, 2]}))
    for which, iteration in (("start", 0), ("0", 0), ("2", 2), ("best", 2), ("3", 3), ("final", 3)):
        assert means(evaluated(copy, "--checkpoint", which)) == pytest.approx(expected[iteration], rel=1e-6), which
    state.write_text(json.dumps({**json.loads(state.read_text()), "best": [0.0, 0]}))
    assert means(evaluated(copy, "--checkpoint", "best")) == pytest.approx(expected[0], rel=1e-6)


def test_json_has_these_keys_and_the_same_numbers_twice(run, evaluated):
    one, other = evaluated(run), evaluated(run)
    assert list(one) == ["episodes", "reward", "metrics", "tokens", "seconds"]
    assert one["episodes"] == 9
    assert one["reward"]["low"] < one["reward"]["mean"] < one["reward"]["high"]
    assert 0 < one["tokens"] <= 9 * 2 * 24
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_recipe_is_played_by_the_untrained_team(run, tmp_path, evaluated):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    assert means(evaluated(recipe)) == pytest.approx(logged(run, 0), rel=1e-6)


def test_few_tasks_have_no_interval_and_repeated_ones_count_once(run, evaluated):
    """AT three times and DO once: the mean is that of AT and DO, not three quarters AT."""
    few = evaluated(run, "--episodes", "7")
    assert (few["episodes"], few["reward"]["low"], few["reward"]["high"]) == (7, None, None)
    assert "7 distinct tasks" in few["note"]
    at, do = (means(evaluated(run, "--env.eval_strings", f'["{word}"]'))["reward"] for word in ("AT", "DO"))
    assert at != do
    both = evaluated(run, "--env.eval_strings", '["AT", "DO", "AT", "AT"]')
    assert both["reward"]["mean"] == pytest.approx((at + do) / 2)
    assert both["note"].endswith("4 episodes of 2 distinct tasks; each task counts once")


def test_more_episodes_than_tasks_play_tasks_again(run, evaluated):
    """Greedy answers repeat; sampled ones do not."""
    words = ("--env.eval_strings", '["AT", "DO"]')
    once, again = evaluated(run, *words), evaluated(run, *words, "--episodes", "5")
    assert (once["episodes"], again["episodes"]) == (2, 5)
    assert again["reward"]["mean"] == pytest.approx(once["reward"]["mean"])
    assert again["note"].endswith("5 episodes of 2 distinct tasks; each task counts once")
    hot = (*words, "--evaluation.temperature", "3.0", "--show", "4")
    played = [[turn["agents"] for turn in e["turns"]] for e in evaluated(run, *hot, "--evaluation.episodes", "4")["played"]]
    assert played[0] != played[2]
    assert played[1] != played[3]


def test_settings_of_evaluation_may_change(run, evaluated):
    greedy = evaluated(run, "--episodes", "2")
    assert evaluated(run, "--evaluation.episodes", "2")["reward"] == greedy["reward"]
    assert evaluated(run, "--episodes", "2", "--rollout.max_tokens", "3")["tokens"] == 12
    assert evaluated(run, "--evaluation.temperature", "3.0")["reward"] != evaluated(run)["reward"]


def test_failed_episodes_are_counted_and_in_no_mean(tmp_path, evaluated, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[run]\nthreads = 1\n[env]\nname = "test_evaluate:Choosy"\n[rollout]\nmax_tokens = 2\n')
    result = evaluated(recipe)
    assert (result["episodes"], result["failed"]) == (9, 1)
    assert result["reward"]["mean"] == pytest.approx((45 - 3) / 9)
    assert result["metrics"]["odd"] == {"mean": None, "low": None, "high": None}
    assert result["note"] == "odd: not a finite number for 8 of 9 tasks"
    assert main(["evaluate", str(recipe)]) == 0
    out = capsys.readouterr().out
    reward = next(line for line in out.split("\n") if line.startswith("reward")).split()
    assert reward[1] == "4.667"
    assert float(reward[4]) == round(100 * 42 / 9 / 18, 1)  # in % of the world's maximum
    assert "task 3 is broken" in out


def test_a_world_whose_every_task_fails_is_an_error(tmp_path, refused):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[run]\nthreads = 1\n[env]\nname = "test_evaluate:Broken"\n[rollout]\nmax_tokens = 2\n')
    assert "none of 10 held-out episodes was played to its end; the first: step 0: all is broken" in refused(recipe)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--episodes", "0"], "--episodes 0 plays nothing"),
        (["--episodes", "-2"], "--episodes -2 plays nothing"),
        (["--show", "0"], "--show 0 shows nothing"),
        (["--checkpoint", "1"], "no checkpoint after 1 iterations; saved: 2, 3"),
        (["--checkpoint", "newest"], "is not final, best, start, or a number"),
        (["--learner.lr", "1"], "'learner.lr' is not a setting that the evaluation of a trained run can change"),
        (["--evaluation.temprature", "1"], "Did you mean 'evaluation.temperature'?"),
        (["--env.turns.x", "1"], "'turns' is a value"),
        (["--env.agents", "3"], "it lacks builder_2/config.json"),
        (["--env.agents", "3", "--checkpoint", "3"], "policy-builder_2"),
        (["--env.eval_strings", '["?"]'], "cannot be built"),
    ],
)
def test_what_cannot_be_evaluated_is_one_message(run, refused, words, message):
    assert message in refused(run, *words)


@pytest.mark.parametrize(
    ("damage", "words", "message"),
    [
        (lambda run: shutil.rmtree(run / "final"), [], "has no final weights yet: finish it with `collm train --resume"),
        (lambda run: (run / "final/builder_0/model.safetensors").write_bytes(b"x" * 99), [], "cannot be read"),
        (lambda run: (run / "final/builder_1/tokenizer_config.json").unlink(), [], "it lacks builder_1/tokenizer_config"),
        (lambda run: (run / "config.json").write_bytes(b"\xff"), [], "cannot be read"),
        (lambda run: (run / "config.json").unlink(), [], "holds no config.json"),
        (lambda run: (run / "checkpoints/000003/state.json").write_text("{}"), ["--checkpoint", "best"], "state.json"),
        (lambda run: shutil.rmtree(run / "checkpoints"), ["--checkpoint", "best"], "has no checkpoint yet"),
        (
            lambda run: (run / "checkpoints/000003/state.json").write_text('{"best": [0.5, 1]}'),
            ["--checkpoint", "best"],
            "has no checkpoint after 1 iterations; saved: 2, 3. Name one of these",
        ),
        (
            lambda run: (run / "checkpoints/000003/state.json").write_text('{"best": null}'),
            ["--checkpoint", "best"],
            "has made no held-out evaluation",
        ),
        (
            lambda run: (run / "checkpoints/000003/critic-team.safetensors").rename(
                run / "checkpoints/000003/policy-builder_0.safetensors"
            ),
            ["--checkpoint", "3"],
            "holds other tensors",
        ),
    ],
)
def test_a_damaged_run_is_one_message(copy, refused, damage, words, message):
    damage(copy)
    text = refused(copy, *words)
    assert message in text or message.replace("read", "loaded") in text
    assert str(copy) in text


def test_what_is_no_source_is_one_message(tmp_path, refused):
    assert "neither a run directory nor a recipe" in refused(tmp_path / "missing")
    assert "cannot be read: No such file" in refused(tmp_path / "missing.toml")
    assert "is not a run directory" in refused(tmp_path)
    (tmp_path / "bad.toml").write_text("[env")
    assert "not valid TOML" in refused(tmp_path / "bad.toml")
    (tmp_path / "good.toml").write_text(RECIPE)
    assert "a recipe's team is untrained" in refused(tmp_path / "good.toml", "--checkpoint", "best")


def test_mistakes_are_told_before_torch_is_loaded(run):
    code = "import sys; from collm.cli.main import main; code = main(sys.argv[1:]); print('torch' in sys.modules); exit(code)"
    words = ["evaluate", str(run), "--checkpoint", "7"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr


def test_show_prints_what_each_agent_read_and_wrote(tmp_path, capsys):
    """Of the first tasks, beside the same table; a failed episode has its reason; JSON stays one object."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[run]\nthreads = 1\n[env]\nname = "test_evaluate:Choosy"\n[rollout]\nmax_tokens = 2\n')
    assert main(["evaluate", str(recipe), "--show", "4"]) == 0
    shown = capsys.readouterr().out
    blocks = shown.split("--- ")[1:]
    assert [block.splitlines()[0] for block in blocks] == ["task 0", "task 1", "task 2", "task 3"]
    for block in blocks[:3]:
        for agent in ("agent_0", "agent_1"):
            assert f"{agent} read:\n  | Name one colour.\n{agent} wrote:\n  " in block
    assert "reward 2\n" in blocks[2]
    assert "metrics: odd 1" in blocks[0]
    assert "failed: step 0: task 3 is broken" in blocks[3]
    assert shown.count("mean [95 % interval]") == 1
    assert main(["evaluate", str(recipe), "--show", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [episode["task"] for episode in record["played"]] == [0, 1]
    assert record["played"][1]["turns"][0]["agents"]["agent_0"]["read"] == "Name one colour."
    assert record["played"][1]["turns"][0]["reward"] == 1.0
    assert record["episodes"] == 9


def test_show_names_turns_parts_empty_and_cut_answers(capsys):
    answers = {"a": Completion("a", "one\ntwo\x1b[2J", finish_reason="length"), "b": Completion("b", "")}
    turn = Turn(
        {"a": "Say\nit.", "b": "Say."}, answers, 0.5, 0.5, parts={"covered": 0.5}, messages={"a": Completion("a", "hi")}
    )
    text = told(Episode(7, 0, ("a", "b"), turns=[turn, turn], label="7"))
    assert text.splitlines()[:13] == [
        "--- task 7",
        "turn 1, a read:", "  | Say", "  | it.",
        "turn 1, a wrote to the others:", "  > hi",
        "turn 1, a wrote:", "  > one", "  > two?[2J", "  (cut off at rollout.max_tokens)",
        "turn 1, b read:", "  | Say.",
        "turn 1, b wrote:",
    ]  # fmt: skip
    assert text.splitlines()[13:15] == ["  (nothing)", "turn 1, reward 0.5 (covered 0.5)"]
