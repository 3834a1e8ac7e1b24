"""Small random models of the families people use, each with a tokenizer of its own and its family's chat format."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from collm.envs.agree import COLOURS, Agree
from collm.models.chat import Chat
from collm.tiny.workshop.demonstrations import name_colour
from collm.types import Message

# ChatML with a system message of its own where none is given (Qwen2.5).
CHATML = """{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif -%}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""

# ChatML that leaves the thoughts out of every answer before the newest question, and shows them after it (Qwen3).
THINKING = """{%- set ns = namespace(newest=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.newest = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
  {%- set text = m.content -%}
  {%- if m.role == 'assistant' -%}
    {%- set thought = '' -%}
    {%- if '</think>' in text -%}
      {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
      {%- set text = text.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {%- if loop.index0 > ns.newest -%}
      {%- set text = '<think>\n' + thought + '\n</think>\n\n' + text -%}
    {%- endif -%}
  {%- endif -%}
  {{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""

# Headers around roles, a system block with today's date always, texts stripped (Llama 3).
HEADERS = """{{- bos_token -}}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content.strip() %}{% set rest = messages[1:] -%}
{%- else %}{% set first = '' %}{% set rest = messages %}{% endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' + first + '<|eot_id|>' -}}
{%- for m in rest -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content.strip() + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}"""

# Turns of "user" and "model" in strict alternation; what a system message says is put before the first question (Gemma).
TURNS = """{{- bos_token -}}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] -%}
{%- else %}{% set first = '' %}{% set rest = messages %}{% endif -%}
{%- for m in rest -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
  {%- set role = 'model' if m.role == 'assistant' else m.role -%}
  {{- '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m.content.strip() + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif -%}"""

SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
WINDOW: dict[str, Any] = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
FAMILIES: dict[str, tuple[str, tuple[str, str, str], Any, Any]] = {
    # name -> chat template, (end of a message, begin, other mark), config, model
    "qwen2.5": (CHATML, ("<|im_end|>", "<|endoftext|>", "<|im_start|>"), Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (THINKING, ("<|im_end|>", "<|endoftext|>", "<|im_start|>"), Qwen3Config, Qwen3ForCausalLM),
    "llama3": (HEADERS, ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>"), LlamaConfig, LlamaForCausalLM),
    "gemma2": (TURNS, ("<end_of_turn>", "<bos>", "<start_of_turn>"), Gemma2Config, Gemma2ForCausalLM),
    "gemma3": (TURNS, ("<end_of_turn>", "<bos>", "<start_of_turn>"), Gemma3TextConfig, Gemma3ForCausalLM),
    "granite": (CHATML, ("<|im_end|>", "<|endoftext|>", "<|im_start|>"), GraniteConfig, GraniteForCausalLM),
}
EXTRA: dict[str, dict[str, Any]] = {
    "qwen2.5": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "llama3": {"tie_word_embeddings": False},
    "gemma2": {**WINDOW, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3": {**WINDOW, "query_pre_attn_scalar": 16},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "tie_word_embeddings": True},
}


def demonstrations(seed: int, count: int, agents: int = 2) -> list[tuple[str, str]]:
    """(question, a poor player's answer) of `agree` with four colours."""
    rng = random.Random(seed)
    pairs = []
    while len(pairs) < count:
        env = Agree(agents=agents)
        observations, _ = env.reset(seed=rng.getrandbits(32))
        pairs += [(text, name_colour(env, agent, rng)) for agent, text in observations.items()]
    return pairs


@cache
def tokenizer(family: str, vocab_size: int = 420) -> PreTrainedTokenizerFast:
    """Byte pairs trained on `agree`, with the family's special tokens and template; thoughts are marked by plain tokens."""
    template, (end, begin, mark), *_ = FAMILIES[family]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", begin, end, mark, *(["<|end_header_id|>"] if family == "llama3" else [])]
    core.train_from_iterator(
        [text for pair in demonstrations(0, 64) for text in pair] + [f" {colour}" for colour in COLOURS],
        trainers.BpeTrainer(
            vocab_size=vocab_size + 7 * sorted(FAMILIES).index(family),
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token=begin, eos_token=end, chat_template=template, padding_side="left"
    )
    if family == "qwen3":
        made.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return made


def model(family: str, seed: int = 0) -> Any:
    """A random model of the family's shape, a few ten thousand parameters."""
    _, _, config, kind = FAMILIES[family]
    words = tokenizer(family)
    torch.manual_seed(seed)
    ids = {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id}
    return kind(config(vocab_size=len(words), **SIZE, **ids, **EXTRA[family])).eval()


def learn_to_speak(made: Any, words: Any, seed: int, steps: int = 50, lr: float = 3e-3) -> float:
    """A few seconds of imitating poor players of `agree`; returns the last loss. The model then names colours, no more."""
    chat = Chat(words)
    rows = []
    for question, answer in demonstrations(seed, 512):
        prompt = chat.encode((Message("user", question),)).tolist()
        rows.append((prompt, [*chat.text_ids(answer), words.eos_token_id]))
    optimizer = torch.optim.AdamW(made.parameters(), lr=lr, betas=(0.9, 0.98))
    rng = random.Random(seed)
    loss = torch.zeros(())
    for _ in range(steps):
        chosen = rng.sample(rows, 32)
        width = max(len(prompt) + len(answer) for prompt, answer in chosen)
        ids_BL, labels_BL = torch.zeros(32, width, dtype=torch.int64), torch.full((32, width), -100)
        for b, (prompt, answer) in enumerate(chosen):
            ids_BL[b, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels_BL[b, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        logits = made(input_ids=ids_BL[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.transpose(1, 2), labels_BL[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def speaking(family: str, folder: Path, seed: int) -> Path:
    """Folder of a small model of the family that can play `agree` badly."""
    made, words = model(family, seed), tokenizer(family)
    learn_to_speak(made, words, seed)
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
