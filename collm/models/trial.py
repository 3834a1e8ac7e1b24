"""Tries every model once when it is loaded, before a run directory exists.

What fails at the end of a run, or trains on wrong numbers without an error, is found here in about a second. What can be made
right is; the rest is a ConfigError of one sentence with the way out. Models behind a server are not here and are not tried;
those that vLLM samples from are not tried with a cache, since the cache is vLLM's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from collm.errors import ConfigError
from collm.models.adapters import Adapter, compute_in
from collm.models.chat import Chat
from collm.models.critic import Critic
from collm.models.loading import check_vocabulary
from collm.models.policy import Policy
from collm.models.team import Team
from collm.types import Message

HISTORY = (
    Message("user", "Name a colour that a team-mate would name, too."),
    Message("assistant", "red"),
    Message("user", "Again, please."),
)
STEPS = 3
"""Number of tokens of the answers that are compared."""
LARGEST_GAP = {"float32": 1e-3, "bfloat16": 0.05}
"""Largest difference of hidden states with and without padding and cache, relative to the largest number in them."""


def try_team(team: Team, *, cached: bool = True) -> None:
    """Try each policy of a team; of several from one source, the first. Raises ConfigError, as `try_policy`."""
    distinct = {(p.source or id(p), p.compute, p.adapter is None): p for p in reversed(team.policies.values())}
    for policy in distinct.values():
        try_policy(policy, cached=cached)


def try_policy(policy: Policy, *, cached: bool = True) -> None:
    """Try one policy: its files can be written, its prompts are transformers', and it answers as it is scored.

    cached: compare a padded and cached answer, as the local engine makes them, with a plain forward pass.
    Raises ConfigError with the reason and the way out.
    """
    _save(policy)
    _compare_prompts(policy.chat)
    if cached:
        _compare_passes(policy)


def try_critic(critic: Critic) -> None:
    """Try one critic: its tokenizer fits its model, and its template its tokenizer. Raises ConfigError."""
    body = critic.body.base.body if isinstance(critic.body, Adapter) else critic.body
    check_vocabulary(critic.tokenizer, body.get_input_embeddings().num_embeddings)
    _compare_prompts(critic.chat)


def _name(policy: Policy) -> str:
    return repr(policy.source or str(policy.model.name_or_path))


def _save(policy: Policy) -> None:
    """Write all but the weights into a temporary folder."""
    model = policy.model
    try:
        with tempfile.TemporaryDirectory(prefix="collm-trial-") as folder:
            model.config.save_pretrained(folder)
            if model.generation_config is not None:
                _save_generation(model.generation_config, Path(folder))
            policy.chat.save(Path(folder))
    except Exception as error:  # any error of a writer would otherwise end the run that trained for hours
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"model {_name(policy)} cannot be saved, so its training would be lost: {reason} Mend its config.json, "
            "generation_config.json or tokenizer_config.json, or choose another model."
        ) from error


def _save_generation(config: Any, folder: Path) -> None:
    """Write the sampling defaults of other programs. Those that only make sense when sampling are made to sample."""
    try:
        config.save_pretrained(folder)
    except ValueError:
        config.do_sample = True
        config.save_pretrained(folder)


def _compare_prompts(chat: Chat) -> None:
    """Prompt ids against transformers' own."""
    for messages in (HISTORY[:1], HISTORY):
        ours, theirs = chat.encode(messages).tolist(), chat.by_transformers(messages)
        if ours != theirs:
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            name = chat.tokenizer.name_or_path
            raise ConfigError(
                f"the tokenizer of {name!r} encodes a prompt as {len(theirs)} ids by apply_chat_template and as {len(ours)} in "
                f"parts, which differ from id {place} on: its chat template changes the texts of messages. Mend its "
                "chat_template.jinja, or choose another model."
            )


def _compare_passes(policy: Policy) -> None:
    """A left-padded, cached answer against a plain forward pass over the same ids."""
    try:
        gap = passes_gap(policy)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        found = f"it fails: {reason}"
    else:
        limit = max(LARGEST_GAP[policy.compute], LARGEST_GAP.get(str(policy.model.dtype).removeprefix("torch."), 0.0))
        if gap <= limit:
            return
        found = f"its hidden states differ by {gap:.3g} of the largest, and {limit:g} is the most"
    raise ConfigError(
        f"model {_name(policy)} ({type(policy.model).__name__}) does not answer a padded batch with a cache as it reads the "
        f"same tokens alone: {found}. Recurrent models, and models that ignore masks or positions, cannot be sampled from "
        "here. Choose a model with attention and a cache of keys and values."
    )


@torch.inference_mode()
def passes_gap(policy: Policy) -> float:
    """Largest difference of the hidden states that predict an answer, with and without padding and cache.

    Two prompts of different lengths are answered greedily by `STEPS` tokens. Relative to the largest absolute number.
    """
    device = policy.device
    prompts = [torch.from_numpy(policy.chat.encode(messages)).long() for messages in (HISTORY[:1], HISTORY)]
    longest = max(map(len, prompts))
    ids_BL, mask_BL = torch.zeros(2, longest, dtype=torch.int64), torch.zeros(2, longest + STEPS, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt) :] = prompt
        mask_BL[row, longest - len(prompt) :] = 1
    ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
    positions_BL = (mask_BL.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=policy.model.config.get_text_config())
    hidden: list[torch.Tensor] = []
    answers: list[torch.Tensor] = []
    new = slice(0, longest)
    for step in range(STEPS):
        with compute_in(policy.compute, device):
            output = policy.body(
                input_ids=ids_BL if step == 0 else answers[-1][:, None],
                attention_mask=mask_BL[:, : longest + step],
                position_ids=positions_BL[:, new],
                past_key_values=cache,
                use_cache=True,
            )
        hidden.append(output.last_hidden_state[:, -1])
        answers.append(policy.logits(hidden[-1]).argmax(-1))
        new = slice(longest + step, longest + step + 1)
    cached_BSD, answers_BS = torch.stack(hidden, 1).float(), torch.stack(answers, 1)
    gaps = []
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt.to(device), answers_BS[row, :-1]])
        plain_SD = policy.hidden(whole[None])[0, len(prompt) - 1 :].float()
        gaps.append((cached_BSD[row] - plain_SD).abs().max() / plain_SD.abs().max())
    return float(torch.stack(gaps).nan_to_num(torch.inf).max())
