"""Stop strings and streamed text: whatever the pieces, the text is that of the answer in one piece."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collm.serving.follow import Follower, Piece, cut, ended, settled
from collm.serving.wire import parse
from collm.types import Completion, without_thoughts

LETTERS = "ab<"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("red\nblue", ["\n"], "red"), ("red", ["\n"], None), ("red", [], None), ("\nred", ["\n"], ""),
        ("a bb c", ["c", "bb"], "a "),
        ("abcd", ["bcd", "c"], "ab"),  # "c" is complete before "bcd"
        ("abc", ["c", "bc"], "a"),  # both are complete at once; the longer one begins first
    ],
)  # fmt: skip
def test_an_answer_is_cut_before_the_first_stop_string(text, stops, expected):
    assert cut(text, stops) == ((text, False) if expected is None else (expected, True))
    completion = Completion("a", text, finish_reason="length")
    assert ended(completion, stops).finish_reason == ("length" if expected is None else "stop")


def test_text_that_may_become_a_mark_is_held_back():
    assert settled("a STO", ["STOP", "\n\n"]) == "a "
    assert settled("a STOR", ["STOP", "\n\n"]) == "a STOR"
    assert settled("a\n", ["STOP", "\n\n"]) == "a"
    assert settled("caf\ufffd", []) == "caf"  # half of a character


def streamed(pieces: list[str], stops: list[str], read=str) -> tuple[list[Piece], str, bool]:
    """The pieces of an answer whose tokens are these texts, its end included; its text; whether a stop string ended it."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "stop": stops, "stream": True}
    asked, sent = parse(json.dumps(body).encode(), "a", max_tokens=8, vocabulary=9), []

    def text(ids: list[int]) -> str:
        return read("".join(pieces[i] for i in ids))

    follower = Follower(asked, text, sent.append)
    stopped = False
    for token in range(len(pieces)):
        stopped = follower(token, -0.5, torch.zeros(9))
        if stopped:
            break
    whole = ended(Completion("a", text([token.id for token in follower.tokens])), stops).text
    return [*sent, follower.piece(whole)], whole, stopped


texts = st.lists(st.text(LETTERS, max_size=3), max_size=6)


@settings(deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts, st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3))
def test_a_stream_is_the_answer_however_it_is_tokenized(pieces, stops):
    sent, whole, stopped = streamed(pieces, stops)
    assert "".join(piece.text for piece in sent) == whole == cut("".join(pieces), stops)[0]
    assert stopped == cut("".join(pieces), stops)[1]
    ids = [token.id for piece in sent for token in piece.tokens]
    assert ids == list(range(len(ids)))  # each token once, in order
    assert all(piece.text for piece in sent[:-1])


def test_a_stream_shows_no_thoughts():
    pieces = ["<thi", "nk>", "blue?", "</think>", "\n\n", "re", "d", "!"]
    sent, whole, _ = streamed(pieces, ["!"], without_thoughts)
    assert [piece.text for piece in sent] == ["re", "d", ""]
    assert whole == "red"


def test_text_before_a_thought_has_been_sent_when_the_thought_begins():
    sent, whole, _ = streamed(["Hm. ", "<think>", "?", "</think>", "red"], [], without_thoughts)
    assert [piece.text for piece in sent] == ["Hm. ", "red", ""]
    assert whole == "red"


def test_a_tokenizer_that_rewrites_what_it_wrote_loses_nothing():
    """Some remove a space before a full stop that comes later; the space has been sent by then."""
    sent, whole, _ = streamed(["red ", ". Or", " blue"], [], lambda text: text.replace(" .", "."))
    assert [piece.text for piece in sent] == ["red ", ". Or", " blue", ""]
    assert whole == "red. Or blue"
