"""The update: from one iteration's episodes to new weights. From here the formulas of `algorithms` are called."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from collm import seeds
from collm.algorithms import losses
from collm.algorithms.catalogue import CLIPPED_LOSSES
from collm.config import Config
from collm.errors import TrainingError
from collm.models.adapters import dropout
from collm.models.recompute import recompute_layers
from collm.models.team import Team
from collm.training import credit
from collm.training.critics import Critics, Judge, Metrics
from collm.training.pack import Batch, MicroBatch, micro_batches, pack_answers
from collm.types import Group, Sampling


class Learner:
    """Owns critics and optimizers; `update` is the only place where weights change.

    Float32 master weights and optimizer state throughout. One critic step per pass over the joint samples, whatever the number
    of agents; one step per policy and pass.
    """

    def __init__(self, team: Team, config: Config, sampling: Sampling, metric_names: Sequence[str] = ()):
        self.team, self.config, self.sampling = team, config, sampling
        self.members = team.members()
        self.critics = Critics(team, config, metric_names)
        keep_reference = config.algorithm.kl_coef > 0
        self.references = {n: policy.frozen_copy() for n, policy in self.members.items()} if keep_reference else {}
        self.optimizers = {name: self._policy_optimizer(name) for name in self.members}
        for judge in self.judges:
            if judge.critic is not None:
                optimizer = self._optimizer([(judge.critic.parameters(), config.critic.lr)])
                self.optimizers[f"critic-{judge.name}"] = optimizer
        if config.learner.gradient_checkpointing:
            for body in [p.body for p in self.members.values()] + [j.critic.body for j in self.judges if j.critic is not None]:
                recompute_layers(body)

    @property
    def judges(self) -> list[Judge]:
        return self.critics.judges

    def update(self, groups: Sequence[Group], iteration: int) -> Metrics:
        """Learn from one iteration's groups and return metrics, each under its agent's name.

        Raises TrainingError where a number is not finite, before the step that it would have spoilt.
        """
        batch = Batch.of(groups, self.team.agents)
        if not batch.episodes:
            raise TrainingError(f"iteration {iteration}: every episode failed: {groups[0].episodes[0].failure}")
        self.iteration, self.batch = iteration, batch
        metrics: Metrics = defaultdict(float)
        self._schedule()
        self._require_finite(batch.rewards_ET, "reward")
        values = self.critics.values(batch, metrics) if self.judges else None
        advantages_ENT, targets_ENT = credit.assign(batch, values, self.critics, self.config.algorithm, metrics)
        self._require_finite(advantages_ENT.flatten(1), "advantage")
        if values is not None:
            self.critics.explain(batch, values, metrics)
            total, values = values, values - self.critics.known_ENT  # from here on what the text alone says
            self.critics.remember(batch, total)
            targets_ENT = targets_ENT - self.critics.known_ENT[..., : targets_ENT.shape[-1]]
            if self.config.critic.normalize_targets:
                self.critics.rescale(batch, targets_ENT)
            self.critics.train(batch, targets_ENT, self._step, self._check, metrics, iteration)
        for name, policy in self.members.items():
            with dropout(policy.trained, seeds.derive(self.config.run.seed, "dropout", iteration, name)):
                self._train_policy(name, advantages_ENT, targets_ENT, values, metrics)
        return dict(metrics)

    def _train_policy(
        self, name: str, advantages_ENT: Tensor, targets_ENT: Tensor, values: Tensor | None, metrics: Metrics
    ) -> None:
        """`algorithm.epochs` steps of one policy, each over all answers of the agents it speaks for.

        During critic warm-up only a value head on the policy is trained, and the policy's body stays as it is.
        """
        settings, policy, batch = self.config.algorithm, self.members[name], self.batch
        judges = {judge.agents[0]: judge for judge in self.judges if judge.critic is None and judge.policy is policy}
        warming_up = self.iteration < self.config.critic.warmup
        if warming_up and not judges:
            return
        agents = [agent for agent, other in self.team.policies.items() if other is policy]
        packed = {
            agent: pack_answers(batch, agent, policy, values=agent in judges, history=self.config.rollout.history)
            for agent in agents
        }
        num = sum(len(sequence.answers) for rows in packed.values() for sequence in rows)
        for _ in range(self.config.critic.epochs if warming_up else settings.epochs):
            totals: Metrics = defaultdict(float)
            for agent in agents:
                for micro in micro_batches(packed[agent], self.config.learner.micro_batch_tokens, policy.device):
                    with torch.set_grad_enabled(not warming_up):
                        hidden_BLD = policy.hidden(micro.ids_BL)
                    parts = []
                    if not warming_up and len(micro.token_K):
                        parts.append(self._policy_loss(name, micro, hidden_BLD, advantages_ENT, num, totals))
                    if agent in judges:
                        judge = judges[agent]
                        num_values = self.critics.num_targets(judge, batch)
                        error = self.critics.loss(judge, micro, hidden_BLD, batch, targets_ENT, values, num_values)
                        if error is not None:
                            totals[judge.label] += error.item()
                            parts.append(self.config.critic.coef * error)
                    if parts:
                        loss = torch.stack(parts).sum()
                        self._check(loss, agent, batch.episodes_of(micro.slot_S))
                        loss.backward()
                        metrics["tokens/policy"] += micro.num_tokens
            metrics[f"{name}/gradient_norm"] = self._step(name, name)
            for judge in judges.values():
                metrics[f"{judge.label}/loss"] = totals[judge.label]
            if warming_up:
                continue
            metrics[f"{name}/loss"] = totals["policy"]
            metrics[f"{name}/entropy_estimate"] = -totals["logp"] / max(totals["scored"], 1)
            if settings.loss != "reinforce":
                metrics[f"{name}/clipped"] = totals["clipped"] / max(totals["scored"], 1)
            if settings.kl_coef:
                metrics[f"{name}/kl"] = totals["kl"] / max(totals["scored"], 1)

    def _policy_loss(
        self, name: str, micro: MicroBatch, hidden_BLD: Tensor, advantages_ENT: Tensor, num: int, totals: Metrics
    ) -> Tensor:
        """A micro-batch's share of the actor's loss."""
        settings, policy = self.config.algorithm, self.members[name]
        logp_K = policy.score(hidden_BLD[micro.row_K, micro.column_K], micro.token_K, self.sampling)
        advantages_S = advantages_ENT.flatten()[micro.slot_S.cpu()].to(logp_K)
        if settings.loss == "reinforce":
            loss, stats = losses.reinforce(logp_K, micro.answer_K, advantages_S, num_answers=num)
        else:
            loss, stats = CLIPPED_LOSSES[settings.loss](
                logp_K, micro.old_logp_K, micro.answer_K, advantages_S, clip=settings.clip, num_answers=num
            )
        totals["policy"] += loss.item()
        if settings.kl_coef:
            reference, whole = self.references[name], replace(self.sampling, top_p=1.0, top_k=0)  # supports may differ
            with torch.no_grad():
                before_KD = reference.hidden(micro.ids_BL)[micro.row_K, micro.column_K]
                before_K = reference.score(before_KD, micro.token_K, whole)
            now_K = policy.score(hidden_BLD[micro.row_K, micro.column_K], micro.token_K, whole)
            kl, kl_stats = losses.kl_to_reference(now_K, before_K, num_answers=num)
            loss, stats = loss + settings.kl_coef * kl, stats | kl_stats
        stats |= {"logp": logp_K.detach().sum().item(), "scored": float(len(logp_K))}
        for key, value in stats.items():
            totals[key] += value
        return loss

    def _policy_optimizer(self, name: str) -> torch.optim.AdamW:
        policy = self.members[name]
        heads = [judge.head for judge in self.judges if judge.critic is None and judge.policy is policy]
        groups = [(policy.trained.parameters(), self.config.learner.lr)]
        groups += [(head.parameters(), self.config.critic.lr) for head in heads]
        return self._optimizer(groups)

    def _optimizer(self, groups: Iterable[tuple[Iterable[nn.Parameter], float]]) -> torch.optim.AdamW:
        settings = self.config.learner
        parts = [{"params": list(params), "lr": lr, "full_lr": lr} for params, lr in groups]
        return torch.optim.AdamW(parts, betas=settings.betas, weight_decay=settings.weight_decay, fused=True)

    def _schedule(self) -> None:
        """Set learning rates for this iteration; a function of its number alone, so there is no state to save."""
        settings, total = self.config.learner, self.config.run.iterations
        factor = min(1.0, (self.iteration + 1) / (settings.warmup + 1))
        done = max(0, self.iteration - settings.warmup) / max(1, total - settings.warmup)
        if settings.schedule == "linear":
            factor *= 1 - done
        elif settings.schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * done))
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * factor

    def _step(self, name: str, label: str) -> float:
        """Clip, check, step; returns the gradient's norm before clipping."""
        optimizer = self.optimizers[name]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.learner.clip_norm or math.inf).item()
        if not math.isfinite(norm):
            raise TrainingError(
                f"iteration {self.iteration}: the gradient of {label} is {norm}; no step was taken. The last checkpoint is "
                "intact: start a new run with a lower learning rate."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _check(self, loss: Tensor, label: str, episodes: Iterable[int]) -> None:
        if not torch.isfinite(loss):
            named = ", ".join(f"{e} (task {self.batch.episodes[e].label})" for e in list(episodes)[:8])
            raise TrainingError(
                f"iteration {self.iteration}: the loss of {label} is {loss.item()} in a micro-batch of episodes {named}; no "
                "step was taken. The last checkpoint is intact: start a new run with a lower learning rate."
            )

    def _require_finite(self, numbers_EX: Tensor, what: str) -> None:
        bad = (~torch.isfinite(numbers_EX)).any(1).nonzero()[:, 0].tolist()
        if bad:
            episode = self.batch.episodes[bad[0]]
            raise TrainingError(
                f"iteration {self.iteration}: a {what} of episode {bad[0]} (task {episode.label}, agents "
                f"{', '.join(episode.agents)}) is not a finite number. Nothing was learned from this iteration."
            )
