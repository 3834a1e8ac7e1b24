"""Answers over HTTP: cut, streamed, with log-probs; the numbers of requests; models by name. In this process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from servers import free_port

from collm.serving import counted
from collm.serving.server import make_app

ASKED = {"messages": [{"role": "user", "content": "Name one colour."}], "temperature": 2.0, "seed": 5, "max_tokens": 24}
PLACE = "/v1/chat/completions"


@pytest.fixture(scope="module")
def client(tiny) -> Iterator[TestClient]:
    with TestClient(make_app(tiny, "a")) as client:
        yield client


@pytest.fixture(scope="module")
def plain(client) -> dict[str, Any]:
    """The choice of a long answer."""
    (choice,) = client.post(PLACE, json=ASKED).json()["choices"]
    assert len(choice["token_ids"]) == 24
    assert len(choice["message"]["content"]) > 10
    return choice


def chunks(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    response = client.post(PLACE, json={**ASKED, "stream": True, **fields})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def test_an_answer_ends_at_a_stop_string(client, plain):
    """With the text before it; the ids are all that was sampled, and no more than the stop string needs."""
    text = plain["message"]["content"]
    stop = text[6:9]
    assert text.index(stop) == 6, "choose another seed"
    for given in (stop, [stop], ["never written", stop]):
        answer = client.post(PLACE, json={**ASKED, "stop": given}).json()
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == text[:6]
        assert choice["finish_reason"] == "stop"
        count = len(choice["token_ids"])
        assert count < 24
        assert answer["usage"]["completion_tokens"] == count
        assert choice["token_ids"] == plain["token_ids"][:count]
        assert choice["token_logprobs"] == pytest.approx(plain["token_logprobs"][:count], abs=1e-5)
    (choice,) = client.post(PLACE, json={**ASKED, "stop": "never written"}).json()["choices"]
    assert choice == plain


def test_a_stop_string_of_one_request_does_not_end_another(client, plain):
    text = plain["message"]["content"]
    answers: dict[str, str] = {}

    def ask(stop: str | None) -> None:
        answers[str(stop)] = client.post(PLACE, json={**ASKED, "stop": stop}).json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(stop,)) for stop in (None, text[6:9], text[3:5])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {"None": text, text[6:9]: text[:6], text[3:5]: text[: text.index(text[3:5])]}


@pytest.mark.parametrize("stops", [None, (6, 9)])
def test_a_stream_is_the_same_answer_in_pieces(client, plain, stops):
    text = plain["message"]["content"]
    stop = None if stops is None else text[slice(*stops)]
    first, *rest = chunks(client, stop=stop, logprobs=True)
    (whole,) = client.post(PLACE, json={**ASKED, "stop": stop, "logprobs": True}).json()["choices"]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    *pieces, last = [chunk["choices"][0] for chunk in rest]
    assert len(pieces) > 2
    assert "".join(piece["delta"]["content"] for piece in pieces) == whole["message"]["content"]
    assert last["delta"] == {}
    assert [piece["finish_reason"] for piece in pieces] == [None] * len(pieces)
    assert last["finish_reason"] == whole["finish_reason"]
    tokens = [token for piece in pieces if piece["logprobs"] for token in piece["logprobs"]["content"]]
    assert [token["token"] for token in tokens] == [token["token"] for token in whole["logprobs"]["content"]]
    assert [token["logprob"] for token in tokens] == pytest.approx(whole["token_logprobs"], abs=1e-5)
    assert len({chunk["id"] for chunk in (first, *rest)}) == 1
    assert all("usage" not in chunk for chunk in (first, *rest))


def test_a_stream_ends_with_its_usage_if_asked(client):
    *before, last = chunks(client, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == client.post(PLACE, json=ASKED).json()["usage"]
    assert all(chunk["usage"] is None for chunk in before)


def test_what_is_refused_is_no_stream(client):
    response = client.post(PLACE, json={**ASKED, "stream": True, "max_tokens": 1 << 19})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}, {"top_k": 2}, {"temperature": 0.5, "top_p": 0.5}])
def test_top_logprobs_are_those_of_the_sampling_distribution(client, tiny, sampling):
    (choice,) = client.post(PLACE, json={**ASKED, **sampling, "logprobs": True, "top_logprobs": 3}).json()["choices"]
    count = 2 if sampling.get("top_k") else 3
    for token in choice["logprobs"]["content"]:
        top = token["top_logprobs"]
        assert len(top) <= count
        assert [each["logprob"] for each in top] == sorted((each["logprob"] for each in top), reverse=True)
        assert token["logprob"] <= top[0]["logprob"] + 1e-6
        same = [each["logprob"] for each in top if each["token"] == token["token"]]
        assert not same or min(abs(value - token["logprob"]) for value in same) < 1e-5
        if "top_k" in sampling:
            assert sum(2.718281828 ** each["logprob"] for each in top) == pytest.approx(1, abs=1e-4)
        if sampling.get("temperature") == 0:
            assert token["token"] == top[0]["token"]
    streamed = chunks(client, **sampling, logprobs=True, top_logprobs=3)
    tokens = [t for chunk in streamed for t in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [t["top_logprobs"] for t in tokens] == [t["top_logprobs"] for t in choice["logprobs"]["content"]]


def test_a_model_by_its_name(client):
    (listed,) = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/a").json() == listed
    other = client.get("/v1/models/b")
    assert other.status_code == 404
    assert other.json()["error"]["message"] == "model=\"b\" is not served here; this server's only model is 'a'"


def numbers(response: httpx.Response) -> dict[str, float]:
    """Metric (with its status) -> value, parsed by Prometheus's own library."""
    assert response.headers["content-type"].startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]
    assert {sample.labels.get("agent") for sample in samples} <= {"a"}
    kept = [sample for sample in samples if not sample.name.endswith(("_created", "_bucket"))]
    return {sample.name.removeprefix("collm_") + sample.labels.get("status", ""): sample.value for sample in kept}


def test_requests_and_tokens_are_counted(client):
    before = numbers(client.get("/metrics"))
    answers = [client.post(PLACE, json={**ASKED, "seed": seed}).json() for seed in range(2)]
    chunks(client)
    client.post(PLACE, json={"n": 2})
    client.post(PLACE, content=b"x", headers={"content-type": "text/plain"})
    client.get(PLACE)
    client.get("/v1/models")
    after = numbers(client.get("/metrics"))
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    seconds = grown.pop("request_seconds_sum")
    usage = [answer["usage"] for answer in answers] + [client.post(PLACE, json=ASKED).json()["usage"]]
    assert grown == {
        "requests_total200": 3, "requests_total400": 1, "requests_total415": 1, "request_seconds_count": 3,
        "prompt_tokens_total": sum(each["prompt_tokens"] for each in usage),
        "completion_tokens_total": sum(each["completion_tokens"] for each in usage),
    }  # fmt: skip
    assert 0 < seconds < 60
    assert after["requests_in_flight"] == 0


def test_the_metrics_need_the_key_as_well(tiny):
    with TestClient(make_app(tiny, "a", key="k")) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/v1/models/a").status_code == 401
        assert client.get("/metrics", headers={"authorization": "Bearer k"}).status_code == 200


def test_a_client_that_leaves_a_stream_ends_its_answer(tiny, monkeypatch, tmp_path):
    """The engine samples no further for it; it is counted with status 499."""
    drawn = []
    monkeypatch.setattr("collm.serving.follow.likeliest", lambda *a, **k: drawn.append(threading.Event().wait(0.02)) or [])
    port, record = free_port(), tmp_path / "record"
    app = make_app(tiny, "a", record=record)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    url = f"http://127.0.0.1:{port}"

    async def leave() -> dict[str, float]:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        body = {**ASKED, "max_tokens": 400, "temperature": 5.0, "stream": True, "logprobs": True, "top_logprobs": 1}
        async with httpx.AsyncClient() as asking:
            async with asking.stream("POST", url + PLACE, json=body) as response:
                async for line in response.aiter_lines():
                    if '"content"' in line and len(drawn) > 3:
                        break
            for _ in range(500):
                if record.exists():
                    break
                await asyncio.sleep(0.02)
            again = await asking.post(url + PLACE, json={**ASKED, "max_tokens": 1}, timeout=60)
            assert again.status_code == 200
            found = numbers(await asking.get(f"{url}/metrics"))
        server.should_exit = True
        await serving
        return found

    found = asyncio.run(leave())
    assert found["requests_total499"] == 1
    assert found["requests_in_flight"] == 0
    assert json.loads(record.read_text().splitlines()[0])["status"] == counted.CLIENT_LEFT
    assert 3 < len(drawn) < 300
