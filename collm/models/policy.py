"""A policy: a causal language model with its tokenizer and chat template, which answers an agent's own history."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from collm.algorithms.logprobs import token_logprobs
from collm.errors import ConfigError
from collm.models import attention
from collm.models.adapters import Adapter, Base, compute_in
from collm.models.blueprint import BaseSpec, base_of
from collm.models.chat import Chat
from collm.models.loading import check_vocabulary, load_pretrained, max_positions_of
from collm.models.sources import adapter_folder, fetch_adapter, resolve
from collm.models.split import whole_weights
from collm.models.trees import Tree, hidden_states, reads_trees
from collm.settings.rooms import LoraSettings
from collm.types import Sampling

LOGITS_AT_ONCE = 1 << 25
"""Maximum number of logits (K V) in one chunk; larger batches are scored in chunks that the backward pass recomputes."""


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for PyTorch's bfloat16 products, or it is unknown; without them they are slow."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Policy:
    """One model and its tokenizer. Several agents may share one policy.

    Whole models and adapters are float32; an adapter's base keeps its format.

    Args:
        compute: number format of matrix products, "float32" or "bfloat16".
        source: origin of the whole model, or of the adapter's base.
        system, thinking: as `team.system` and `team.thinking`; None leaves them to the template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        compute: str = "float32",
        adapter: Adapter | None = None,
        source: str = "",
        system: str | None = None,
        thinking: str | None = None,
    ):
        self.adapter = adapter
        self.model = model.eval() if adapter else model.float().eval()
        attention.adopt(self.model)
        self.tokenizer = tokenizer
        self.compute = compute
        self.source = source
        self.split = False
        """Whether this process has only a piece of each parameter (`models/split.py`)."""
        self.head: Any = model.get_output_embeddings()
        self.scale, self.softcap = logit_rule(model)
        stops = model.generation_config.eos_token_id if model.generation_config is not None else None
        stops = [i for i in (stops if isinstance(stops, list) else [stops]) if i is not None]
        check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, stops)
        limit = max_positions_of(model.config)
        self.chat = Chat(tokenizer, stops, max_positions=limit, system=system, thinking=thinking)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        compute: str = "float32",
        device: str | torch.device = "cpu",
        lora: LoraSettings | None = None,
        seed: int = 0,
        bases: dict[BaseSpec, Base] | None = None,
        system: str | None = None,
        thinking: str | None = None,
    ) -> Policy:
        """Load a Hugging Face folder or hub name, or "tiny"; a PEFT adapter is loaded with the base that it names.

        Raises ConfigError if the model cannot be loaded.

        Args:
            lora: add a new adapter to the model, initialized from `seed`, instead of training the whole model.
            bases: bases in memory, which are shared; a new base is added.
            system, thinking: as `team.system` and `team.thinking`.
        """
        about: dict[str, Any] = {"compute": compute, "system": system, "thinking": thinking}
        fetch_adapter(source)
        spec = base_of(source, lora, compute)
        if spec is None:
            tokenizer = load_pretrained(AutoTokenizer, source)
            model = load_pretrained(AutoModelForCausalLM, source, dtype=torch.float32)
            return cls(model.to(device), tokenizer, source=resolve(source), **about)
        bases, folder = {} if bases is None else bases, adapter_folder(source)
        if spec not in bases:
            bases[spec] = Base.from_pretrained(source if folder is None else spec.model, dtype=spec.dtype, device=device)
        base = bases[spec]
        adapter = base.add(lora, seed) if folder is None and lora is not None else base.load(folder or Path(source))
        return cls(base.model, base.tokenizer, adapter=adapter, source=base.source, **about)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_positions(self) -> int:
        """Maximum length of a sequence, in tokens, by the model's config."""
        return self.chat.max_positions

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer."""
        return self.chat.stop_ids

    @property
    def body(self) -> Any:
        """The model without its vocabulary head, under the policy's adapter if it has one."""
        return self.adapter or self.model.base_model

    @property
    def trained(self) -> nn.Module:
        """The module that is trained and saved: the whole model, or the adapter alone."""
        return self.adapter or self.model

    @cached_property
    def reads_trees(self) -> bool:
        """Whether `hidden` may be given trees."""
        return reads_trees(self.body, self.device)

    def hidden(self, ids_BL: Tensor, tree: Tree | None = None) -> Tensor:
        """Hidden states (B, L, D) of ids (B, L), padded at the right, which are sequences or trees."""
        with compute_in(self.compute, self.device):
            return hidden_states(self.body, ids_BL, tree)

    def logits(self, hidden_KD: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Vocabulary logits (K, V) of chosen hidden states (K, D). head: the whole one, if it has been fetched."""
        with compute_in(self.compute, self.device):
            logits_KV = (head or self.whole_head())(hidden_KD)
        return shaped(logits_KV, self.scale, self.softcap)

    def whole_head(self) -> Callable[[Tensor], Tensor]:
        """The vocabulary head, hidden states -> logits. That of a split model is fetched from all processes."""
        if not self.split:
            head: Callable[[Tensor], Tensor] = self.head
            return head
        from torch.distributed.tensor import Partial

        weight = self.head.weight.full_tensor(grad_placements=[Partial()])
        return partial(torch.func.functional_call, self.head, {"weight": weight})

    def score(self, hidden_KD: Tensor, tokens_K: Tensor, sampling: Sampling) -> Tensor:
        """Log-probs (K,) of tokens from the hidden states that predict them, under the sampling distribution."""
        head = self.whole_head()

        def chunk(hidden: Tensor, tokens: Tensor) -> Tensor:
            return token_logprobs(self.logits(hidden, head), tokens, **sampling.distribution())

        rows = max(1, LOGITS_AT_ONCE // self.head.weight.shape[0])
        if len(tokens_K) <= rows:
            return chunk(hidden_KD, tokens_K)
        parts = [
            checkpoint(chunk, hidden, tokens, use_reentrant=False)
            for hidden, tokens in zip(hidden_KD.split(rows), tokens_K.split(rows), strict=True)
        ]
        return torch.cat(parts)

    def for_generation(self) -> Policy:
        """The policy with the linear layers of a whole model cast to its compute format once; the same log-probs, bit for bit.

        Autocast casts float32 weights at every token. The result is valid until the weights change; it shares all weights but
        the cast ones. A policy without such weights is returned as it is.
        """
        if self.compute != "bfloat16" or self.adapter is not None or self.split:
            return self
        ready = copy.copy(self)
        ready.model = copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})
        ready.head = ready.model.get_output_embeddings()
        for layer in ready.model.modules():
            if isinstance(layer, nn.Linear):
                for name, weight in layer.named_parameters(recurse=False):
                    setattr(layer, name, nn.Parameter(weight.detach().bfloat16(), requires_grad=False))
        return ready

    def frozen_copy(self) -> Policy:
        """A frozen copy of the policy, the reference of KL penalties; that of an adapter has the same base."""
        if self.adapter is None:
            return Policy(copy.deepcopy(self.model).requires_grad_(False), self.tokenizer, compute=self.compute)
        frozen = self.adapter.base.frozen_copy(self.adapter)
        return Policy(self.model, self.tokenizer, compute=self.compute, adapter=frozen, source=self.source)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder: model or PEFT adapter, tokenizer and chat template."""
        if self.adapter is None:
            self.model.save_pretrained(folder, **({"state_dict": whole_weights(self.model)} if self.split else {}))
        else:
            self.adapter.save(folder)
        self.chat.save(folder)
        spell_as_before(folder)


def spell_as_before(folder: Path) -> None:
    """Add the names that transformers 4 reads to files of transformers 5: top-level `rope_theta`, and the tokenizer's class.

    Without it, version 4 uses the family's default `rope_theta` without a warning. Scaled rotary positions have version 5's
    names only.
    """
    path = folder / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        rope = config.get("rope_parameters") or {}
        if "rope_theta" in rope and config.get("rope_theta") is None:
            path.write_text(json.dumps(config | {"rope_theta": rope["rope_theta"]}, indent=2) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shaped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits after a family's constant factor (Cohere, Granite) and soft limit c tanh(x / c) (Gemma)."""
    logits = logits if scale == 1 else logits * scale
    return torch.tanh(logits / softcap) * softcap if softcap else logits


@torch.no_grad()
def logit_rule(model: Any) -> tuple[float, float | None]:
    """(scale, softcap) of `shaped` that reproduce the model's logits from its vocabulary head, confirmed on a few tokens.

    Families name the factor differently, and one name has opposite meanings (Granite divides by `logits_scaling`, HyperCLOVA X
    multiplies), so each candidate is compared with the model's output. Raises ConfigError if none fits.
    """
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    stated = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier")]
    ids_BL = torch.arange(min(8, config.vocab_size), device=next(model.parameters()).device)[None]  # several: pad's may be zero
    plain = model.get_output_embeddings()(model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state).float()
    own = model(input_ids=ids_BL, use_cache=False).logits.float()
    for scale in [*(s for factor in stated if factor for s in (factor, 1 / factor)), 1.0]:
        if torch.allclose(shaped(plain, scale, softcap), own, rtol=0, atol=0.01 * float(own.abs().max())):
            return float(scale), softcap
    raise ConfigError(
        f"model {model.name_or_path!r} ({type(model).__name__}) makes logits from hidden states in a way that is not supported:"
        " its vocabulary head alone, with the factors and limits its config states, gives other numbers. Choose another model."
    )
