"""Properties of a config's environment: its plan, agents, number of tasks and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collm import seeds
from collm.envs import gate
from collm.envs.catalogue import EnvSpec
from collm.errors import ConfigError
from collm.rollout.examples import draw_examples
from collm.rollout.plan import Plan
from collm.rollout.protocols import PROTOCOLS
from collm.runs.examples import read_examples
from collm.settings.rooms import Config
from collm.types import Episode, Example, Sampling


def plan_of(
    config: Config, split: str, agents: tuple[str, ...] | None = None, examples: tuple[Example, ...] | None = None
) -> Plan:
    """The plan of a split's episodes under a config.

    agents: those that are trained; default: all. examples: used instead of those that the config draws or names.
    """
    rollout, evaluation, algorithm = config.rollout, config.evaluation, config.algorithm
    training = split == "train"
    return Plan(
        env_of(config),
        split=split,
        protocol=rollout.protocol,
        history=rollout.history,
        max_turns=rollout.max_turns,
        sampling=Sampling(
            temperature=rollout.temperature if training else evaluation.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_tokens=rollout.max_tokens,
        ),
        group_size=algorithm.group_size if training else 1,
        tree=training and algorithm.tree,
        resamples=algorithm.resamples if training and algorithm.baseline == "counterfactual" else 0,
        no_op=training and algorithm.teammates == "replay",
        examples=find_examples(config) if examples is None else examples,
        agents=agents,
    )


def env_of(config: Config) -> EnvSpec:
    return EnvSpec(config.env.name, config.env.options)


def find_examples(config: Config) -> tuple[Example, ...]:
    """The examples that `rollout.examples` draws or names. Raises ConfigError."""
    wanted, spec = config.rollout.examples, env_of(config)
    if isinstance(wanted, str):
        return read_examples(Path(wanted), gate.agents_of(spec.make("train")))
    return draw_examples(spec, wanted, config.run.seed) if wanted else ()


def training_tasks(plan: Plan) -> list[int]:
    """The tasks that training plays: all but those of the examples, unless no task is left then."""
    taken = {example.task for example in plan.examples}
    everything = range(num_tasks(plan))
    return [task for task in everything if task not in taken] or list(everything)


def num_tasks(plan: Plan) -> int:
    """Number of tasks of a split; 1 for an environment without `num_tasks`."""
    return gate.num_tasks_of(plan.env.make(plan.split))


def check_fit(config: Config) -> tuple[str, ...]:
    """The environment's agents. Raises ConfigError if algorithm, protocol or models do not fit them."""
    env = env_of(config).make("train")
    agents = tuple(env.possible_agents)
    PROTOCOLS[config.rollout.protocol](env, Episode(0, 0, agents))
    name = config.algorithm.name
    if name in ("ac", "grpo") and len(agents) != 1:
        other = {"ac": "collm-cc", "grpo": "magrpo"}[name]
        raise ConfigError(
            f"algorithm.name={name!r} is for one agent, but {config.env.name} has {len(agents)}: {', '.join(agents)}. "
            f"Set algorithm.name={other!r}, or make the task for one agent."
        )
    lora = config.team.lora
    for setting, named in (("team.models", config.team.models), ("team.lora.agents", (lora and lora.agents) or ())):
        unknown = sorted(set(named) - set(agents))
        if unknown:
            raise ConfigError(f"{setting} names {', '.join(unknown)}, but the task's agents are {', '.join(agents)}.")
    return agents


def trained_agents(config: Config, agents: tuple[str, ...]) -> tuple[str, ...]:
    """The agents that are not on servers. Raises ConfigError if there is none."""
    local = tuple(agent for agent in agents if agent not in config.team.remote)
    if not local:
        raise ConfigError(
            "every agent of team.models is a server: nothing is left to train here, and log-probs of answers to learn from are "
            "a local model's. Give one agent a model, or play such a team with `collm play`."
        )
    return local


def metric_names(config: Config) -> tuple[str, ...]:
    """Names of the environment metrics that regressions read: those reported after one turn of empty answers, without
    diagnostics."""
    env = env_of(config).make("train")
    gate.reset(env, 0, 0)
    returned: Any = env.step(dict.fromkeys(env.agents, ""))  # only names are read here
    infos = returned[-1] if isinstance(returned, tuple) and isinstance(returned[-1], Mapping) else {}
    reported = [info.get("metrics") for info in infos.values() if isinstance(info, Mapping)]
    names = {str(name) for metrics in reported if isinstance(metrics, Mapping) for name in metrics}
    return tuple(sorted(names - frozenset(getattr(env, "diagnostics", ()))))


def drawn(config: Config, iteration: int, tasks: Sequence[int]) -> tuple[list[int], list[int]]:
    """The tasks that an iteration plays, of these, and the key of each: a function of the seed and the iteration."""
    chosen = draw_tasks(config.run.seed, iteration, config.rollout.tasks, tasks)
    return chosen, [seeds.derive(config.run.seed, "episode", iteration, i) for i in range(len(chosen))]


def draw_tasks(seed: int, iteration: int, count: int, tasks: Sequence[int]) -> list[int]:
    """`count` of these tasks for one iteration: a new random order of all of them in every pass."""
    drawn: list[int] = []
    total = len(tasks)
    position, end = iteration * count, (iteration + 1) * count
    while position < end:
        order = list(tasks)
        seeds.stream(seed, "tasks", position // total).shuffle(order)
        drawn += order[position % total :][: end - position]
        position = iteration * count + len(drawn)
    return drawn
