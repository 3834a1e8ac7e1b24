"""Worked examples: drawn once, in front of every history, read by critics, never trained on, and kept by a run."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collm import open_run
from collm.cli.main import main
from collm.engines.http import HttpEngine, endpoint
from collm.engines.local import LocalEngine
from collm.engines.scripted import ScriptedEngine
from collm.envs.catalogue import EnvSpec
from collm.errors import ConfigError
from collm.learning.batch import Batch
from collm.learning.pack import pack_answers
from collm.models.critic import Critic
from collm.models.policy import Policy
from collm.models.team import Team
from collm.rollout.collect import collect
from collm.rollout.examples import draw_examples
from collm.rollout.plan import Plan
from collm.rollout.replay import resample
from collm.runs.directory import run_config
from collm.runs.examples import of_agent, read_examples, recorded_examples, with_examples
from collm.serving import server
from collm.settings.load import load_config, parse_config, parse_resolved
from collm.training.task import draw_tasks, plan_of, training_tasks
from collm.training.trainer import Trainer
from collm.types import Episode, Example, Message, Request, Sampling, examples_of

ROLES = EnvSpec("worlds:Roles")
COLOURS = ("red", "green", "blue", "yellow", "white", "black")


def config(folder: Path, **changes: dict[str, Any]) -> Any:
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "folder": str(folder), "iterations": 2, "threads": 1, "device": "cpu", "trackers": []},
        "env": {"name": "worlds:Roles"},
        "rollout": {"tasks": 4, "max_tokens": 4, "examples": 2},
        "algorithm": {"name": "collm-cc"},
        "learner": {"lr": 1e-3},
        "critic": {"body": "auto", "lr": 1e-3},
        "evaluation": {"every": 2, "episodes": 3},
    }
    for room, settings in changes.items():
        values[room] = {**values.get(room, {}), **settings}
    return parse_config(values)


def pairs(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in messages]


# --- drawing -------------------------------------------------------------------------------------------------------------


def test_examples_are_first_turns_of_different_training_tasks_and_each_agent_has_its_own() -> None:
    examples = draw_examples(ROLES, 3, 5)
    assert [example.agent for example in examples] == ["agent_0", "agent_1"] * 3
    tasks = [example.task for example in examples[::2]]
    assert len(set(tasks)) == 3
    for example in examples:
        seen, said = example.messages
        assert (seen.role, said.role, said.token_ids) == ("user", "assistant", None)
        assert seen.text.startswith(f"train {example.task}, ")
        assert seen.text.endswith(f": {example.agent}, name a colour.")
        assert said.text == COLOURS[(example.task + (example.agent == "agent_1")) % 6]


def test_the_seed_determines_the_draw() -> None:
    assert draw_examples(ROLES, 3, 5) == draw_examples(ROLES, 3, 5)
    drawn = {tuple(e.task for e in draw_examples(ROLES, 3, seed)) for seed in range(8)}
    assert len(drawn) > 4


def test_more_examples_than_tasks_repeat_them_with_other_seeds() -> None:
    examples = draw_examples(EnvSpec("worlds:Roles", {"tasks": 1}), 3, 0)
    assert len({example.messages[0].text for example in examples[::2]}) == 3


def test_training_leaves_out_the_tasks_of_the_examples() -> None:
    plan = Plan(ROLES, examples=draw_examples(ROLES, 2, 0))
    tasks = training_tasks(plan)
    assert sorted([*tasks, *{example.task for example in plan.examples}]) == list(range(6))
    drawn = draw_tasks(3, 0, 8, tasks)
    assert set(drawn) == set(tasks)
    assert sorted(drawn[:4]) == tasks
    assert training_tasks(replace(plan, examples=draw_examples(ROLES, 6, 0))) == list(range(6))


def test_an_environment_without_a_scripted_player_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Luck has no scripted player for agent_0, agent_1.*file of chats"):
        Trainer(config(tmp_path, env={"name": "worlds:Luck"}), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [-1, True, 1.5])
def test_a_count_is_a_whole_number(given: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.examples"):
        config(tmp_path, rollout={"examples": given})


# --- histories -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["full", "last", "newest"])
@pytest.mark.parametrize("protocol", ["parallel", "pipeline", "discussion"])
def test_every_request_begins_with_the_agents_examples_and_goes_on_as_without(history: Any, protocol: str) -> None:
    examples = draw_examples(ROLES, 2, 0)

    def asked(plan: Plan) -> list[Request]:
        seen: list[Request] = []

        def answer(request: Request) -> str:
            seen.append(request)
            return f"{request.agent} {request.seed % 97}"

        collect(plan, ScriptedEngine(answer), [3, 4], [1, 2])
        return seen

    plan = Plan(EnvSpec("worlds:Roles", {"turns": 3}), protocol=protocol, history=history)
    with_them, without = asked(replace(plan, examples=examples)), asked(plan)
    assert len(with_them) == len(without)
    for long, short in zip(with_them, without, strict=True):
        head = examples_of(examples, long.agent)
        assert len(head) == 4
        assert long.messages == (*head, *short.messages)
        assert long.seed == short.seed


def test_trees_and_resampled_answers_read_them_too(sampled: Any) -> None:
    examples = draw_examples(ROLES, 1, 0)
    seen: list[Request] = []

    class Watched(ScriptedEngine):
        def generate(self, requests: Any) -> Any:
            seen.extend(requests)
            return super().generate(requests)

    engine = Watched(lambda request: str(request.seed % 7))
    collect(Plan(ROLES, examples=examples, tree=True, group_size=2), engine, [1], [1])
    plan = Plan(ROLES, examples=examples, resamples=2)
    (group,) = collect(plan, engine, [1], [1])
    resample(plan, engine, group.episodes)
    assert len(seen) == 2 * 2 + 4 * 2 + 2 * 2 + 2 * 2 * 2
    assert all(request.messages[:2] == examples_of(examples, request.agent) for request in seen)


# --- learning ------------------------------------------------------------------------------------------------------------


def test_only_sampled_answers_are_trained_on(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path), quiet=True)
    groups = trainer.collect()
    assert {group.task for group in groups} == set(trainer.tasks)
    batch = Batch.of(groups, trainer.team.agents)
    assert batch.shape == (4, 2, 2)
    policy = trainer.team.policies["agent_0"]
    for packed in pack_answers(batch, "agent_0", policy):
        (first, *_) = packed.answers
        head = policy.chat.encode(examples_of(trainer.plan.examples, "agent_0"), answer=False)
        assert np.array_equal(packed.ids[: len(head)], head)
        assert first[1] > len(head)
        assert len(packed.answers) == 2
    assert all(episode.num_tokens() <= 2 * 2 * 4 for group in groups for episode in group.episodes)


@pytest.mark.parametrize("newest_only", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_critics_read_them_like_earlier_turns(tiny: Policy, newest_only: bool, state: bool) -> None:
    examples = draw_examples(ROLES, 2, 0)
    (group,) = collect(Plan(ROLES, examples=examples), ScriptedEngine(lambda request: "red"), [1], [1])
    episode = group.episodes[0]
    critic = Critic(tiny.body, tiny.tokenizer)

    def read(episode: Episode, view: tuple[str, ...]) -> str:
        ids = critic.read(episode, 1, view, state=state, newest_only=newest_only).ids
        return str(tiny.tokenizer.decode(ids))

    for view in (("agent_0",), ("agent_0", "agent_1")):
        reading = read(episode, view)
        places = [reading.index(m.text) for a in view for m in examples_of(examples, a) if m.role == "user"]
        assert max(places) < reading.index("Again, agent_0.")
        assert reading.count("assistant") == read(replace(episode, examples={}), view).count("assistant") + 2
    bare = critic.read(replace(episode, examples={}), 1, ("agent_0",))
    critic.max_tokens = len(bare.ids)
    cut = critic.read(episode, 1, ("agent_0",))
    assert np.array_equal(cut.ids, bare.ids)
    assert cut.cut == 2


def test_a_joint_critic_reads_examples_of_unequal_number(tiny: Policy) -> None:
    both = (Message("user", "p"), Message("assistant", "a"))
    examples = (Example(both, "agent_0"), Example((*both, *both), "agent_1"))
    (group,) = collect(Plan(ROLES, examples=examples), ScriptedEngine(lambda request: "red"), [1], [1])
    critic = Critic(tiny.body, tiny.tokenizer)
    assert critic._examples(group.episodes[0], ("agent_0", "agent_1"), False) == [
        ("agent_0: p\nagent_1: p", "agent_0: a\nagent_1: a"),
        ("agent_1: p", "agent_1: a"),
    ]


# --- runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_records_them_and_every_reader_uses_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(config(tmp_path), quiet=True)
    examples = trainer.plan.examples
    run = trainer.run()
    assert recorded_examples(run) == examples
    assert plan_of(run_config(run, {"env.name": "worlds:Roles"}), "eval").examples == examples
    assert plan_of(run_config(run, {"env.name": "worlds:Roles", "run.seed": 9}), "eval").examples == examples
    assert plan_of(run_config(run, {"env.name": "worlds:Roles", "rollout.examples": 0}), "eval").examples == ()
    own = tuple(replace(example, agent=None) for example in examples if example.agent == "agent_1")
    assert recorded_examples(run / "final" / "agent_1") == own
    assert main(["export", str(run), "--agent", "agent_1", str(tmp_path / "one")]) == 0
    assert recorded_examples(tmp_path / "one") == own
    opened = open_run(run)
    opened.export(tmp_path / "all")
    assert recorded_examples(tmp_path / "all" / "agent_1") == own
    prompt = "eval 2, 5: agent_1, name a colour."
    asked: list[Request] = []
    opened.answer("agent_1", prompt)
    engine = opened._loaded[1]  # type: ignore[index]
    generate = engine.generate
    engine.generate = lambda requests: (asked.extend(requests), generate(requests))[1]  # type: ignore[method-assign]
    opened.answer("agent_1", prompt)
    opened.answer("agent_1", asked[0].messages)
    assert asked[0].messages == (*examples_of(examples, "agent_1"), Message("user", prompt)) == asked[1].messages
    capsys.readouterr()
    assert main(["evaluate", str(run), "--env.name", "worlds:Roles", "--json"]) == 0
    reward = json.loads(capsys.readouterr().out)["reward"]["mean"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["evaluation/episodes"] == 3
    assert reward == pytest.approx(last["evaluation/reward"])


def test_a_resumed_run_uses_the_record_although_the_file_that_it_came_from_has_changed(tmp_path: Path) -> None:
    source = tmp_path / "chats.jsonl"
    source.write_text(chat("user", "Name one.", "assistant", "red"))
    changes = {"rollout": {"tasks": 4, "max_tokens": 4, "examples": str(source)}, "run": {"checkpoint_every": 1}}
    whole = Trainer(config(tmp_path / "whole", **changes), quiet=True).run()
    trainer = Trainer(config(tmp_path / "stopped", **changes), quiet=True)
    after_one = trainer._complete

    def stop(record: Any, log: Any, display: Any) -> None:
        after_one(record, log, display)
        if trainer.iteration == 1:
            raise KeyboardInterrupt

    trainer._complete = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    source.write_text(chat("user", "Name two.", "assistant", "blue"))
    resumed = Trainer.resume(trainer.folder, quiet=True)
    assert resumed.plan.examples[0].messages[1].text == "red"
    resumed.run()
    for name in ("policy-agent_0", "critic-team"):
        files = [run / "checkpoints" / "000002" / f"{name}.safetensors" for run in (whole, trainer.folder)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((trainer.folder / "config.json").read_text())["rollout"]["examples"] == str(source)


def test_old_runs_have_no_examples() -> None:
    old = load_config(None, {"env.name": "agree", "rollout.examples": 3}).resolved()
    del old["rollout"]["examples"]
    assert parse_resolved(old).rollout.examples == 0


# --- files and servers ---------------------------------------------------------------------------------------------------


def chat(*words: str, **more: Any) -> str:
    messages = [{"role": role, "content": text} for role, text in zip(words[::2], words[1::2], strict=True)]
    return json.dumps({"messages": messages, **more}) + "\n"


def test_a_file_of_chats(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(chat("user", "q", "assistant", "a") + "\n" + chat("user", "r", "assistant", "b", agent="agent_1", task=4))
    examples = plan_of(config(tmp_path, rollout={"examples": str(path)}), "train").examples
    assert pairs(examples_of(examples, "agent_0")) == [("user", "q"), ("assistant", "a")]
    assert pairs(examples_of(examples, "agent_1"))[2:] == [("user", "r"), ("assistant", "b")]
    assert training_tasks(Plan(ROLES, examples=examples)) == [0, 1, 2, 3, 5]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no chat"),
        ("{", "line 1: Expecting"),
        ("[" * 100_000, "line 1: "),
        ("[]", "line 1: it has no list 'messages'"),
        ("\n" + chat("user", "q"), "line 2: the last message must be the assistant's"),
        (chat("assistant", "q"), "message 0 must have the role 'user'"),
        (chat("user", "q", "user", "q"), "message 1 must have the role 'assistant'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 0 has no text"),
        (chat("user", "q", "assistant", "a", agent="nobody"), "'nobody' is not one of agent_0, agent_1"),
        (chat("user", "q", "assistant", "a", task=True), "'task' is not a whole number"),
        (chat(), "the last message"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        plan_of(config(tmp_path, rollout={"examples": str(path)}), "train")
    assert reason in str(error.value)
    assert str(path) in str(error.value)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: no file is there"):
        read_examples(tmp_path)


def test_a_request_gets_the_examples_once_and_after_its_system_message() -> None:
    examples = (Example((Message("user", "q"), Message("assistant", "a"))), Example((Message("user", "x"),), agent="other"))
    asked, system = Message("user", "now"), Message("system", "s")
    shown = examples[0].messages
    other = (Message("user", "q"), Message("assistant", "b"), asked)
    for messages, wanted in (
        ((asked,), (*shown, asked)),
        ((*shown, asked), (*shown, asked)),
        ((system, asked), (system, *shown, asked)),
        ((system, *shown, asked), (system, *shown, asked)),
        (other, (*shown, *other)),
    ):
        assert with_examples(examples, "agent_0", messages) == wanted
    assert with_examples((), "agent_0", (system, asked)) == (system, asked)


def test_a_server_answers_as_the_run_does(tiny: Policy, tmp_path: Path) -> None:
    """Episodes played over HTTP, whose requests hold the examples, and a bare request read the same prompts as in process."""
    examples = draw_examples(ROLES, 2, 0)
    held, ready = server.listen("127.0.0.1", 0), threading.Event()
    app = server.make_app(tiny, "agent_0", examples=of_agent(examples, "agent_0"))
    threading.Thread(target=server.run, args=(app, held, ready.set), daemon=True).start()
    assert ready.wait(30)
    remote = HttpEngine({"agent_0": endpoint("agent_0", f"http://127.0.0.1:{held.getsockname()[1]}/v1")})
    local = LocalEngine(Team({"agent_0": tiny}))
    plan = Plan(EnvSpec("worlds:Roles", {"agents": 1}), sampling=Sampling(0, max_tokens=4), examples=examples)
    (here,), (there,) = (collect(plan, engine, [1], [1])[0].episodes for engine in (local, remote))
    for turn, other in zip(here.turns, there.turns, strict=True):
        assert np.array_equal(turn.completions["agent_0"].prompt_ids, other.completions["agent_0"].prompt_ids)
    bare = Request("agent_0", here.history("agent_0")[4:5], plan.sampling)
    assert np.array_equal(remote.generate([bare])[0].prompt_ids, here.turns[0].completions["agent_0"].prompt_ids)
    remote.close()
