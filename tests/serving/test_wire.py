"""What a request may hold: null fields, roles, stop strings, and refusals that name field, value, reason and way out."""

from __future__ import annotations

import json

import pytest

from collm.serving import wire
from collm.serving.wire import NEUTRAL, Asked, Refused, parse

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "seed": 1}


def parsed(**fields: object) -> Asked:
    return parse(json.dumps({**HELLO, **fields}).encode(), "a", max_tokens=8, vocabulary=100)


def refused(**fields: object) -> Refused:
    with pytest.raises(Refused) as error:
        parsed(**fields)
    return error.value


def test_null_fields_are_absent():
    """Clients send every field of their records, most of them null; also in messages, which may come from an answer."""
    everything = dict.fromkeys([*wire.FIELDS, *wire.IGNORED, *NEUTRAL, "a_field_of_next_year"], None)
    asked = parsed(**{**everything, **HELLO})
    assert asked == parsed()
    answer = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    request = parsed(messages=[*HELLO["messages"], answer, {**HELLO["messages"][0], "name": None, "type": "text"}]).request
    assert [message.role for message in request.messages] == ["user", "assistant", "user"]
    assert parsed(stream_options=None, stream=True) == parsed(stream_options={"include_usage": None}, stream=True)


def test_a_developer_is_the_system():
    request = parsed(messages=[{"role": "developer", "content": "Be brief."}, *HELLO["messages"]]).request
    assert request.messages[0].role == "system"


@pytest.mark.parametrize(("given", "stops"), [("\n", ("\n",)), (["a", "b c"], ("a", "b c")), ("", ()), ([], ()), (None, ())])
def test_stop_strings(given, stops):
    assert parsed(stop=given).stop == stops


def test_the_form_of_an_answer():
    plain, full = parsed(), parsed(stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=5)
    assert (plain.stream, plain.usage, plain.logprobs, plain.top) == (False, False, False, 0)
    assert (full.stream, full.usage, full.logprobs, full.top) == (True, True, True, 5)
    assert parsed(max_tokens=5, max_completion_tokens=None).request.sampling.max_tokens == 5
    assert parsed(max_tokens=5, max_completion_tokens=7).request.sampling.max_tokens == 7


NOT_OFFERED = {
    "n": 2, "presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.1, "logit_bias": {"5": 1}, "min_p": 0.1,
    "tools": [{"type": "function"}], "functions": [{"name": "f"}], "tool_choice": "required", "function_call": {"name": "f"},
    "modalities": ["text", "audio"], "response_format": {"type": "json_object"},
}  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_is_not_offered_is_refused_unless_it_is_neutral(name):
    assert NOT_OFFERED.keys() == NEUTRAL.keys()
    for value in NEUTRAL[name][0]:
        assert parsed(**{name: value}) == parsed()
    error = refused(**{name: NOT_OFFERED[name]})
    assert (error.status, error.param, error.code) == (400, name, "unsupported_value")
    assert str(error).startswith(f"{name}={json.dumps(NOT_OFFERED[name])} ")


SENTENCES = [
    ({"n": 2}, "n=2 asks for several answers where a request has one; send as many requests with different seeds"),
    ({"colour": "red"}, 'colour="red" is not a field of this server; leave it out'),
    ({"stop": [""]}, 'stop=[""] is neither a text nor a list of texts that are not empty; give one, or leave it out'),
    ({"top_logprobs": 3}, "top_logprobs=3 is given without logprobs; add logprobs=true, or leave it out"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs=21 is not a whole number from 0 to 20; give one, or leave it out"),
    ({"top_p": 0}, "top_p=0 keeps no token; give a number above 0, or temperature=0 for greedy answers"),
    ({"stream_options": []}, 'stream_options=[] is not an object; give {"include_usage": true}, or leave it out'),
    ({"stream": 1}, "stream=1 is neither true nor false; give one of these, or leave it out"),
    ({"model": "b"}, "model=\"b\" is not served here; this server's only model is 'a'"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "sentence"), SENTENCES, ids=range(len(SENTENCES)))
def test_a_refusal_is_one_sentence(fields, sentence):
    assert str(refused(**fields)) == sentence


def test_too_many_or_too_long_stop_strings_are_refused():
    assert refused(stop=["x"] * 17).param == "stop"
    assert refused(stop="x" * 1025).param == "stop"
    assert refused(stop=[1]).param == "stop"


@pytest.mark.parametrize("body", [b'{"temperature": 1e999}', b'{"tools": ' + b"[" * 900 + b"]" * 900 + b"}"])
def test_values_that_cannot_be_written_are_refused_as_well(body):
    with pytest.raises(Refused) as error:
        parse(body, "a", max_tokens=8, vocabulary=100)
    assert error.value.status == 400
    assert len(error.value.body()) < 600
