"""Makes the tiny language model that the package ships, from texts the environments generate.

    python -m collm.tiny.workshop.pretrain OUTPUT_FOLDER

The same machine and number of threads give the same weights to the bit. docs/tiny-model.md describes the model and its scores.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from collm.models.chat import Chat
from collm.tiny.workshop import demonstrations
from collm.types import Message

SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Where byte pairs may merge: a command, a block with its " 0 " and line end, a number, a lone capital, seven pixels
# (one row of a letter and its gap) and its line end, a phrase of up to four words, a lone capital, punctuation, white space.
PIECES = (
    r"/[a-z]+| 0 [a-z]+(?:_[a-z]+)*\n?|(?:\n| ?)[A-Z]?[a-z_]+(?: [a-z_]+){0,3}[,.:;]?| ?[A-Z](?![a-z])"
    r"| ?\d+|[#.]{1,7}| ?[^\s\w]+\n?|\s|."
)


def make_tokenizer(texts: Iterator[str], vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the tiny model's chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TEMPLATE, padding_side="left"
    )


def make_model(vocab_size: int, seed: int) -> Qwen3ForCausalLM:
    """An untrained Qwen3 of about a million parameters, untied embeddings, float32."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            rope_theta=10000.0,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=3,
            bos_token_id=None,
        )
    )


def batches(chat: Chat, seed: int, tokens: int, longest: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, weights), each (B, L): similar lengths together, about `tokens` a batch; prompts weigh 0.2, answers 1."""
    stream = demonstrations.chats(seed)
    order = np.random.default_rng(seed)
    while True:
        rows = []
        for turns in itertools.islice(stream, 2048):
            ids: list[int] = []
            weights: list[float] = []
            for observation, answer in turns:
                prompt = chat.encode((Message("user", observation),)).tolist()
                answer_ids = [*chat.text_ids(answer), SPECIAL.index("<|end|>")]
                ids += [*prompt, *answer_ids]
                weights += [0.2] * len(prompt) + [1.0] * len(answer_ids)
            rows.append((ids[:longest], weights[:longest]))
        rows.sort(key=lambda row: len(row[0]))
        packed = []
        while rows:
            count = max(1, tokens // len(rows[-1][0]))
            packed.append(rows[-count:])
            del rows[-count:]
        for index in order.permutation(len(packed)):
            batch = packed[index]
            width = max(len(ids) for ids, _ in batch)
            ids_BL = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
            weights_BL = torch.tensor([w + [0.0] * (width - len(w)) for _, w in batch])
            yield ids_BL, weights_BL


def pretrain(
    folder: Path, *, seed: int = 0, chats: int = 8000, steps: int = 2400, tokens: int = 6144, lr: float = 3e-3
) -> None:
    """Train and write model and tokenizer (fp16 safetensors) to `folder`; prints the loss and the time left.

    The tokenizer is trained on so many `chats`, the model in so many `steps` of about `tokens` tokens each.
    """
    tokenizer = make_tokenizer(
        text for turns in itertools.islice(demonstrations.chats(seed + 1), chats) for pair in turns for text in pair
    )
    chat = Chat(tokenizer)
    model = make_model(len(tokenizer), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.02, (steps - step) / (steps - warmup)))
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    started, recent, seen = time.monotonic(), [], 0
    for step, (ids_BL, weights_BL) in enumerate(itertools.islice(batches(chat, seed + 2, tokens, 1024), steps), 1):
        logits = model(input_ids=ids_BL[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.transpose(1, 2), ids_BL[:, 1:], reduction="none")
        loss = (losses * weights_BL[:, 1:]).sum() / weights_BL[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        seen += ids_BL.numel()
        if step % 50 == 0 or step == steps:
            spent = time.monotonic() - started
            print(
                f"step {step}/{steps}  loss {np.mean(recent[-50:]):.4f}  {seen / spent:,.0f} tokens/s"
                f"  {spent * (steps - step) / step / 60:.1f} min left",
                flush=True,
            )
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    print(f"wrote {folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.2f} MB, sha256 {digest}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny language model that collm ships.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chats", type=int, default=8000, help="for the tokenizer")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--threads", type=int, default=1, help="the shipped weights were made with 1")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretrain(arguments.folder, seed=arguments.seed, chats=arguments.chats, steps=arguments.steps)


if __name__ == "__main__":
    main()
