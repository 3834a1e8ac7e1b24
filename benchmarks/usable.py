"""How often an untrained model gives a usable answer in each built-in environment, with the wording for untrained models.

    python benchmarks/usable.py                       # 40 held-out tasks each, with build/smollm2 (make smollm2)
    python benchmarks/usable.py --tasks 8 agree tldr  # fewer tasks, some environments
    python benchmarks/usable.py --write docs/results/real/usable.json

One answer per task; the agents take turns. The table is deterministic by seed, on one CPU thread, in bfloat16. Temperature,
number of examples and greatest length of an answer are those of `CASES`; examples are drawn from training tasks.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collm import seeds
from collm.engines.kv_cache import Memory
from collm.engines.local import Segment, decode, uniforms_of
from collm.envs.catalogue import EnvSpec
from collm.models.policy import Policy
from collm.models.team import Team
from collm.rollout.examples import draw_examples
from collm.settings.rooms import LoraSettings
from collm.types import Example, Message, Request, Sampling


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    env: str
    options: dict[str, Any]
    examples: int
    temperature: float
    max_tokens: int
    example_options: dict[str, Any] = field(default_factory=dict)
    """Options of the examples that differ, where an environment has one task alone."""
    tried: str = ""
    """What else was tried on training tasks, as usable answers of all."""


BRIDGES = (
    "With earlier wordings, and a scripted player that gave one builder an empty list on small maps: 1 example, "
    "temperature 0.5: 0 of 8 (6 copies); 1 example, 0.8: 2 of 10 (2 copies); 3 examples, 0.5: 3 of 10 (5 copies); "
    "3 examples, 0.8: 4 of 10 (3 copies); 3 examples, 0.7: 3 of 20 (14 copies); maps of 7 x 7, 2 examples, 0.7: 1 of 10 "
    "(5 copies). With the water listed as commands: 5 x 5, 3 examples, 0.5: 2 of 16 (14 copies); 5 x 5, no example, 0.5: "
    "0 of 8; 7 x 7, 2 examples, 0.7: 5 of 8 (1 copy); 7 x 7, 2 examples, 0.5: 6 of 10 (3 copies)."
)
FIELDS = (
    "On 5 x 5 fields, where half of the scripted player's answers for `mineral` have no step: 1 example, temperature 0.5, the "
    "neighbours listed: 3 of 8 (2 copies); 3 examples, 0.5, a format of letters: 2 of 10 (1 copy); 2 examples, 0.5, a fact of "
    "letters: 1 of 10 (2 copies); 3 examples, 0.3: 5 of 10 (3 copies); 0.4 on 40 held-out tasks: 16 (12 copies). With 3 "
    "examples, temperature 0.4 and this wording: 7 x 7: 6 of 10 (no copy); 6 x 6: 8 of 10 (1 copy)."
)
HOUSES = (
    "With earlier wordings, temperature 0.5: 1 example: 4 of 6; 2 examples: 5 of 10; the boxes listed as commands, 1 example: "
    "4 of 8."
)
CASES = (
    Case("agree", {}, 1, 0.5, 8, {"colours": ["white", "black", "brown", "pink"]}),
    Case("quote", {}, 0, 0.7, 14),
    Case("coop_code", {"turns": 1}, 3, 0.5, 40),
    Case("tldr", {}, 0, 0.5, 40),
    Case("bridge_build", {"size": [7, 7], "turns": 1}, 2, 0.6, 64, tried=BRIDGES),
    Case("resource_gathering", {"size": [6, 6], "turns": 1}, 3, 0.4, 48, tried=FIELDS),
    Case("str_build", {"strings": "english", "lengths": [2], "turns": 1}, 1, 0.5, 48),
    Case("house_build", {"size": [4, 3, 4], "turns": 1}, 2, 0.4, 56, tried=HOUSES),
)


@dataclass(frozen=True)
class Judged:
    """One answer: its parts (`TextEnv.num_parts`), how many of them the environment rejected, and whether it copies an
    example."""

    parts: int
    rejected: int
    copied: bool

    @property
    def usable(self) -> bool:
        """The environment accepts it, at most half of its parts are rejected, and it does not copy an example."""
        return self.parts > 0 and 2 * self.rejected <= self.parts and not self.copied


def copies(answer: str, observation: str, shown: Iterable[str]) -> bool:
    """Whether every line of an answer is a line of one example: of an earlier answer, or of the one in the observation."""
    lines = _lines(answer)
    _, found, last = observation.rpartition("for example:")
    return bool(lines) and any(lines <= _lines(example) for example in (*shown, *([last] if found else [])))


def _lines(text: str) -> set[str]:
    return {" ".join(line.lower().split()) for line in re.split(r"\n|(?<=[.!?])\s", text) if line.strip()}


def judge(spec: EnvSpec, task: int, seed: int, agent: str, answer: str, shown: Sequence[str]) -> Judged:
    """Play one turn in which the other agents answer as the scripted player does."""
    made: Any = spec.make("eval")
    observations, _ = made.reset(seed=seed, options={"task": task})
    *_, infos = made.step({**made.scripted_answers(), agent: answer})
    metrics = infos[agent]["metrics"]
    return Judged(made.num_parts(answer), int(metrics["rejected"]), copies(answer, observations[agent], shown))


def measure(case: Case, model: str, tasks: int, seed: int) -> dict[str, Any]:
    """One row of the table, with the first three answers."""
    began, spec = time.monotonic(), EnvSpec(case.env, {**case.options, "wording": "plain"})
    maker = EnvSpec(case.env, {**spec.options, **case.example_options})
    examples = draw_examples(maker, case.examples, seed) if case.examples else ()
    asked = []
    for number in range(tasks):
        env: Any = spec.make("eval")
        task, own = number % env.num_tasks, seeds.derive(seed, "usable", number)
        observations, _ = env.reset(seed=own, options={"task": task})
        agent = env.agents[number % len(env.agents)]
        asked.append((task, own, agent, observations[agent]))
    sampling = Sampling(temperature=case.temperature, max_tokens=case.max_tokens)
    requests = [
        Request(agent, (*_messages(examples, agent), Message("user", text)), sampling, own) for _, own, agent, text in asked
    ]
    agents = env.possible_agents
    answers = answers_of(loaded(agents, model), requests)
    judged = [
        judge(spec, task, own, agent, answer, [e.messages[-1].text for e in examples if e.agent == agent])
        for (task, own, agent, _), answer in zip(asked, answers, strict=True)
    ]
    by_agent = {
        agent: [one.usable for one, (_, _, who, _) in zip(judged, asked, strict=True) if who == agent] for agent in agents
    }
    return {
        "env": case.env,
        "options": case.options,
        "examples": case.examples,
        "temperature": case.temperature,
        "max_tokens": case.max_tokens,
        "tasks": tasks,
        "seed": seed,
        "usable": sum(one.usable for one in judged) / tasks,
        "usable_by_agent": {agent: sum(good) / len(good) for agent, good in by_agent.items() if good},
        "copied": sum(one.copied for one in judged) / tasks,
        "seconds": round(time.monotonic() - began),
        "tried": case.tried,
        "samples": [
            {"agent": agent, "read": text, "wrote": answer, "usable": one.usable}
            for (_, _, agent, text), answer, one in zip(asked[:3], answers, judged)
        ],
    }


def loaded(agents: Sequence[str], model: str) -> Policy:
    team = Team.from_pretrained(dict.fromkeys(agents, model), lora=LoraSettings(rank=1), shared=True, compute="bfloat16")
    return team.policies[agents[0]].for_generation()


@torch.inference_mode()
def answers_of(policy: Policy, requests: Sequence[Request]) -> list[str]:
    """Sample an answer to each request. The beginning that the prompts of one agent share, its examples, is read once."""
    answers: dict[int, str] = {}
    for agent in dict.fromkeys(request.agent for request in requests):
        rows = [i for i, request in enumerate(requests) if request.agent == agent]
        prompts, sampling = [policy.chat.encode(requests[i].messages) for i in rows], requests[rows[0]].sampling
        shared = min(prompts, key=len)[:-1]
        while any((prompt[: len(shared)] != shared).any() for prompt in prompts):
            shared = shared[:-1]
        ((ids, _),) = decode([Segment(policy, [shared], torch.zeros(1, 1), Sampling(max_tokens=1), after=(read := Memory()))])
        layers, known = read.find(np.concatenate([shared, ids, ids])), Memory()
        assert layers is not None  # the row that was just read
        known.add(shared, layers)
        uniforms = np.stack([uniforms_of(requests[i].seed, sampling.max_tokens) for i in rows])
        found = decode([Segment(policy, prompts, torch.from_numpy(uniforms), sampling, known)])
        answers.update((i, policy.chat.read(ids.tolist())[0]) for i, (ids, _) in zip(rows, found, strict=True))
    return [answers[i] for i in range(len(requests))]


def _messages(examples: Sequence[Example], agent: str) -> list[Message]:
    return [message for example in examples if example.agent == agent for message in example.messages]


def row(found: dict[str, Any]) -> str:
    by_agent = ", ".join(f"{agent} {share:.2f}" for agent, share in found["usable_by_agent"].items())
    return (
        f"| {found['env']} | {found['examples']} | {found['temperature']} | {found['max_tokens']} | {found['usable']:.2f} "
        f"| {by_agent} | {found['copied']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("envs", nargs="*", help="default: all")
    parser.add_argument("--model", default="build/smollm2")
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, help="instead of those of each row")
    parser.add_argument("--temperature", type=float, help="instead of that of each row")
    parser.add_argument("--write", type=Path, help="a JSON file; rows of other environments in it are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    changed = {name: value for name in ("examples", "temperature") if (value := getattr(options, name)) is not None}
    kept = json.loads(options.write.read_text(encoding="utf-8")) if options.write and options.write.exists() else []
    rows = {found["env"]: found for found in kept}
    print("| environment | examples | temperature | max_tokens | usable | by agent | copies |\n|---|---|---|---|---|---|---|")
    for case in CASES:
        if not options.envs or case.env in options.envs:
            rows[case.env] = measure(Case(**{**vars(case), **changed}), options.model, options.tasks, options.seed)
            print(row(rows[case.env]), flush=True)
            if options.write:
                options.write.parent.mkdir(parents=True, exist_ok=True)
                options.write.write_text(json.dumps([*rows.values()], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
