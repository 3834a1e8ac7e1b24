"""LoRA: agents and critics as low-rank adapters on one frozen base model, which is in memory once.

    W x  becomes  W x + (alpha / rank) B A x        A: (rank, in), B: (out, rank); B = 0 at the start

Source: Hu et al. 2021, arXiv:2106.09685. Layers and files are PEFT's. PEFT is imported when the first adapter is made, since
the import takes seconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from collm.errors import ConfigError
from collm.models import attention
from collm.models.blueprint import BaseSpec
from collm.models.loading import load_pretrained
from collm.models.sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS, resolve
from collm.settings.rooms import LoraSettings


def compute_in(dtype: str, device: torch.device) -> AbstractContextManager:
    """Autocast to bfloat16 for dtype "bfloat16"; weights and optimizer state stay float32."""
    if dtype == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


class Base:
    """A frozen language model, its tokenizer, and the adapters on it; at most one adapter is active at a time."""

    def __init__(self, model: Any, tokenizer: Any, *, source: str = ""):
        self.model = model.requires_grad_(False).eval()
        attention.adopt(self.model)
        self.tokenizer = tokenizer
        self.source = source or str(model.name_or_path)
        self.adapters: list[Adapter] = []
        self.active: str | None = None
        self._peft: Any = None
        self.layers: dict[str, Any] = {}
        """Path -> layer with adapters."""

    @classmethod
    def from_pretrained(cls, source: str, *, dtype: str = "float32", device: str | torch.device = "cpu") -> Base:
        """Load a Hugging Face folder or hub name, or "tiny", with its weights in "float32" or "bfloat16"."""
        tokenizer = load_pretrained(AutoTokenizer, source)
        model = load_pretrained(AutoModelForCausalLM, source, dtype=getattr(torch, dtype))
        return cls(model.to(device), tokenizer, source=resolve(source))

    @property
    def spec(self) -> BaseSpec:
        """Its entry in the blueprint."""
        return BaseSpec(self.source, str(self.model.get_input_embeddings().weight.dtype).removeprefix("torch."))

    @property
    def body(self) -> Any:
        """The model without its vocabulary head."""
        return self.model.base_model

    def add(self, settings: LoraSettings, seed: int) -> Adapter:
        """A new adapter that does not change the model yet (B = 0); `seed` determines its matrices A."""
        from peft import LoraConfig

        targets = "all-linear" if settings.targets == ["all-linear"] else settings.targets
        alpha: Any = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
        adapter = self._inject(
            LoraConfig(
                task_type="CAUSAL_LM",
                r=settings.rank,
                lora_alpha=alpha,
                target_modules=targets,
            )
        )
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        with torch.no_grad():
            for pair in adapter.pairs.values():
                start = nn.init.kaiming_uniform_(torch.empty(pair["A"].weight.shape), a=math.sqrt(5), generator=generator)
                pair["A"].weight.copy_(start)
                pair["B"].weight.zero_()
        return adapter

    def add_like(self, other: Adapter, seed: int) -> Adapter:
        """A new adapter with the rank and alpha of another one, on the layers of the same names."""
        config, names = other.lora, sorted({path.rpartition(".")[2] for path in other.pairs})
        settings = LoraSettings(rank=config.r, alpha=config.lora_alpha, targets=names)
        return self.add(settings, seed)

    def load(self, folder: Path) -> Adapter:
        """Load an adapter from a PEFT folder. Raises ConfigError if it is not plain LoRA or does not fit."""
        from peft import PeftConfig

        try:
            config = PeftConfig.from_pretrained(str(folder))
            if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
                raise ValueError(f"its kind is {config.peft_type}, and only plain LoRA is supported")
            adapter = self._inject(config)
            adapter.load(folder)
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"adapter {str(folder)!r} cannot be loaded on {self.source!r}: {error}.") from error
        return adapter

    def bare(self) -> Adapter:
        """The base without an adapter, with the interface of one."""
        return Adapter(self, None, None)

    def frozen_copy(self, adapter: Adapter) -> Adapter:
        """A frozen copy of an adapter; the bare base if the adapter does not change it (B = 0)."""
        if not any(pair["B"].weight.any() for pair in adapter.pairs.values()):
            return self.bare()
        frozen = self._inject(copy.deepcopy(adapter.lora))
        frozen.load_state_dict(adapter.state_dict())
        self.adapters.remove(frozen)
        return frozen.requires_grad_(False)

    def activate(self, name: str | None) -> None:
        """Make one adapter active, or none."""
        if name == self.active:
            return
        for layer in self.layers.values():
            layer.set_adapter([] if name is None else [name])
        for adapter in self.adapters:
            adapter.requires_grad_(True)  # PEFT freezes all but the active one, which would drop pending gradients
        self.active = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        before = self.active
        self.activate(name)
        try:
            yield
        finally:
            self.activate(before)

    def again(self) -> Any:
        """A context that activates the adapter that is active now, for passes that are computed twice."""
        return self.using(self.active)

    @cached_property
    def keeps_rows(self) -> bool:
        """Whether every adapted layer reads (rows, tokens, features), found by a small pass; a mixture of experts does not."""
        shapes: list[torch.Size] = []
        ids_BL = torch.zeros(2, 3, dtype=torch.int64, device=next(self.model.parameters()).device)
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[:-1]))
            for layer in self.layers.values()
        ]
        try:
            with self.using(None):
                self.body(input_ids=ids_BL, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return set(shapes) == {ids_BL.shape}

    def _inject(self, config: Any) -> Adapter:
        from peft import get_peft_model
        from peft.tuners.lora import LoraLayer

        config.base_model_name_or_path = self.source
        name = f"adapter-{len(self._peft.peft_config) if self._peft is not None else 0}"
        try:
            if self._peft is None:
                self._peft = get_peft_model(self.model, config, name)
            else:
                self._peft.add_adapter(name, config)
        except ValueError as error:
            linear = sorted({path.rpartition(".")[2] for path, m in self.body.named_modules() if isinstance(m, nn.Linear)})
            raise ConfigError(
                f"team.lora.targets={_listed(config.target_modules)} does not fit {self.source!r}: {str(error).split('. ')[0]}."
                f" Its linear layers are {', '.join(linear)}; 'all-linear' takes them all."
            ) from error
        config.base_model_name_or_path = self.source
        if not isinstance(config.target_modules, str):  # an adapter from elsewhere may name its layers by a pattern
            config.target_modules = sorted(config.target_modules)
        self.layers = {path: module for path, module in self.model.named_modules() if isinstance(module, LoraLayer)}
        for layer in self.layers.values():
            layer.cast_input_dtype_enabled = False  # autocast does it; PEFT would copy every input to float32 and back
        self.__dict__.pop("keeps_rows", None)
        if any(name in layer.lora_embedding_A for layer in self.layers.values()) or isinstance(
            self.model.get_output_embeddings(), LoraLayer
        ):
            raise ConfigError(
                f"team.lora.targets={_listed(config.target_modules)} names embeddings or the vocabulary head; adapters are for "
                "the linear layers between them. Set 'all-linear', or name some of those."
            )
        adapter = Adapter(self, name, config)
        self.adapters.append(adapter)
        self.active = "undecided"
        self.activate(None)
        return adapter


class Adapter(nn.Module):
    """One adapter. As a module it has its own matrices only; a call runs the base's body with this adapter active.

    lora: PEFT's config. Weights are float32, independent of the base's format.
    """

    def __init__(self, base: Base, name: str | None, lora: Any):
        super().__init__()
        self.base, self.name, self.lora = base, name, lora
        self.pairs: dict[str, Any] = {}
        for path, layer in base.model.named_modules():
            if name is not None and name in getattr(layer, "lora_A", ()):
                pair = {"A": layer.lora_A[name], "B": layer.lora_B[name]}
                self.pairs[path] = nn.ModuleDict(pair)
                self.add_module(path.replace(".", "/"), self.pairs[path])
        self.eval()

    @property
    def config(self) -> Any:
        return self.base.model.config

    def forward(self, **inputs: Any) -> Any:
        self.base.activate(self.name)
        device = self.base.model.get_input_embeddings().weight.device
        with compute_in(self.base.spec.dtype, device):  # float32 matrices on a bfloat16 base need it
            return self.base.body(**inputs)

    def tensors(self) -> dict[str, Tensor]:
        """PEFT's name -> weight (not a copy)."""
        return {
            f"base_model.model.{path}.lora_{side}.weight": pair[side].weight.data
            for path, pair in self.pairs.items()
            for side in "AB"
        }

    def save(self, folder: Path) -> None:
        """Write a PEFT folder, which names the base by its origin."""
        folder.mkdir(parents=True, exist_ok=True)
        saved = copy.copy(self.lora)
        saved.inference_mode = True
        saved.save_pretrained(str(folder))
        save_file(self.tensors(), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Load the weights of a PEFT folder. Raises ValueError if names or shapes differ from this adapter's."""
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise ValueError(f"it lacks {ADAPTER_WEIGHTS}")
        found, own = load_file(folder / ADAPTER_WEIGHTS), self.tensors()
        differing = set(found) ^ set(own) or {name for name in own if own[name].shape != found[name].shape}
        if differing:
            raise ValueError(f"it holds other tensors than a plain LoRA of its {ADAPTER_CONFIG}: {sorted(differing)[:3]}")
        for name, tensor in own.items():
            tensor.copy_(found[name])


class Stack:
    """Adapters of one base in one pass, for generation: the rows of a batch are sorted by adapter.

        W x  becomes  W x + B (m * A x)      A: (R, in), B: (out, R) of all adapters, with alpha / rank in B;
                                             m: (R,) is 1 for the matrices of the row's adapter, else 0

    A and B are copies in the base's number format.
    """

    def __init__(self, adapters: Sequence[Adapter]):
        self.base = adapters[0].base
        self._added: list[tuple[Any, Tensor, Tensor, tuple[int, ...]]] = []  # layer, A, transpose of B, rank per adapter
        for path, layer in self.base.layers.items():
            pairs = [(adapter.pairs[path], adapter) for adapter in adapters if path in adapter.pairs]
            if pairs:
                A = torch.cat([pair["A"].weight for pair, _ in pairs])
                B = torch.cat([pair["B"].weight * layer.scaling[adapter.name] for pair, adapter in pairs], dim=1)
                ranks = tuple(len(a.pairs[path]["A"].weight) if path in a.pairs else 0 for a in adapters)
                dtype = layer.get_base_layer().weight.dtype
                self._added.append((layer, A.to(dtype), B.to(dtype).t(), ranks))

    def on(self, counts: Sequence[int]) -> Callable[..., Any]:
        """The base's body for a batch whose first counts[0] rows are the first adapter's, the next counts[1] the second's."""
        masks: dict[tuple[int, ...], Tensor] = {}
        for _, A, _, ranks in self._added:
            if ranks not in masks and len(counts) > 1:
                blocks = [torch.ones(count, rank) for count, rank in zip(counts, ranks, strict=True)]
                masks[ranks] = torch.block_diag(*blocks)[:, None].to(A)

        def body(**inputs: Any) -> Any:
            self.base.activate(None)
            hooks = [layer.register_forward_hook(partial(_add, A, B, masks.get(ranks))) for layer, A, B, ranks in self._added]
            try:
                return self.base.body(**inputs)
            finally:
                for hook in hooks:
                    hook.remove()

        return body


def _add(A: Tensor, B: Tensor, mask_B1R: Tensor | None, layer: Any, inputs: tuple[Tensor], result: Tensor) -> Tensor:
    """The forward hook of an adapted layer: its result plus B (m * A x)."""
    low = nn.functional.linear(inputs[0], A)
    low = low if mask_B1R is None else low * mask_B1R
    return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), B).view_as(result)


def _listed(targets: Any) -> str:
    return repr(targets if isinstance(targets, str) else sorted(targets))
