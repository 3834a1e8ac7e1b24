"""Former names of settings: a recipe that uses one is refused with the new name; an old run's config.json is translated."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_ALWAYS = "it always has the value that was its default. Leave it out."
NAMES = {
    "algorithm.advantage": "set algorithm.baseline: 'value' for 'td_lambda', 'none' for 'return', the others keep their names.",
    "algorithm.critic": "set critic.reads='joint' or 'own'; whether there is a critic follows from algorithm.baseline.",
    "algorithm.critic_kind": "it follows from algorithm.baseline: 'value' reads V, 'counterfactual' reads Q.",
    "algorithm.critic_body": "set critic.body='policy' for a value head on the agent's model, or leave it out.",
    "algorithm.critic_lam": "set critic.lam.",
    "critic.difference": "set algorithm.teammates='replay' for true, 'none' for false; it goes with every baseline.",
    "critic.coef": _ALWAYS,
    "critic.value_clip": "values are not clipped. Leave it out.",
    "learner.betas": _ALWAYS,
    "learner.weight_decay": _ALWAYS,
    "learner.warmup": "learning rates begin at their full height. Leave it out.",
    "run.tensorboard": "set run.trackers=['tensorboard'] for true, [] for false.",
    "run.keep": "the last two checkpoints and the best one are kept. Leave it out.",
    "run.episodes_saved": "four training episodes are written per iteration. Leave it out.",
    "team.lora.dropout": "adapters learn without dropout. Leave it out.",
    "team.lora.base": "team.compute='bfloat16' keeps frozen base models in bfloat16, too.",
    "team.lora.critics": "set critic.body='model' for false, or leave it out.",
    "rollout.vllm.kv_cache_gib": "on a CPU set the environment variable VLLM_CPU_KVCACHE_SPACE; on a GPU set "
    "rollout.vllm.gpu_memory_utilization.",
    "rollout.vllm.enforce_eager": _ALWAYS,
    "rollout.vllm.sleep": _ALWAYS,
}
"""Removed setting -> its replacement."""

ADDED: dict[tuple[str, str], Any] = {
    ("env", "wording"): "terse",
    ("rollout", "examples"): 0,
    ("rollout", "shards"): 1,
    ("rollout", "ahead"): 0,
    ("algorithm", "max_drop"): None,
    ("critic", "loss"): "mse",
    ("critic", "replay"): None,
    ("team", "system"): None,
    ("team", "thinking"): "shown",
}
"""(room, key) of a setting that was added when runs and studies existed already -> the value that keeps their meaning."""

_BASELINES = {"td_lambda": "value", "return": "none"}
_LEARNING: dict[str, Any] = {
    "critic.coef": 0.6,
    "critic.value_clip": None,
    "learner.betas": [0.9, 0.999],
    "learner.weight_decay": 0.0,
    "learner.warmup": 0,
    "team.lora.dropout": 0.0,
}
"""Removed settings that affected learning -> the value that is always used now."""


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run under their present names; present settings are returned unchanged."""
    complete = copy.deepcopy(dict(values))
    for (room, key), before in ADDED.items():
        if isinstance(complete.get(room), dict) and not (room == "env" and ":" in complete[room].get("name", "")):
            complete[room].setdefault(key, before)  # an environment of the user's own has its own options
    if isinstance(run := complete.get("run"), dict) and "tensorboard" in run:
        run["trackers"] = ["tensorboard"] if run.pop("tensorboard") else []
    algorithm, critic = complete.get("algorithm"), complete.get("critic")
    if not isinstance(algorithm, dict) or "advantage" not in algorithm:
        return complete
    critic = critic if isinstance(critic, dict) else {}
    advantage, reads, body = (algorithm.pop(key, None) for key in ("advantage", "critic", "critic_body"))
    algorithm["baseline"] = _BASELINES.get(advantage, advantage)
    algorithm["teammates"] = "replay" if critic.pop("difference", False) else "none"
    algorithm.pop("critic_kind", None)
    critic["lam"] = algorithm.pop("critic_lam", 0.0)
    critic["reads"] = "own" if reads == "own" else "joint"
    team, rollout = complete.get("team"), complete.get("rollout")
    lora = team.get("lora") if isinstance(team, dict) else None
    whole = isinstance(lora, dict) and lora.get("critics") is False
    critic["body"] = "policy" if body == "policy" else "model" if whole else "auto"
    complete["critic"] = critic
    if isinstance(rollout, dict):
        rollout["protocol"] = "parallel" if rollout.get("protocol") == "single" else rollout.get("protocol", "parallel")
        rollout["vllm"] = rollout.get("vllm") or {}
    for name in NAMES:
        *path, key = name.split(".")
        _table(complete, path).pop(key, None)
    return complete


def metrics(value: Any) -> Any:
    """The present value of `critic.metrics` for a truth value, which it was before, also as text; others are unchanged."""
    known = {"true": "global", "1": "global", "yes": "global", "on": "global"}
    known |= {"false": "none", "0": "none", "no": "none", "off": "none"}
    return known.get(str(value).lower(), value)


def lost(values: Mapping[str, Any]) -> list[str]:
    """Settings of an old run that can no longer be expressed, as "name=value"; such a run cannot be resumed exactly."""
    found = []
    for name, now in _LEARNING.items():
        *path, key = name.split(".")
        if (value := _table(values, path).get(key, now)) != now:
            found.append(f"{name}={value!r}")
    lora = _table(values, ["team", "lora"])
    if lora.get("base") == "float32" and _table(values, ["team"]).get("compute") == "bfloat16":
        found.append("team.lora.base='float32'")
    return found


def _table(values: Mapping[str, Any], path: list[str]) -> Any:
    """The table at `path`, or an empty one."""
    table: Any = values
    for name in path:
        table = table.get(name) if isinstance(table, Mapping) else None
    return table if isinstance(table, Mapping) else {}
