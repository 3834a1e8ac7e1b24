"""A critic: a language model's body that reads the histories of some agents, and a head that predicts the return.

Its input is a chat: for each turn a message with the observations of these agents and a message with their answers. V(h_t) is
computed at the position where the model would begin to answer, Q(h_t, a_t) at the last token of the answers. Since attention
is causal, one forward pass yields the values of all turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from collm.algorithms import losses
from collm.algorithms.stats import RunningMoments
from collm.models.adapters import compute_in
from collm.models.blueprint import HISTOGRAM_BINS
from collm.models.chat import Chat
from collm.models.loading import load_pretrained, max_positions_of
from collm.models.trees import Tree, hidden_states, reads_trees
from collm.types import Episode, Ids, Message


class ValueHead(nn.Module):
    """A linear map from a hidden state to a predicted return. It predicts 0 until it is trained.

    With target normalization the map predicts in units of the targets' standard deviation. When mean or deviation change, the
    map is corrected so that its predictions stay the same. Source: PopArt, arXiv:1602.07714.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("deviation", torch.ones((), dtype=torch.float64))
        self.moments = RunningMoments()

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (...), in units of return, of hidden states (..., D)."""
        normalized = hidden.float() @ self.weight + self.bias
        return normalized * self.deviation.to(normalized) + self.mean.to(normalized)

    @torch.no_grad()
    def rescale(self, targets: Tensor) -> None:
        """Update mean and deviation from targets (S,), in units of return, without changing any prediction."""
        if not len(targets):
            return
        self.moments.update(targets)
        mean, deviation = self.moments.mean, self.moments.deviation
        ratio = (self.deviation / deviation).item()
        self.weight.mul_(ratio)
        self.bias.copy_((self.bias * self.deviation + self.mean - mean) / deviation)
        self.mean.fill_(mean)
        self.deviation.fill_(deviation)

    def loss(self, hidden: Tensor, targets: Tensor, *, num_values: int) -> Tensor:
        """Mean squared error over `num_values` targets (S,), in units of return; with normalized targets in units of their
        variance."""
        values = self(hidden)
        unit = self.deviation.to(values) ** 2
        return losses.value_error(values, targets.to(values), num_values=num_values)[0] / unit

    def get_extra_state(self) -> Tensor:
        m = self.moments
        return torch.tensor([m.weight, m.first, m.second], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.moments.weight, self.moments.first, self.moments.second = state.tolist()


class HistogramHead(nn.Module):
    """Predicts a histogram of returns from a hidden state; the value is its mean (HL-Gauss). It predicts 0 until it is trained.

    The bins have equal width and reach `MARGIN` bins beyond the lowest and the highest target so far, so that a smoothed target
    lies within them. A target outside stretches all bins. At first the histogram is that of the first targets.
    Source: arXiv:2403.03950; `algorithms.losses.gaussian_histogram` has the formula.
    """

    NUM_BINS = HISTOGRAM_BINS
    MARGIN = 2
    """Bins beyond the targets, at each side: with half a bin 3.3 standard deviations."""
    DEVIATION = 0.75
    """Standard deviation of a smoothed target, in bins."""

    lowest: Tensor
    highest: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(self.NUM_BINS, width))
        self.bias = nn.Parameter(torch.zeros(self.NUM_BINS))
        self.register_buffer("lowest", torch.tensor(math.inf, dtype=torch.float64))
        self.register_buffer("highest", torch.tensor(-math.inf, dtype=torch.float64))

    @property
    def width(self) -> float:
        """Of a bin, in units of return."""
        spread = max(float(self.highest - self.lowest), 1e-6 * max(1.0, abs(float(self.lowest))))
        return spread / (self.NUM_BINS - 1 - 2 * self.MARGIN)

    @property
    def centres(self) -> Tensor:
        """(B,) of the bins, in units of return."""
        return float(self.lowest) + self.width * (torch.arange(self.NUM_BINS, dtype=torch.float64) - self.MARGIN)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., B) of hidden states (..., D)."""
        return hidden.float() @ self.weight.T + self.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (...), in units of return, of hidden states (..., D)."""
        logits = self.logits(hidden)
        if self.lowest > self.highest:
            return logits.new_zeros(logits.shape[:-1])
        return logits.softmax(-1) @ self.centres.to(logits)

    @torch.no_grad()
    def rescale(self, targets: Tensor) -> None:
        """Stretch the bins over targets (S,), in units of return; the first ones that differ also set the bias."""
        if not len(targets):
            return
        first = bool(self.lowest >= self.highest)
        self.lowest.fill_(min(self.lowest.item(), targets.min().item()))
        self.highest.fill_(max(self.highest.item(), targets.max().item()))
        if first:
            self.bias.copy_((self.smoothed(targets).mean(0) + 1e-4).log())

    def smoothed(self, targets: Tensor) -> Tensor:
        """(S, B) histograms of targets (S,), in units of return."""
        edges = self.centres[0] + self.width * (torch.arange(self.NUM_BINS + 1, dtype=torch.float64) - 0.5)
        return losses.gaussian_histogram(targets, edges, deviation=self.DEVIATION * self.width)

    def loss(self, hidden: Tensor, targets: Tensor, *, num_values: int) -> Tensor:
        """Mean cross-entropy over `num_values` targets (S,), in nats."""
        logits = self.logits(hidden)
        return losses.histogram_error(logits, self.smoothed(targets).to(logits), num_values=num_values)[0]


Head = ValueHead | HistogramHead
HEADS: dict[str, type[Head]] = {"mse": ValueHead, "hl_gauss": HistogramHead}
"""Value of `critic.loss` -> head."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The input of a critic for one value."""

    ids: Ids
    """(L,) token ids; the value is computed at the last one."""
    cut: int
    """Number of oldest turns that were cut to fit."""


class Critic(nn.Module):
    """A language model's body with a value head and its own tokenizer. Vocabulary logits are not computed."""

    def __init__(
        self,
        body: Any,
        tokenizer: Any,
        *,
        max_tokens: int = 8192,
        compute: str = "float32",
        system: str | None = None,
        loss: str = "mse",
    ):
        super().__init__()
        self.body = body.float().eval()
        self.value = HEADS[loss](body.config.get_text_config().hidden_size)
        self.tokenizer = tokenizer
        self.chat = Chat(tokenizer, keep_thoughts=True, system=system)
        self.max_tokens = min(max_tokens, max_positions_of(body.config))
        self.compute = compute

    @classmethod
    def from_pretrained(cls, source: str, *, device: Any = "cpu", **options: Any) -> Critic:
        """A critic on the body of a pretrained language model, with the class's options. Raises ConfigError if it cannot be
        loaded."""
        tokenizer = load_pretrained(AutoTokenizer, source)
        body = load_pretrained(AutoModel, source, dtype=torch.float32)
        return cls(body, tokenizer, **options).to(device)

    @property
    def device(self) -> torch.device:
        return self.value.weight.device

    @cached_property
    def reads_trees(self) -> bool:
        """Whether `hidden` may be given trees."""
        return reads_trees(self.body, self.device)

    def hidden(self, ids_BL: Tensor, tree: Tree | None = None) -> Tensor:
        """Hidden states (B, L, D) of ids (B, L), padded at the right, which are sequences or trees."""
        with compute_in(self.compute, self.device):
            return hidden_states(self.body, ids_BL, tree)

    def middle(self, ids_BL: Tensor, tree: Tree | None = None) -> Tensor:
        """Float32 mean (B, L, D) of the hidden states of the middle half of the layers, as of `hidden`."""
        with compute_in(self.compute, self.device):
            return hidden_states(self.body, ids_BL, tree, middle=True).float()

    def read(
        self,
        episode: Episode,
        turn: int,
        agents: Sequence[str],
        *,
        state: bool = False,
        newest_only: bool = False,
        answers: Mapping[str, str] | None = None,
    ) -> Reading:
        """The critic's input for turn `turn`; len(episode.turns) is the history after the last turn.

        The agents' examples are read like earlier turns. If the history is too long, examples and then the oldest turns are cut
        first. If a single turn is too long, every text keeps an equal
        number of tokens at its end.

        Args:
            agents: agents whose texts are read.
            state: include the environment's privileged state.
            newest_only: without earlier turns (rollout.history="newest"), but with examples.
            answers: for Q, agent -> its answer at this turn.
        """
        earlier = self._examples(episode, agents, state)
        earlier += [
            (self._observed(episode, t, agents, state), self._answered(episode.turns[t].completions, agents))
            for t in range(0 if not newest_only else turn, turn)
        ]
        newest = self._observed(episode, turn, agents, state)
        final = None if answers is None else self._joined({a: answers[a] for a in agents if a in answers}, len(agents))
        for cut in range(len(earlier) + 1):
            ids = self._encode(earlier[cut:], newest, final)
            if len(ids) <= self.max_tokens:
                return Reading(ids, cut)
        texts = self._texts(episode, turn, agents, state)
        said = {agent: answers[agent] for agent in agents if agent in answers} if answers is not None else {}
        blank = self._encode(
            [],
            self._joined(dict.fromkeys(texts, ""), len(texts)),
            None if final is None else self._joined(dict.fromkeys(said, ""), len(agents)),
        )
        share = max(0, self.max_tokens - len(blank)) // (len(texts) + len(said))
        while True:
            newest = self._joined({name: self._tail(text, share) for name, text in texts.items()}, len(texts))
            if final is not None:
                final = self._joined({agent: self._tail(text, share) for agent, text in said.items()}, len(agents))
            ids = self._encode([], newest, final)
            if len(ids) <= self.max_tokens or share == 0:  # a cut text may have more tokens than it had within the whole
                return Reading(ids[-self.max_tokens :], turn + 1)
            share = share * 9 // 10

    def _encode(self, earlier: list[tuple[str, str]], newest: str, final: str | None) -> Ids:
        messages = [message for seen, said in earlier for message in (Message("user", seen), Message("assistant", said))]
        messages.append(Message("user", newest))
        if final is None:
            return self.chat.encode(messages)
        return self.chat.encode([*messages, Message("assistant", final)], answer=False)

    def _examples(self, episode: Episode, agents: Sequence[str], state: bool) -> list[tuple[str, str]]:
        """The agents' worked examples, read like earlier turns: (observations, answers)."""
        rows = zip_longest(*([m.text for m in episode.examples.get(agent, ())] for agent in agents))
        texts = [{agent: text for agent, text in zip(agents, row, strict=True) if text is not None} for row in rows]
        joined = [self._joined(found, len(agents) + (state and not i % 2)) for i, found in enumerate(texts)]
        return list(zip(joined[::2], joined[1::2], strict=True))

    def _texts(self, episode: Episode, turn: int, agents: Sequence[str], state: bool) -> dict[str, str]:
        played = turn < len(episode.turns)
        observed = episode.turns[turn].observations if played else episode.observations
        texts = {agent: observed[agent] for agent in agents if agent in observed}
        if state:
            texts["state"] = episode.turns[turn].state if played else episode.state
        return texts

    def _observed(self, episode: Episode, turn: int, agents: Sequence[str], state: bool) -> str:
        texts = self._texts(episode, turn, agents, state)
        return self._joined(texts, len(agents) + state)

    def _answered(self, completions: Mapping[str, Any], agents: Sequence[str]) -> str:
        return self._joined({agent: completions[agent].text for agent in agents if agent in completions}, len(agents))

    def _joined(self, texts: Mapping[str, str], num: int) -> str:
        """A single text unchanged; several texts, each after its agent's name."""
        if num == 1:
            return "".join(texts.values())
        return "\n".join(f"{name}: {text}" for name, text in texts.items())

    def _tail(self, text: str, tokens: int) -> str:
        ids = self.chat.text_ids(text)
        return text if len(ids) <= tokens else self.chat.decode(list(ids[len(ids) - tokens :]))
