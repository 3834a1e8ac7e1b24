"""Collect, pack, loss, step: two tiny models learn to name the same colour, without a trainer. `python examples/minimal.py`"""

import torch

from collm import Plan, Team, collect
from collm.algorithms.advantages import discounted_returns, leave_one_out
from collm.algorithms.losses import ppo_clip
from collm.engines.local import LocalEngine
from collm.envs.catalogue import EnvSpec
from collm.learning.batch import Batch
from collm.learning.pack import micro_batches, pack_answers
from collm.types import Sampling

TASKS, GROUP = 8, 8  # 8 groups of 8 episodes an iteration
SAMPLING = Sampling(max_tokens=4)


def train(iterations: int = 12, lr: float = 5e-4) -> list[float]:
    """Train and return the mean reward of each iteration, measured before the iteration's optimizer step."""
    plan = Plan(EnvSpec("agree", {"colours": 4}), sampling=SAMPLING, group_size=GROUP)
    team = Team.from_pretrained({"agent_0": "tiny", "agent_1": "tiny"})  # one model per agent
    engine = LocalEngine(team)
    optimizers = {agent: torch.optim.AdamW(policy.trained.parameters(), lr=lr) for agent, policy in team.policies.items()}
    rewards = []
    for iteration in range(iterations):
        # Collect: each group is `GROUP` episodes of one task that share the environment's seed.
        seeds = [iteration * TASKS + number for number in range(TASKS)]
        groups = collect(plan, engine, [0] * TASKS, seeds)
        batch = Batch.of(groups, team.agents)  # E episodes, N agents, T turns
        rewards.append(batch.rewards_ET.sum(1).mean().item())

        # Credit: the joint return minus the mean return of the other episodes of the group.
        returns_ET = discounted_returns(batch.rewards_ET, gamma=1.0)
        siblings_first = returns_ET.view(TASKS, GROUP, -1).transpose(0, 1)
        advantages_ET = leave_one_out(siblings_first).transpose(0, 1).reshape(returns_ET.shape)
        advantages_ENT = advantages_ET[:, None].expand(batch.shape)

        for agent, policy in team.policies.items():
            # Pack: the agent's prompts and answers as token ids, padded. A slot is an answer's place in (E, N, T).
            packed = pack_answers(batch, agent, policy)
            num_answers = sum(len(sequence.answers) for sequence in packed)
            for micro in micro_batches(packed, max_tokens=8192, device=policy.device):
                # Loss: log-probs under the distribution that was sampled from, weighted by the advantages.
                hidden_BLD = policy.hidden(micro.ids_BL)
                logp_K = policy.score(hidden_BLD[micro.row_K, micro.column_K], micro.token_K, SAMPLING)
                advantages_S = advantages_ENT.flatten()[micro.slot_S]
                loss, _ = ppo_clip(logp_K, micro.old_logp_K, micro.answer_K, advantages_S, clip=0.2, num_answers=num_answers)
                loss.backward()
            # Step: each agent has its own optimizer.
            optimizers[agent].step()
            optimizers[agent].zero_grad()
        print(f"iteration {iteration:2d}  reward {rewards[-1]:.2f}", flush=True)
    return rewards


if __name__ == "__main__":
    train()
