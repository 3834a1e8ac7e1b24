"""A tree of token ids in one pass gives what one pass per sequence gives, in every family, and models that cannot are found."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, model, tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

from collm.learning.pack import Packed, micro_batches
from collm.models.critic import Critic
from collm.models.policy import Policy
from collm.models.trees import reads_trees
from collm.types import Sampling

SAMPLING = Sampling(temperature=0.8)


def siblings() -> list[Packed]:
    """Two turns behind a prompt of 40 tokens (longer than the families' windows), which branches at each turn."""
    generator = np.random.default_rng(0)
    prompt, packed = generator.integers(4, 100, 40), []
    for _ in range(3):
        first = np.concatenate([prompt, generator.integers(4, 100, 6)])
        for _ in range(2):
            again = np.concatenate([first, generator.integers(4, 100, 9), generator.integers(4, 100, 5)])
            answers = [(2 * len(packed), 40, np.zeros(6)), (2 * len(packed) + 1, 55, np.zeros(5))]
            packed.append(Packed(again, answers=answers, markers=[(len(packed), 54)]))
    return packed


def passed(policy: Any, packed: list[Packed], *, trees: bool, tokens: int = 1 << 20) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Log-probs of all answers in order of slots, the gradient of a weighted sum of squares, and the number of tokens read."""
    policy.trained.zero_grad()
    found, num_tokens = {}, 0
    for micro in micro_batches(packed, tokens, policy.device, trees=trees):
        logp = policy.score(policy.hidden(micro.ids_BL, micro.tree)[micro.row_K, micro.column_K], micro.token_K, SAMPLING)
        (logp.square() * (1 + micro.slot_S[micro.answer_K])).sum().backward()
        found |= {slot: logp[micro.answer_K == s].detach() for s, slot in enumerate(micro.slot_S.tolist())}
        num_tokens += micro.num_tokens
    gradient = torch.cat([p.grad.flatten() for p in policy.trained.parameters() if p.grad is not None])
    return torch.cat([found[slot] for slot in sorted(found)]), gradient, num_tokens


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert one.shape == other.shape
    assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize(("family", "attention"), product(sorted(FAMILIES), ("sdpa", "eager")))
def test_every_family_reads_trees(family: str, attention: str) -> None:
    made = model(family)
    made.set_attn_implementation(attention)
    policy = Policy(made, tokenizer(family))
    assert policy.reads_trees
    (alone, gradient, many), (shared, same, few) = (passed(policy, siblings(), trees=trees) for trees in (False, True))
    assert few < many / 2
    close(shared, alone)
    close(same, gradient)
    critic = Critic(model(family, 1).base_model, tokenizer(family))
    hidden = []
    for trees in (False, True):
        (micro,) = micro_batches(siblings(), 1 << 20, critic.device, trees=trees)
        order = micro.slot_M.argsort()
        hidden.append(critic.hidden(micro.ids_BL, micro.tree)[micro.row_M, micro.column_M][order].detach())
    close(hidden[1], hidden[0])


def test_a_mixture_of_experts_reads_trees() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    made = MixtralForCausalLM(MixtralConfig(vocab_size=420, num_key_value_heads=2, sliding_window=24, **sizes))
    policy = Policy(made, tokenizer("llama3"))
    assert policy.reads_trees
    (alone, gradient, _), (shared, same, _) = (passed(policy, siblings(), trees=trees) for trees in (False, True))
    close(shared, alone)
    close(same, gradient)


def test_a_model_that_carries_a_state_does_not_read_trees() -> None:
    made = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    with pytest.warns(UserWarning, match=r"MambaModel cannot read several answers behind one prompt \("):
        assert not reads_trees(made.base_model, torch.device("cpu"))


class OwnMask(nn.Module):
    """A model that makes its causal mask itself, whatever mask it is given."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        self.inner = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval().base_model

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        inputs.pop("attention_mask", None)
        own = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()[None, None]
        return self.inner(input_ids=input_ids, attention_mask=own, **inputs)


def test_a_model_that_ignores_masks_does_not_read_trees() -> None:
    made = OwnMask()
    assert reads_trees(made.inner, torch.device("cpu"))
    with pytest.warns(UserWarning, match="its hidden states differ by"):
        assert not reads_trees(made, torch.device("cpu"))
