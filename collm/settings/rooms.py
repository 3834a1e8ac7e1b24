"""The settings of every room, one sentence each. checks.py refuses contradictions; presets.py defines the algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from collm.errors import ConfigError
from collm.settings import checks, former
from collm.settings.presets import ALGORITHMS, CRITIC_BASELINES

Examples = Annotated[int, Field(ge=0)] | str
NUMBERS = (int, float, int | None, float | None, Examples)
OFF = BeforeValidator(lambda value: None if value == "none" else value)
"""Makes "none" a way to write None, which TOML does not have."""
ONE_IS_A_LIST = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


class Room(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for a number; pydantic would take `--learner.lr true` as a rate of 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in NUMBERS:
            raise ValueError(f"{_where(cls, info)}={str(value).lower()}: a number is wanted.")
        return value


class RunSettings(Room):
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run directory; default: task, algorithm and seed."""
    folder: str = "runs"
    """Folder that holds the run directories."""
    seed: int = Field(0, ge=0)
    """Seed of all random numbers; on a CPU the same seed gives the same run, bit for bit."""
    iterations: int = Field(100, ge=1)
    """Number of iterations; each collects episodes and learns from them."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch; default: as many as this process may use."""
    device: str = "auto"
    """"cpu", "cuda", or "auto" (cuda if available, else cpu)."""
    checkpoint_every: int = Field(10, ge=1)
    """Most iterations between checkpoints; the last always has one, and cheap ones are written in between."""
    trackers: Annotated[list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], ONE_IS_A_LIST] = ["tensorboard"]
    """Trackers that also get the numbers of metrics.jsonl: "tensorboard", "wandb", "mlflow", "trackio"; [] for none."""


class EnvSettings(BaseModel):
    """The environment and its own options, which `collm tasks` lists."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, frozen=True)
    name: str
    """A built-in environment, or "module:Class" of any PettingZoo ParallelEnv with text observations and actions."""

    @model_validator(mode="before")
    @classmethod
    def _wording(cls, values: Any) -> Any:
        """The wording of a built-in environment is a setting of every run, so that a run keeps its prompts."""
        built_in = isinstance(values, Mapping) and ":" not in str(values.get("name", ":"))
        return {**values, "wording": values.get("wording", "plain")} if built_in else values

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class LoraSettings(Room):
    """Low-rank adapters on a frozen base model. Agents with the same base share one copy of it in memory."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter's matrices; any setting of this table trains adapters instead of whole models."""
    alpha: float = Field(32.0, gt=0)
    """The adapter's update is scaled by alpha / rank."""
    targets: Annotated[list[str], ONE_IS_A_LIST] = ["all-linear"]
    """Names of the adapted linear layers; "all-linear" adapts all but the vocabulary head."""
    agents: Annotated[list[str] | None, ONE_IS_A_LIST] = None
    """Agents that are trained as adapters; the others as whole models. Default: all agents."""

    @field_validator("agents", "targets")
    @classmethod
    def _some(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and (not value or len(set(value)) < len(value) or ("all-linear" in value and len(value) > 1)):
            raise ValueError(f"{_where(cls, info)}={value}: name at least one, each once, or leave it out.")
        return value


class TeamSettings(Room):
    model: str = "tiny"
    """Initial model of every agent: a Hugging Face folder, a hub name, or "tiny", the model in the package."""
    models: dict[str, str] = {}
    """Agent name -> model, for agents that differ; http://host:port/v1 (or .../v1#model) is a server, which is not trained."""
    api_key_env: str | None = None
    """Environment variable that holds the API key for such servers."""
    shared: bool = False
    """Agents with the same initial model share one set of weights; if false, each agent has its own."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Number format of matrix products and of frozen base models; trained weights and optimizer state are always float32."""
    system: str | None = Field(None, min_length=1)
    """System message at the head of every history; "none" leaves out the chat template's own. Default: the template's own."""
    thinking: Literal["off", "private", "shown"] = "off"
    """"off": models do not think if their chat template has a switch for it. "private": they think, but neither the environment
    nor another agent reads thoughts, which are trained in every case. "shown": thoughts are part of the answer."""
    lora: Annotated[LoraSettings | None, OFF] = None
    """Train low-rank adapters instead of whole models: a table of settings, or "none"."""

    @property
    def remote(self) -> dict[str, str]:
        """Agents that run on a server and are not trained: agent name -> address."""
        return {agent: place for agent, place in self.models.items() if place.startswith(("http://", "https://"))}


class VllmSettings(Room):
    """Limits of the engine "vllm"."""

    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """Fraction of the GPU's memory for the weights and caches of all vLLM models; the learner needs the rest."""
    max_model_len: int | None = Field(None, ge=1)
    """Maximum length of history and answer together, in tokens; default: the model's own."""


class RolloutSettings(Room):
    engine: Literal["local", "vllm"] = "local"
    """Generates the answers: "local" is this package's own loop, "vllm" needs the extra `vllm`."""
    vllm: VllmSettings = VllmSettings()
    """Limits of the engine "vllm"."""
    tasks: int = Field(16, ge=1)
    """Tasks drawn per iteration; each is played as one episode, one group or one turn tree."""
    shards: int = Field(1, ge=1)
    """Pieces that tasks are cut into, each played by itself, if wanted by several processes (`cluster.rollouts`)."""
    ahead: int = Field(0, ge=0, le=1)
    """Updates that the weights which play an iteration may lack: with 1 its episodes are played while the update of the
    iteration before is computed, if by other processes (`cluster.rollouts`); it needs a clipped `algorithm.loss`."""
    protocol: Literal["parallel", "pipeline", "discussion"] = "parallel"
    """Order of answers within a turn: "parallel" is decentralized execution; "pipeline" (one agent after the other) and
    "discussion" (a round of messages before the answers) are for evaluation only."""
    history: Literal["full", "last", "newest"] = "full"
    """What an agent reads: "full" is all its observations and answers, "last" the first observation, its last answer and the
    newest observation, "newest" the newest observation alone."""
    examples: Examples = 0
    """Worked examples in front of every agent's history: how many first turns of training tasks the environment's scripted
    player answers, or a file of chats (JSON lines)."""
    max_turns: int | None = Field(None, ge=1)
    """Truncate episodes after this number of turns; default: the environment ends them."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability; 1 keeps all."""
    top_k: int = Field(0, ge=0)
    """Sample from the k likeliest tokens; 0 keeps all."""
    max_tokens: int = Field(256, ge=1)
    """Maximum length of an answer, in tokens."""
    batch_tokens: int = Field(1 << 17, ge=1)
    """Maximum tokens in one batch of the local engine, which bounds its key-value cache. The cache that each model keeps for
    the next turn is limited to half of this."""


class AlgorithmSettings(Room):
    name: str = "collm-cc"
    """Preset that sets the defaults of [algorithm] and [critic]; `collm algorithms` lists all presets."""
    baseline: str = "value"
    """Baseline subtracted from the return: "value" (V of a critic), "counterfactual" (mean Q of resampled answers),
    "group_mean", "leave_one_out", "group_max", "none", or a user-defined "module:function"."""
    teammates: Literal["none", "replay", "effects"] = "none"
    """Also subtract a difference baseline, the effect of the team-mates' answers: from a replay of each turn with the agent's
    answer empty ("replay"), or from what lines of answers changed in observations of earlier iterations ("effects")."""
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
    """Policy loss: "reinforce", or a clipped importance ratio per token ("ppo_clip") or per answer ("sequence_clip", GSPO)."""
    clip: float = Field(0.2, gt=0)
    """Clip range: the importance ratio is clipped to [1 - clip, 1 + clip]."""
    epochs: int = Field(1, ge=1)
    """Policy updates per iteration, each over all answers of the iteration."""
    max_drop: Annotated[float | None, OFF] = Field(None, gt=0)
    """Maximum mean drop of the log-prob of good answers (neither return nor advantage below the iteration's mean) by one policy
    update, in nats per answer; a larger step is halved until it is within this, at most to 1/64. "none" takes every step whole.
    With 0.03 (collm-cc, collm-dc, ac) a team that has solved its task stays solved (docs/results/stability)."""
    normalize: Literal["none", "agent", "group"] = "none"
    """"agent": divide advantages by each agent's standard deviation over the iteration (with a critic: z-score); "group": by
    each group's standard deviation of returns."""
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
                f"algorithm.name={name!r} is not an algorithm.{checks.near(str(name), ALGORITHMS)} "
                "`collm algorithms` lists them."
            )
        return {**ALGORITHMS[name].algorithm, **values}

    @model_validator(mode="after")
    def _agree(self) -> AlgorithmSettings:
        for check in checks.ALGORITHM:
            check(self)
        return self

    @property
    def has_critic(self) -> bool:
        """Whether the baseline is a predicted value, of critics or (with `critic.body="none"`) of a regression."""
        return self.baseline in CRITIC_BASELINES

    @property
    def critic_kind(self) -> Literal["V", "Q"]:
        """What critics predict: V of a history, or Q of a history and the joint action."""
        return "Q" if self.baseline == "counterfactual" else "V"


class CriticSettings(Room):
    reads: Literal["joint", "own"] = "joint"
    """The joint history (one centralized critic), or each agent's own history (a decentralized critic per agent)."""
    body: Literal["auto", "model", "policy", "frozen", "none"] = "auto"
    """"model": the critic is a separate model; "policy": a value head on the agent's model; "auto": an adapter if the critic's
    model is the base of an agent's adapter, else a separate model; "frozen": a ridge regression on hidden states of a model
    that is not trained; "none": no language model, V is a regression alone."""
    model: str | None = None
    """Initial model of the critic; default: that of the first agent whose history it reads."""
    lr: float | None = Field(None, gt=0)
    """Learning rate of critics; default: 1e-4 for adapters, otherwise as learner.lr."""
    lam: float = Field(0.0, ge=0, le=1)
    """Lambda of the critic's targets; 0 is the one-step target r + gamma V, 1 the return."""
    loss: Literal["mse", "hl_gauss"] = "mse"
    """Loss of a trained critic: squared error, or cross-entropy of a histogram of returns ("hl_gauss"), whose mean is V."""
    epochs: int = Field(1, ge=1)
    """Critic updates per iteration: over all its episodes, or with a replay each over 8 of the sequences kept."""
    replay: int | None = Field(None, ge=1)
    """Recent iterations whose sequences and targets a separate critic learns from; default: 1, and 32 for a frozen body."""
    warmup: int = Field(0, ge=0)
    """Number of first iterations that train the critics only."""
    state: bool = False
    """Critics also read the environment's privileged state."""
    metrics: str = "none"
    """Add a regression of returns to what critics predict from text. It reads the rewards so far and "global" (environment
    metrics), "readings" (numbers in the texts that the critic reads) or those of your "module:function"; "auto" is "global" for
    a joint critic if the environment reports metrics, else "readings". With body="none" it is V, also with "none"."""
    normalize_targets: bool = False
    """Normalize critic targets by their running mean and standard deviation (PopArt)."""
    max_tokens: int = Field(8192, ge=16)
    """Maximum length of a history that a critic reads, in tokens; the oldest turns are cut first and counted."""

    @field_validator("metrics", mode="before")
    @classmethod
    def _former(cls, value: Any) -> Any:
        return former.metrics(value)


class LearnerSettings(Room):
    lr: float | None = Field(None, gt=0)
    """Learning rate of the agents (AdamW); default: 5e-4 for adapters and for "tiny", 5e-6 for other whole models."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rates over the iterations."""
    clip_norm: Annotated[float | None, OFF] = Field(1.0, gt=0)
    """Maximum norm of a gradient; "none" does not clip."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Maximum tokens (padding included) in one forward and backward pass; affects memory, not results."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more computation."""


class EvaluationSettings(Room):
    every: int = Field(20, ge=0)
    """Iterations between held-out evaluations, with one before and one after training; 0 disables evaluation."""
    episodes: int | None = Field(None, ge=1)
    """Number of held-out episodes, one per task from the first on, and again from the first after the last; default: each task
    once."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy. Above 0, top_p and top_k are those of the rollout."""

    def due(self, iteration: int, last: int) -> bool:
        """Whether the team is evaluated after `iteration` of `last` iterations; 0 is before training."""
        return self.every > 0 and (iteration % self.every == 0 or iteration == last)


class ClusterSettings(Room):
    address: Annotated[str | None, OFF] = None
    """Ray cluster that trains every model in a process of its own: "local" starts one here, "auto" is the one that runs here,
    or HOST:PORT; "none" trains in this process. It needs the extra `cluster`."""
    devices: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Agent, "critic" or "rollouts" -> fraction or number of devices (GPUs or machines) for each; default: by memory."""
    rollouts: int = Field(0, ge=0)
    """Processes with copies of all policies that play the pieces of `rollout.shards`; with 0 the driver plays all of them."""
    restarts: int = Field(3, ge=0)
    """Times that a run continues by itself from its last checkpoint after a loss; lost rollout workers that are made again."""


TABLES: dict[str, type[Room]] = {"team.lora": LoraSettings, "rollout.vllm": VllmSettings}
"""Nested tables: "room.key" -> model."""


class Config(Room):
    """All settings of a run. The run directory keeps `resolved()` as config.json."""

    run: RunSettings = RunSettings()
    env: EnvSettings
    team: TeamSettings = TeamSettings()
    rollout: RolloutSettings = RolloutSettings()
    algorithm: AlgorithmSettings = Field(default_factory=lambda: AlgorithmSettings.model_validate({}))
    critic: CriticSettings = CriticSettings()
    learner: LearnerSettings = LearnerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        """Apply the preset's settings of the critic. If the recipe replaces the baseline or disables the metrics, drop the
        preset's difference baseline, and its critic without a language model: text, or Q of answers, is then to be read."""
        algorithm, critic = (values.get(room, {}) for room in ("algorithm", "critic"))
        if not isinstance(algorithm, Mapping) or not isinstance(critic, Mapping):
            return values  # each room refuses what it cannot read
        name = algorithm.get("name", "collm-cc")
        preset = ALGORITHMS.get(name) if isinstance(name, str) else None
        if preset is None:
            return values
        baseline = algorithm.get("baseline", preset.algorithm["baseline"])
        room = {**(preset.critic if baseline in CRITIC_BASELINES else {}), **critic}
        if baseline != preset.algorithm["baseline"] or former.metrics(room.get("metrics", "none")) == "none":
            room = {key: value for key, value in room.items() if key != "body" or key in critic}
            algorithm = {**({"teammates": "none"} if "teammates" in preset.algorithm else {}), **algorithm}
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

    @property
    def views_are_own(self) -> bool:
        """Whether each agent has regressions of its own, which read its texts alone."""
        return self.algorithm.has_critic and self.critic.reads == "own" and self.critic.metrics not in ("global", "none")

    def returns_read(self, *, reported: bool) -> str:
        """What regressions of returns read: a value of `critic.metrics` other than "auto".

        reported: whether the environment reports metrics.
        """
        if self.critic.metrics != "auto":
            return self.critic.metrics
        return "global" if reported and self.critic.reads == "joint" else "readings"

    def changes_read(self, *, reported: bool) -> str:
        """What the difference baseline reads: as above. Effects change texts, so that text is read there; otherwise environment
        metrics, unless `critic.metrics` is set or V is a regression on the rewards alone."""
        read = self.returns_read(reported=reported)
        if self.algorithm.teammates == "effects":
            return "readings" if read in ("global", "none") else read
        return "global" if read == "none" and (self.critic.body != "none" or not self.algorithm.has_critic) else read

    def check_trains(self) -> None:
        """Raises ConfigError if the settings are for evaluation only."""
        if self.rollout.protocol != "parallel":
            raise ConfigError(
                f"rollout.protocol={self.rollout.protocol!r} cannot train: its agents read each other within a turn, while "
                "training is for acting on one's own history alone. Train with rollout.protocol='parallel'; "
                f"`collm evaluate RUN --rollout.protocol {self.rollout.protocol}` plays this one."
            )

    def in_one_process(self) -> Config:
        return self.model_copy(update={"cluster": ClusterSettings()})

    def resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def _where(room: type[BaseModel], info: ValidationInfo) -> str:
    """A setting's full name, from the room's class."""
    rooms: dict[Any, str] = {field.annotation: name for name, field in Config.model_fields.items()}
    rooms |= {table: name for name, table in TABLES.items()}
    return f"{rooms.get(room, room.__name__)}.{info.field_name}"
