"""A policy: a causal language model that answers an agent's own history, with its tokenizer and chat template."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from collm.algorithms.logprobs import token_logprobs
from collm.errors import ConfigError
from collm.models import attention, tiny
from collm.models.chat import Chat
from collm.types import Sampling

transformers_logging.disable_progress_bar()

LOGITS_AT_ONCE = 1 << 25
"""Numbers in one chunk of logits; a longer batch is scored chunk by chunk, each recomputed in the backward pass."""


def compute_in(dtype: str, device: torch.device) -> AbstractContextManager:
    """Autocast to bfloat16 where asked; weights and optimizer state stay float32 in every case."""
    if dtype == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def resolve(source: str) -> str:
    """A model's folder or hub name; "tiny" is the model that the package ships."""
    return str(tiny.folder()) if source == "tiny" else source


def load_pretrained(auto_class: Any, source: str, **options: Any) -> Any:
    """`auto_class.from_pretrained(source)`, with an error that names the setting's value and the way out.

    Code that lies beside the weights is never run.
    """
    try:
        return auto_class.from_pretrained(resolve(source), trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"model {source!r} cannot be loaded: {reason} Give a local Hugging Face folder, a hub name that this machine "
            "can reach, or 'tiny'."
        ) from error


class Policy:
    """One model and its tokenizer. Several agents may share one policy.

    The model is float32; `compute` names the number format of matrix products ("float32" or "bfloat16").
    """

    def __init__(self, model: Any, tokenizer: Any, *, compute: str = "float32"):
        self.model = model.float().eval()
        attention.adopt(self.model)
        self.tokenizer = tokenizer
        self.compute = compute
        self.head: Any = model.get_output_embeddings()
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        stops = model.generation_config.eos_token_id if model.generation_config is not None else None
        stops = stops if isinstance(stops, list) else [stops]
        self.stop_ids = sorted({int(i) for i in [*stops, tokenizer.eos_token_id] if i is not None})
        self.chat = Chat(tokenizer, self.stop_ids)

    @classmethod
    def from_pretrained(cls, source: str, *, compute: str = "float32", device: str | torch.device = "cpu") -> Policy:
        """Load a Hugging Face folder or hub name, or "tiny". Raises ConfigError where that is impossible."""
        tokenizer = load_pretrained(AutoTokenizer, source)
        model = load_pretrained(AutoModelForCausalLM, source, dtype=torch.float32)
        return cls(model.to(device), tokenizer, compute=compute)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_positions(self) -> int:
        """The longest sequence, in tokens, that the model was made for."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)

    @property
    def body(self) -> nn.Module:
        """The model without its vocabulary head."""
        return self.model.base_model

    def hidden(self, ids_BL: Tensor) -> Tensor:
        """Hidden states (B, L, D) of right-padded ids (B, L). Attention is causal, so padding at the right needs no mask."""
        with compute_in(self.compute, self.device):
            return self.body(input_ids=ids_BL, use_cache=False).last_hidden_state

    def logits(self, hidden_KD: Tensor) -> Tensor:
        """Vocabulary logits (K, V) of chosen hidden states (K, D)."""
        with compute_in(self.compute, self.device):
            logits_KV = self.head(hidden_KD)
        return torch.tanh(logits_KV / self.softcap) * self.softcap if self.softcap else logits_KV

    def score(self, hidden_KD: Tensor, tokens_K: Tensor, sampling: Sampling) -> Tensor:
        """Log-probs (K,) of tokens from the hidden states that predict them, under the sampling distribution."""

        def chunk(hidden: Tensor, tokens: Tensor) -> Tensor:
            return token_logprobs(self.logits(hidden), tokens, **sampling.distribution())

        rows = max(1, LOGITS_AT_ONCE // self.head.weight.shape[0])
        if len(tokens_K) <= rows:
            return chunk(hidden_KD, tokens_K)
        parts = [
            checkpoint(chunk, hidden, tokens, use_reentrant=False)
            for hidden, tokens in zip(hidden_KD.split(rows), tokens_K.split(rows), strict=True)
        ]
        return torch.cat(parts)

    def frozen_copy(self) -> Policy:
        """The policy as it is now, never to be trained: a reference for KL penalties."""
        return Policy(copy.deepcopy(self.model).requires_grad_(False), self.tokenizer, compute=self.compute)

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder: model, tokenizer and chat template."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
