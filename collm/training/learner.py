"""The update: from one iteration's episodes to new weights. From here the formulas of `algorithms` are called."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from collm import seeds
from collm.algorithms import advantages, losses
from collm.algorithms.catalogue import CLIPPED_LOSSES, GROUP_ESTIMATORS
from collm.algorithms.stats import explained_variance
from collm.config import Config
from collm.errors import TrainingError
from collm.models.critic import Critic, ValueHead
from collm.models.team import Team
from collm.training.pack import Batch, MicroBatch, Packed, micro_batches, pack_alternatives, pack_answers, pack_readings
from collm.types import Group, Sampling

Metrics = dict[str, float]


@dataclass(slots=True)
class Judge:
    """One critic and whom it serves. Without a `critic` of its own the judge is a value head on the agent's policy."""

    name: str
    agents: tuple[str, ...]
    critic: Critic | None
    head: ValueHead


class Learner:
    """Owns critics and optimizers; `update` is the only place where weights change.

    Float32 master weights and optimizer state throughout. One critic step per pass over the joint samples, whatever the number
    of agents; one step per policy and pass.
    """

    def __init__(self, team: Team, config: Config, sampling: Sampling):
        self.team, self.config, self.sampling = team, config, sampling
        self.members = team.members()
        self.judges = self._make_judges()
        self.references = (
            {name: policy.frozen_copy() for name, policy in self.members.items()}
            if config.algorithm.kl_coef
            else {}
        )
        self.optimizers = {name: self._optimizer(self._policy_groups(name)) for name in self.members}
        for judge in self.judges:
            if judge.critic is not None:
                groups = [(list(judge.critic.parameters()), config.critic.lr)]
                self.optimizers[f"critic-{judge.name}"] = self._optimizer(groups)

    def update(self, groups: Sequence[Group], iteration: int) -> Metrics:
        """Learn from one iteration's groups. Raises TrainingError, weights untouched, if a number is not finite."""
        algorithm, critic = self.config.algorithm, self.config.critic
        batch = Batch.of(groups, self.team.agents)
        if not batch.episodes:
            raise TrainingError(f"iteration {iteration}: every episode failed: {groups[0].episodes[0].failure}")
        self._require_finite(batch.rewards_ET, batch, iteration, "reward")
        metrics: dict[str, float] = defaultdict(float)
        self._schedule(iteration)
        readings = {judge.name: self._readings(judge, batch, metrics) for judge in self.judges}
        values_ENT1 = self._judge(batch, readings, metrics) if self.judges else None
        advantages_ENT, targets_ENT = self._estimate(batch, values_ENT1, metrics)
        self._require_finite(advantages_ENT.flatten(1), batch, iteration, "advantage")
        for judge in self.judges:
            if critic.normalize_targets:
                n = [batch.agents.index(agent) for agent in judge.agents]
                judge.head.rescale(targets_ENT[:, n][self._targeted(batch)[:, n].bool()])
        for judge in self.judges:
            if judge.critic is not None:
                self._train_critic(judge, readings[judge.name], batch, targets_ENT, iteration, metrics)
        only_critic = iteration < critic.warmup
        if not only_critic or algorithm.critic_body == "policy":
            for name in self.members:
                self._train_policy(
                    name, batch, advantages_ENT, targets_ENT, values_ENT1, iteration, metrics, only_critic=only_critic
                )
        return dict(metrics)

    # --- critics -----------------------------------------------------------------------------------------------------

    def _make_judges(self) -> list[Judge]:
        algorithm, critic = self.config.algorithm, self.config.critic
        agents = self.team.agents
        views = {"none": {}, "joint": {"team": agents}, "own": {agent: (agent,) for agent in agents}}[algorithm.critic]
        judges = []
        for name, served in views.items():
            seed = seeds.derive(self.config.run.seed, "value head", name)
            policy = self.team.policies[served[0]]
            if algorithm.critic_body == "policy":
                head = ValueHead(policy.model.config.get_text_config().hidden_size, seed).to(policy.device)
                judges.append(Judge(name, served, None, head))
                continue
            if critic.model is None:
                body, tokenizer = copy.deepcopy(policy.body), policy.tokenizer
                model = Critic(body, tokenizer, seed=seed, max_tokens=critic.max_tokens, compute=policy.compute)
                model.to(policy.device)
            else:
                model = Critic.from_pretrained(
                    critic.model,
                    seed=seed,
                    max_tokens=critic.max_tokens,
                    compute=policy.compute,
                    device=policy.device,
                )
            judges.append(Judge(name, served, model, model.value))
        return judges

    def _readings(self, judge: Judge, batch: Batch, metrics: Metrics) -> list[Packed]:
        algorithm = self.config.algorithm
        if judge.critic is None:
            agent = judge.agents[0]
            return pack_answers(batch, agent, self.team.policies[agent], values=True)
        packed, num_cut = pack_readings(
            batch, judge.critic, judge.agents, state=self.config.critic.state, kind=algorithm.critic_kind
        )
        metrics["critic/cut"] += num_cut
        return packed

    def _judge(self, batch: Batch, readings: dict[str, list[Packed]], metrics: Metrics) -> Tensor:
        """Values before this update: (E, N, T + 1) of V, 0 after the end; or (E, N, T) of Q."""
        E, N, T = batch.shape
        width = T + (self.config.algorithm.critic_kind == "V")
        values_ENT = torch.zeros(E, N, width)
        for judge in self.judges:
            flat = self._read(judge, readings[judge.name], E * N * width, metrics).view(E, N, width)
            for agent in judge.agents:
                values_ENT[:, batch.agents.index(agent)] = flat[:, batch.agents.index(judge.agents[0])]
        return values_ENT

    @torch.no_grad()
    def _read(self, judge: Judge, packed: Sequence[Packed], num: int, metrics: Metrics) -> Tensor:
        """Values (num,) at the markers' slots, 0 where there is no marker."""
        reader = judge.critic or self.team.policies[judge.agents[0]]
        values = torch.zeros(num)
        for micro in self._batches(packed, reader.device):
            hidden = reader.hidden(micro.ids_BL)[micro.row_M, micro.column_M]
            values[micro.slot_M.cpu()] = judge.head(hidden).cpu()
            metrics["tokens/critic"] += micro.num_tokens
        return values

    def _train_critic(
        self, judge: Judge, packed: list[Packed], batch: Batch, targets_ENT: Tensor, iteration: int, metrics: Metrics
    ) -> None:
        """Regress a critic model on the targets: `critic.epochs` steps, each over all joint samples."""
        assert judge.critic is not None
        targets_S, wanted_S = self._critic_slots(batch, targets_ENT)
        num = int(sum(wanted_S[slot] for sequence in packed for slot, _ in sequence.markers))
        label = "critic" if self.config.algorithm.critic == "joint" else f"{judge.name}/critic"
        for _ in range(self.config.critic.epochs):
            total = 0.0
            for micro in self._batches(packed, judge.critic.device):
                chosen = wanted_S[micro.slot_M.cpu()]
                if not chosen.any():
                    continue
                hidden = judge.critic.hidden(micro.ids_BL)[micro.row_M, micro.column_M]
                slots = micro.slot_M.cpu()[chosen]
                targets = targets_S[slots].to(hidden.device)
                loss, _ = losses.value_error(judge.head(hidden[chosen.to(hidden.device)]), targets, num_values=num)
                self._check(loss, iteration, label, batch, slots // targets_ENT[0, 0].numel() // len(batch.agents))
                (self.config.critic.coef * loss).backward()
                total += loss.item()
                metrics["tokens/critic"] += micro.num_tokens
            metrics[f"{label}/gradient_norm"] = self._step(f"critic-{judge.name}", iteration, label)
            metrics[f"{label}/loss"] = total

    def _critic_slots(self, batch: Batch, targets_ENT: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and whether there is one, by marker slot: V has a slot more per agent than there are turns."""
        wanted_ENT = self._targeted(batch).bool()
        if self.config.algorithm.critic_kind == "V":
            targets_ENT, wanted_ENT = nn.functional.pad(targets_ENT, (0, 1)), nn.functional.pad(wanted_ENT, (0, 1))
        return targets_ENT.flatten(), wanted_ENT.flatten()

    def _targeted(self, batch: Batch) -> Tensor:
        """(E, N, T): where a critic has a target. A joint critic has one while anybody acts; Q has none where a cut-off
        episode ends, since nobody knows what would have been answered next."""
        wanted_ENT = batch.live_ENT
        if self.config.algorithm.critic == "joint":
            wanted_ENT = wanted_ENT.amax(1, keepdim=True).expand_as(wanted_ENT)
        if self.config.algorithm.critic_kind == "Q":
            last = nn.functional.one_hot(batch.num_turns_E - 1, wanted_ENT.shape[-1]).bool()
            wanted_ENT = wanted_ENT * ~(last & batch.truncated_E[:, None])[:, None]
        return wanted_ENT

    # --- advantages --------------------------------------------------------------------------------------------------

    def _estimate(self, batch: Batch, values: Tensor | None, metrics: Metrics) -> tuple[Tensor, Tensor]:
        """Advantages and critic targets, (E, N, T) each."""
        algorithm = self.config.algorithm
        E, N, T = batch.shape
        rewards_ENT = batch.rewards_ET[:, None].expand(E, N, T)
        targets_ENT = torch.zeros(E, N, T)
        if algorithm.advantage == "td_lambda":
            assert values is not None
            live = batch.live_ENT if algorithm.critic == "own" else self._targeted(batch)
            advantages_ENT = advantages.td_lambda(rewards_ENT, values, live, gamma=algorithm.gamma, lam=algorithm.lam)
            targets_ENT = advantages.lambda_returns(
                rewards_ENT, values, live, gamma=algorithm.gamma, lam=algorithm.critic_lam
            )
        elif algorithm.advantage == "counterfactual":
            assert values is not None
            following = nn.functional.pad(values, (0, 1))
            targets_ENT = advantages.lambda_returns(
                rewards_ENT, following, self._targeted(batch), gamma=algorithm.gamma, lam=algorithm.critic_lam
            )
            advantages_ENT = self._counterfactual(batch, values, metrics)
        elif algorithm.tree:
            advantages_ENT = self._tree(batch)
        else:
            advantages_ENT = self._siblings(batch)
        advantages_ENT = advantages_ENT * batch.live_ENT
        if algorithm.critic != "none":
            self._explain(batch, values, metrics)
        if algorithm.normalize == "agent":
            parts = [
                advantages.normalize(advantages_ENT[:, n], batch.live_ENT[:, n], recentre=algorithm.critic != "none")
                for n in range(N)
            ]
            advantages_ENT = torch.stack(parts, 1)
        for n, agent in enumerate(batch.agents):
            chosen = advantages_ENT[:, n][batch.live_ENT[:, n].bool()]
            metrics[f"{agent}/advantage_deviation"] = chosen.std(correction=0).item() if len(chosen) else 0.0
        self._annotate(batch, values, advantages_ENT)
        return advantages_ENT, targets_ENT

    def _annotate(self, batch: Batch, values: Tensor | None, advantages_ENT: Tensor) -> None:
        """Write values, TD errors and advantages into the episodes, so that a person can see who failed when."""
        judged = None
        if values is not None and self.config.algorithm.critic_kind == "V":
            rewards_ENT = batch.rewards_ET[:, None].expand(batch.shape)
            judged = advantages.td_lambda(
                rewards_ENT, values, torch.ones(batch.shape), gamma=self.config.algorithm.gamma, lam=0.0
            )
        for e, episode in enumerate(batch.episodes):
            for t, turn in enumerate(episode.turns[episode.own_from :], episode.own_from):
                for n, agent in enumerate(batch.agents):
                    if agent in turn.completions:
                        turn.advantages[agent] = advantages_ENT[e, n, t].item()
                        if values is not None:
                            turn.values[agent] = values[e, n, t].item()
                        if judged is not None:
                            turn.td_errors[agent] = judged[e, n, t].item()

    def _siblings(self, batch: Batch) -> Tensor:
        """Whole episodes: return-to-go at turn t against the siblings' at t, an ended sibling counting 0."""
        algorithm = self.config.algorithm
        estimator = GROUP_ESTIMATORS[algorithm.advantage]
        returns_ET = advantages.discounted_returns(batch.rewards_ET, gamma=algorithm.gamma)
        parts, start = [], 0
        for group in batch.groups:
            returns_GT = returns_ET[start : start + len(group.episodes)]
            start += len(group.episodes)
            alone = len(returns_GT) == 1 and algorithm.advantage != "return"  # its siblings failed: nothing to compare
            compared = torch.zeros_like(returns_GT) if alone else estimator(returns_GT)
            parts.append(advantages.group_std(compared, returns_GT) if algorithm.normalize == "group" else compared)
        return torch.cat(parts)[:, None].expand(batch.shape)

    def _tree(self, batch: Batch) -> Tensor:
        """Turn trees: each joint action against its siblings at the node."""
        algorithm = self.config.algorithm
        estimator = GROUP_ESTIMATORS[algorithm.advantage]
        advantages_ET, e = torch.zeros(batch.rewards_ET.shape), 0
        for group in batch.groups:
            rewards = [[turn.reward for turn in episode.turns] for episode in group.episodes]
            paths = [episode.path for episode in group.episodes]
            returns = advantages.tree_returns(rewards, paths, gamma=algorithm.gamma)
            by_node = advantages.tree_advantages(returns, estimator)
            for episode in group.episodes:
                for t in range(episode.own_from, len(episode.turns)):
                    advantages_ET[e, t] = by_node[episode.path[: t + 1]]
                e += 1
        return advantages_ET[:, None].expand(batch.shape)

    def _counterfactual(self, batch: Batch, values_ENT: Tensor, metrics: Metrics) -> Tensor:
        """Q of what was taken minus the mean Q of each agent's alternatives."""
        advantages_S = torch.zeros(values_ENT.numel())
        for judge in self.judges:
            assert judge.critic is not None
            packed, slots = pack_alternatives(batch, judge.critic, judge.agents, state=self.config.critic.state)
            if not slots:
                continue
            q_MK = self._read(judge, packed, len(slots), metrics).view(-1, self.config.algorithm.resamples)
            slot_M = torch.tensor(slots).view(q_MK.shape)[:, 0]
            advantages_S[slot_M] = advantages.counterfactual(values_ENT.flatten()[slot_M], q_MK)
        return advantages_S.view(values_ENT.shape)

    def _explain(self, batch: Batch, values: Tensor | None, metrics: Metrics) -> None:
        """Explained variance per turn, against realized returns of episodes no critic has been trained on yet."""
        assert values is not None
        returns_ET = advantages.discounted_returns(batch.rewards_ET, gamma=self.config.algorithm.gamma)
        for judge in self.judges:
            n = batch.agents.index(judge.agents[0])
            label = "critic" if self.config.algorithm.critic == "joint" else f"{judge.name}/critic"
            live = self._targeted(batch)[:, n].bool() & ~batch.truncated_E[:, None]
            metrics[f"{label}/value"] = values[:, n, : live.shape[1]][live].mean().item() if live.any() else math.nan
            for t in range(live.shape[1]):
                chosen = live[:, t]
                metrics[f"{label}/explained_variance_turn_{t}"] = explained_variance(
                    values[chosen, n, t], returns_ET[chosen, t]
                )

    # --- policies ----------------------------------------------------------------------------------------------------

    def _train_policy(
        self,
        name: str,
        batch: Batch,
        advantages_ENT: Tensor,
        targets_ENT: Tensor,
        values_ENT1: Tensor | None,
        iteration: int,
        metrics: Metrics,
        *,
        only_critic: bool,
    ) -> None:
        """`algorithm.epochs` steps of one policy, each over all answers of the agents it speaks for."""
        algorithm = self.config.algorithm
        policy = self.members[name]
        agents = [agent for agent, other in self.team.policies.items() if other is policy]
        heads = {judge.agents[0]: judge.head for judge in self.judges if judge.critic is None}
        packed = {agent: pack_answers(batch, agent, policy, values=agent in heads) for agent in agents}
        num = sum(len(sequence.answers) for rows in packed.values() for sequence in rows)
        if not num:
            return
        epochs = max(algorithm.epochs, self.config.critic.epochs) if only_critic else algorithm.epochs
        for _ in range(epochs):
            totals: dict[str, float] = defaultdict(float)
            for agent in agents:
                for micro in self._batches(packed[agent], policy.device):
                    hidden = policy.hidden(micro.ids_BL)
                    loss = hidden.new_zeros((), dtype=torch.float32)
                    if not only_critic and len(micro.token_K):
                        loss = loss + self._policy_loss(name, micro, hidden, advantages_ENT, num, totals)
                    if agent in heads:
                        loss = loss + self._head_loss(heads[agent], micro, hidden, batch, targets_ENT, values_ENT1, num, totals)
                    self._check(loss, iteration, agent, batch, micro.slot_S.cpu() // (batch.shape[1] * batch.shape[2]))
                    loss.backward()
                    metrics["tokens/policy"] += micro.num_tokens
            norm = self._step(name, iteration, name)
            metrics[f"{name}/gradient_norm"] = norm
            metrics[f"{name}/loss"] = totals["policy"]
            metrics[f"{name}/entropy_estimate"] = -totals["logp"] / max(totals["scored"], 1)
            if heads:
                metrics[f"{name}/critic/loss"] = totals["value"]
            if algorithm.loss != "reinforce":
                metrics[f"{name}/clipped"] = totals["clipped"] / max(totals["tokens"], 1)
            if algorithm.kl_coef:
                metrics[f"{name}/kl"] = totals["kl"] / max(totals["scored"], 1)

    def _policy_loss(
        self, name: str, micro: MicroBatch, hidden: Tensor, advantages_ENT: Tensor, num: int, totals: Metrics
    ) -> Tensor:
        algorithm, policy = self.config.algorithm, self.members[name]
        logp_K = policy.score(hidden[micro.row_K, micro.column_K], micro.token_K, self.sampling)
        advantages_S = advantages_ENT.flatten()[micro.slot_S.cpu()].to(logp_K)
        if algorithm.loss == "reinforce":
            loss, stats = losses.reinforce(logp_K, micro.answer_K, advantages_S, num_answers=num)
        else:
            loss, stats = CLIPPED_LOSSES[algorithm.loss](
                logp_K, micro.old_logp_K, micro.answer_K, advantages_S, clip=algorithm.clip, num_answers=num
            )
        totals["policy"] += loss.item()
        totals["logp"] += logp_K.detach().sum().item()
        totals["scored"] += len(logp_K)
        for key, value in stats.items():
            totals[key] += value
        if algorithm.kl_coef:
            with torch.no_grad():
                frozen = self.references[name]
                before = frozen.hidden(micro.ids_BL)[micro.row_K, micro.column_K]
                reference = frozen.score(before, micro.token_K, self.sampling)
            kl, stats = losses.kl_to_reference(logp_K, reference, num_answers=num)
            totals["kl"] += stats["kl"]
            loss = loss + algorithm.kl_coef * kl
        return loss

    def _head_loss(
        self,
        head: ValueHead,
        micro: MicroBatch,
        hidden: Tensor,
        batch: Batch,
        targets_ENT: Tensor,
        values_ENT1: Tensor | None,
        num: int,
        totals: Metrics,
    ) -> Tensor:
        """The critic's part of a policy's loss, where the value head sits on the agent's own model."""
        assert values_ENT1 is not None
        targets_S, wanted_S = self._critic_slots(batch, targets_ENT)
        slots = micro.slot_M.cpu()
        chosen = wanted_S[slots]
        if not chosen.any():
            return hidden.new_zeros(())
        values = head(hidden[micro.row_M, micro.column_M][chosen.to(hidden.device)])
        targets = targets_S[slots[chosen]].to(values)
        if self.config.critic.value_clip is None:
            loss, _ = losses.value_error(values, targets, num_values=num)
        else:
            old = values_ENT1.flatten()[slots[chosen]].to(values)
            clip = self.config.critic.value_clip
            loss, _ = losses.clipped_value_error(values, old, targets, clip=clip, num_values=num)
        totals["value"] += loss.item()
        return self.config.critic.coef * loss

    # --- steps -------------------------------------------------------------------------------------------------------

    def _policy_groups(self, name: str) -> list[tuple[list[nn.Parameter], float]]:
        policy = self.members[name]
        groups = [(list(policy.model.parameters()), self.config.learner.lr)]
        heads = [j.head for j in self.judges if j.critic is None and self.team.policies[j.agents[0]] is policy]
        if heads:
            groups.append(([p for head in heads for p in head.parameters()], self.config.critic.lr))
        return groups

    def _optimizer(self, groups: Iterable[tuple[list[nn.Parameter], float]]) -> torch.optim.AdamW:
        learner = self.config.learner
        parts = [{"params": params, "lr": lr, "full_lr": lr} for params, lr in groups]
        return torch.optim.AdamW(parts, betas=learner.betas, weight_decay=learner.weight_decay, fused=True)

    def _schedule(self, iteration: int) -> None:
        """Set learning rates for this iteration; a function of its number alone, so there is no state to save."""
        learner, run = self.config.learner, self.config.run
        factor = min(1.0, (iteration + 1) / (learner.warmup + 1))
        done = max(0, iteration - learner.warmup) / max(1, run.iterations - learner.warmup)
        if learner.schedule == "linear":
            factor *= 1 - done
        elif learner.schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * done))
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * factor

    def _batches(self, packed: Sequence[Packed], device: torch.device) -> Iterable[MicroBatch]:
        return micro_batches(packed, self.config.learner.micro_batch_tokens, device)

    def _step(self, name: str, iteration: int, label: str) -> float:
        """Clip, check, step; returns the gradient's norm before clipping."""
        optimizer = self.optimizers[name]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.learner.clip_norm or math.inf)
        if not math.isfinite(norm):
            raise TrainingError(f"iteration {iteration}: the gradient of {label} is {norm.item()}; no step was taken.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def _check(self, loss: Tensor, iteration: int, label: str, batch: Batch, episodes_S: Tensor) -> None:
        if not torch.isfinite(loss):
            named = ", ".join(f"{e} (task {batch.episodes[e].label})" for e in sorted(set(episodes_S.tolist()))[:8])
            raise TrainingError(
                f"iteration {iteration}: the loss of {label} is {loss.item()} in a micro-batch of episodes {named}; "
                "no step was taken. The last checkpoint is intact: lower the learning rate and resume."
            )

    def _require_finite(self, numbers_EX: Tensor, batch: Batch, iteration: int, what: str) -> None:
        bad = (~torch.isfinite(numbers_EX)).any(1).nonzero()[:, 0].tolist()
        if bad:
            episode = batch.episodes[bad[0]]
            raise TrainingError(
                f"iteration {iteration}: a {what} of episode {bad[0]} (task {episode.label}, agents "
                f"{', '.join(episode.agents)}) is not a finite number. Nothing was learned from this iteration."
            )
