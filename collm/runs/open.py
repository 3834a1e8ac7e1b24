"""A run opened from Python: settings, metrics, episodes, and the team, to generate answers or to export.

    run = collm.open_run("runs/demo")
    run.metrics[-1]["reward/raw"]
    for episode in run.episodes(evaluation=True):
        print(episode["iteration"], episode["label"], episode["score"])
    run.answer("builder_0", "Build HE with a teammate who ...")

Torch is imported only when a team is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collm.errors import EngineError, RunError
from collm.runs.directory import checkpoints, episode_files, read_settings, run_config
from collm.runs.examples import of_agent, recorded_examples, with_examples
from collm.runs.read import Record, read_episodes, read_metrics
from collm.runs.weights import (
    export,
    export_team,
    find_weights,
    load_team,
    no_agent,
    refuse_existing,
    saved_agents,
)
from collm.settings.rooms import Config
from collm.types import Message, Request, Sampling, encodable

if TYPE_CHECKING:
    from collm.engines.local import LocalEngine
    from collm.models.team import Team


def open_run(path: str | Path, *, overrides: Mapping[str, Any] | None = None) -> Run:
    """Open a run directory, finished or not.

    overrides: `{"room.key": value}`, settings that replace the run's own when a team is loaded, as in `collm evaluate`. The
    device defaults to the best one of this machine. If the environment is not built in and the agents' names are not known
    from saved weights, `env.name` must be given here: an environment is code, and a run directory can come from elsewhere.
    Raises: RunError where `path` is not a run directory, or its settings are damaged.
    """
    folder = Path(path)
    return Run(folder, read_settings(folder), overrides)


class Run:
    """A run directory. Metrics are read once and cached; to see the progress of a live run, open it again.

    Weights are named "final", "best" (by held-out reward), "start" (untrained) or by a number of iterations.
    """

    folder: Path
    config: Record
    """All settings of `config.json`: room -> setting -> value."""

    def __init__(self, folder: Path, config: Record, overrides: Mapping[str, Any] | None = None):
        self.folder = folder
        self.config = config
        self._overrides = dict(overrides or {})
        self._loaded: tuple[str, LocalEngine] | None = None

    def __repr__(self) -> str:
        return f"<Run {str(self.folder)!r}: {self.config['env']['name']}, {self.config['algorithm']['name']}>"

    @property
    def name(self) -> str:
        return encodable(self.folder.resolve().name)

    @property
    def planned(self) -> int:
        """Number of iterations of the whole run, `run.iterations`."""
        return int(self.config["run"]["iterations"])

    @cached_property
    def metrics(self) -> list[Record]:
        """One record per iteration; record 0 is before training. Raises RunError where the file is damaged."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def checkpoints(self) -> list[int]:
        """Iterations after which a checkpoint was kept."""
        return [int(path.name) for path in checkpoints(self.folder)]

    def evaluations(self) -> dict[int, Path]:
        """Iteration -> file of the held-out episodes that were played after it, in order."""
        return episode_files(self.folder, evaluation=True)

    def training_episodes(self) -> dict[int, Path]:
        """Iteration -> file of its training episodes, in order, where they were kept."""
        return episode_files(self.folder, evaluation=False)

    def episodes(self, iteration: int | None = None, *, evaluation: bool = False) -> Iterator[Record]:
        """The recorded episodes in order, failed ones included. Each is a record whose first key is "iteration".

        iteration: only episodes of this iteration. evaluation: held-out episodes instead of training episodes; their iteration
        is the number of iterations done before. Raises RunError where no episodes of that iteration were kept, or a file is
        damaged.
        """
        files = self.evaluations() if evaluation else self.training_episodes()
        if iteration is not None and iteration not in files:
            kind = "held-out evaluation after" if evaluation else "training episodes of"
            kept = ", ".join(map(str, files)) or "none"
            raise RunError(
                f"run {str(self.folder)!r} has kept no {kind} iteration {iteration}; kept: {kept}. Choose one of these, or "
                "leave it out for all."
            )
        chosen = files if iteration is None else {iteration: files[iteration]}
        return ({"iteration": number, **episode} for number, path in chosen.items() for episode in read_episodes(path))

    def cost(self) -> dict[str, Any]:
        """The cost of training so far: joint actions, seconds without evaluations, tokens sampled by the agents."""
        seconds = [record.get(name) or 0.0 for record in self.metrics for name in ("seconds/collect", "seconds/learn")]
        return {
            "joint_actions": self.metrics[-1]["joint_actions"] if self.metrics else 0,
            "seconds": round(math.fsum(seconds), 3),
            "tokens": sum(record.get("tokens/sampled") or 0 for record in self.metrics),
        }

    def team(self, checkpoint: str | int = "final") -> Team:
        """Load the team, without frozen team-mates on servers. Raises RunError or ConfigError."""
        return self._load(checkpoint)

    def answer(
        self,
        agent: str,
        prompt: str | Sequence[Message],
        *,
        checkpoint: str | int = "final",
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> str:
        """Generate an agent's answer to a prompt, or to a chat that ends with one. The team stays loaded.

        The run's examples are put in front, unless the chat begins with them.

        sampling: default: the sampling of the run's evaluations, which is greedy by default. seed: the seed of the sampling.
        Raises: RunError or ConfigError as `team`, EngineError where the prompt is too long.
        """
        from collm.engines.local import LocalEngine
        from collm.training.evaluate import plan_of

        if self._loaded is None or self._loaded[0] != str(checkpoint):
            self._loaded = None  # two teams may not fit
            self._loaded = str(checkpoint), LocalEngine(self.team(checkpoint))
        engine, config = self._loaded[1], self._settings()
        if agent not in engine.team.policies:
            raise no_agent(config, agent, engine.team.agents)
        messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        messages = with_examples(recorded_examples(self.folder), agent, messages)
        sampling = sampling or plan_of(config, "eval", examples=()).sampling
        (completion,) = engine.generate([Request(agent, messages, sampling, seed)])
        if completion.error:
            raise EngineError(f"{agent} cannot answer: {completion.error}.")
        return completion.text

    def export(
        self, folder: str | Path, agent: str | None = None, *, checkpoint: str | int = "final", merged: bool = False
    ) -> Path:
        """Write an agent as a Hugging Face folder, which transformers loads without collm. Without `agent`, write one folder
        for every agent, named after it. Each has a model card, README.md.

        merged: write an adapter merged into its base. Raises RunError, also where `folder` exists, or ConfigError.
        """
        from collm.reports.card import model_card

        target = Path(folder)
        refuse_existing(target)
        examples = recorded_examples(self.folder)
        team = self._load(checkpoint, (agent,) if agent else (), device="cpu")
        adapters = {name: policy.adapter is not None and not merged for name, policy in team.policies.items()}
        cards = {name: model_card(self, name, str(checkpoint), adapter=apart) for name, apart in adapters.items()}
        if agent is None:
            export_team(team, target, examples, merged=merged, cards=cards)
        else:
            export(team.policies[agent], target, of_agent(examples, agent), merged=merged, card=cards[agent])
        return target

    def _load(self, checkpoint: str | int, agents: Sequence[str] = (), *, device: str = "auto") -> Team:
        """The team, or some agents of it. The environment is made only if the saved weights do not tell the agents' names."""
        weights, _ = find_weights(self.folder, str(checkpoint))
        config = self._settings(device)
        shared = config.team.shared
        agents = agents or saved_agents(weights or self.folder / "final", shared=shared)
        if not agents and self.checkpoints and not shared:
            agents = saved_agents(checkpoints(self.folder)[-1])
        if agents:
            return load_team(config, weights, agents=agents)
        return load_team(self._settings(device, playing=True), weights)

    def _settings(self, device: str = "auto", *, playing: bool = False) -> Config:
        return run_config(self.folder, {"run.device": device, **self._overrides}, playing=playing)
