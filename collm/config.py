"""Every setting, one model per room. A recipe is a TOML file, `--room.key value` overrides it, contradictions are refused.

Nothing here imports torch, so a mistyped setting is reported before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from collm.errors import ConfigError

NUMBERS = (int, float, int | None, float | None)
Rate = Annotated[float, Field(ge=0, lt=1)]


class Room(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """`--learner.lr true` would otherwise train at a rate of 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in NUMBERS:
            raise ValueError(f"{_where(cls, info)}={str(value).lower()}: a number is wanted.")
        return value


class RunSettings(Room):
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's directory; default: task, algorithm and seed."""
    folder: str = "runs"
    """Where run directories lie."""
    seed: int = Field(0, ge=0)
    """Decides everything random; same seed, same run, bit for bit on a CPU."""
    iterations: int = Field(100, ge=1)
    """How often to collect and learn."""
    threads: int | None = Field(None, ge=1)
    """CPU threads for torch; default: as many as the machine has."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": cuda where there is one."""
    checkpoint_every: int = Field(10, ge=1)
    """Iterations between checkpoints; the last iteration always has one."""
    keep: int = Field(2, ge=1)
    """How many of the last checkpoints to keep; the best by held-out score is kept besides."""
    episodes_saved: int = Field(4, ge=0)
    """Full training episodes written to disk per iteration; those of held-out evaluations are all kept."""
    tensorboard: bool = True
    """Write TensorBoard events."""


class EnvSettings(BaseModel):
    """The task, and its own options beside it: `collm tasks` lists them."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, frozen=True)
    name: str
    """A built-in task, or "module:Class" of any PettingZoo ParallelEnv with text observations and actions."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class LoraSettings(Room):
    """Agents as adapters on a base model that those who share it hold once in memory."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter's matrices."""
    alpha: float = Field(32.0, gt=0)
    """An adapter's change is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs dropped while it learns; an answer is then scored otherwise than it was sampled."""
    targets: list[str] = ["all-linear"]
    """Names of the linear layers that are adapted; "all-linear" takes all but the vocabulary head."""
    base: Literal["float32", "bfloat16"] = "float32"
    """Number format that base models are kept in; adapters are float32 in every case."""
    agents: list[str] | None = None
    """Agents that are adapters, the others being whole models; default: all."""
    critics: bool = True
    """Critics are adapters too, each with a value head, wherever their model is the base of some agent."""

    @field_validator("agents", "targets", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("agents", "targets")
    @classmethod
    def _some(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and (not value or len(set(value)) < len(value) or ("all-linear" in value and len(value) > 1)):
            raise ValueError(f"{_where(cls, info)}={value}: name at least one, each once, or leave it out.")
        return value


class TeamSettings(Room):
    model: str = "tiny"
    """The model every agent starts from: a Hugging Face folder or hub name, or "tiny", which the package ships."""
    models: dict[str, str] = {}
    """Agent name -> model, where they differ; http://host:port/v1 (or .../v1#model) is a server, untrained."""
    api_key_env: str | None = None
    """Environment variable that holds the API key for such servers."""
    shared: bool = False
    """All agents that start from the same model share one set of weights, rather than each having its own."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Number format of matrix products; weights that learn and optimizer state are float32 in every case."""
    lora: LoraSettings | None = None
    """Train low-rank adapters rather than whole models: a table of settings, or none."""

    @field_validator("lora", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @model_validator(mode="after")
    def _agree(self) -> TeamSettings:
        if self.lora is not None and self.lora.base == "bfloat16" and self.compute != "bfloat16":
            raise ValueError(
                "team.lora.base='bfloat16' keeps weights that float32 products cannot use. Set team.compute='bfloat16', or "
                "team.lora.base='float32'."
            )
        return self

    @property
    def remote(self) -> dict[str, str]:
        """The frozen team-mates that live on servers: agent name -> address."""
        return {agent: place for agent, place in self.models.items() if place.startswith(("http://", "https://"))}


class VllmSettings(Room):
    """What the engine "vllm" may take of the machine."""

    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """Share of the GPU's memory for vLLM's weights and caches, all its models together; the learner needs the rest."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """GiB for all its key-value caches; default: on a GPU what the share above leaves, on a CPU 1."""
    max_model_len: int | None = Field(None, ge=1)
    """Longest history and answer together, in tokens; default: what the model was made for."""
    enforce_eager: bool = False
    """Do without CUDA graphs: a quicker start and less memory, but slower answers. On a CPU always so."""
    sleep: bool = True
    """On a GPU, leave its memory to the learner while that works; the weights wait in the host's memory."""


class RolloutSettings(Room):
    engine: Literal["local", "vllm"] = "local"
    """How text is generated: by this package's own loop, or by vLLM (the extra `vllm`)."""
    vllm: VllmSettings | None = None
    """With engine="vllm": a table of its settings, where they are not the defaults."""
    tasks: int = Field(16, ge=1)
    """Tasks drawn per iteration; each is played by one episode, one group or one turn tree."""
    protocol: Literal["parallel", "single", "pipeline", "discussion"] = "parallel"
    """Who speaks when: "parallel" is decentralized execution, "single" one agent alone; for evaluation alone, "pipeline" is one
    agent after the other and "discussion" a round of messages before the answers."""
    history: Literal["full", "last", "newest"] = "full"
    """What an agent reads: its growing chat; first instruction, last answer and newest observation; or the newest alone."""
    max_turns: int | None = Field(None, ge=1)
    """Cut episodes after so many turns (they then count as truncated)."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability; 1 keeps all."""
    top_k: int = Field(0, ge=0)
    """Sample from the k likeliest tokens; 0 keeps all."""
    max_tokens: int = Field(256, ge=1)
    """Longest answer, in tokens."""
    batch_tokens: int = Field(1 << 17, ge=1)
    """Tokens in one batch of the local engine; bounds the key-value cache. Histories kept for the next turn add half of it."""


Advantage = Literal["td_lambda", "counterfactual", "group_mean", "leave_one_out", "group_max", "return"]
GROUP_ADVANTAGES = ("group_mean", "leave_one_out", "group_max")


class AlgorithmSettings(Room):
    name: str = "collm-cc"
    """Which preset the other settings of this room start from: `collm algorithms` lists them."""
    critic: Literal["none", "joint", "own"] = "none"
    """What a critic reads: everyone's history (one critic), or each agent's own (one critic per agent)."""
    critic_kind: Literal["V", "Q"] = "V"
    """V judges a history; Q judges a history and the answers given to it."""
    critic_body: Literal["model", "policy"] = "model"
    """Whether an own critic is a model of its own, or a value head on the agent's model."""
    advantage: Advantage = "return"
    """The estimator: what an answer's return is compared with."""
    gamma: float = Field(0.9, ge=0, le=1)
    """Discount per turn."""
    lam: float = Field(0.0, ge=0, le=1)
    """Lambda of the actor's advantage; 0 is the TD error."""
    critic_lam: float = Field(0.0, ge=0, le=1)
    """Lambda of the critic's target; 0 is one step, 1 the return."""
    group_size: int = Field(1, ge=1)
    """Episodes per task, or joint answers per node of a turn tree."""
    tree: bool = False
    """Grow a turn tree with group_size joint answers per node, rather than whole episodes side by side."""
    resamples: int = Field(4, ge=1)
    """With advantage="counterfactual": other answers drawn per agent and turn."""
    loss: Literal["reinforce", "ppo_clip", "sequence_clip"] = "reinforce"
    """Policy gradient, or ratio-clipped per token (PPO) or per answer (GSPO)."""
    clip: float = Field(0.2, gt=0)
    """How far a ratio may move in one iteration."""
    epochs: int = Field(1, ge=1)
    """Passes of the actor over one iteration's answers."""
    normalize: Literal["none", "agent", "group"] = "none"
    """Divide advantages by each agent's deviation over the iteration (critics: z-score), or by each group's own."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the starting policy; above 0 a frozen copy of it is kept (for an adapter, its base)."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        name = values.get("name", "collm-cc")
        if not isinstance(name, str) or name not in ALGORITHMS:
            raise ValueError(f"there is no algorithm {name!r}.{_near(str(name), ALGORITHMS)} `collm algorithms` lists them.")
        return {**ALGORITHMS[name].algorithm, **values}

    @model_validator(mode="after")
    def _agree(self) -> AlgorithmSettings:
        a = f"algorithm.advantage={self.advantage!r}"
        if self.advantage in GROUP_ADVANTAGES and self.group_size < 2:
            raise ValueError(
                f"{a} compares episodes of one task, but algorithm.group_size={self.group_size} gives nothing to compare. "
                "Set algorithm.group_size=4, or algorithm.advantage='td_lambda' with algorithm.critic='joint'."
            )
        if self.advantage in ("td_lambda", "counterfactual") and self.critic == "none":
            raise ValueError(f"{a} needs a critic. Set algorithm.critic='joint' (or 'own').")
        if self.critic != "none" and self.advantage not in ("td_lambda", "counterfactual"):
            raise ValueError(f"{a} never asks the critic. Set algorithm.critic='none', or algorithm.advantage='td_lambda'.")
        if (self.critic_kind == "Q") != (self.advantage == "counterfactual"):
            raise ValueError(
                f"{a} with algorithm.critic_kind={self.critic_kind!r}: Q - Q is no signal to the actor, V knows no answer. "
                "Set critic_kind='Q' together with advantage='counterfactual', or 'V' with 'td_lambda'."
            )
        if self.critic_body == "policy" and (self.critic != "own" or self.critic_kind != "V"):
            raise ValueError(
                "algorithm.critic_body='policy' puts V on what the agent itself reads. Set algorithm.critic='own' and "
                "critic_kind='V', or critic_body='model'."
            )
        if self.normalize == "group" and (self.advantage not in GROUP_ADVANTAGES or self.group_size < 4):
            raise ValueError(
                f"algorithm.normalize='group' divides by a group's own deviation: it needs a group estimator and "
                f"group_size of at least 4 (here {self.advantage!r} and {self.group_size}). Set normalize='agent'."
            )
        if self.epochs > 1 and self.loss == "reinforce":
            raise ValueError(
                f"algorithm.epochs={self.epochs} reuses answers of an older policy, and loss='reinforce' does not correct for "
                "that. Set algorithm.loss='ppo_clip', or epochs=1."
            )
        if self.tree and (self.critic != "none" or self.group_size < 2):
            raise ValueError(
                "algorithm.tree=true grows joint answers to compare: it goes with the group methods and group_size >= 2. "
                "Set algorithm.tree=false."
            )
        return self


@dataclasses.dataclass(frozen=True)
class Preset:
    """An algorithm by name: what it is, and the settings of two rooms that it stands for."""

    about: str
    algorithm: dict[str, Any]
    critic: dict[str, Any] = dataclasses.field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """{"room.key": value} of both rooms."""
        rooms = {"algorithm": self.algorithm, "critic": self.critic}
        return {f"{room}.{key}": value for room, values in rooms.items() for key, value in values.items()}


def _monte_carlo(about: str, advantage: str) -> Preset:
    return Preset(about, {"group_size": 4, "advantage": advantage})


_TD = {"critic": "joint", "advantage": "td_lambda"}
_EXPLAINING = {**_TD, "lam": 0.9, "critic_lam": 0.9}
_NUMBERS = {"metrics": True}
_DIFFERENCE = {**_NUMBERS, "difference": True}
ALGORITHMS = {
    "collm-cc": Preset(
        "one critic reads the joint history (arXiv:2601.21972); TD error against what the team-mates' answers let expect",
        {**_TD, "critic_lam": 0.9},
        _DIFFERENCE,
    ),
    "collm-cc-paper": Preset(
        "the setting of arXiv:2601.21972 to the letter: a critic of text alone, TD error z-scored per agent",
        {**_TD, "normalize": "agent"},
    ),
    "collm-dc": Preset(
        "each agent has a critic that reads its own history; TD(lambda)", {**_EXPLAINING, "critic": "own"}, _NUMBERS
    ),
    "magrpo": _monte_carlo("return minus the mean of a task's siblings (arXiv:2508.04652)", "group_mean"),
    "marloo": _monte_carlo("return minus the mean of the other siblings (arXiv:2402.14740)", "leave_one_out"),
    "maremax": _monte_carlo("return minus the group's best; a biased baseline", "group_max"),
    "mareinforce": _monte_carlo("return, no baseline", "return"),
    "ac": Preset("one agent and its critic; TD(lambda)", _EXPLAINING, _NUMBERS),
    "grpo": _monte_carlo("magrpo with one agent (arXiv:2402.03300)", "group_mean"),
}
"""An algorithm is a value: there is one trainer."""

CRITIC_ONLY = (
    "critic.warmup", "critic.state", "critic.metrics", "critic.difference", "critic.normalize_targets",
    "algorithm.lam", "algorithm.critic_lam",
)  # fmt: skip
"""Settings that mean nothing to a method without a critic."""


class CriticSettings(Room):
    model: str | None = None
    """The critic's model; default: that of the first agent whose texts it reads."""
    lr: float = Field(5e-6, gt=0)
    """Learning rate of the critic (and of a value head)."""
    coef: float = Field(0.6, gt=0)
    """Weight of the critic's loss; it matters where clipping or a shared body weighs it against the actor's."""
    epochs: int = Field(1, ge=1)
    """Passes of the critic over one iteration's episodes."""
    warmup: int = Field(0, ge=0)
    """First iterations that train the critic alone."""
    state: bool = False
    """Let the critic read the world's privileged state, too."""
    metrics: bool = False
    """Expect what a regression on the world's own numbers says (rewards so far, its metrics); the text critic adds the rest."""
    difference: bool = False
    """Compare an answer with what the world's numbers let expect had the agent been silent and its team-mates not."""
    normalize_targets: bool = False
    """Predict in units of the targets' running deviation (PopArt)."""
    value_clip: float | None = Field(None, gt=0)
    """With critic_body="policy": how far V may move in one update, in units of reward."""
    max_tokens: int = Field(8192, ge=16)
    """Longest history a critic reads; the oldest turns are cut first, and counted."""


class LearnerSettings(Room):
    lr: float = Field(5e-6, gt=0)
    """Learning rate of the agents (AdamW)."""
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """AdamW's averaging rates."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Longest gradient, in norm; none to leave gradients alone."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How learning rates fall until the last iteration."""
    warmup: int = Field(0, ge=0)
    """Iterations over which learning rates rise to their full height."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Tokens (padding included) in one forward and backward pass; changes memory, not results."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass rather than keep their inner results: less memory, a third more work."""

    @field_validator("clip_norm", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value


class EvaluationSettings(Room):
    every: int = Field(20, ge=0)
    """Iterations between held-out evaluations (one before training and one after it in any case); 0 for no evaluation."""
    episodes: int | None = Field(None, ge=1)
    """Held-out tasks played, from the first; default: each once."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy. Above it, top_p and top_k are those of the rollout."""


ADDED: dict[tuple[str, str], Any] = {("critic", "difference"): False}
"""Settings (room, key) that came when there were runs and grids already, and the value that leaves all as it was then."""
TABLES: dict[str, type[Room]] = {"team.lora": LoraSettings, "rollout.vllm": VllmSettings}
"""Settings that are tables of settings."""


class Config(Room):
    """A whole run. `resolved()` is what the run directory keeps."""

    run: RunSettings = RunSettings()
    env: EnvSettings
    team: TeamSettings = TeamSettings()
    rollout: RolloutSettings = RolloutSettings()
    algorithm: AlgorithmSettings = Field(default_factory=lambda: AlgorithmSettings.model_validate({}))
    critic: CriticSettings = CriticSettings()
    learner: LearnerSettings = LearnerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        """The preset's settings of the critic; those of the algorithm's own room are put there by that room."""
        algorithm, critic = (values.get(room, {}) for room in ("algorithm", "critic"))
        name = algorithm.get("name", "collm-cc") if isinstance(algorithm, Mapping) else None
        preset = ALGORITHMS.get(name) if isinstance(name, str) else None
        if preset is None or not isinstance(critic, Mapping) or algorithm.get("critic") == "none":
            return values  # what is wrong is told by the rooms
        room = {**preset.critic, **critic}
        unfit = not _truth(room.get("metrics", False)) or algorithm.get("critic_kind") == "Q"
        if "difference" not in critic and unfit:
            room.pop("difference", None)  # the preset's, which needs the numbers and V; a contradiction of one's own is refused
        return {**values, "critic": room}

    @model_validator(mode="after")
    def _agree(self) -> Config:
        if self.rollout.temperature == 0:
            raise ValueError(
                "rollout.temperature=0 always gives the same answer, so there is nothing to learn from. "
                "Set rollout.temperature=1.0; evaluation.temperature is greedy by default."
            )
        for name, value in (("rollout", self.rollout.temperature), ("evaluation", self.evaluation.temperature)):
            if self.rollout.engine == "vllm" and 0 < value < 0.01:
                raise ValueError(
                    f"{name}.temperature={value}: rollout.engine='vllm' samples at 0.01 or above. Set {name}.temperature=0.01, "
                    "or rollout.engine='local'."
                )
        if self.critic.value_clip is not None and self.algorithm.critic_body != "policy":
            raise ValueError(
                f"critic.value_clip={self.critic.value_clip} acts only on a value head of the agent's own model. "
                "Set algorithm.critic_body='policy', or leave it out."
            )
        if self.algorithm.critic == "none":
            for name in CRITIC_ONLY:
                room, _, key = name.partition(".")
                if value := getattr(getattr(self, room), key):
                    raise ValueError(
                        f"{name}={value}, but {self.algorithm.name} has no critic. Set {name}="
                        f"{'false' if value is True else 0}, or algorithm.name='collm-cc'."
                    )
        if self.critic.difference:
            if not self.critic.metrics:
                raise ValueError(
                    "critic.difference=true expects by the world's own numbers, which critic.metrics=false leaves out. Set "
                    "critic.metrics=true, or critic.difference=false."
                )
            if self.algorithm.critic_kind == "Q":
                raise ValueError(
                    "critic.difference=true and algorithm.critic_kind='Q' are two baselines for one answer. Set "
                    "critic.difference=false, or critic_kind='V' with algorithm.advantage='td_lambda'."
                )
        if self.critic.warmup >= self.run.iterations:
            raise ValueError(
                f"critic.warmup={self.critic.warmup} leaves no iteration of run.iterations={self.run.iterations} to train the "
                "agents. Set fewer warm-up iterations, or more iterations."
            )
        if self.algorithm.critic_body == "policy":
            own = {"critic.model": self.critic.model, "critic.state": self.critic.state}
            for name, given in own.items():
                if given:
                    raise ValueError(
                        f"{name}={given!r}: a value head on the agent's own model reads what the agent reads, with its model. "
                        "Leave it out, or set algorithm.critic_body='model'."
                    )
            if self.critic.epochs > 1 and not self.critic.warmup:
                raise ValueError(
                    f"critic.epochs={self.critic.epochs}: a value head on the agent's own model learns in the agent's own "
                    "steps; only the warm-up has more of them, and critic.warmup=0. Leave it out, or set "
                    "algorithm.critic_body='model'."
                )
        return self

    @property
    def run_name(self) -> str:
        task = self.env.name.replace(":", ".")
        return self.run.name or f"{task}-{self.algorithm.name}-seed{self.run.seed}"

    def check_trains(self) -> None:
        """Raises ConfigError where the settings are for evaluation alone."""
        if self.rollout.protocol not in ("parallel", "single"):
            raise ConfigError(
                f"rollout.protocol={self.rollout.protocol!r} cannot train: its agents read each other within a turn, while "
                "training is for acting on one's own history alone. Train with rollout.protocol='parallel'; "
                f"`collm evaluate RUN --rollout.protocol {self.rollout.protocol}` plays this one."
            )

    def resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def load_config(recipe: Path | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a recipe and apply `{"room.key": value}` on top. Raises ConfigError naming setting, reason and way out."""
    values: dict[str, Any] = {}
    if recipe is not None:
        try:
            values = tomllib.loads(recipe.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"recipe {str(recipe)!r} cannot be read: {error.strerror}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {str(recipe)!r} is not valid TOML: {error}.") from error
    apply_overrides(values, overrides or {})
    return parse_config(values)


def apply_overrides(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Put `{"room.key": value}` on top of nested plain values. Raises ConfigError where a value stands in a table's place."""
    for key, value in overrides.items():
        room, _, name = key.partition(".")
        if not isinstance(values.setdefault(room, {}), dict):
            raise ConfigError(f"{room!r} in the recipe must be a table [{room}] of settings.")
        place = values[room]
        *inner, last = name.split(".")
        for part in inner:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"unknown setting {key!r}: {part!r} is a value, not a table of settings.")
        place[last] = value


def parse_config(values: Mapping[str, Any]) -> Config:
    """A Config from nested plain values, as TOML or JSON gives them."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from error


def parse_resolved(values: Mapping[str, Any]) -> Config:
    """A Config from what `resolved()` once gave: settings that came later stay as it was before there were any, whatever
    presets have become."""
    complete = dict(values)
    for (room, key), before in ADDED.items():
        if isinstance(complete.get(room), Mapping):
            complete[room] = {key: before, **complete[room]}
    return parse_config(complete)


def parse_value(text: str, name: str = "") -> Any:
    """A command-line value: TOML where it is one value (a number, true, a list, quoted text), else the bare text.

    `name` is the setting it is for: one that holds text takes 2024 or true as text, too.
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    if isinstance(value, (str, list)):
        return value
    room, _, key = name.partition(".")
    fields: Any = getattr(Config.model_fields[room].annotation, "model_fields", {}) if room in Config.model_fields else {}
    holds_text = key in fields and fields[key].annotation in (str, str | None)
    bare = len(parsed) > 1 or "#" in text or isinstance(value, (datetime.date, datetime.time))
    return text if bare or holds_text else value


def describe() -> Iterator[tuple[str, str, str]]:
    """(room.key, default, sentence) of every setting, for `--help` and the documentation."""
    for room, field in Config.model_fields.items():
        model: Any = field.annotation
        for key, setting in model.model_fields.items():
            default = "required" if setting.is_required() else json.dumps(setting.get_default())
            preset = getattr(ALGORITHMS["collm-cc"], room, {})
            default = json.dumps(preset[key]) if key in preset else default
            yield f"{room}.{key}", default, " ".join((setting.description or "").split())
            if table := TABLES.get(f"{room}.{key}"):
                for name, inner in table.model_fields.items():
                    yield f"{room}.{key}.{name}", json.dumps(inner.get_default()), " ".join((inner.description or "").split())


def _truth(value: Any) -> bool:
    """What a switch will take `value` for; False where it will be refused."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


def _where(room: type[BaseModel], info: ValidationInfo) -> str:
    """A setting's full name, from the room's class."""
    rooms: dict[Any, str] = {field.annotation: name for name, field in Config.model_fields.items()}
    rooms |= {table: name for name, table in TABLES.items()}
    return f"{rooms.get(room, room.__name__)}.{info.field_name}"


def _near(name: str, names: Any) -> str:
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def _explain(detail: Any) -> str:
    """One pydantic error as one sentence about one setting."""
    path = [str(part) for part in detail["loc"]]
    name = ".".join(path)
    if detail["type"] == "extra_forbidden":
        known = [key for key, _, _ in describe()]
        names = known if len(path) > 1 else list(Config.model_fields)
        kind = "setting" if len(path) > 1 else "room"
        return f"unknown {kind} {name!r}.{_near(name, names) or ' `collm train --settings` lists all settings.'}"
    if detail["type"] == "missing" and name in ("env", "env.name"):
        return "env.name is missing: say which task to train on, for example env.name='str_build'. `collm tasks` lists them."
    if detail["type"] in ("model_type", "dict_type"):
        return f"{name}={detail['input']!r} is one value; {name} is a table of settings: write [{name}] and one setting a line."
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return message
    return f"{name}={detail['input']!r}: {message[0].lower()}{message[1:]}."
