"""Contradictions between settings: one function each, which raises ValueError with value, reason and way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from collm.settings.presets import BASELINES, CRITIC_BASELINES, GROUP_BASELINES

if TYPE_CHECKING:
    from collm.settings.rooms import AlgorithmSettings, Config

CRITIC_ONLY = ("critic.warmup", "critic.state", "critic.normalize_targets", "critic.lam", "algorithm.lam")
"""Settings that have no effect without a critic."""
METRICS = ("auto", "global", "readings", "none")
"""Built-in values of critic.metrics."""


def near(name: str, names: Iterable[str]) -> str:
    """ " Did you mean ...?" with the known name nearest to an unknown one; empty if none is near."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def compares_siblings(a: AlgorithmSettings) -> bool:
    """Whether the baseline is a statistic of a group's returns."""
    return a.baseline in GROUP_BASELINES or ":" in a.baseline


def baseline_is_known(a: AlgorithmSettings) -> None:
    if a.baseline not in BASELINES and not re.fullmatch(r"[\w.]+:[\w.]+", a.baseline):
        known = ", ".join(BASELINES)
        raise ValueError(
            f"algorithm.baseline={a.baseline!r} is not a baseline.{near(a.baseline, BASELINES)} Set one of {known}, or "
            "'module:function' of your own."
        )


def group_baseline_has_a_group(a: AlgorithmSettings) -> None:
    if compares_siblings(a) and a.group_size < 2:
        raise ValueError(
            f"algorithm.baseline={a.baseline!r} compares episodes of one task, but algorithm.group_size={a.group_size} gives "
            "nothing to compare. Set algorithm.group_size=4, or algorithm.baseline='value'."
        )


def group_deviation_has_a_group(a: AlgorithmSettings) -> None:
    if a.normalize == "group" and (not compares_siblings(a) or a.group_size < 4):
        raise ValueError(
            f"algorithm.normalize='group' divides by a group's own deviation: it needs a group baseline and group_size of at "
            f"least 4 (here {a.baseline!r} and {a.group_size}). Set normalize='agent'."
        )


def several_epochs_are_corrected(a: AlgorithmSettings) -> None:
    if a.epochs > 1 and a.loss == "reinforce":
        raise ValueError(
            f"algorithm.epochs={a.epochs} reuses answers of an older policy, and loss='reinforce' does not correct for that. "
            "Set algorithm.loss='ppo_clip', or epochs=1."
        )


def tree_has_branches(a: AlgorithmSettings) -> None:
    if a.tree and (a.baseline in CRITIC_BASELINES or a.group_size < 2):
        raise ValueError(
            "algorithm.tree=true compares joint answers at each node: it needs a group baseline and group_size >= 2. Set "
            "algorithm.tree=false."
        )


ALGORITHM = (
    baseline_is_known,
    group_baseline_has_a_group,
    group_deviation_has_a_group,
    several_epochs_are_corrected,
    tree_has_branches,
)


def sampling_varies(c: Config) -> None:
    if c.rollout.temperature == 0:
        raise ValueError(
            "rollout.temperature=0 always gives the same answer, so there is nothing to learn from. "
            "Set rollout.temperature=1.0; evaluation.temperature is greedy by default."
        )


def vllm_can_sample(c: Config) -> None:
    for name, value in (("rollout", c.rollout.temperature), ("evaluation", c.evaluation.temperature)):
        if c.rollout.engine == "vllm" and 0 < value < 0.01:
            raise ValueError(
                f"{name}.temperature={value}: rollout.engine='vllm' samples at 0.01 or above. Set {name}.temperature=0.01, "
                "or rollout.engine='local'."
            )


def shards_have_tasks(c: Config) -> None:
    if c.rollout.shards > c.rollout.tasks:
        raise ValueError(
            f"rollout.shards={c.rollout.shards} cuts the tasks of an iteration into more pieces than there are: rollout.tasks="
            f"{c.rollout.tasks}. Set rollout.shards={c.rollout.tasks} at most, or more tasks."
        )


def older_answers_are_corrected(c: Config) -> None:
    if c.rollout.ahead and c.algorithm.loss == "reinforce":
        raise ValueError(
            f"rollout.ahead={c.rollout.ahead} trains on answers of an older policy, and algorithm.loss='reinforce' does not "
            "correct for that: two of four teams lost all they had learned with it (docs/log.md). Set "
            "algorithm.loss='ppo_clip', or rollout.ahead=0."
        )


def critic_settings_have_a_critic(c: Config) -> None:
    if c.algorithm.has_critic:
        return
    for name in CRITIC_ONLY:
        room, _, key = name.partition(".")
        if value := getattr(getattr(c, room), key):
            raise ValueError(
                f"{name}={value}, but {c.algorithm.name} has no critic. Set {name}="
                f"{'false' if value is True else 0}, or algorithm.name='collm-cc'."
            )


def regressions_have_a_source(c: Config) -> None:
    metrics = c.critic.metrics
    if metrics not in METRICS and not re.fullmatch(r"[\w.]+:[\w.]+", metrics):
        raise ValueError(
            f"critic.metrics={metrics!r} is not something that a regression reads.{near(metrics, METRICS)} Set one of "
            f"{', '.join(METRICS)}, or 'module:function' of your own."
        )
    if metrics != "none" and not c.algorithm.has_critic and c.algorithm.teammates == "none":
        raise ValueError(
            f"critic.metrics={metrics!r}, but {c.algorithm.name} has no critic. Set critic.metrics='none', or "
            "algorithm.name='collm-cc'; with algorithm.teammates='replay' the difference baseline reads it."
        )


def warm_up_ends(c: Config) -> None:
    if c.critic.warmup >= c.run.iterations:
        raise ValueError(
            f"critic.warmup={c.critic.warmup} leaves no iteration of run.iterations={c.run.iterations} to train the agents. "
            "Set fewer warm-up iterations, or more iterations."
        )


def value_head_reads_what_its_agent_reads(c: Config) -> None:
    if c.critic.body != "policy" or not c.algorithm.has_critic:
        return
    if c.critic.reads != "own" or c.algorithm.critic_kind != "V":
        raise ValueError(
            "critic.body='policy' is a value head, V, on the agent's own history. Set critic.reads='own' and "
            "algorithm.baseline='value', or critic.body='auto'."
        )
    own = {"critic.model": c.critic.model, "critic.state": c.critic.state}
    for name, given in own.items():
        if given:
            raise ValueError(
                f"{name}={given!r}: a value head on the agent's own model reads what the agent reads, with its model. "
                "Leave it out, or set critic.body='auto'."
            )
    if c.critic.replay not in (None, 1):
        raise ValueError(
            f"critic.replay={c.critic.replay}: a value head on the agent's own model learns in the agent's own steps, from the "
            "answers of the iteration. Leave it out, or set critic.body='auto'."
        )
    if c.critic.epochs > 1 and not c.critic.warmup:
        raise ValueError(
            f"critic.epochs={c.critic.epochs}: a value head on the agent's own model learns in the agent's own steps; only the "
            "warm-up has more of them, and critic.warmup=0. Leave it out, or set critic.body='auto'."
        )


def no_trained_critic_has_no_such_settings(c: Config) -> None:
    if c.critic.body not in ("none", "frozen") or not c.algorithm.has_critic:
        return
    if c.algorithm.critic_kind == "Q":
        raise ValueError(
            f"algorithm.baseline='counterfactual' needs a critic that reads answers, but critic.body={c.critic.body!r} has no "
            "such critic. Set algorithm.baseline='value', or critic.body='auto'."
        )
    given: dict[str, object] = {
        "normalize_targets": c.critic.normalize_targets,
        "epochs": c.critic.epochs if c.critic.epochs > 1 else None,
        "loss": c.critic.loss if c.critic.loss != "mse" else None,
    }
    if c.critic.body == "none":
        given |= {"model": c.critic.model, "state": c.critic.state, "replay": c.critic.replay}
    for name, value in given.items():
        if value:
            raise ValueError(
                f"critic.{name}={value!r}, but critic.body={c.critic.body!r} trains no language model as critic: V is a "
                "regression. Leave it out, or set critic.body='auto'."
            )


def replay_has_steps(c: Config) -> None:
    if c.algorithm.has_critic and c.critic.body in ("auto", "model") and (c.critic.replay or 1) > 1 and c.critic.epochs == 1:
        raise ValueError(
            f"critic.replay={c.critic.replay} keeps the sequences of recent iterations, but critic.epochs=1 learns from 8 of "
            "them alone. Set critic.epochs=50, or critic.replay=1."
        )


def histogram_has_its_own_scale(c: Config) -> None:
    if c.critic.loss == "hl_gauss" and c.critic.normalize_targets and c.algorithm.has_critic:
        raise ValueError(
            "critic.normalize_targets=true rescales a linear head, but critic.loss='hl_gauss' predicts a histogram, whose bins "
            "follow the targets. Leave it out, or set critic.loss='mse'."
        )


def is_address(address: str | None, setting: str) -> None:
    """Raises ValueError for what cannot be the address of a cluster."""
    if address is not None and not re.fullmatch(r"local|auto|([\w.-]+|\[[\da-fA-F:]+\]):\d{1,5}", address):
        raise ValueError(
            f"{setting}={address!r} is not the address of a Ray cluster. Set 'local', 'auto', or HOST:PORT as "
            "`ray start --head` prints it."
        )


def cluster_has_an_address(c: Config) -> None:
    is_address(c.cluster.address, "cluster.address")


def rollout_workers_have_shards(c: Config) -> None:
    if c.cluster.address is not None and c.cluster.rollouts > c.rollout.shards:
        raise ValueError(
            f"cluster.rollouts={c.cluster.rollouts} workers would share rollout.shards={c.rollout.shards}, each of which one "
            f"worker plays. Set cluster.rollouts={c.rollout.shards} at most, or in a new run more shards."
        )


def devices_are_parts_or_whole(c: Config) -> None:
    for name, share in c.cluster.devices.items():
        if share > 1 and (share != int(share) or name == "rollouts"):
            kind = "a rollout worker is on one device. Set at most 1" if name == "rollouts" else "devices are whole. Round it"
            raise ValueError(f"cluster.devices: {name}={share:g}, but {kind}.")


CONFIG = (
    sampling_varies,
    vllm_can_sample,
    shards_have_tasks,
    older_answers_are_corrected,
    critic_settings_have_a_critic,
    regressions_have_a_source,
    warm_up_ends,
    value_head_reads_what_its_agent_reads,
    no_trained_critic_has_no_such_settings,
    replay_has_steps,
    histogram_has_its_own_scale,
    cluster_has_an_address,
    rollout_workers_have_shards,
    devices_are_parts_or_whole,
)
