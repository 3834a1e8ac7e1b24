"""Parts: one model with its optimizer and its update. After credit assignment, parts are independent of each other.

A policy part holds one set of weights, for one agent or for several that share it, and the value heads on it. A critic part
holds a critic that is a separate model. `LocalHands` calls parts one after the other in this process.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from collm import seeds
from collm.algorithms import losses
from collm.algorithms.catalogue import CLIPPED_LOSSES
from collm.learning.batch import Batch
from collm.learning.credit import Credit
from collm.learning.critics import TextCritic, Values, by_slot, merge, read, value_loss, values_at
from collm.learning.pack import MicroBatch, Packed, micro_batches, pack_alternatives, pack_answers
from collm.learning.ranks import ALONE, Ranks
from collm.learning.recent import Recent, flattened, minibatches
from collm.learning.steps import (
    check_loss,
    good_answers,
    make_optimizer,
    rescale,
    retreat,
    set_rates,
    step,
    zero_gradients,
)
from collm.learning.tensors import Files, Read, Tensors, restore, restore_optimizer, state_of
from collm.models.blueprint import CRITIC, OPTIMIZER, REPLAY
from collm.models.critic import Critic, Head
from collm.models.policy import Policy
from collm.models.recompute import recompute_layers
from collm.models.split import split_body, split_policies, whole_weights
from collm.settings.rooms import Config
from collm.types import Metrics, Sampling

VALUE_WEIGHT = 0.6
"""Weight of a value loss beside the policy's loss (arXiv:2601.21972); a separate critic model uses the same weight."""
SHORTEST = 1 / 64
"""A policy step is not shortened below this fraction."""


class Part(Protocol):
    """One model, its optimizer and its update."""

    def values(self, batch: Batch) -> Values | None:
        """Values from text before the update; None if the part has no critic."""
        ...

    def learn(self, batch: Batch, iteration: int, credit: Credit) -> Metrics:
        """One optimizer step per pass. Raises TrainingError if a number is not finite, before the step."""
        ...

    def tensors(self) -> Mapping[str, Tensors]:
        """File name -> tensors of a checkpoint."""
        ...

    def restore(self, read: Read) -> None:
        """Load the output of `tensors`. Raises ValueError if it does not fit."""
        ...


class Hands(Protocol):
    """Calls parts, in this process or elsewhere."""

    def all(self, method: str, *arguments: Any) -> list[Any]:
        """Call `method` of every part with these arguments; returns the results in the order of the parts."""
        ...


class LocalHands:
    """Calls parts of this process, one after the other."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts

    def all(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(part, method)(*arguments) for part in self.parts]


class PolicyPart:
    """A policy, the agents that use it, and the value heads on it (agent -> head). ranks: the processes that it is in."""

    def __init__(
        self,
        name: str,
        policy: Policy,
        agents: Sequence[str],
        heads: dict[str, Head],
        config: Config,
        sampling: Sampling,
        *,
        lr: float,
        head_lr: float,
        ranks: Ranks = ALONE,
    ):
        self.name, self.policy, self.agents, self.heads = name, policy, tuple(agents), heads
        self.config, self.sampling, self.ranks, self.limit = config, sampling, ranks, config.learner.micro_batch_tokens
        self.reference = policy.frozen_copy() if config.algorithm.kl_coef > 0 else None
        if ranks.split:
            split_policies([policy, *filter(None, [self.reference])], ranks.mesh)
        groups = [(policy.trained.parameters(), lr)]
        groups += [(head.parameters(), head_lr) for head in heads.values()]
        self.optimizer = make_optimizer(groups)
        if config.learner.gradient_checkpointing:
            recompute_layers(policy.body)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """File name -> module that is trained."""
        heads: dict[str, nn.Module] = {CRITIC + agent: head for agent, head in self.heads.items()}
        return {f"policy-{self.name}": self.policy.trained, **heads}

    def tensors(self) -> Files:
        files = {name: partial(whole_weights, module) for name, module in self.modules.items()}
        return Files({**files, OPTIMIZER + self.name: partial(state_of, self.optimizer)})

    def restore(self, read: Read) -> None:
        for name, module in self.modules.items():
            restore(module, read(name))
        restore_optimizer(self.optimizer, read(OPTIMIZER + self.name))

    def values(self, batch: Batch) -> Values | None:
        found = []
        for agent, head in self.heads.items():
            packed = pack_answers(batch, agent, self.policy, values=True, history=self.config.rollout.history)
            found.append(read(self.policy, head, packed, batch, [agent], self.limit, "V", ranks=self.ranks))
        return merge(found) if found else None

    def learn(self, batch: Batch, iteration: int, credit: Credit) -> Metrics:
        """`algorithm.epochs` steps, each over all answers of the policy's agents.

        During critic warm-up only value heads are trained and the policy is unchanged.
        """
        warming_up = iteration < self.config.critic.warmup
        for agent, head in self.heads.items():
            rescale(head, agent, batch, credit, self.config)
        if warming_up and not self.heads:
            return {}
        set_rates(self.optimizer, self.config, iteration)
        settings, history = self.config.algorithm, self.config.rollout.history
        all_move = self.reference is not None or self.ranks.split
        packed = {a: pack_answers(batch, a, self.policy, values=a in self.heads, history=history) for a in self.agents}
        num = sum(len(sequence.answers) for rows in packed.values() for sequence in rows)
        metrics: Metrics = defaultdict(float)
        for epoch in range(self.config.critic.epochs if warming_up else settings.epochs):
            before_X = None if settings.max_drop is None else torch.zeros(math.prod(batch.shape))
            totals: Metrics = defaultdict(float)
            for agent in self.agents:
                micros = micro_batches(packed[agent], self.limit, self.policy.device, trees=self.policy.reads_trees)
                for micro, counts in self.ranks.deal(micros):
                    sums = totals if counts else defaultdict(float)
                    advantages_S = credit.advantages_ENT.flatten()[micro.slot_S.cpu()]
                    moves = not warming_up and (all_move or bool(advantages_S.any()))
                    sums["zero_advantages"] += (advantages_S == 0).sum().item()
                    shares = []
                    with torch.set_grad_enabled(moves or (agent in self.heads and not warming_up)):
                        hidden_BLD = self.policy.hidden(micro.ids_BL, micro.tree)
                        if not warming_up and len(micro.token_K):
                            before = before_X if counts else None
                            shares.append(self._policy_loss(agent, micro, hidden_BLD, advantages_S, num, sums, before))
                    if agent in self.heads:
                        error = self._value_loss(agent, micro, hidden_BLD, batch, credit)
                        if error is not None:
                            sums[f"{agent}/critic"] += error.item()
                            shares.append(VALUE_WEIGHT * error)
                            moves = moves or warming_up or error.item() != 0
                    if shares:
                        loss = torch.stack(shares).sum() * counts
                        check_loss(loss, agent, iteration, batch, batch.episodes_of(micro.slot_S))
                        sums["learned" if moves else "skipped"] += len(micro.slot_S)
                        if moves:
                            loss.backward()
                        sums["read"] += micro.num_tokens
            totals = self.ranks.total(totals)
            self.ranks.add_gradients(self.optimizer)
            metrics["tokens/policy"] += totals["read"]
            if totals["skipped"] and not totals["learned"]:
                zero_gradients(self.optimizer)
            moved = [] if before_X is None else [p for p in self.policy.trained.parameters() if p.grad is not None]
            metrics[f"{self.name}/gradient_norm"] = step(self.optimizer, self.name, iteration, self.config.learner)
            for agent in self.heads:
                metrics[f"{agent}/critic/loss"] = totals[f"{agent}/critic"]
            if not warming_up:
                if before_X is not None and settings.max_drop is not None:
                    self.ranks.add(before_X)
                    good_X = good_answers(batch, credit, gamma=settings.gamma).flatten()
                    sequences = [sequence for rows in packed.values() for sequence in rows]
                    metrics[f"{self.name}/step_fraction"] = self._shorten(sequences, moved, before_X, good_X, settings.max_drop)
                metrics |= self._summary(totals, num)
                metrics |= {} if epoch else self._gaps(totals, iteration)
        return dict(metrics)

    def _shorten(
        self, packed: Sequence[Packed], moved: Sequence[nn.Parameter], before_X: Tensor, good_X: Tensor, limit: float
    ) -> float:
        """Halve the last step until good answers lose at most `limit` of log-prob on average; returns the fraction of the step
        that is left.

        Momentum moves a policy for some ten steps after a gradient. Where all answers earn the same, the gradient is 0 and does
        not correct the move, so that a team can lose within one step what it has learned.

        Args:
            moved: parameters of the policy that the step moved.
            before_X: (E * N * T,) log-prob of each answer before the step.
            good_X: (E * N * T,) bool, those that count.
        """
        fraction = 1.0
        while fraction > SHORTEST and self._drop(packed, before_X, good_X) > limit:
            fraction /= 2
            retreat(self.optimizer, moved, fraction)
        return fraction

    @torch.no_grad()
    def _drop(self, packed: Sequence[Packed], before_X: Tensor, good_X: Tensor) -> float:
        """Mean drop of the log-prob of good answers, in nats per answer; 0 if there is none."""
        sums = {"drop": 0.0, "num": 0.0}
        chosen = [sequence for sequence in packed if any(good_X[slot] for slot, _, _ in sequence.answers)]
        micros = micro_batches(chosen, self.limit, self.policy.device, trees=self.policy.reads_trees)
        for micro, counts in self.ranks.deal(micros):
            hidden_KD = self.policy.hidden(micro.ids_BL, micro.tree)[micro.row_K, micro.column_K]
            logp_S = losses.answer_sums(
                self.policy.score(hidden_KD, micro.token_K, self.sampling), micro.answer_K, len(micro.slot_S)
            ).cpu()
            slot_S = micro.slot_S.cpu()
            sums["drop"] += counts * ((before_X[slot_S] - logp_S) * good_X[slot_S]).sum().item()
            sums["num"] += counts * int(good_X[slot_S].sum())
        return (sums := self.ranks.total(sums))["drop"] / max(sums["num"], 1)

    def _summary(self, totals: Metrics, num: int) -> Metrics:
        """Metrics of one pass over `num` answers."""
        name, scored = self.name, max(totals["scored"], 1)
        metrics = {f"{name}/loss": totals["policy"], f"{name}/entropy_estimate": -totals["logp"] / scored}
        metrics |= {f"{name}/{share}": totals[share] / max(num, 1) for share in ("zero_advantages", "skipped")}
        if self.config.algorithm.loss != "reinforce":
            metrics[f"{name}/clipped"] = totals["clipped"] / scored
        if self.reference is not None:
            metrics[f"{name}/kl"] = totals["kl"] / scored
        return metrics

    def _gaps(self, totals: Metrics, iteration: int) -> Metrics:
        """Absolute difference per token between the engine's and the learner's log-probs before any step, in nats: 0 up to
        rounding for the same weights in the same number format. With rollout.ahead the engine's are an update older."""
        metrics, gap = Metrics(), "staleness" if iteration and self.config.rollout.ahead else "logprob_gap"
        for agent in self.agents:
            metrics[f"{agent}/{gap}_mean"] = totals[f"{agent}/gap"] / max(totals[f"{agent}/tokens"], 1)
            metrics[f"{agent}/{gap}_max"] = totals[f"{agent}/gap_max"]
        return metrics

    def _policy_loss(
        self,
        agent: str,
        micro: MicroBatch,
        hidden_BLD: Tensor,
        advantages_S: Tensor,
        num: int,
        totals: Metrics,
        before_X: Tensor | None,
    ) -> Tensor:
        """A micro-batch's part of the policy loss. Adds its statistics to `totals`, its answers' log-probs to `before_X`."""
        settings, policy = self.config.algorithm, self.policy
        logp_K = policy.score(hidden_BLD[micro.row_K, micro.column_K], micro.token_K, self.sampling)
        advantages_S = advantages_S.to(logp_K)
        if before_X is not None:
            before_X[micro.slot_S.cpu()] = losses.answer_sums(logp_K.detach(), micro.answer_K, len(advantages_S)).cpu()
        if settings.loss == "reinforce":
            loss, stats = losses.reinforce(logp_K, micro.answer_K, advantages_S, num_answers=num)
        else:
            loss, stats = CLIPPED_LOSSES[settings.loss](
                logp_K, micro.old_logp_K, micro.answer_K, advantages_S, clip=settings.clip, num_answers=num
            )
        totals["policy"] += loss.item()
        if self.reference is not None:
            whole = replace(self.sampling, top_p=1.0, top_k=0)  # the two supports may differ
            with torch.no_grad():
                before_KD = self.reference.hidden(micro.ids_BL, micro.tree)[micro.row_K, micro.column_K]
                before_K = self.reference.score(before_KD, micro.token_K, whole)
            now_K = policy.score(hidden_BLD[micro.row_K, micro.column_K], micro.token_K, whole)
            kl, kl_stats = losses.kl_to_reference(now_K, before_K, num_answers=num)
            loss, stats = loss + settings.kl_coef * kl, stats | kl_stats
        gap_K = (logp_K.detach() - micro.old_logp_K).abs()
        stats |= {"logp": logp_K.detach().sum().item(), "scored": float(len(logp_K))}
        stats |= {f"{agent}/gap": gap_K.sum().item(), f"{agent}/tokens": float(len(gap_K))}
        totals[f"{agent}/gap_max"] = max(totals[f"{agent}/gap_max"], gap_K.max().item())
        for key, value in stats.items():
            totals[key] += value
        return loss

    def _value_loss(self, agent: str, micro: MicroBatch, hidden_BLD: Tensor, batch: Batch, credit: Credit) -> Tensor | None:
        num = int(credit.wanted_ENT[:, batch.agents.index(agent)].sum())
        return value_loss(
            self.heads[agent], micro, hidden_BLD, *by_slot(credit.targets_ENT, credit.wanted_ENT, kind="V"), num=num
        )


class CriticPart(TextCritic):
    """A critic that is a separate model with its optimizer. ranks: the processes that it is in.

    replay: number of recent iterations that it learns from; 1 for the present one alone.
    """

    def __init__(
        self,
        name: str,
        critic: Critic,
        agents: Sequence[str],
        config: Config,
        *,
        lr: float,
        replay: int = 1,
        ranks: Ranks = ALONE,
    ):
        super().__init__(name, critic, agents, config)
        self.ranks = ranks
        if ranks.split:
            split_body(critic.body, ranks.mesh)
        self.optimizer = make_optimizer([(critic.body.parameters(), lr), (critic.value.parameters(), lr)])
        self.recent = Recent(replay) if replay > 1 else None
        if config.learner.gradient_checkpointing:
            recompute_layers(critic.body)

    def tensors(self) -> Files:
        kept = {} if self.recent is None else {REPLAY + self.name: self.recent.tensors}
        own = {self.name: partial(whole_weights, self.critic), OPTIMIZER + self.name: partial(state_of, self.optimizer)}
        return Files({**own, **kept})

    def restore(self, read: Read) -> None:
        restore(self.critic, read(self.name))
        restore_optimizer(self.optimizer, read(OPTIMIZER + self.name))
        if self.recent is not None:
            self.recent.restore(read(REPLAY + self.name))

    def values(self, batch: Batch) -> Values:
        kind, limit = self.config.algorithm.critic_kind, self.config.learner.micro_batch_tokens
        packed, num_cut = self.pack(batch)
        values = read(self.critic, self.critic.value, packed, batch, self.agents, limit, kind, ranks=self.ranks)
        values.num_cut = num_cut
        if kind == "Q":
            packed, slots = pack_alternatives(batch, self.critic, self.view(batch), **self.reads)
            if slots:
                q_M, num_tokens = values_at(self.critic, self.critic.value, packed, len(slots), limit, self.ranks)
                q_MK = q_M.view(-1, self.config.algorithm.resamples)
                values.alternatives.append((torch.tensor(slots).view(q_MK.shape)[:, 0], q_MK))
                values.num_tokens += num_tokens
        return values

    def learn(self, batch: Batch, iteration: int, credit: Credit) -> Metrics:
        """`critic.epochs` steps, each over all targets of the iteration, or with a replay over a minibatch of those kept."""
        kind, limit = self.config.algorithm.critic_kind, self.config.learner.micro_batch_tokens
        rescale(self.critic.value, self.agents[0], batch, credit, self.config)
        set_rates(self.optimizer, self.config, iteration)
        metrics: Metrics = defaultdict(float)
        for packed, targets_X, wanted_X, num in self._passes(batch, iteration, credit):
            totals: Metrics = defaultdict(float)
            micros = micro_batches(packed, limit, self.critic.device, trees=self.critic.reads_trees)
            for micro, counts in self.ranks.deal(micros):
                hidden_BLD = self.critic.hidden(micro.ids_BL, micro.tree)
                loss = value_loss(self.critic.value, micro, hidden_BLD, targets_X, wanted_X, num=num)
                if loss is None or not counts:
                    if self.ranks.split:
                        (0 * hidden_BLD).sum().backward()
                    continue
                episodes = batch.episodes_of(micro.slot_M, kind == "V") if self.recent is None else ()
                check_loss(loss, self.label, iteration, batch, episodes)
                totals["loss"] += loss.item()
                if loss.item() > 0 or self.ranks.split:
                    (VALUE_WEIGHT * loss).backward()
                totals["read"] += micro.num_tokens
            totals = self.ranks.total(totals)
            self.ranks.add_gradients(self.optimizer)
            metrics["tokens/critic"] += totals["read"]
            if metrics["tokens/critic"] and totals["loss"] == 0:
                zero_gradients(self.optimizer)
            metrics[f"{self.label}/gradient_norm"] = step(self.optimizer, self.label, iteration, self.config.learner)
            metrics[f"{self.label}/loss"] = totals["loss"]
        return dict(metrics)

    def _passes(self, batch: Batch, iteration: int, credit: Credit) -> Iterator[tuple[list[Packed], Tensor, Tensor, int]]:
        """For each step: sequences, targets and whether there is one, both by slot, and their number."""
        num_steps = self.config.critic.epochs
        targets_X, wanted_X = by_slot(credit.targets_ENT, credit.wanted_ENT, kind=self.config.algorithm.critic_kind)
        packed, _ = self.pack(batch)
        if self.recent is None:
            num = int(credit.wanted_ENT[:, batch.agents.index(self.agents[0])].sum())
            yield from [(packed, targets_X, wanted_X, num)] * num_steps
            return
        self.recent.add(flattened(packed, targets_X, wanted_X))
        stream = seeds.stream(self.config.run.seed, "critic's replay", self.name, iteration)
        for chosen, targets_M in minibatches(self.recent, num_steps, stream):
            yield chosen, targets_M, torch.ones_like(targets_M, dtype=torch.bool), len(targets_M)
