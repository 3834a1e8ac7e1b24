"""One pass over a tree of token ids: a beginning that several sequences share is read once.

A tree's tokens are in depth-first order. A token has the position it has in its sequences, and attends to the tokens between
the root and itself. Numbers and gradients are those of one pass per sequence, up to rounding.

transformers builds every attention mask (causal, sliding window, chunked) from a function of two positions. The masks of a tree
are that function at the tree's positions, limited to ancestors, so a model's own windows apply.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from collm.models import attention


@dataclass(frozen=True, slots=True)
class Tree:
    """B rows of L tokens in depth-first order.

    Example: "a b", "a c d" in one row is a b c d with positions 0 1 1 2 and ends 4 2 4 4.
    """

    position_BL: Tensor
    """(B, L) number of a token's ancestors."""
    end_BL: Tensor
    """(B, L) index after the token's last descendant."""


_PRESENT: ContextVar[Tree | None] = ContextVar("tree", default=None)


def hidden_states(body: Any, ids_BL: Tensor, tree: Tree | None = None, *, middle: bool = False) -> Tensor:
    """Hidden states (B, L, D) of ids (B, L): of trees, or of sequences, which are padded at the right and need no mask.

    middle: in place of the last layer's, the mean over the middle half of the layers. The first layers describe single tokens,
    and the last ones predict the next token; texts are told apart best in between (arXiv:2502.02013).
    """

    def found(**inputs: Any) -> Tensor:
        output = body(input_ids=ids_BL, use_cache=False, **({"output_hidden_states": True} if middle else {}), **inputs)
        return _middle(output.hidden_states) if middle else output.last_hidden_state

    if tree is None:
        return found()
    token = _PRESENT.set(tree)
    try:
        mask_BL = torch.ones_like(ids_BL)  # without it transformers takes positions that fall for the start of a sequence
        return found(attention_mask=mask_BL, position_ids=tree.position_BL)
    finally:
        _PRESENT.reset(token)


def _middle(layers: Sequence[Tensor]) -> Tensor:
    """Mean of the middle half of the layers; layers: the embeddings, then the output of each layer."""
    num = len(layers) - 1
    first, last = num // 4 + 1, num - num // 4
    return sum(layers[first + 1 : last + 1], layers[first]) / (last + 1 - first)


@torch.no_grad()
def reads_trees(body: Any, device: torch.device) -> bool:
    """Whether a model's hidden states of a small tree are those of its sequences; a warning gives the reason if not.

    False for models that carry a state from token to token, and for those whose masks are not made by transformers.
    """
    first, second = [1, 2, 3, 4, 5], [1, 2, 3, 6, 4]
    ids_BL = torch.tensor([[*first, *second[3:]]], device=device)
    tree = Tree(torch.tensor([[0, 1, 2, 3, 4, 3, 4]], device=device), torch.tensor([[7, 7, 7, 5, 5, 7, 7]], device=device))
    wanted_BLD = hidden_states(body, torch.tensor([first, second], device=device))
    wanted_LD = torch.cat([wanted_BLD[0], wanted_BLD[1, 3:]])
    tolerance = (1e-4 if wanted_LD.dtype == torch.float32 else 0.03) * wanted_LD.abs().max()
    try:
        gap = (hidden_states(body, ids_BL, tree)[0] - wanted_LD).abs().max()
        reason = "" if gap <= tolerance else f"its hidden states differ by {gap:.1g}"
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
    if reason:
        warnings.warn(
            f"{type(body).__name__} cannot read several answers behind one prompt ({reason}), so an update reads the prompt "
            "once per answer. The results are the same.",
            stacklevel=2,
        )
    return not reason


def _masked(
    make: Callable[..., Tensor], *sizes: Any, mask_function: Callable[..., Any] = causal_mask_function, **settings: Any
) -> Tensor:
    """transformers' mask for the tree that is being read, if one is."""
    tree = _PRESENT.get()
    if tree is None:
        return make(*sizes, mask_function=mask_function, **settings)

    def sees(b: Any, head: Any, query: Any, key: Any) -> Any:
        positions = tree.position_BL[b, query], tree.position_BL[b, key]
        return mask_function(b, head, *positions) & (key <= query) & (query < tree.end_BL[b, key])

    return make(*sizes, mask_function=sees, **{**settings, "attention_mask": None, "allow_is_causal_skip": False})


for _name, _make in ((attention.NAME, sdpa_mask), ("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionMaskInterface.register(_name, partial(_masked, _make))
