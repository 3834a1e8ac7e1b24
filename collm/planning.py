"""What a recipe will need, before anything starts: memory by part, steps, tokens, hours. Nothing here imports torch.

The arithmetic follows the training code: what is held all the time (weights, optimizer state), and what each phase adds to it
(generation, a critic's update, an agent's update, saving). The peak is the largest of the phases. docs/planning.md says how
near it comes to what was measured.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collm.envs.catalogue import make
from collm.errors import CollmError, ConfigError
from collm.settings.load import apply_overrides, parse_config
from collm.settings.rooms import Config, LoraSettings

GIB = 1 << 30
LOGITS_AT_ONCE = 1 << 25
"""As models/policy.py has it: longer batches are scored in chunks of so many logits."""
CUDA_RESERVE = 1 * GIB
"""Assumed for a CUDA context, its libraries' workspaces and fragmentation."""
TEMPLATE = 8
"""Assumed of a chat template: tokens around one message and its answer."""
CHARACTERS_PER_TOKEN = 4.0
"""Assumed of prompts where the model's tokenizer is not on this machine."""


# --- shapes of models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-like language model in numbers. tied: the vocabulary head is the embedding. qk_norm: norms on queries and keys
    (Qwen3). qkv_bias: queries, keys and values have biases (Qwen2)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    qk_norm: bool = False
    qkv_bias: bool = False

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name -> (inputs, outputs)."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def body(self) -> int:
        """Parameters without the vocabulary head."""
        block = sum(a * b for a, b in self.linear.values()) + 2 * self.hidden
        block += 2 * self.head_dim * self.qk_norm + (self.heads + 2 * self.kv_heads) * self.head_dim * self.qkv_bias
        return self.embedding + self.layers * block + self.hidden

    @property
    def parameters(self) -> int:
        return self.body + self.embedding * (not self.tied)

    def adapter(self, lora: LoraSettings) -> int:
        """Parameters of one LoRA adapter. Raises ConfigError for layers that are not there."""
        chosen = self.linear if lora.targets == ["all-linear"] else lora.targets
        unknown = [name for name in chosen if name not in self.linear]
        if unknown:
            raise ConfigError(
                f"team.lora.targets names {unknown[0]!r}; planning knows {', '.join(self.linear)}, or 'all-linear'."
            )
        return self.layers * lora.rank * sum(sum(self.linear[name]) for name in chosen)


def _qwen3(layers: int, hidden: int, heads: int, intermediate: int) -> Shape:
    return Shape(layers, hidden, heads, 8, 128, intermediate, 151936, tied=True, qk_norm=True)


KNOWN = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 16, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 16, 6144),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 32, 9728),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen3(36, 2560, 32, 9728),
    "Qwen/Qwen2.5-Coder-3B": Shape(36, 2048, 16, 2, 128, 11008, 151936, tied=True, qkv_bias=True),
}
"""Published shapes of the models that recipes name, for machines that have neither the model nor a hub."""


def read_shape(source: str) -> Shape:
    """The shape of "tiny", a Hugging Face folder (an adapter's is its base's), a model in the hub's cache, or a known one.

    Raises ConfigError where none is found, or where the model is not of the kind whose arithmetic is known.
    """
    folder = _folder(source)
    if folder is None:
        if source in KNOWN:
            return KNOWN[source]
        raise ConfigError(
            f"model {source!r} cannot be planned: it is neither a folder here nor in the hub's cache, and its shape is not "
            f"known. Download its config.json into a folder and name that. Known: {', '.join(KNOWN)}."
        )
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        return read_shape(str(_read_json(adapter).get("base_model_name_or_path")))
    config = _read_json(folder / "config.json")
    config = {**config, **config.get("text_config", {})}
    kind = str(config.get("model_type"))
    if not kind.startswith(("qwen2", "qwen3", "llama", "mistral")) or "moe" in kind:
        raise ConfigError(f"model {source!r} is of the kind {kind!r}; planning knows Llama, Mistral, Qwen2 and Qwen3 shapes.")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Shape(
            int(config["num_hidden_layers"]),
            hidden,
            heads,
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or hidden // heads),
            int(config["intermediate_size"]),
            int(config["vocab_size"]),
            bool(config.get("tie_word_embeddings", False)),
            kind.startswith("qwen3"),
            kind.startswith("qwen2") or bool(config.get("attention_bias", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"model {source!r}: its config.json lacks a number that planning needs ({error!r}).") from error


def _folder(source: str) -> Path | None:
    """Where a model's config lies on this machine, if it does."""
    if source == "tiny":
        return Path(__file__).parent / "tiny" / "weights"
    if Path(source).is_dir():
        return Path(source)
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{source.replace('/', '--')}" / "snapshots"
    return next((path.parent for path in sorted(cache.glob("*/config.json"))), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}.") from error


# --- how much there is to do --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """One iteration in numbers, every answer as long as it may be.

    prompts: agent -> tokens of each turn's new observation. answer: tokens of an answer. episodes: leaves of trees included.
    joint_actions: of which something is learnt. note: what had to be assumed.
    """

    agents: tuple[str, ...]
    prompts: Mapping[str, tuple[int, ...]]
    answer: int
    episodes: int
    joint_actions: int
    history: str
    note: str = ""

    @property
    def turns(self) -> int:
        return len(self.prompts[self.agents[0]])

    def sequence(self, *readers: str) -> int:
        """Tokens of the longest history with its answers: an agent's, or what a critic of several reads."""
        turns = [TEMPLATE + sum(self.prompts[agent][turn] + self.answer for agent in readers) for turn in range(self.turns)]
        if self.history == "full":
            return sum(turns)
        return turns[0] + max(turns[1:]) if self.history == "last" and self.turns > 1 else max(turns)

    @property
    def sequences(self) -> int:
        """Sequences per agent that one update reads: a growing chat is one, whatever its turns."""
        return self.episodes if self.history == "full" else self.episodes * self.turns


def work_of(config: Config) -> Work:
    """What one iteration plays: the agents' prompts as a few first tasks have them, answered with nothing."""
    note, options = "", config.env.options
    data = [str(options[key]) for key in ("data", "eval_data") if options.get(key)]
    absent = [name for name in data if name.startswith("hf:") or not Path(name.split("[")[0]).exists()]
    if absent:
        options = {key: value for key, value in options.items() if key not in ("data", "eval_data")}
        note = (
            f"Prompts are those of the built-in tasks, since {absent[0]} is not here (nothing is fetched from the hub to plan)."
        )
    env: Any = make(config.env.name, **options)
    agents, turns = tuple(env.possible_agents), int(getattr(env, "turns", 1))
    turns = min(turns, config.rollout.max_turns or turns)
    longest = {agent: [0] * turns for agent in agents}
    for task in range(min(4, int(getattr(env, "num_tasks", 1)))):
        for agent, texts in _observed(env, task, turns).items():
            for turn in range(turns):
                text = texts[min(turn, len(texts) - 1)]
                source = config.team.models.get(agent, config.team.model)
                longest[agent][turn] = max(longest[agent][turn], count_tokens(source, text))
    group, tasks = config.algorithm.group_size, config.rollout.tasks
    if config.algorithm.tree:
        episodes, actions = tasks * group**turns, tasks * sum(group**turn for turn in range(1, turns + 1))
    else:
        episodes, actions = tasks * group, tasks * group * turns
    prompts = {agent: tuple(counts) for agent, counts in longest.items()}
    return Work(agents, prompts, config.rollout.max_tokens, episodes, actions, config.rollout.history, note)


def _observed(env: Any, task: int, turns: int) -> dict[str, list[str]]:
    """What every agent reads at each turn of an episode in which nobody says a thing."""
    observations, _ = env.reset(seed=0, options={"task": task})
    texts = {agent: [str(text)] for agent, text in observations.items()}
    for _ in range(turns - 1):
        try:
            observations, *_ = env.step(dict.fromkeys(env.agents, ""))
        except CollmError:  # a world that cannot judge answers here: later turns are taken to be as long as the first
            break
        for agent, text in observations.items():
            texts[agent].append(str(text))
        if not env.agents:
            break
    return texts


def count_tokens(source: str, text: str) -> int:
    """Tokens of a text: by the model's tokenizer where it lies on this machine, else by its length."""
    folder = _folder(source)
    if folder is not None and (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        known = _tokenizers.setdefault(str(folder), None) or Tokenizer.from_file(str(folder / "tokenizer.json"))
        _tokenizers[str(folder)] = known
        return len(known.encode(text, add_special_tokens=False))
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


_tokenizers: dict[str, Any] = {}


# --- memory -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Model:
    """One set of weights that answers or judges: whole, or an adapter on a base that is counted elsewhere."""

    name: str
    source: str
    shape: Shape
    lora: LoraSettings | None
    head: bool
    """With the vocabulary head, or (a critic) without."""

    @property
    def trained(self) -> int:
        """Parameters that learn; all of them are float32."""
        if self.lora is not None:
            return self.shape.adapter(self.lora)
        return self.shape.parameters if self.head else self.shape.body


@dataclass(slots=True)
class Phase:
    """What one phase holds beyond what is always there: part -> bytes."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(slots=True)
class Plan:
    """held: part -> bytes, all the time; phases: what each adds. The peak is held plus the largest phase."""

    config: Config
    work: Work
    held: dict[str, float]
    phases: list[Phase]
    update_tokens: float
    """Tokens that agents' and critics' updates read in one iteration."""

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + self.largest.total

    @property
    def generated_tokens(self) -> int:
        """In one iteration, at most."""
        return self.work.joint_actions * len(self.work.agents) * self.work.answer

    @property
    def imagined_turns(self) -> int:
        """Turns that the world plays for difference baselines in one iteration, at most: `rollout.replay.replay_without`."""
        agents, turns = len(self.work.agents), self.work.turns
        if self.config.algorithm.teammates != "replay" or agents == 1:
            return 0
        return self.work.episodes * agents * turns * (turns + 1) // 2

    def hours(self, generated_per_second: float, updated_per_second: float) -> float:
        """Of the whole run, without evaluations."""
        seconds = self.generated_tokens / generated_per_second + self.update_tokens / updated_per_second
        return self.config.run.iterations * seconds / 3600

    def plain(self) -> dict[str, Any]:
        """As JSON has it; memory in bytes."""
        iterations = self.config.run.iterations
        return {
            "peak_bytes": round(self.peak),
            "held_bytes": {name: round(size) for name, size in self.held.items()},
            "phases": {phase.name: {name: round(size) for name, size in phase.parts.items()} for phase in self.phases},
            "iterations": iterations,
            "joint_actions": iterations * self.work.joint_actions,
            "imagined_turns_at_most": iterations * self.imagined_turns,
            "generated_tokens_at_most": iterations * self.generated_tokens,
            "update_tokens_at_most": round(iterations * self.update_tokens),
            "prompt_tokens": {agent: list(counts) for agent, counts in self.work.prompts.items()},
            "note": self.work.note,
        }


def plan(config: Config, work: Work | None = None) -> Plan:
    """The plan of a recipe. Raises ConfigError where a model's shape is not known."""
    work = work or work_of(config)
    members, speaks_for = _members(config, work.agents)
    critics = _critics(config, members)
    held: dict[str, float] = {}

    def add(part: str, size: float) -> None:
        if size:
            held[part] = held.get(part, 0) + size

    bases: dict[tuple[str, str], Model] = {}
    for model in [*members.values(), *critics.values()]:
        if model.lora is None:
            add("weights", 4 * model.trained)
        else:
            bases.setdefault((model.source, config.team.compute), model)
            add("adapters", 4 * model.trained)
        add("optimizer", 8 * model.trained)
    for (_, base), model in bases.items():
        add("shared base", (2 if base == "bfloat16" else 4) * model.shape.parameters)
    if config.algorithm.kl_coef > 0:
        add("reference policies", sum(4 * model.trained for model in members.values()))
    add("value heads", sum(12 * (model.shape.hidden + 1) for model in critics.values()))
    if config.run.device != "cpu" and _has_cuda(config.run.device):
        add("CUDA context (assumed)", CUDA_RESERVE)
    phases = [_generation(config, work, name, model, speaks_for[name]) for name, model in members.items()]
    phases += [_update(config, model, *_read_by(config, work, name), 0) for name, model in critics.items()]
    for name, model in members.items():
        longest = max(work.sequence(agent) for agent in speaks_for[name])
        answers = work.turns * work.answer if work.history == "full" else work.answer
        phases.append(_update(config, model, longest, work.sequences * len(speaks_for[name]), answers))
    written = [4 * model.trained for model in [*members.values(), *critics.values()]]
    phases.append(Phase("saving a checkpoint", {"a copy of one model's weights": max(written)}))
    tokens = config.algorithm.epochs * sum(
        work.sequences * work.sequence(agent) for agents in speaks_for.values() for agent in agents
    )
    for name in critics:
        longest, count = _read_by(config, work, name)
        tokens += (1 + config.critic.epochs) * longest * count
    return Plan(config, work, held, phases, tokens)


def _members(config: Config, agents: Sequence[str]) -> tuple[dict[str, Model], dict[str, list[str]]]:
    """Every distinct policy under its first agent's name, and the agents that it speaks for. As models/team.py does it."""
    team = config.team
    known: dict[tuple[str, bool], str] = {}
    members: dict[str, Model] = {}
    speaks_for: dict[str, list[str]] = {}
    for agent in (a for a in agents if a not in team.remote):
        source = team.models.get(agent, team.model)
        lora = team.lora if team.lora is not None and (team.lora.agents is None or agent in team.lora.agents) else None
        name = known.setdefault((source, lora is not None), agent) if team.shared else agent
        if name == agent:
            members[agent] = Model(agent, source, read_shape(source), lora, head=True)
        speaks_for.setdefault(name, []).append(agent)
    return members, speaks_for


def _critics(config: Config, members: Mapping[str, Model]) -> dict[str, Model]:
    """The critics that are models of their own, by the agent (or the team) they judge. As training/assemble.py does it."""
    settings, found = config.algorithm, {}
    if not settings.has_critic or config.critic.body == "policy":
        return {}
    first = next(iter(members.values()))
    for name, policy in {"joint": {"team": first}, "own": dict(members)}[config.critic.reads].items():
        source = config.critic.model or policy.source
        lora = config.team.lora if config.critic.body == "auto" else None
        on_base = lora if any(m.lora is not None and m.source == source for m in members.values()) else None
        found[name] = Model(f"critic of {name}", source, read_shape(source), on_base, head=False)
    return found


def _read_by(config: Config, work: Work, name: str) -> tuple[int, int]:
    """(tokens, number) of the sequences that a critic reads. V judges the last turn before it is answered."""
    agents = work.agents if name == "team" else (name,)
    unread = len(agents) * work.answer if config.algorithm.critic_kind == "V" else 0
    return min(config.critic.max_tokens, work.sequence(*agents) - unread), work.sequences


def _generation(config: Config, work: Work, name: str, model: Model, agents: Sequence[str]) -> Phase:
    """Answering the last and longest turn: prefill, key-value cache, logits. As engines/local.py does it."""
    if config.rollout.engine == "vllm":
        return Phase(f"generation ({name})", {})
    shape, c = model.shape, _compute_bytes(config)
    length = max(work.sequence(agent) for agent in agents)
    prompt = length - work.answer
    rows = max(1, min(work.episodes * len(agents), config.rollout.batch_tokens // length))
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    everything = work.episodes * len(agents) * length
    held = everything if everything <= config.rollout.batch_tokens // 2 else 0  # for the next turn
    cache = (rows * length * (shape.layers + 1) + held * shape.layers) * 2 * keys * c  # a layer more while rows leave the batch
    mlp = 3 * c * shape.intermediate + 8 * shape.hidden
    attention = c * (3 * queries + 2 * keys) + 8 * shape.hidden + 5 * prompt * (prompt > 1)
    sorts = config.rollout.top_p < 1 or config.rollout.top_k
    logits = rows * shape.vocabulary * (16 + 25 * bool(sorts))
    return Phase(
        f"generation ({name})",
        {"key-value cache": cache, "prompts and logits": max(rows * prompt * max(mlp, attention), logits)},
    )


def _update(config: Config, model: Model, longest: int, count: int, answer: int) -> Phase:
    """Forward and backward of one micro-batch: activations that are kept for the backward pass, the gradient, the logits.

    longest: tokens of a sequence; count: sequences; answer: tokens scored in each (0 for a critic).
    """
    shape, c = model.shape, _compute_bytes(config)
    rows = max(1, min(count, config.learner.micro_batch_tokens // max(1, longest)))
    tokens, scored = rows * longest, rows * answer
    block, transient = tokens * block_bytes(shape, c, model.lora), tokens * 3 * c * shape.intermediate
    inputs = tokens * 4 * shape.hidden
    kept = 3 * inputs + (shape.layers * inputs + block if config.learner.gradient_checkpointing else shape.layers * block)
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


def block_bytes(shape: Shape, c: int, lora: LoraSettings | None) -> float:
    """Bytes per token that one block keeps for its backward pass; c: bytes of a product's number (4, or 2 for bfloat16).

    Residual stream and norms are float32. A frozen layer does not keep its input, but an adapter on it keeps one of its own.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    trained = lora is None
    norm = 4 * shape.hidden * (2 if trained else 1) + c * shape.hidden  # its input, that normalized, and its output
    size: float = 2 * norm
    if shape.qk_norm:
        size += 4 * (queries + keys) * (2 if trained else 1)
    size += c * (queries + 2 * keys)  # queries, keys and values as attention takes them
    size += c * queries  # attention's answer
    size += c * 4 * shape.intermediate  # gate, its activation, up, and their product
    if lora is not None:
        chosen = shape.linear if lora.targets == ["all-linear"] else lora.targets
        size += c * lora.rank * len(list(chosen))
        if c == 2:  # each adapter keeps its own copy of its input
            size += 2 * sum(shape.linear[name][0] for name in chosen)
    return size


def _compute_bytes(config: Config) -> int:
    return 2 if config.team.compute == "bfloat16" else 4


def _has_cuda(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and shutil.which("nvidia-smi") is not None)


def device_memory(device: str) -> int | None:
    """Bytes of the device that a run would use; None where that cannot be told."""
    if _has_cuda(device):
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            return int(answer.split()[0]) << 20
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


# --- what would make it fit ---------------------------------------------------------------------------------------------


def remedies(config: Config, longest: int) -> Iterator[dict[str, Any]]:
    """Settings that lower the peak, the smallest change first; the first ones change memory and time, not results."""
    tokens = config.learner.micro_batch_tokens
    while tokens // 2 >= longest:
        tokens //= 2
        yield {"learner.micro_batch_tokens": tokens}
    batch = config.rollout.batch_tokens
    while batch // 2 >= longest:
        batch //= 2
        yield {"rollout.batch_tokens": batch}
    if not config.learner.gradient_checkpointing:
        yield {"learner.gradient_checkpointing": True}
    if config.team.compute != "bfloat16":
        yield {"team.compute": "bfloat16"}
    if config.team.lora is None:
        yield {"team.lora.rank": 16}


def advise(config: Config, limit: float) -> tuple[dict[str, Any], Plan] | None:
    """The fewest of the remedies that bring the peak below `limit` bytes, and the plan with them; None if all do not."""
    work = work_of(config)
    longest = max(work.sequence(agent) for agent in work.agents)
    taken: dict[str, Any] = {}
    for remedy in remedies(config, longest):
        alone = _with(config, remedy)
        if (found := plan(alone, work)).peak <= limit:
            return remedy, found
        taken |= remedy
        if plan(_with(config, taken), work).peak <= limit:
            for name in list(taken):
                fewer = {key: value for key, value in taken.items() if key != name}
                try:
                    if plan(_with(config, fewer), work).peak <= limit:
                        taken = fewer
                except ConfigError:
                    continue  # the others need it
            return taken, plan(_with(config, taken), work)
    return None


def _with(config: Config, overrides: Mapping[str, Any]) -> Config:
    values = config.model_dump(mode="json", exclude_none=True)
    apply_overrides(values, overrides)
    return parse_config(values)
