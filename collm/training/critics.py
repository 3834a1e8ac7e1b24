"""The critics of a run: who reads what, what they expect, how well that explains returns, and their own updates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from collm import seeds
from collm.algorithms import losses
from collm.algorithms.advantages import discounted_returns
from collm.algorithms.regression import TurnRegression, Yardstick
from collm.algorithms.stats import explained_variance, without_task_means
from collm.config import Config
from collm.errors import TrainingError
from collm.models.adapters import dropout
from collm.models.critic import Critic, ValueHead
from collm.models.policy import Policy
from collm.models.team import Team
from collm.training.pack import Batch, MicroBatch, Packed, micro_batches, pack_alternatives, pack_answers, pack_readings

TURNS = 32
"""Turns that have a regression of their own; later ones share the last."""

Metrics = dict[str, float]
Check = Callable[[Tensor, str, Iterable[int]], None]
"""check(loss, whose, episodes): raises if the loss is not finite."""


@dataclass(slots=True)
class Judge:
    """One critic and the agents it serves. Without a `critic` model it is a value head on the agent's own policy."""

    name: str
    agents: tuple[str, ...]
    label: str
    head: ValueHead
    critic: Critic | None
    policy: Policy
    packed: list[Packed] = field(default_factory=list)

    @property
    def module(self) -> nn.Module:
        """What belongs to the judge alone: its whole model, or its head."""
        return self.critic or self.head


class Critics:
    """All judges of a run: one over the joint history, one per agent, or none."""

    def __init__(self, team: Team, config: Config, metric_names: Sequence[str] = ()):
        self.team, self.config = team, config
        self.kind = config.algorithm.critic_kind
        self.joint = config.algorithm.critic == "joint"
        self.reads = {"state": config.critic.state, "newest_only": config.rollout.history == "newest"}
        agents = team.agents
        own: dict[str, tuple[str, ...]] = {agent: (agent,) for agent in agents}
        views: dict[str, dict[str, tuple[str, ...]]] = {"none": {}, "joint": {"team": agents}, "own": own}
        self.judges = [self._make(name, group) for name, group in views[config.algorithm.critic].items()]
        self.metric_names = tuple(metric_names)
        self.regression = TurnRegression(2 + len(metric_names), TURNS) if config.critic.metrics else None
        self.without = nn.ModuleList(
            TurnRegression(2 + len(metric_names), TURNS) for _ in (agents if config.critic.difference else ())
        )
        self.yardstick = Yardstick(2 + len(metric_names), TURNS)
        self.marked_ENT = torch.zeros(0)
        self.known_ENT = torch.zeros(0)

    @property
    def regressions(self) -> dict[str, nn.Module]:
        """What is remembered beside the judges, by name: all that a checkpoint must keep of it."""
        found: dict[str, nn.Module] = {}
        if self.regression is not None:
            found["regression"] = self.regression
        if self.without:
            found["without"] = self.without
        if self.judges:
            found["yardstick"] = self.yardstick
        return found

    def _make(self, name: str, agents: tuple[str, ...]) -> Judge:
        settings, policy = self.config.critic, self.team.policies[agents[0]]
        label = "critic" if self.joint else f"{name}/critic"
        if self.config.algorithm.critic_body == "policy":
            head = ValueHead(policy.model.config.get_text_config().hidden_size).to(policy.device)
            return Judge(name, agents, label, head, None, policy)
        common: dict[str, Any] = {"max_tokens": settings.max_tokens, "compute": policy.compute}
        base = None
        if self.config.team.lora is None or self.config.team.lora.critics:
            base = self.team.base_of(settings.model or policy.source)
        if base is not None:
            adapter = base.add_like(base.adapters[0], seeds.derive(self.config.run.seed, "critic's adapter", name))
            critic = Critic(adapter, base.tokenizer, **common).to(policy.device)
        elif settings.model is None and policy.adapter is None:
            critic = Critic(copy.deepcopy(policy.body), policy.tokenizer, **common).to(policy.device)
        else:
            critic = Critic.from_pretrained(settings.model or policy.source, device=policy.device, **common)
        return Judge(name, agents, label, critic.value, critic, policy)

    def head_of(self, agent: str) -> ValueHead | None:
        """The value head on an agent's own model, if that is where its critic sits."""
        return next((judge.head for judge in self.judges if judge.critic is None and agent in judge.agents), None)

    def view(self, judge: Judge, batch: Batch) -> tuple[str, ...]:
        """Whose texts a critic reads: a joint one those of all who play, frozen team-mates included."""
        return batch.episodes[0].agents if self.joint and batch.episodes else judge.agents

    def targeted(self, batch: Batch) -> Tensor:
        """(E, N, T): where a critic has a target: at every turn played, also when its agent has left and only team-mates earn.

        A value head on the policy reads the agent's own answers alone, and its returns end with them. Q has no target where
        a cut-off episode ends, since nobody knows what would have been answered next.
        """
        wanted_ENT = batch.live_ENT
        if self.config.algorithm.critic_body == "model":
            wanted_ENT = batch.played_ET[:, None].to(wanted_ENT).expand_as(wanted_ENT)
        if self.kind == "Q":
            wanted_ENT = wanted_ENT * ~(batch.last_ET & batch.truncated_E[:, None])[:, None]
        return wanted_ENT

    def values(self, batch: Batch, metrics: Metrics) -> Tensor:
        """What every critic expects now: V (E, N, T + 1), 0 after an end; or Q of the answers given (E, N, T)."""
        E, N, T = batch.shape
        width = T + (self.kind == "V")
        values_ENT = torch.zeros(E, N, width)
        self.marked_ENT = torch.zeros(E, N, width)
        metrics["critic/cut"] = 0.0
        for judge in self.judges:
            if judge.critic is None:
                judge.packed = pack_answers(
                    batch, judge.agents[0], judge.policy, values=True, history=self.config.rollout.history
                )
            else:
                judge.packed, num_cut = pack_readings(
                    batch, judge.critic, self.view(judge, batch), kind=self.kind, **self.reads
                )
                metrics["critic/cut"] += num_cut
            values = self._read(judge, judge.packed, E * N * width, metrics).view(E, N, width)
            first = batch.agents.index(judge.agents[0])
            for agent in judge.agents:
                values_ENT[:, batch.agents.index(agent)] = values[:, first]
            marked = torch.zeros(E * N * width)
            marked[[slot for sequence in judge.packed for slot, _ in sequence.markers]] = 1.0
            for agent in judge.agents:
                self.marked_ENT[:, batch.agents.index(agent)] = marked.view(E, N, width)[:, first]
        self._expect(batch)
        return values_ENT + self.known_ENT

    def _expect(self, batch: Batch) -> None:
        """Fill `known_ENT`: what the regression says wherever a critic speaks."""
        self.known_ENT = torch.zeros_like(self.marked_ENT)
        if self.regression is not None:
            expected_ET = self.regression(self.features(batch)[:, : self.known_ENT.shape[-1]])
            self.known_ENT = torch.where(self.marked_ENT.bool(), expected_ET[:, None], self.known_ENT)

    def features(self, batch: Batch) -> Tensor:
        """(E, T + 1, M): rewards so far, the last raw reward and the world's metrics before each turn; after the last, too."""
        E, _, T = batch.shape
        rows = np.zeros((E, T + 1, 2 + len(self.metric_names)))
        for e, episode in enumerate(batch.episodes):
            so_far = 0.0
            for t in range(len(episode.turns) + 1):
                last = episode.turns[t - 1].raw_reward if t else 0.0
                so_far += episode.turns[t - 1].reward if t else 0.0
                ended = t == len(episode.turns)
                reported = episode.metrics if ended else episode.turns[t].metrics
                rows[e, t] = self._numbers(so_far, last, reported)
                bad = [name for name, x in zip(self.metric_names, rows[e, t, 2:], strict=True) if not math.isfinite(x)]
                if bad and (not ended or episode.truncated):
                    raise TrainingError(
                        f"the world's metric {bad[0]!r} is {reported[bad[0]]!r} before turn {t} of episode {e} (task "
                        f"{episode.label}), not a finite number. Nothing was learned from this iteration. `collm check` names "
                        "what a world may report."
                    )
        return torch.from_numpy(rows).float()

    def remember(self, batch: Batch, values_ENT: Tensor) -> None:
        """Count this iteration's returns in the regression on the world's numbers; `known_ENT` is what it says from now on.

        The text is to learn what the regression leaves: were both to follow the old difference, they would overshoot. The
        return of an episode that was cut off goes on with V of its final history; for Q such an episode counts for nothing.
        """
        if self.regression is None:
            return
        gamma, rewards_ET, counted_ET = self.config.algorithm.gamma, batch.rewards_ET, _complete(batch)
        if self.kind == "V":
            speaking_ENT = self.marked_ENT[..., 1:]
            following_ET = (values_ENT[..., 1:] * speaking_ENT).sum(1) / speaking_ENT.sum(1).clamp_min(1)
            rewards_ET = rewards_ET + gamma * following_ET * (batch.last_ET & batch.truncated_E[:, None])
            counted_ET = batch.played_ET
        returns_ET = discounted_returns(rewards_ET, gamma=gamma)
        self.regression.learn(self.features(batch)[:, :-1], returns_ET, counted_ET)
        self._expect(batch)

    def baselines(self, batch: Batch, values_ENT: Tensor, targets_ENT: Tensor) -> Tensor:
        """(E, N, T): what each agent's turn lets expect without its own answer, in units of return; V where that is unknown.

            b_i(h_t, a_-i,t) = V(h_t) + beta . (Delta - mean Delta),   beta: ridge regression of G_t - V(h_t) on Delta

        Delta is what the team-mates alone changed in the world's numbers, so the agent's own answer is not in it: see
        `algorithms.advantages.difference`. All is taken around this iteration's means, so that on average b is V: a constant
        would follow the very rise of returns that V follows, and right answers would be punished until both have settled.

        Args: targets_ENT: G, what the advantage is taken of; it is learned from once it has been said what was expected.
        """
        T = batch.shape[2]
        baselines_ENT = values_ENT[..., :T].clone()
        before_ETM = self.features(batch)[:, :T]
        for n, (agent, without) in enumerate(zip(batch.agents, self.without, strict=True)):
            after_ETM, asked_ET = self.silent_features(batch, agent)
            changed_ETM = _centred(after_ETM - before_ETM, asked_ET)
            surprise_ET = _centred((targets_ENT[:, n] - values_ENT[:, n, :T])[..., None], asked_ET)[..., 0]
            assert isinstance(without, TurnRegression)
            baselines_ENT[:, n] += torch.where(asked_ET, without(changed_ETM), 0.0)
            without.learn(changed_ETM, surprise_ET, asked_ET)
        return baselines_ENT

    def silent_features(self, batch: Batch, agent: str) -> tuple[Tensor, Tensor]:
        """As `features` after each turn, had the agent been silent in it: (E, T, M), and (E, T) bool where these are
        known and finite."""
        E, _, T = batch.shape
        rows, asked = np.zeros((E, T, 2 + len(self.metric_names))), np.zeros((E, T), dtype=bool)
        for e, episode in enumerate(batch.episodes):
            so_far = 0.0
            for t, turn in enumerate(episode.turns):
                if agent in turn.silent and t >= episode.own_from:
                    imagined = turn.silent[agent]
                    numbers = self._numbers(so_far + imagined.reward, imagined.raw_reward, imagined.metrics)
                    if all(map(math.isfinite, numbers)):
                        rows[e, t], asked[e, t] = numbers, True
                so_far += turn.reward
        return torch.from_numpy(rows).float(), torch.from_numpy(asked)

    def _numbers(self, so_far: float, last: float, reported: Mapping[str, Any]) -> list[float]:
        """(M,): rewards so far, the last raw reward, and what the world reported."""
        return [so_far, last, *(_number(reported.get(name, 0.0)) for name in self.metric_names)]

    def alternatives(self, batch: Batch, metrics: Metrics) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each critic: slots (M,) of answers, and Q (M, K) with each of them exchanged for its K alternatives."""
        for judge in self.judges:
            assert judge.critic is not None
            packed, slots = pack_alternatives(batch, judge.critic, self.view(judge, batch), **self.reads)
            if slots:
                q_M = self._read(judge, packed, len(slots), metrics) + self.known_ENT.flatten()[slots]
                q_MK = q_M.view(-1, self.config.algorithm.resamples)
                yield torch.tensor(slots).view(q_MK.shape)[:, 0], q_MK

    def explain(self, batch: Batch, values_ENT: Tensor, metrics: Metrics) -> None:
        """Explained variance per turn against realized returns, on episodes no critic has been trained on yet: of all, and
        of what is no difference between tasks. The yardstick is what the world's own numbers explain of the latter in recent
        iterations; the spread, what there is to explain: the squared deviations of returns from their task's mean, summed."""
        returns_ET = discounted_returns(batch.rewards_ET, gamma=self.config.algorithm.gamma)
        tasks_E = torch.tensor([episode.task for episode in batch.episodes])
        features_ETM = self.features(batch)
        for t in range(returns_ET.shape[1]):
            chosen = _complete(batch)[:, t]
            returns, tasks = returns_ET[chosen, t], tasks_E[chosen]
            metrics[f"yardstick_turn_{t}"] = self.yardstick.measure(t, features_ETM[chosen, t], returns, tasks)
            metrics[f"spread_turn_{t}"] = without_task_means(returns, tasks).square().sum().item()
        for judge in self.judges:
            n = batch.agents.index(judge.agents[0])
            live_ET = self.targeted(batch)[:, n].bool() & ~batch.truncated_E[:, None]
            values_ET = values_ENT[:, n, : live_ET.shape[1]]
            metrics[f"{judge.label}/value"] = values_ET[live_ET].mean().item() if live_ET.any() else math.nan
            for t in range(live_ET.shape[1]):
                chosen = live_ET[:, t]
                values, returns, tasks = values_ET[chosen, t], returns_ET[chosen, t], tasks_E[chosen]
                metrics[f"{judge.label}/explained_variance_turn_{t}"] = explained_variance(values, returns)
                within = explained_variance(without_task_means(values, tasks), without_task_means(returns, tasks))
                metrics[f"{judge.label}/explained_within_tasks_turn_{t}"] = within

    def rescale(self, batch: Batch, targets_ENT: Tensor) -> None:
        """Target normalization: follow mean and deviation of each critic's targets."""
        for judge in self.judges:
            n = batch.agents.index(judge.agents[0])
            judge.head.rescale(targets_ENT[:, n][self.targeted(batch)[:, n].bool()])

    def train(
        self,
        batch: Batch,
        targets_ENT: Tensor,
        step: Callable[[str, str], float],
        check: Check,
        metrics: Metrics,
        iteration: int,
    ) -> None:
        """Regress every critic model on its targets: `critic.epochs` steps, each over all joint samples.

        Args: targets_ENT: (E, N, T) in units of return. step(optimizer's name, whose) -> gradient norm.
        """
        for judge in self.judges:
            if judge.critic is None:
                continue  # trained with the policy it sits on
            num = self.num_targets(judge, batch)
            with dropout(judge.critic.body, seeds.derive(self.config.run.seed, "critic's dropout", iteration, judge.name)):
                for _ in range(self.config.critic.epochs):
                    total = 0.0
                    for micro in self._batches(judge.packed, judge.critic.device):
                        loss = self.loss(judge, micro, judge.critic.hidden(micro.ids_BL), batch, targets_ENT, None, num)
                        if loss is None:
                            continue
                        check(loss, judge.label, batch.episodes_of(micro.slot_M, self.kind == "V"))
                        (self.config.critic.coef * loss).backward()
                        total += loss.item()
                        metrics["tokens/critic"] += micro.num_tokens
                    metrics[f"{judge.label}/gradient_norm"] = step(f"critic-{judge.name}", judge.label)
                    metrics[f"{judge.label}/loss"] = total

    def num_targets(self, judge: Judge, batch: Batch) -> int:
        return int(self.targeted(batch)[:, batch.agents.index(judge.agents[0])].sum())

    def loss(
        self,
        judge: Judge,
        micro: MicroBatch,
        hidden_BLD: Tensor,
        batch: Batch,
        targets_ENT: Tensor,
        old_values_ENT1: Tensor | None,
        num: int,
    ) -> Tensor | None:
        """A micro-batch's share of the squared error, in units of the targets' deviation where targets are normalized; None
        where it holds no target. Clipped if old values are given."""
        wanted_ENT = self.targeted(batch).bool()
        if self.kind == "V":  # V has one slot more per agent than there are turns
            targets_ENT, wanted_ENT = nn.functional.pad(targets_ENT, (0, 1)), nn.functional.pad(wanted_ENT, (0, 1))
        chosen = wanted_ENT.flatten()[micro.slot_M.cpu()]
        if not chosen.any():
            return None
        slots = micro.slot_M.cpu()[chosen]
        values = judge.head(hidden_BLD[micro.row_M, micro.column_M][chosen.to(hidden_BLD.device)])
        targets = targets_ENT.flatten()[slots].to(values)
        clip = self.config.critic.value_clip
        unit = judge.head.deviation.to(values) ** 2
        if clip is None or old_values_ENT1 is None:
            return losses.value_error(values, targets, num_values=num)[0] / unit
        old = old_values_ENT1.flatten()[slots].to(values)
        return losses.clipped_value_error(values, old, targets, clip=clip, num_values=num)[0] / unit

    @torch.no_grad()
    def _read(self, judge: Judge, packed: Sequence[Packed], num: int, metrics: Metrics) -> Tensor:
        """Values (num,) at the markers' slots, 0 where there is no marker."""
        reader = judge.critic or judge.policy
        values = torch.zeros(num)
        for micro in self._batches(packed, reader.device):
            hidden = reader.hidden(micro.ids_BL)[micro.row_M, micro.column_M]
            values[micro.slot_M.cpu()] = judge.head(hidden).cpu()
            metrics["tokens/critic"] += micro.num_tokens
        return values

    def _batches(self, packed: Sequence[Packed], device: torch.device) -> Iterable[MicroBatch]:
        return micro_batches(packed, self.config.learner.micro_batch_tokens, device)


def _complete(batch: Batch) -> Tensor:
    """(E, T) bool: turns that were played, of episodes whose return is known to the end."""
    return batch.played_ET & ~batch.truncated_E[:, None]


def _centred(numbers_ETM: Tensor, chosen_ET: Tensor) -> Tensor:
    """Numbers (E, T, M) less, at each turn, their mean over the chosen episodes; 0 elsewhere."""
    chosen_ET1 = chosen_ET[..., None]
    kept_ETM = torch.where(chosen_ET1, numbers_ETM, 0.0)  # what is left out may be NaN
    return kept_ETM - chosen_ET1 * kept_ETM.sum(0) / chosen_ET1.sum(0).clamp_min(1)


def _number(value: Any) -> float:
    """What a world reports as a number; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
