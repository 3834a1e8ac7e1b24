"""Imitation: a supervised warm-up of a team on recorded answers.

It is maximum likelihood, and is computed as the policy loss with every advantage 1:

    L = - 1/num_answers  sum_s log pi(a_s | h_s),   a_s a recorded answer with its end-of-turn token

The answers are those of the environment's scripted player on training tasks, or of chats from a file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from collm import seeds
from collm.engines.base import Engine
from collm.engines.catalogue import make_engine
from collm.errors import ConfigError
from collm.learning.batch import Batch
from collm.learning.credit import Credit
from collm.learning.learner import PartsLearner, total
from collm.learning.pack import starts_with
from collm.models.chat import Chat
from collm.models.team import Team
from collm.rollout.collector import LocalCollector
from collm.rollout.examples import play_scripted
from collm.rollout.plan import Plan
from collm.runs.checkpoint import save_team
from collm.runs.examples import read_examples
from collm.runs.weights import refuse_existing
from collm.settings.rooms import AlgorithmSettings, Config, CriticSettings
from collm.training.assemble import make_learner, make_team, prepare, with_remote
from collm.training.display import Display
from collm.training.evaluate import evaluate
from collm.training.task import check_fit, draw_tasks, plan_of, trained_agents, training_tasks
from collm.types import Completion, Episode, Example, Group, Ids, Message, Sampling, Turn, examples_of


@dataclass(frozen=True, slots=True)
class Imitation:
    """The result of `imitate`."""

    folder: Path
    """One Hugging Face folder per agent, named after it."""
    starts: dict[str, Path]
    """Agent -> the folder to start it from; agents that share a policy name the same one."""
    losses: list[float]
    """Per step, nats per token of recorded answers, before the step; mean over policies."""
    reward: tuple[float, float] | None
    """Held-out reward before and after, as `collm evaluate` reports it; None with evaluation.every=0."""


def imitate(
    config: Config, *, steps: int = 50, data: Path | None = None, out: Path | None = None, display: Display | None = None
) -> Imitation:
    """Train the team of a config on recorded answers and write it to `out`, from which `team.models` starts.

    Each step takes `rollout.tasks` episodes of the scripted player, or as many chats, and makes one optimizer step per policy
    with the config's learner. Raises ConfigError for an environment without a scripted player, or a bad file.

    Args: data: a file of chats (JSON lines) instead of the scripted player. out: default: runs/NAME-imitated.
    """
    config = prepare(config.in_one_process())
    folder = out or Path(config.run.folder) / f"{config.run_name}-imitated"
    refuse_existing(folder)
    agents = check_fit(config)
    plan = plan_of(config, "train", trained_agents(config, agents))
    tasks = training_tasks(plan)
    chats = None if data is None else chats_of(read_examples(data, agents), plan)
    if chats is None:
        play_scripted(plan, tasks[0], 0)  # fail before a model is loaded
    team = make_team(config, agents)
    learner, engine = _learner(config, team, steps), with_remote(make_engine(team, config.rollout), config)
    display = display or Display(steps, quiet=True)
    losses: list[float] = []
    before = _held_out(config, engine, plan, display, "before")
    display.started = time.monotonic()
    with display.phase("imitating"):
        for done in range(steps):
            drawn = draw_tasks(config.run.seed, done, config.rollout.tasks, tasks if chats is None else range(len(chats)))
            keys = [seeds.derive(config.run.seed, "imitate", done, i) for i in range(len(drawn))]
            played = [play_scripted(plan, t, k) if chats is None else chats[t] for t, k in zip(drawn, keys, strict=True)]
            losses.append(step(learner, [recorded(episode, team, plan) for episode in played], done))
            display.update(done + 1, {"loss": losses[-1]})
    engine.load(team)
    after = _held_out(config, engine, plan, display, "after")
    engine.close()
    save_team(folder, team, plan.examples)
    first = {id(policy): agent for agent, policy in team.members().items()}
    starts = {agent: folder / first[id(policy)] for agent, policy in team.policies.items()}
    return Imitation(folder, starts, losses, None if before is None or after is None else (before, after))


def step(learner: PartsLearner, episodes: Sequence[Episode], number: int) -> float:
    """One optimizer step per policy; returns nats per token of the recorded answers before it, mean over policies."""
    batch = Batch.of([Group(episode.task, [episode]) for episode in episodes], learner.agents)
    if not batch.episodes:
        raise ConfigError(f"no episode of the scripted player was played to its end: {episodes[0].failure}")
    credit = Credit(batch.live_ENT, torch.zeros(batch.shape), torch.zeros(batch.shape))
    metrics = total(learner.hands.all("learn", batch, number, credit))
    return float(np.mean([value for name, value in metrics.items() if name.endswith("/entropy_estimate")]))


def chats_of(examples: Sequence[Example], plan: Plan) -> list[Episode]:
    """Each chat as an episode of its agent, or of every trained agent."""
    episodes = []
    for number, example in enumerate(examples):
        texts = [message.text for message in example.messages]
        for agent in plan.agents or () if example.agent is None else (example.agent,):
            pairs = zip(texts[::2], texts[1::2], strict=True)
            turns = [Turn({agent: seen}, {agent: Completion(agent, said)}, 0.0, 0.0) for seen, said in pairs]
            shown = {agent: examples_of(plan.examples, agent)}
            episodes.append(Episode(number, 0, (agent,), turns=turns, examples=shown))
    kept = [episode for episode in episodes if set(episode.agents) <= set(plan.agents or ())]
    if not kept:
        raise ConfigError(f"no chat is of an agent that is trained here. Give chats of {', '.join(plan.agents or ())}.")
    return kept


def recorded(episode: Episode, team: Team, plan: Plan) -> Episode:
    """The episode with the token ids of its answers, as if the team had sampled them."""
    turns: list[Turn] = []
    for turn in episode.turns:
        before = replace(episode, turns=turns, observations=turn.observations)
        completions = dict(turn.completions)
        for agent in completions.keys() & team.policies.keys():
            chat, history = team.policies[agent].chat, before.history(agent, plan.history)
            prompt, ids = chat.encode(history), answer_ids(chat, history, completions[agent].text)
            if len(prompt) + len(ids) > chat.max_positions:
                raise ConfigError(
                    f"an answer of {agent} to imitate (task {episode.label or episode.task}) ends at token "
                    f"{len(prompt) + len(ids)}, beyond the model's {chat.max_positions}. Give shorter chats or fewer turns."
                )
            logprobs = np.zeros(len(ids), dtype=np.float32)
            completions[agent] = replace(completions[agent], prompt_ids=prompt, token_ids=ids, logprobs=logprobs)
        turns = [*turns, replace(turn, completions=completions)]
    return replace(episode, turns=turns)


def answer_ids(chat: Chat, history: Sequence[Message], text: str) -> Ids:
    """(L,) token ids of an answer as the chat template writes it, up to its end-of-turn token."""
    prompt, whole = chat.encode(history), chat.encode((*history, Message("assistant", text)), answer=False)
    ends = [i for i, token in enumerate(whole) if token in chat.stop_ids]
    if starts_with(whole, prompt) and ends and ends[-1] >= len(prompt):
        end = next(i for i in ends if i >= len(prompt))
        return whole[len(prompt) : end + 1]
    end = int(whole[ends[-1]]) if ends else chat.stop_ids[0]
    return np.array([*chat.text_ids(text), end], dtype=np.int32)


def _learner(config: Config, team: Team, steps: int) -> PartsLearner:
    """A learner of the config's policies without critics, at temperature 1 over the whole vocabulary."""
    plain = AlgorithmSettings.model_validate({"name": "mareinforce"})
    run = config.run.model_copy(update={"iterations": steps})
    changed = config.model_copy(update={"algorithm": plain, "critic": CriticSettings(), "run": run})
    return make_learner(team, changed, Sampling())


def _held_out(config: Config, engine: Engine, plan: Plan, display: Display, when: str) -> float | None:
    """The held-out reward now; None if the config disables evaluation."""
    if not config.evaluation.every:
        return None
    with display.phase(f"evaluating {when} imitation", engine):
        collector = LocalCollector(engine, shards=config.rollout.shards)
        reward = evaluate(config, collector, examples=plan.examples).summary()["evaluation/reward"]
    engine.rest()
    display.say(f"held-out {when} imitation: reward {reward:.3f}")
    return float(reward)
