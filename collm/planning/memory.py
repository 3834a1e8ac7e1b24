"""Memory of a run: the part held all the time (weights, optimizer state), and the part that each phase adds.

Phases are generation, a critic's update, an agent's update, and saving; the arithmetic follows the code of each. The peak is
the held part plus the largest phase. docs/planning.md compares plans with measurements.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from collm.machine import memory
from collm.models.blueprint import HISTOGRAM_BINS, MINIBATCH, BaseSpec, Blueprint, CriticSpec, PolicySpec
from collm.models.sources import is_adapter
from collm.planning.shapes import Shape, read_adapter, read_shape
from collm.planning.work import Row, Work, work_of
from collm.settings.rooms import Config, LoraSettings

GIB = 1 << 30
LOGITS_AT_ONCE = 1 << 25
"""Longer batches are scored in chunks of so many logits, as in models/policy.py."""
CUDA_RESERVE = 1 * GIB
"""Bytes assumed for a CUDA context, its libraries' workspaces and fragmentation."""

TOKENIZER = 900
"""Bytes of the process per token of a vocabulary, for a byte-pair tokenizer and the heap that loading it leaves: 43 MiB were
measured for the 49152 tokens of SmolLM2."""
PRODUCTS = 128 * (283 << 10)
"""Bytes of the bfloat16 products that a run keeps compiled on a CPU: two caches of 64 (`runs/heap.py`)."""


GENERATION, SAVING = "generation", "saving a checkpoint"
"""How the names of these phases begin."""


@dataclass(frozen=True, slots=True)
class Model:
    """One set of weights of a policy or critic: a whole model, or an adapter on a base that is counted elsewhere."""

    name: str
    shape: Shape
    base: BaseSpec | None
    """The base of an adapter."""
    lora: LoraSettings | None
    """An adapter's rank and layers; None for a whole model, and for a frozen body, which has a base."""
    head: bool
    """Whether the model has the vocabulary head; a critic has none."""

    @property
    def trained(self) -> int:
        """Number of trained parameters; all of them are float32."""
        if self.lora is not None:
            return self.shape.adapter(self.lora)
        if self.base is not None:
            return 0
        return self.shape.parameters if self.head else self.shape.body

    @property
    def products(self) -> int:
        """Number of weights that a token is multiplied with in one forward pass."""
        return self.shape.linear_weights + self.shape.embedding * self.head


@dataclass(frozen=True, slots=True)
class Passes:
    """How often an iteration's learning reads the tokens of a model."""

    model: Model
    tokens: int
    read: float
    """Number of forward passes alone."""
    learned: float
    """Number of forward and backward passes."""
    referred: float = 0
    """Number of forward passes of the reference policy; they read no tokens more."""


@dataclass(slots=True)
class Phase:
    """Memory that one phase adds to the held memory: part -> bytes."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(slots=True)
class Plan:
    """held: part -> bytes, all the time. phases: what each adds. The peak is held plus the largest phase."""

    config: Config
    blueprint: Blueprint
    work: Work
    held: dict[str, float]
    phases: list[Phase]
    passes: list[Passes]
    """What agents' and critics' updates read in one iteration."""

    @property
    def update_tokens(self) -> float:
        """Tokens that agents' and critics' updates read in one iteration."""
        return sum(found.tokens * (found.read + found.learned) for found in self.passes)

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + self.largest.total

    @property
    def generated_tokens(self) -> int:
        """Tokens generated in one iteration, at most."""
        return self.work.joint_actions * len(self.work.agents) * self.work.answer

    @property
    def replayed_turns(self) -> int:
        """Environment turns replayed for difference baselines in one iteration, at most: `rollout.replay.replay_without`."""
        agents, turns = len(self.work.agents), self.work.turns
        if self.config.algorithm.teammates != "replay" or agents == 1:
            return 0
        return self.work.episodes * agents * turns * (turns + 1) // 2

    def hours(self, generated_per_second: float, updated_per_second: float) -> float:
        """Hours of the whole run, without evaluations."""
        seconds = self.generated_tokens / generated_per_second + self.update_tokens / updated_per_second
        return self.config.run.iterations * seconds / 3600

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON; memory in bytes."""
        iterations = self.config.run.iterations
        return {
            "peak_bytes": round(self.peak),
            "held_bytes": {name: round(size) for name, size in self.held.items()},
            "phases": {phase.name: {name: round(size) for name, size in phase.parts.items()} for phase in self.phases},
            "iterations": iterations,
            "joint_actions": iterations * self.work.joint_actions,
            "replayed_turns_at_most": iterations * self.replayed_turns,
            "generated_tokens_at_most": iterations * self.generated_tokens,
            "update_tokens_at_most": round(iterations * self.update_tokens),
            "prompt_tokens": {agent: list(counts) for agent, counts in self.work.prompts.items()},
            "note": self.work.note,
        }


def plan(config: Config, work: Work | None = None, blueprint: Blueprint | None = None) -> Plan:
    """The plan of a recipe. Raises ConfigError where a model's shape is unknown.

    blueprint: what one process holds; default: everything.
    """
    work = work or work_of(config)
    blueprint = blueprint or Blueprint.of(config, work.agents)
    policies = [(policy, _policy(policy)) for policy in blueprint.policies]
    critics = [(critic, _critic(critic, blueprint)) for critic in blueprint.critics if critic.body != "policy"]
    models = [model for _, model in [*policies, *critics]]
    held: dict[str, float] = {}

    def add(part: str, size: float) -> None:
        if size:
            held[part] = held.get(part, 0) + size

    for model in models:
        add("weights" if model.base is None else "adapters", 4 * model.trained)
        add("optimizer", 8 * model.trained)
    for base, shape in {model.base: model.shape for model in models if model.base is not None}.items():
        add("shared base", (2 if base.dtype == "bfloat16" else 4) * shape.parameters)
    referred = {reference.policy for reference in blueprint.references}
    add("reference policies", sum(4 * model.trained for policy, model in policies if policy.name in referred))
    width = HISTOGRAM_BINS if config.critic.loss == "hl_gauss" else 1
    trained = [(critic, model) for critic, model in critics if critic.body != "frozen"]
    frozen = [(critic, model) for critic, model in critics if critic.body == "frozen"]
    add("value heads", sum(12 * width * (model.shape.hidden + 1) for _, model in trained))
    kept = 4 * work.episodes * work.turns
    add("hidden states kept", sum(kept * critic.replay * model.shape.hidden for critic, model in frozen))
    if config.run.device != "cpu" and _has_cuda(config.run.device):
        add("CUDA context (assumed)", CUDA_RESERVE)
    else:
        add("tokenizer", TOKENIZER * max(model.shape.vocabulary for model in models))
        add("compiled products", PRODUCTS if config.team.compute == "bfloat16" else 0)
    cast = sum(_cast_bytes(config, model) for _, model in policies)
    owners = {policy.name: (policy, model) for policy, model in policies}
    batches = [[owners[policy.name] for policy in unit.policies] for unit in blueprint.units if unit.policies]
    kept = sum(_kept(config, work, batch) for batch in batches)
    phases = [_generation(config, work, batch, cast, kept) for batch in batches]
    limit = config.learner.micro_batch_tokens
    rows = {agent: work.rows(agent, max_tokens=limit) for policy in blueprint.policies for agent in policy.agents}
    read = {critic.name: _read_by(config, work, critic) for critic, _ in critics}
    phases += [_update(config, model, read[critic.name], 0) for critic, model in trained]
    phases += [_reading(config, model, read[critic.name]) for critic, model in frozen]
    for policy, model in policies:
        longest = max((rows[agent] for agent in policy.agents), key=_tokens)
        phases.append(_update(config, model, longest, work.answer))
    written = max(4 * model.trained for model in models)
    phases.append(Phase(SAVING, {"a copy of one model's weights": written}))
    epochs, headed = config.algorithm.epochs, {critic.policy for critic in blueprint.critics if critic.body == "policy"}
    passes = [
        Passes(model, _tokens(rows[agent]), int(policy.name in headed), epochs, epochs * (policy.name in referred))
        for policy, model in policies
        for agent in policy.agents
    ]
    for critic, model in critics:  # each reads once before the update
        passes.append(Passes(model, _tokens(read[critic.name]), 1, _times_learned(config, work, critic)))
    return Plan(config, blueprint, work, held, phases, passes)


def _policy(policy: PolicySpec) -> Model:
    return Model(policy.name, read_shape(policy.model), policy.base, _lora(policy), head=True)


def _critic(critic: CriticSpec, blueprint: Blueprint) -> Model:
    """A critic with its own body. Its adapter has the settings of the policy that the blueprint names."""
    lora = _lora(blueprint.policy_of(critic.policy)) if critic.body == "adapter" else None
    return Model(f"critic of {critic.name}", read_shape(critic.model), critic.base, lora, head=False)


def _lora(policy: PolicySpec) -> LoraSettings | None:
    return read_adapter(policy.model) if is_adapter(policy.model) else policy.lora


def _read_by(config: Config, work: Work, critic: CriticSpec) -> list[Row]:
    """The rows that a critic reads. V reads the last turn before it is answered."""
    agents = work.agents if critic.joint else critic.agents
    size = {"max_tokens": config.learner.micro_batch_tokens, "limit": config.critic.max_tokens}
    return work.rows(*agents, **size, answered=critic.kind != "V")


def _times_learned(config: Config, work: Work, critic: CriticSpec) -> float:
    """How often a critic's update reads an iteration's rows."""
    if critic.body == "frozen":
        return 0
    return config.critic.epochs * (1 if critic.replay == 1 else min(1, MINIBATCH / work.episodes))


def _tokens(rows: Sequence[Row]) -> int:
    return sum(row.tokens for row in rows)


def _kept(config: Config, work: Work, batch: Sequence[tuple[PolicySpec, Model]]) -> int:
    """Bytes of the key-value cache that the local engine keeps of one batch for the next turn."""
    shape, held = batch[0][1].shape, 0
    for policy, _ in batch:
        own = work.episodes * len(policy.agents) * max(work.sequence(agent) for agent in policy.agents)
        held += own if held + own <= config.rollout.batch_tokens // 2 else 0
    return held * shape.layers * 2 * shape.kv_heads * shape.head_dim * _compute_bytes(config)


def _generation(config: Config, work: Work, batch: Sequence[tuple[PolicySpec, Model]], cast: int, kept: int) -> Phase:
    """Generation of the last and longest turn: prefill, key-value cache, logits, as in engines/local.py.

    batch: a whole model, or the adapters of one base, whose prompts are read one after another and tokens decoded together.
    kept: bytes of the caches that all batches keep for the next turn.
    """
    name = f"{GENERATION} ({', '.join(model.name for _, model in batch)})"
    if config.rollout.engine == "vllm":
        return Phase(name, {})
    shape, c = batch[0][1].shape, _compute_bytes(config)
    lengths = {policy.name: max(work.sequence(agent) for agent in policy.agents) for policy, _ in batch}
    asked = {policy.name: work.episodes * len(policy.agents) for policy, _ in batch}
    length = max(lengths.values())
    prompt = length - work.answer
    largest = max(1, config.rollout.batch_tokens // length)
    rows, read = min(sum(asked.values()), largest), min(max(asked.values()), largest)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    cache = rows * length * (shape.layers + 1) * 2 * keys * c + kept  # a layer more while rows leave the batch
    mlp = 3 * c * shape.intermediate + 8 * shape.hidden
    attention = c * (3 * queries + 2 * keys) + 8 * shape.hidden + 5 * prompt * (prompt > 1)
    sorts = config.rollout.top_p < 1 or config.rollout.top_k
    logits = rows * shape.vocabulary * (16 + 25 * bool(sorts))
    return Phase(
        name,
        {
            "key-value cache": cache,
            "prompts and logits": max(read * prompt * max(mlp, attention), logits),
            "linear layers in bfloat16": cast,
            "copies of adapters": sum(c * model.trained for _, model in batch if model.lora is not None),
        },
    )


def _update(config: Config, model: Model, rows: Sequence[Row], answer: int) -> Phase:
    """Forward and backward of the largest micro-batch: activations kept for the backward pass, the gradient, the logits.

    rows: those of an iteration. answer: tokens scored in an answer (0 for a critic).
    """
    shape, c = model.shape, _compute_bytes(config)
    longest, num, scored, branches = _micro_batch(rows, config.learner.micro_batch_tokens)
    tokens, scored = num * longest, scored * answer
    block, transient = tokens * block_bytes(shape, c, model.lora), tokens * 3 * c * shape.intermediate
    inputs = tokens * 4 * shape.hidden
    kept = 3 * inputs + (shape.layers * inputs + block if config.learner.gradient_checkpointing else shape.layers * block)
    if branches:
        kept += tree_bytes(shape, c, longest, num) * (1 if config.learner.gradient_checkpointing else shape.layers)
    gradient = 4 * model.trained
    if model.lora is None and c == 2:
        gradient += 2 * (model.trained - shape.embedding)  # the products' own copies of the weights
    largest_weight = 4 * shape.embedding if model.lora is None else 0
    logits = 0.0
    if answer:
        chunk = min(scored, max(1, LOGITS_AT_ONCE // shape.vocabulary)) * shape.vocabulary
        copies = 1 + (config.rollout.temperature not in (0, 1)) + (config.rollout.top_p < 1 or config.rollout.top_k > 0)
        sorts = 25 if config.rollout.top_p < 1 or config.rollout.top_k else 0
        logits = chunk * (4 * copies + max(12, sorts))
    return Phase(
        f"update ({model.name})",
        {"gradient": gradient, "activations": kept, "logits and products": max(logits, transient) + largest_weight},
    )


def _reading(config: Config, model: Model, rows: Sequence[Row]) -> Phase:
    """The largest forward pass of a frozen body: the hidden states of every layer."""
    longest, num, _, _ = _micro_batch(rows, config.learner.micro_batch_tokens)
    shape, c = model.shape, _compute_bytes(config)
    tokens = longest * num
    parts: dict[str, float] = {
        "hidden states": tokens * shape.hidden * c * (shape.layers + 1),
        "products": tokens * 3 * c * shape.intermediate,
    }
    return Phase(f"reading ({model.name})", parts)


def _micro_batch(rows: Sequence[Row], max_tokens: int) -> tuple[int, int, int, bool]:
    """The micro-batch with the most tokens, as learning/pack.py makes it: (tokens of a row, number of rows, answers scored,
    whether it has a mask)."""
    found = [(0, 0, 0, False)]
    for branches in (False, True):
        alike = sorted((row for row in rows if row.branches == branches), key=lambda row: -row.tokens)
        if alike:
            longest = alike[0].tokens
            num = max(1, min(len(alike), max_tokens // max(1, longest)))
            found.append((longest, num, sum(row.answers for row in alike[:num]), branches))
    return max(found, key=lambda batch: batch[0] * batch[1])


def tree_bytes(shape: Shape, c: int, longest: int, num: int) -> float:
    """Bytes that attention of one layer keeps more under a tree's mask, in `num` rows of `longest` tokens: the mask as numbers,
    and keys and values copied for every query head."""
    return c * num * longest * (longest + 2 * (shape.heads - shape.kv_heads) * shape.head_dim)


def block_bytes(shape: Shape, c: int, lora: LoraSettings | None) -> float:
    """Bytes per token that one block keeps for its backward pass. c: bytes per number in products (4, or 2 for bfloat16).

    Norms are float32. A layer keeps its input if it is trained or adapted. Layers with the same input share it, and the output
    projection takes attention's answer as it is; but autocast makes a copy in bfloat16 for each layer of a whole model after a
    norm.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    trained = lora is None
    norm = 4 * (2 if trained else 1)  # its input, and that normalized where its weight is trained
    size: float = 2 * norm * shape.hidden
    if shape.qk_norm:
        size += norm * (queries + keys)
    size += c * 2 * (queries + keys)  # queries, keys, values and answer of attention
    size += c * 3 * shape.intermediate  # gate, its activation, and up
    chosen = list(shape.linear) if lora is None or lora.targets == ["all-linear"] else lora.targets
    for readers in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)):
        num = len(set(readers) & set(chosen))
        copies = num if trained and c == 2 else min(num, 1)
        size += c * copies * shape.linear[readers[0]][0]
    return size + (0 if lora is None else c * lora.rank * len(chosen))


def _cast_bytes(config: Config, model: Model) -> int:
    """Bytes of the linear layers that the local engine casts and keeps while it generates: `Policy.for_generation`."""
    if model.lora is not None or config.team.compute != "bfloat16":
        return 0
    return 2 * model.products


def _compute_bytes(config: Config) -> int:
    return 2 if config.team.compute == "bfloat16" else 4


def _has_cuda(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and shutil.which("nvidia-smi") is not None)


def gpu_memories() -> list[int]:
    """Memory in bytes of each GPU of this machine, by NVIDIA's own tool; [] if it finds none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return [int(line) << 20 for line in answer.split()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def device_memory(device: str) -> int | None:
    """Memory in bytes of the device that a run would use; None if it is unknown."""
    if _has_cuda(device):
        return next(iter(gpu_memories()), None)
    return memory()
