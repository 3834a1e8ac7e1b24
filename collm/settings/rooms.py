"""The fields of every room, one sentence each. What contradicts what is in checks.py, the algorithms are in presets.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

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
from collm.settings import checks
from collm.settings.presets import ALGORITHMS, CRITIC_BASELINES

NUMBERS = (int, float, int | None, float | None)


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
    """CPU threads of torch; default: as many as this process may use."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": cuda where there is one."""
    checkpoint_every: int = Field(10, ge=1)
    """Iterations between checkpoints; the last iteration always has one."""
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
    """Agents as low-rank adapters on a base model, which is in memory once for all agents that share it."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter's matrices; any setting of this table trains adapters instead of whole models."""
    alpha: float = Field(32.0, gt=0)
    """An adapter's change is scaled by alpha / rank."""
    targets: list[str] = ["all-linear"]
    """Names of the adapted linear layers; "all-linear" adapts all but the vocabulary head."""
    agents: list[str] | None = None
    """Agents that are adapters; the others are whole models. Default: all agents."""

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
    """The model that every agent starts from: a Hugging Face folder, a hub name, or "tiny", which is part of the package."""
    models: dict[str, str] = {}
    """Agent name -> model, where it differs; http://host:port/v1 (or .../v1#model) is a server, which is not trained."""
    api_key_env: str | None = None
    """Environment variable that holds the API key for such servers."""
    shared: bool = False
    """Agents that start from the same model share one set of weights; otherwise each agent has its own."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Number format of matrix products and of frozen base models; trained weights and optimizer state are always float32."""
    lora: LoraSettings | None = None
    """Train low-rank adapters instead of whole models: a table of settings, or none."""

    @field_validator("lora", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @property
    def remote(self) -> dict[str, str]:
        """Agents that are served elsewhere and not trained: agent name -> address."""
        return {agent: place for agent, place in self.models.items() if place.startswith(("http://", "https://"))}


class VllmSettings(Room):
    """Limits of the engine "vllm"."""

    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """Fraction of the GPU's memory for the weights and caches of all vLLM models; the learner needs the rest."""
    max_model_len: int | None = Field(None, ge=1)
    """Maximum length of history and answer together, in tokens; default: the model's own."""


class RolloutSettings(Room):
    engine: Literal["local", "vllm"] = "local"
    """What generates text: this package's own loop, or vLLM (the extra `vllm`)."""
    vllm: VllmSettings = VllmSettings()
    """Limits of the engine "vllm"."""
    tasks: int = Field(16, ge=1)
    """Tasks drawn per iteration; each is played as one episode, one group or one turn tree."""
    protocol: Literal["parallel", "pipeline", "discussion"] = "parallel"
    """Who speaks when: "parallel" is decentralized execution; "pipeline" (one agent after the other) and "discussion" (a round
    of messages before the answers) are for evaluation."""
    history: Literal["full", "last", "newest"] = "full"
    """What an agent reads: all its observations and answers; the first observation, last answer and newest one; or the newest
    one."""
    max_turns: int | None = Field(None, ge=1)
    """Truncate episodes after this number of turns; default: the environment decides."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability; 1 keeps all."""
    top_k: int = Field(0, ge=0)
    """Sample from the k likeliest tokens; 0 keeps all."""
    max_tokens: int = Field(256, ge=1)
    """Maximum length of an answer, in tokens."""
    batch_tokens: int = Field(1 << 17, ge=1)
    """Tokens in one batch of the local engine; bounds its key-value cache. Histories kept for the next turn take half as many
    more."""


class AlgorithmSettings(Room):
    name: str = "collm-cc"
    """The preset that the other settings of [algorithm] and [critic] start from; `collm algorithms` lists them."""
    baseline: str = "value"
    """What is subtracted from the return: "value" (V of a critic), "counterfactual" (mean Q of resampled answers),
    "group_mean", "leave_one_out", "group_max", "none", or "module:function" of your own."""
    teammates: Literal["none", "replay"] = "none"
    """Subtract a difference baseline, too: the effect of the team-mates' answers, from a replay of each turn without the
    agent's."""
    gamma: float = Field(0.9, ge=0, le=1)
    """Discount per turn."""
    lam: float = Field(0.0, ge=0, le=1)
    """With baseline="value": lambda of TD(lambda) advantages; 0 is the TD error, 1 the return minus V."""
    group_size: int = Field(1, ge=1)
    """Episodes per task, or joint answers per node of a turn tree."""
    tree: bool = False
    """Grow a turn tree with group_size joint answers per node, instead of whole episodes."""
    resamples: int = Field(4, ge=1)
    """With baseline="counterfactual": answers resampled per agent and turn."""
    loss: Literal["reinforce", "ppo_clip", "sequence_clip"] = "reinforce"
    """Policy gradient, or a clipped importance ratio per token (PPO) or per answer (GSPO)."""
    clip: float = Field(0.2, gt=0)
    """Largest change of the importance ratio that still has a gradient."""
    epochs: int = Field(1, ge=1)
    """Updates of the policies per iteration, each over all its answers."""
    normalize: Literal["none", "agent", "group"] = "none"
    """Divide advantages by each agent's standard deviation over the iteration (with a critic: z-score), or by each group's."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the initial policy; above 0 a frozen copy of it is kept (for an adapter, its base)."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        name = values.get("name", "collm-cc")
        if not isinstance(name, str) or name not in ALGORITHMS:
            raise ValueError(
                f"there is no algorithm {name!r}.{checks.near(str(name), ALGORITHMS)} `collm algorithms` lists them."
            )
        return {**ALGORITHMS[name].algorithm, **values}

    @model_validator(mode="after")
    def _agree(self) -> AlgorithmSettings:
        for check in checks.ALGORITHM:
            check(self)
        return self

    @property
    def has_critic(self) -> bool:
        """Whether the baseline is computed by critics."""
        return self.baseline in CRITIC_BASELINES

    @property
    def critic_kind(self) -> Literal["V", "Q"]:
        """What critics predict: the value of a history, or of a history and the joint action taken there."""
        return "Q" if self.baseline == "counterfactual" else "V"


class CriticSettings(Room):
    reads: Literal["joint", "own"] = "joint"
    """The joint history (one centralized critic), or each agent's own history (a decentralized critic per agent)."""
    body: Literal["auto", "model", "policy"] = "auto"
    """"model": a model of its own; "policy": a value head on the agent's model; "auto": an adapter where an agent's base model
    is the critic's, else a model of its own."""
    model: str | None = None
    """The critic's model; default: that of the first agent whose history it reads."""
    lr: float | None = Field(None, gt=0)
    """Learning rate of critics; default: 1e-4 for adapters, otherwise as learner.lr."""
    lam: float = Field(0.0, ge=0, le=1)
    """Lambda of the critic's targets; 0 is the one-step target, 1 the return."""
    epochs: int = Field(1, ge=1)
    """Updates of the critics per iteration, each over all its episodes."""
    warmup: int = Field(0, ge=0)
    """First iterations that train critics only."""
    state: bool = False
    """Critics also read the environment's privileged state."""
    metrics: bool = False
    """Values are the metric regression's (from environment metrics and rewards so far) plus what critics read from text."""
    normalize_targets: bool = False
    """Predict in units of the running standard deviation of targets (PopArt)."""
    max_tokens: int = Field(8192, ge=16)
    """Maximum length of a history that a critic reads; the oldest turns are cut first, and counted."""


class LearnerSettings(Room):
    lr: float | None = Field(None, gt=0)
    """Learning rate of the agents (AdamW); default: 5e-4 for adapters and for "tiny", 5e-6 for other whole models."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How learning rates fall until the last iteration."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Maximum norm of a gradient; none to leave gradients as they are."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Tokens (padding included) in one forward and backward pass; changes memory, not results."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass: less memory, a third more work."""

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
        """Apply the preset's settings of the critic, and drop its difference baseline where the recipe replaces its baseline or
        leaves out the metrics."""
        algorithm, critic = (values.get(room, {}) for room in ("algorithm", "critic"))
        if not isinstance(algorithm, Mapping) or not isinstance(critic, Mapping):
            return values  # each room refuses what it cannot read
        name = algorithm.get("name", "collm-cc")
        preset = ALGORITHMS.get(name) if isinstance(name, str) else None
        if preset is None:
            return values
        baseline = algorithm.get("baseline", preset.algorithm["baseline"])
        room = {**(preset.critic if baseline in CRITIC_BASELINES else {}), **critic}
        if "teammates" in preset.algorithm and (
            baseline != preset.algorithm["baseline"] or not _truth(room.get("metrics", False))
        ):
            algorithm = {"teammates": "none", **algorithm}
        return {**values, "algorithm": algorithm, "critic": room}

    @model_validator(mode="after")
    def _agree(self) -> Config:
        for check in checks.CONFIG:
            check(self)
        return self

    @property
    def run_name(self) -> str:
        task = self.env.name.replace(":", ".")
        return self.run.name or f"{task}-{self.algorithm.name}-seed{self.run.seed}"

    def check_trains(self) -> None:
        """Raises ConfigError where the settings are for evaluation alone."""
        if self.rollout.protocol != "parallel":
            raise ConfigError(
                f"rollout.protocol={self.rollout.protocol!r} cannot train: its agents read each other within a turn, while "
                "training is for acting on one's own history alone. Train with rollout.protocol='parallel'; "
                f"`collm evaluate RUN --rollout.protocol {self.rollout.protocol}` plays this one."
            )

    def resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


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
