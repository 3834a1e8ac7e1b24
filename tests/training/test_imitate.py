"""Imitation: maximum likelihood of recorded answers, through the learner; its folder trains and serves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from collm.cli.main import main
from collm.errors import ConfigError, RunError
from collm.learning.learner import total
from collm.models.chat import Chat
from collm.models.policy import Policy
from collm.models.team import Team
from collm.rollout.examples import play_scripted
from collm.rollout.plan import Plan
from collm.runs.examples import read_examples, recorded_examples
from collm.runs.weights import load_agent
from collm.settings.load import load_config, parse_config
from collm.settings.rooms import Config
from collm.training import imitate as module
from collm.training.imitate import answer_ids, imitate, recorded, step
from collm.training.trainer import Trainer
from collm.types import Message

RECIPE = """
[run]
threads = 1
device = "cpu"
trackers = []
iterations = 1
[env]
name = "worlds:Roles"
turns = 2
tasks = 3
[rollout]
tasks = 4
max_tokens = 6
[learner]
lr = 1e-3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "roles.toml"
    path.write_text(RECIPE + "[evaluation]\nevery = 1\n")
    return path


def config(recipe: Path, **overrides: Any) -> Config:
    changed = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(recipe, {"run.folder": str(recipe.parent / "runs"), **changed})


def test_likelihood_and_reward_rise_and_the_folder_trains_and_serves(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = recipe.parent / "team"
    shown = recipe.parent / "shown.jsonl"
    shown.write_text(
        '{"agent": "agent_1", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    )
    words = ["imitate", str(recipe), "--steps", "40", "--out", str(out), "--json"]
    assert main([*words, "--rollout.examples", str(shown)]) == 0
    found = capsys.readouterr()
    assert found.err.startswith("loading")
    assert "left" in found.err
    record = json.loads(found.out)
    assert record["loss"][1] < 0.2 * record["loss"][0]
    assert record["reward"][0] < 0.2
    assert record["reward"][1] == 1
    assert {place.name for place in out.iterdir()} == {"agent_0", "agent_1"}
    assert record["models"] == {agent: str(out / agent) for agent in ("agent_0", "agent_1")}
    (example,) = recorded_examples(out / "agent_1")
    assert [message.text for message in example.messages] == ["q", "a"]
    assert recorded_examples(out / "agent_0") == ()
    assert load_agent(out / "agent_1", "agent_1", "final")[1] == "exported weights"
    starts = {f"team.models.{agent}": place for agent, place in record["models"].items()}
    run = Trainer(
        load_config(recipe, {"run.folder": str(recipe.parent), "rollout.examples": str(shown), **starts}), quiet=True
    ).run()
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["evaluation/reward"] == 1
    with pytest.raises(RunError, match="exists already"):
        imitate(config(recipe), steps=1, out=out)


@pytest.mark.parametrize("kind", ["adapters", "shared policy"])
def test_adapters_and_shared_policies(recipe: Path, kind: str) -> None:
    settings = {"adapters": {"team__lora": {"rank": 4}, "learner__lr": 3e-3}, "shared policy": {"team__shared": True}}[kind]
    done = imitate(config(recipe, **settings), steps=25)
    assert done.folder == recipe.parent / "runs" / "worlds.Roles-collm-cc-seed0-imitated"
    assert done.losses[-1] < 0.5 * done.losses[0]
    assert len(set(done.starts.values())) == (1 if kind == "shared policy" else 2)
    starts = {f"team__models__{agent}": str(place) for agent, place in done.starts.items()}
    again = imitate(config(recipe, **settings, **starts), steps=1, out=recipe.parent / "again")
    assert again.losses[0] < 0.6 * done.losses[0]
    assert again.reward is not None
    assert done.reward is not None
    assert again.reward[0] == done.reward[1]


def test_chats_of_a_file(recipe: Path) -> None:
    path = recipe.parent / "chats.jsonl"
    chats = [
        {"agent": agent, "messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": word}]}
        for agent, word in (("agent_0", "red"), ("agent_1", "blue"))
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    done = imitate(config(recipe, evaluation__every=0), steps=25, data=path)
    assert done.reward is None
    assert done.losses[-1] < 0.1 * done.losses[0]
    for agent, word in (("agent_0", "red"), ("agent_1", "blue")):
        policy = Policy.from_pretrained(str(done.folder / agent))
        ids = policy.chat.encode((Message("user", "Say it."),))
        wanted = answer_ids(policy.chat, (Message("user", "Say it."),), word)
        row = torch.from_numpy(np.concatenate([ids, wanted])[None]).long()
        likeliest = policy.logits(policy.hidden(row)[0]).argmax(-1)
        assert likeliest[len(ids) - 1 : -1].tolist() == wanted.tolist()


def test_a_chat_without_a_name_is_every_agents(recipe: Path) -> None:
    path = recipe.parent / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
    plan = Plan(module.plan_of(config(recipe), "train").env, agents=("agent_0", "agent_1"))
    assert [episode.agents for episode in module.chats_of(read_examples(path), plan)] == [("agent_0",), ("agent_1",)]
    with pytest.raises(ConfigError, match="Give chats of other"):
        module.chats_of([replace(read_examples(path)[0], agent="agent_0")], replace(plan, agents=("other",)))


def test_the_loss_is_the_mean_negative_log_likelihood_of_every_answer(recipe: Path) -> None:
    """By hand, with transformers alone: prompt, answer and end of turn as the template writes them."""
    settings = config(recipe)
    team = Team.from_pretrained({"agent_0": "tiny", "agent_1": "tiny"})
    plan = module.plan_of(settings, "train", team.agents)
    episodes = [recorded(play_scripted(plan, task, task), team, plan) for task in (0, 1)]
    policy, nats, num_tokens = team.policies["agent_0"], 0.0, 0
    for episode in episodes:
        for t, turn in enumerate(episode.turns):
            chat = [m for past in episode.turns[:t] for m in
                    (("user", past.observations["agent_0"]), ("assistant", past.completions["agent_0"].text))]  # fmt: skip
            chat = [{"role": r, "content": c} for r, c in [*chat, ("user", turn.observations["agent_0"])]]
            said = [*chat, {"role": "assistant", "content": turn.completions["agent_0"].text}]
            prompt = policy.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            whole = policy.tokenizer.apply_chat_template(said, return_dict=False)
            end = next(i for i in range(len(prompt), len(whole)) if whole[i] in policy.stop_ids)
            ids = torch.tensor([whole[: end + 1]])
            with torch.no_grad():
                logp = policy.model(input_ids=ids).logits.float().log_softmax(-1)
            nats -= sum(logp[0, i - 1, ids[0, i]].item() for i in range(len(prompt), end + 1))
            num_tokens += end + 1 - len(prompt)
    learner = module._learner(settings, team, 1)
    metrics: list[dict[str, float]] = []
    every = learner.hands.all
    learner.hands.all = lambda *a: (metrics.append(total(found := every(*a))), found)[1]  # type: ignore[method-assign]
    loss = step(learner, episodes, 0)
    assert metrics[0]["agent_0/loss"] == pytest.approx(nats / 4, rel=1e-4)
    assert metrics[0]["agent_0/entropy_estimate"] == pytest.approx(nats / num_tokens, rel=1e-4)
    assert loss == pytest.approx((metrics[0]["agent_0/entropy_estimate"] + metrics[0]["agent_1/entropy_estimate"]) / 2)


def test_an_answer_has_one_end_of_turn(tiny: Policy) -> None:
    history = (Message("user", "q"), Message("assistant", "a"), Message("user", "r"))
    ids = answer_ids(tiny.chat, history, "red <|im_end|>")
    assert [i for i in ids if i in tiny.stop_ids] == [ids[-1]]
    assert tiny.chat.decode(ids[:-1]) == "red <|im_end|>"

    class Odd(Chat):
        """A template whose prompt opens a block that a finished answer lacks."""

        def encode(self, messages: Any, *, answer: bool = True) -> Any:
            ids = super().encode(messages, answer=answer)
            return np.concatenate([ids, ids[:1]]) if answer else ids

    odd = Odd(tiny.tokenizer, tiny.stop_ids)
    assert answer_ids(odd, history, "red").tolist() == answer_ids(tiny.chat, history, "red").tolist()


def test_an_environment_without_a_scripted_player_is_refused(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"Luck has no scripted player for agent_0, agent_1.*--data FILE"):
        imitate(parse_config({"env": {"name": "worlds:Luck"}, "run": {"folder": str(recipe.parent)}}), steps=1)


def test_an_answer_beyond_the_models_positions_is_refused(recipe: Path) -> None:
    path = recipe.parent / "chats.jsonl"
    long = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "red " * 5000}]}
    path.write_text(json.dumps(long))
    with pytest.raises(ConfigError, match="beyond the model's"):
        imitate(config(recipe, evaluation__every=0), steps=1, data=path)
