"""Weights of a run: finding them, loading a team or one agent, and exporting agents as Hugging Face folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from collm.errors import ConfigError, RunError
from collm.models.blueprint import Blueprint, saved_policies
from collm.runs.directory import checkpoints, command, run_config
from collm.runs.examples import of_agent, write_examples
from collm.runs.files import is_leftover, replacing, write_text
from collm.settings.rooms import Config
from collm.types import Example

if TYPE_CHECKING:  # torch is loaded where a model is
    from collm.models.policy import Policy
    from collm.models.team import Team

EMPTY: Mapping[str, str] = {}
CARD = "README.md"
"""File of an exported folder: its model card."""


def find_weights(run: Path, which: str) -> tuple[Path | None, str]:
    """(folder of a run's weights or None for the untrained team, description of the weights).

    `which`: "final", "best" (by held-out reward), "start", or a number of iterations. Raises RunError or ConfigError.
    """
    if which == "start":
        return None, "untrained team"
    if which == "final":
        if not (run / "final").is_dir():
            raise RunError(
                f"run {str(run)!r} has no final weights yet: finish it with `{command('collm', 'train', '--resume', run)}`, "
                "or use --checkpoint best."
            )
        return run / "final", "final weights"
    saved = checkpoints(run)
    kept = ", ".join(str(int(path.name)) for path in saved) or "none"
    if which == "best":
        number = best_iteration(run, saved)
    elif which.isascii() and which.isdigit():
        number = int(which)
    else:
        raise ConfigError(f"--checkpoint {which!r} is not final, best, start, or a number of iterations (saved: {kept}).")
    if number == 0:
        return None, "untrained team"
    folder = run / "checkpoints" / f"{number:06d}"
    if folder not in saved:
        raise RunError(
            f"run {str(run)!r} has no checkpoint after {number} iterations; saved: {kept}. Name one of these, or final."
        )
    return folder, f"weights after {number} iterations" + (" (best)" if which == "best" else "")


def best_iteration(run: Path, saved: list[Path]) -> int:
    """The iteration with the best held-out reward, from the newest checkpoint's state. Raises RunError if it is not there."""
    if not saved:
        raise RunError(
            f"run {str(run)!r} has no checkpoint yet: continue it with `{command('collm', 'train', '--resume', run)}`."
        )
    path = saved[-1] / "state.json"
    try:
        best = json.loads(path.read_bytes())["best"]
        number = None if best is None else int(best[1])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"{str(path)!r} cannot be read: {error!r}. Name another: --checkpoint N or final.") from error
    if number is None:
        raise RunError(f"run {str(run)!r} has made no held-out evaluation, so no checkpoint is best. Use --checkpoint final.")
    return number


def load_team(config: Config, weights: Path | None, *, agents: Sequence[str] | None = None) -> Team:
    """The team of a config, untrained or with weights of a run's `final` or checkpoint folder. Raises RunError or ConfigError.

    agents: load only these agents; environment and data are not needed then.
    """
    from safetensors import SafetensorError

    from collm.runs.checkpoint import load_policies
    from collm.training.assemble import make_team, resolve_device
    from collm.training.task import check_fit, trained_agents

    run = config.run.model_copy(update={"device": resolve_device(config.run.device)})
    config = config.model_copy(update={"run": run})
    if agents is None:
        agents = trained_agents(config, check_fit(config))
    else:
        _check_agents(config, weights, agents)
    names = tuple(agents)
    if weights is None:
        return make_team(config, names)
    try:
        if weights.name == "final":
            return _load_final(config, weights, names)
        team = make_team(config, names)
        load_policies(weights, {_saved_as(config, name, weights): policy for name, policy in team.members().items()})
        return team
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{str(weights)!r} cannot be read: {error}. Choose other weights with --checkpoint.") from error


def _load_final(config: Config, final: Path, agents: tuple[str, ...]) -> Team:
    """The team of a `final` folder: whole models from their folders, adapters on the base that the run's settings name."""
    from collm.models.sources import is_adapter
    from collm.training.assemble import make_team

    adapters = {agent for agent in agents if is_adapter(final / agent)}
    for agent in agents:
        for name in (*([] if agent in adapters else ["config.json"]), "tokenizer_config.json"):
            if not (final / agent / name).is_file():
                raise ValueError(f"it lacks {agent}/{name}")
    models = {**config.team.models, **{agent: str(final / agent) for agent in agents if agent not in adapters}}
    team = make_team(config.model_copy(update={"team": config.team.model_copy(update={"models": models})}), agents)
    for agent, policy in team.members().items():
        if policy.adapter is not None:
            policy.adapter.load(final / agent)
    return team


def _check_agents(config: Config, weights: Path | None, agents: Sequence[str]) -> None:
    """Raise ConfigError where an agent is not one of the run's trained agents, if these are known."""
    everyone = agents if weights is None else saved_agents(weights, shared=config.team.shared)
    for agent in agents:
        if agent in config.team.remote or (everyone and agent not in everyone):
            raise no_agent(config, agent, everyone)


def no_agent(config: Config, agent: str, everyone: Iterable[str]) -> ConfigError:
    """The error for an agent that is not one of `everyone`, the run's trained agents."""
    elsewhere = f" (on a server: {', '.join(config.team.remote)})" if config.team.remote else ""
    return ConfigError(f"no agent {agent!r} in this run; its agents are {', '.join(everyone)}{elsewhere}.")


def saved_agents(weights: Path, *, shared: bool = False) -> tuple[str, ...]:
    """The agents whose weights a run's `final` or checkpoint folder holds.

    A checkpoint names only the first of several agents that share weights. With `shared` the names are therefore read from
    `final`; they are unknown (empty) before it exists.
    """
    final = weights if weights.name == "final" else weights.parents[1] / "final"
    if weights.name == "final" or shared:
        places = sorted(final.iterdir()) if final.is_dir() else []
        return tuple(place.name for place in places if place.is_dir() and not is_leftover(place.name))
    return _policies(weights)


def _policies(checkpoint: Path) -> tuple[str, ...]:
    return saved_policies(path.stem for path in sorted(checkpoint.glob("*.safetensors")))


def _saved_as(config: Config, agent: str, weights: Path) -> str:
    """The name under which a checkpoint holds an agent's weights: its own, or that of the first agent that shares them."""
    saved = _policies(weights)
    return agent if agent in saved else Blueprint.of(config, (*saved, agent)).policy_of(agent).name


def load_agent(source: Path, agent: str, checkpoint: str, *, device: str = "") -> tuple[Policy, str]:
    """(policy, description of its weights) of one agent of a run directory, or of an exported folder.

    device: replaces the run's own. Raises RunError or ConfigError.
    """
    if not source.is_dir():
        raise RunError(f"{str(source)!r} is neither a run directory nor an exported folder.")
    if (source / "tokenizer_config.json").is_file():
        from collm.models.policy import Policy
        from collm.models.trial import try_policy
        from collm.training.assemble import resolve_device

        if checkpoint != "final":
            raise ConfigError(
                f"--checkpoint {checkpoint} is for run directories; {str(source)!r} holds one model. Leave it out."
            )
        policy = Policy.from_pretrained(str(source), device=resolve_device(device or "auto"))
        try_policy(policy)
        return policy, "exported weights"
    config = run_config(source, {"run.device": device} if device else {}, playing=False)
    weights, what = find_weights(source, checkpoint)
    return load_team(config, weights, agents=(agent,)).policies[agent], what


def refuse_existing(target: Path) -> None:
    """Raise RunError if the folder that an export would write exists already."""
    if os.path.lexists(target):
        raise RunError(f"{str(target)!r} exists already; name a folder that does not.")


def export(policy: Policy, target: Path, examples: Sequence[Example] = (), *, merged: bool = False, card: str = "") -> None:
    """Write a Hugging Face folder with the agent's examples, atomically: a whole model, or an adapter in PEFT's format.

    An adapter names its base. merged: write a whole model in any case; an adapter is merged into its base. card: the text of
    README.md; without a text there is none. Raises SaveError.
    """
    from collm.runs.checkpoint import failing_as_os_errors

    with replacing(target) as aside, failing_as_os_errors():
        _write(policy, aside, examples, merged, card)


def export_team(
    team: Team, target: Path, examples: Sequence[Example] = (), *, merged: bool = False, cards: Mapping[str, str] = EMPTY
) -> None:
    """Write one such folder for every agent, named after it, atomically. Raises SaveError."""
    from collm.runs.checkpoint import failing_as_os_errors

    with replacing(target) as aside, failing_as_os_errors():
        aside.mkdir()
        for agent, policy in team.policies.items():
            _write(policy, aside / agent, of_agent(examples, agent), merged, cards.get(agent, ""))


def _write(policy: Policy, folder: Path, examples: Sequence[Example], merged: bool, card: str) -> None:
    folder.mkdir()
    if card:
        write_text(folder / CARD, card)
    write_examples(folder, examples)
    if merged and policy.adapter is not None:
        _merge(policy, folder)
    else:
        policy.save(folder)


def _merge(policy: Policy, folder: Path) -> None:
    """Write an adapter merged into its base as one float32 model."""
    import torch
    from peft import AutoPeftModelForCausalLM

    from collm.models.policy import spell_as_before

    apart = folder / ".adapter"
    policy.save(apart)
    model = AutoPeftModelForCausalLM.from_pretrained(apart, dtype=torch.float32, trust_remote_code=False).merge_and_unload()
    shutil.rmtree(apart)
    model.save_pretrained(folder)
    policy.chat.save(folder)
    spell_as_before(folder)
