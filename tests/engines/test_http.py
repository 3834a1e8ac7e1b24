"""The HTTP engine: what it sends, what it keeps, how long it waits, and that a bad server harms nobody else."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from email.utils import formatdate

import numpy as np
import pytest
from learners import critic_parts
from servers import completion, free_port, http, serve

from collm.cli.main import main
from collm.cli.play import cost_per_episode
from collm.engines.http import Endpoint, HttpEngine, Usage, endpoint, read_answer, read_usage, retry_after
from collm.engines.mixed import MixedEngine
from collm.engines.scripted import ScriptedEngine
from collm.envs.catalogue import EnvSpec
from collm.errors import ConfigError, EngineError, TrainingError
from collm.learning.batch import Batch
from collm.rollout.collect import collect
from collm.rollout.plan import Plan
from collm.runs.log import read_metrics
from collm.settings.load import parse_config
from collm.training.evaluate import evaluate
from collm.training.trainer import Trainer
from collm.types import Message, Request, Sampling

HELLO = Request("a", (Message("user", "Name one colour."),), Sampling(max_tokens=4), seed=7)


def engine_for(*urls: str, **options) -> HttpEngine:
    """Agents a, b, ... at these addresses; quick to give up."""
    options = {"backoff": 0.01, "read": 5.0, **options}
    return HttpEngine({name: endpoint(name, url) for name, url in zip("abcdef", urls, strict=False)}, **options)


def ask(url: str, **options):
    (answer,) = engine_for(url, **options).generate([HELLO])
    return answer


# --- what is sent and what is kept ---------------------------------------------------------------------------------------


def test_a_request_as_openai_writes_it_and_the_ids_that_a_server_gave(monkeypatch):
    monkeypatch.setenv("KEY_OF_A", "secret-1")
    answer = completion("red", token_ids=[71, 2], token_logprobs=[-1.5, -0.25])
    answer = answer[:-1] + b', "prompt_token_ids": [5, 9]}'
    with serve(lambda *_: http(answer)) as served:
        engine = HttpEngine({"a": endpoint("a", f"{served.url}#some/model", key_env="KEY_OF_A", token_ids=True)})
        said = Message("assistant", "blue", np.array([72, 2], np.int32))
        request = Request("a", (*HELLO.messages, said, Message("user", "Again.")), Sampling(0.5, 0.9, 3, 8), seed=2**62 + 1)
        (got,) = engine.generate([request])
    (sent,) = served
    assert sent.pop("headers")["authorization"] == "Bearer secret-1"
    assert sent == {
        "path": "/v1/chat/completions",
        "model": "some/model",
        "messages": [
            {"role": "user", "content": "Name one colour."},
            {"role": "assistant", "content": "blue", "token_ids": [72, 2]},
            {"role": "user", "content": "Again."},
        ],
        "temperature": 0.5, "top_p": 0.9, "top_k": 3, "max_tokens": 8, "seed": 2**62 + 1,
        "logprobs": True, "return_token_ids": True,
    }  # fmt: skip
    assert (got.agent, got.text, got.finish_reason, got.error) == ("a", "red", "stop", "")
    assert got.prompt_ids.tolist() == [5, 9]
    assert got.token_ids.tolist() == [71, 2]
    assert got.logprobs.tolist() == [-1.5, -0.25]
    assert "secret-1" not in repr(engine.endpoints)


def test_an_ordinary_endpoint_gives_text_alone():
    with serve(lambda *_: http(completion("red", finish_reason="length"))) as served:
        got = ask(served.url)
    assert (got.text, got.finish_reason) == ("red", "length")
    assert got.prompt_ids is got.token_ids is got.logprobs is None
    assert not {"top_k", "logprobs", "return_token_ids"} & set(served[0])  # strict servers refuse what they do not know
    assert "authorization" not in served[0]["headers"]
    assert not HttpEngine.trains


def test_thoughts_that_a_server_sends_are_kept_apart_unless_shown():
    said = "<think>\nblue?\n</think>\n\nred"
    with serve(lambda *_: http(completion(said))) as served:
        got, shown = ask(served.url), ask(served.url, thinking="shown")
    assert (got.text, got.written) == ("red", said)
    assert (shown.text, shown.written) == (said, None)


def test_log_probs_where_openai_and_vllm_put_them():
    content = [{"token": "red", "logprob": -0.5, "bytes": None, "top_logprobs": []}]
    got = read_answer("a", completion("red", logprobs={"content": content}, token_ids=[71]))
    assert got.logprobs.tolist() == [-0.5]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>", b"[]", b"null", b"{}", b'{"choices": []}', b'{"choices": [null]}', b'{"choices": [{"message": "red"}]}',
        b'{"choices": [{"message": {"content": 5}}]}', b"[" * 100_000, b"\xff\xfe\x00", b'{"choices": {"0": 1}}',
        completion("red", token_ids=[1.5]), completion("red", token_ids=[-1]), completion("red", token_ids=[2**40]),
        completion("red", token_ids="71"), completion("red", token_ids=[True]), completion("red", token_logprobs=["x"]),
        completion("red", token_logprobs=[float("nan")]), completion("red", token_logprobs=[[1]]),
        completion("red", token_ids=[1, 2], token_logprobs=[-1]), completion("red", logprobs={"content": [{}]}),
        completion("red", logprobs=7),
    ],
)  # fmt: skip
def test_nonsense_is_an_error_of_that_request(body):
    with pytest.raises(EngineError, match="cannot be read"):
        read_answer("a", body)


def test_addresses():
    assert endpoint("a", "http://host:8000") == Endpoint("http://host:8000/v1", "a")
    assert endpoint("a", "https://host/api/v2/#org/m") == Endpoint("https://host/api/v2", "org/m")
    for wrong in (
        "host:8000",
        "ftp://host",
        "http://",
        "http://host:x",
        "http://ho st",
        "http://host:99999",
        "http://h?k=1",
        "",
    ):
        with pytest.raises(ConfigError, match="is not a server's address"):
            endpoint("a", wrong)
    with pytest.raises(ConfigError, match="user name or a password") as caught:
        endpoint("a", "http://me:secret@host")
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="'NOT_SET_AT_ALL'"):
        endpoint("a", "http://host", key_env="NOT_SET_AT_ALL")


# --- time, attempts, budget ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["429 Too Many Requests", "500 Oops", "503 Busy"])
def test_a_busy_server_is_asked_again(status):
    with serve(lambda _, number, __: http(b"{}", status) if number < 2 else http(completion("red"))) as served:
        assert ask(served.url).text == "red"
    assert len(served) == 3


def test_a_connection_that_breaks_is_tried_again():
    def answer(request, number, connection):
        return (
            b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{"
            if number == 0
            else b""
            if number == 1
            else http(completion("red"))
        )

    with serve(answer) as served:
        assert ask(served.url).text == "red"
    assert len(served) == 3


def test_the_wait_that_a_server_names_is_kept():
    named = ["retry-after: 0.4"]
    with serve(lambda _, number, __: http(b"{}", "429 Slow down", *named) if number < 1 else http(completion("red"))) as served:
        started = time.monotonic()
        assert ask(served.url).text == "red"
        assert time.monotonic() - started >= 0.4
    named[0] = "retry-after: 3600"
    with serve(lambda *_: http(b'{"error": {"message": "quota"}}', "429 Slow down", *named)) as served:
        error = ask(served.url).error
    assert "quota" in error
    assert "3600 s" in error
    assert len(served) == 1
    assert retry_after("nonsense") is None
    assert retry_after("-5") == 0
    assert retry_after("inf") is None
    assert retry_after("") is None
    assert 25 < retry_after(formatdate(time.time() + 30, usegmt=True)) <= 31


def test_waits_double_and_the_seed_decides_the_jitter(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("collm.engines.http.time.sleep", waits.append)
    with serve(lambda *_: http(b"{}", "503 Busy")) as served:
        for _ in range(2):
            assert "5 attempts" in ask(served.url, backoff=1.0).error
    assert waits[:4] == waits[4:]
    assert all(2**k / 2 <= wait <= 2**k for k, wait in enumerate(waits[:4]))


def test_what_will_not_change_is_not_asked_twice():
    with serve(lambda *_: http(b'{"error": {"message": "there is no\\nmodel a"}}', "404 Not Found")) as served:
        error = ask(served.url).error
    assert error == f"{served.url} answered 404: there is no model a"
    assert len(served) == 1


def test_a_redirect_is_not_followed():
    """The key would go with it."""
    with serve(lambda *_: http(b"", "307 Elsewhere", "location: http://127.0.0.1:9/")) as served:
        assert "answered 307" in ask(served.url).error
    assert len(served) == 1


def test_a_silent_and_a_dripping_server_are_cut_off():
    def drip(request, number, connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n")
        try:
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            pass

    for behaviour in (lambda *_: time.sleep(3), drip):
        with serve(behaviour) as served:
            started = time.monotonic()
            assert "gave no answer within 0.3 s" in ask(served.url, read=0.3).error
            assert time.monotonic() - started < 2
        assert len(served) == 1


def test_a_flood_is_cut_off():
    """40 MiB for four tokens are not read to their end; what an honest answer may need is."""
    with serve(lambda *_: http(b" " * (40 << 20))) as served:
        assert "no answer of rollout.max_tokens tokens needs" in ask(served.url).error
    with serve(lambda *_: http(b" " * (1 << 20) + completion("red"))) as served:
        assert ask(served.url).text == "red"


def test_what_a_server_writes_cannot_steer_a_terminal():
    hostile = json.dumps({"error": {"message": "\x1b]0;title\x07\x1b[2J\u202egood\x9b31m"}}).encode()
    with serve(lambda *_: http(hostile, "400 Bad Request")) as served:
        error = ask(served.url).error
    assert "?]0;title??[2J?good?31m" in error
    assert error.isprintable()


def test_the_budget_counts_every_request():
    with serve(lambda *_: http(completion("red"))) as served:
        engine = engine_for(served.url, max_requests=3)
        answers = engine.generate([HELLO] * 5)
        late = engine.generate([HELLO])
    assert sorted(a.finish_reason for a in answers) == ["error", "error", "stop", "stop", "stop"]
    assert late[0].error == "the budget of 3 requests is spent"
    assert len(served) == 3


def test_requests_are_under_way_together():
    """Six requests to one server that answers none before all have come."""
    all_here = threading.Barrier(6, timeout=10)

    def answer(request, number, connection):
        all_here.wait()
        return http(completion(str(request["seed"])))

    with serve(answer) as served:
        requests = [Request("a", HELLO.messages, seed=i) for i in range(6)]
        assert [a.text for a in engine_for(served.url).generate(requests)] == list("012345")  # in order
    assert engine_for("http://h").generate([]) == []


# --- episodes ------------------------------------------------------------------------------------------------------------


def test_a_dead_server_fails_its_own_requests_alone():
    dead = f"http://127.0.0.1:{free_port()}/v1"
    with serve(lambda *_: http(completion("red"))) as served:
        engine = engine_for(served.url, dead, retries=1)
        a, b, c, a2 = engine.generate([HELLO, *(Request(n, HELLO.messages) for n in "bc"), HELLO])
    assert (a.text, a2.text, a.error) == ("red", "red", "")
    assert b.error.startswith(f"{dead} cannot be reached: ConnectError")
    assert b.error.endswith("(2 attempts)")
    assert c.error == "no server is known for c; there is one for a, b"


def test_an_episode_fails_with_its_reason_and_the_others_finish():
    """The server refuses every answer in the world of seed 12, from the second turn on."""

    def answer(request, number, connection):
        return http(b'{"error": "no more"}', "400 Bad") if request["seed"] in broken else http(completion("red"))

    plan = Plan(EnvSpec("agree", {"turns": 2}))
    broken: set[int] = set()
    seen: dict[int, list[int]] = {}
    for seed in (11, 12, 13):  # which random numbers does each episode ask for?

        def note(request, seed=seed):
            seen.setdefault(seed, []).append(request.seed)
            return "red"

        collect(plan, ScriptedEngine(note), [0], [seed])
    broken.add(seen[12][2])
    with serve(answer) as served:
        engine = HttpEngine({agent: endpoint(agent, served.url) for agent in ("agent_0", "agent_1")})
        groups = collect(plan, engine, [0, 0, 0], [11, 12, 13])
    good, bad, fine = (group.episodes[0] for group in groups)
    assert [e.score for e in (good, fine)] == [1.0, 1.0]
    assert good.terminated
    assert len(good.turns) == 2
    assert bad.failure == f"agent_0, turn 1: {served.url} answered 400: no more"
    assert len(bad.turns) == 1


USAGES = [
    ({"prompt_tokens": 9, "completion_tokens": 2}, (9, 2)), ({"prompt_tokens": 9}, (9, None)), (None, (None, None)),
    ([9, 2], (None, None)), ({"prompt_tokens": True, "completion_tokens": 10**400}, (None, None)),
    ({"prompt_tokens": -1, "completion_tokens": 0}, (None, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("usage", "expected"), USAGES)
def test_tokens_are_those_that_the_server_reports(usage, expected):
    assert read_usage(completion("red") if usage is None else with_usage(usage)) == expected


def with_usage(usage) -> bytes:
    return json.dumps({**json.loads(completion("red")), "usage": usage}).encode()


def test_the_cost_of_an_agents_answers_is_requests_tokens_and_seconds():
    """By hand: one answer after one refusal (2 requests), one failed answer (3 requests), each for the agent alone."""
    answers = [http(b"{}", "503 Busy"), http(with_usage({"prompt_tokens": 9, "completion_tokens": 2}))]
    with serve(lambda _, number, *__: answers[number]) as good, serve(lambda *_: http(b"{}", "500 Bug")) as bad:
        engine = engine_for(good.url, bad.url, retries=2)
        began = time.monotonic()
        engine.generate([HELLO, replace(HELLO, agent="b")])
        spent = time.monotonic() - began
    assert engine.sent == 5
    a, b = engine.costs["a"], engine.costs["b"]
    assert (a.requests, a.prompt_tokens, a.sampled_tokens) == (2, 9, 2)
    assert (b.requests, b.prompt_tokens, b.sampled_tokens) == (3, None, None)  # the server may have sampled
    assert all(0 < cost.seconds <= spent for cost in (a, b))
    per_episode = cost_per_episode(engine.costs, seconds=8.0, num_episodes=4)
    assert per_episode["a"].items() >= {"requests": 0.5, "prompt_tokens": 2.25, "sampled_tokens": 0.5}.items()
    assert per_episode["team"] == {"requests": 1.25, "prompt_tokens": None, "sampled_tokens": None, "seconds": 2.0}
    a.add(Usage(1, None), 0.0)  # a server that does not report what it sampled
    assert (a.prompt_tokens, a.sampled_tokens) == (10, None)
    alone = cost_per_episode({"a": a}, 8.0, 4)["team"]
    assert (alone["prompt_tokens"], alone["sampled_tokens"]) == (2.5, None)


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        (http(b"{}", "400 Bad Request"), None),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", None),  # it breaks
        (http(b"<html>"), None),
        (http(b'{"usage": {"prompt_tokens": 9, "completion_tokens": 9}, "choices": []}'), 9),
    ],
)
def test_what_a_failed_answer_cost_is_unknown_unless_its_server_reports_it(answer, tokens):
    with serve(lambda *_: answer) as served:
        engine = engine_for(served.url, retries=0)
        (got,) = engine.generate([HELLO])
    assert got.error
    assert (engine.costs["a"].prompt_tokens, engine.costs["a"].sampled_tokens) == (tokens, tokens)


def test_what_no_server_received_costs_no_tokens():
    engine = engine_for(f"http://127.0.0.1:{free_port()}/v1", retries=2, max_requests=4)
    refused, over = engine.generate([HELLO])[0], engine.generate([HELLO])[0]
    assert "(3 attempts)" in refused.error
    assert "the budget of 4 requests is spent" in over.error
    assert (engine.sent, engine.costs["a"].prompt_tokens, engine.costs["a"].sampled_tokens) == (4, 0, 0)
    with serve(lambda *_: http(b"{}", "500 Bug")) as served:
        engine = engine_for(served.url, retries=2, max_requests=1)
        assert "the budget of 1 requests is spent" in engine.generate([HELLO])[0].error
    assert (engine.sent, engine.costs["a"].prompt_tokens) == (1, None)  # the first attempt was received


def test_the_agents_of_an_engine_are_those_of_its_costs_from_the_start():
    """`sent` is read while other threads send: what it iterates over does not grow."""
    engine = engine_for("http://127.0.0.1:1", "http://127.0.0.1:2")
    (got,) = engine.generate([replace(HELLO, agent="z")])
    assert "no server is known for z" in got.error
    assert list(engine.costs) == ["a", "b"]
    assert engine.sent == 0


def test_a_mixed_engine_asks_both_at_once():
    meet = threading.Barrier(2, timeout=10)

    def local(request):
        meet.wait()
        return f"{request.agent} here"

    with serve(lambda *_: (meet.wait(), http(completion("there")))[1]) as served:
        engine = MixedEngine(ScriptedEngine(local), {"a": engine_for(served.url)})
        answers = engine.generate([Request("b", HELLO.messages), HELLO])
    assert [(a.agent, a.text) for a in answers] == [("b", "b here"), ("a", "there")]
    assert engine.generate([]) == []
    assert not engine.trains


def test_a_mixed_engine_trains_where_its_local_engine_does():
    local = ScriptedEngine(lambda request: "red")
    assert not MixedEngine(local, {}).trains
    local.trains = True
    assert MixedEngine(local, {}).trains


def test_no_torch_is_loaded():
    code = "import sys, collm.engines.http, collm.engines.mixed, collm.rollout.collect\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_json_on_the_wire_survives_any_text():
    """Half a surrogate pair and control characters travel as escapes."""
    odd = "\ud800\x00\u2028 \U0001f600"
    with serve(lambda request, *_: http(completion(json.dumps(request["messages"][0]["content"])))) as served:
        (got,) = engine_for(served.url).generate([Request("a", (Message("user", odd),))])
    assert json.loads(got.text) == odd


# --- frozen team-mates ---------------------------------------------------------------------------------------------------


def mixed_recipe(tmp_path, url: str, **algorithm):
    return parse_config(
        {
            "run": {"name": "mixed", "folder": str(tmp_path), "iterations": 12, "threads": 1, "trackers": []},
            "env": {"name": "agree"},
            "team": {"models": {"agent_0": url}},
            "rollout": {"tasks": 32, "max_tokens": 4},
            "algorithm": algorithm,
            "learner": {"lr": 2e-3},
            "critic": {"lr": 1e-3, "body": "auto"},
            "evaluation": {"every": 12, "temperature": 1.0, "episodes": 1},
        }
    )


def score(trainer: Trainer) -> float:
    """The mean reward of fifty episodes, sampled."""
    groups = collect(trainer.plan, trainer.engine, [0] * 50, list(range(50)))
    return float(np.mean([group.episodes[0].score for group in groups]))


def test_a_learner_agrees_with_a_frozen_team_mate_on_a_server(tmp_path):
    """The server always says green; agent_1 learns to. The critic reads both; only agent_1 has weights and a checkpoint."""
    with serve(lambda *_: http(completion("green"))) as served:
        trainer = Trainer(mixed_recipe(tmp_path, served.url), quiet=True)
        untrained, folder, trained = score(trainer), trainer.run(), score(trainer)
        assert evaluate(trainer.config, trainer.collector).summary()["evaluation/failed"] == 0
        assert main(["evaluate", str(folder)]) == 0
    assert untrained < 0.6
    assert trained >= 0.9
    before, *_ = read_metrics(folder / "metrics.jsonl")
    assert before["evaluation/failed"] == 0
    [part] = critic_parts(trainer.learner)
    with serve(lambda *_: http(completion("green"))) as served:
        batch = Batch.of(Trainer(mixed_recipe(tmp_path / "again", served.url), quiet=True).collect(), ("agent_1",))
    reading = part.critic.read(batch.episodes[0], 0, part.view(batch))
    text = trainer.team.policies["agent_1"].tokenizer.decode(reading.ids)
    assert "agent_0" in text
    assert "agent_1" in text
    assert [path.name for path in (folder / "final").iterdir()] == ["agent_1"]
    assert trainer.team.agents == ("agent_1",)
    assert {r["model"] for r in served} == {"agent_0"}


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "magrpo"},
        {"name": "magrpo", "tree": True},
        {"name": "collm-dc"},
        {"name": "collm-cc", "baseline": "counterfactual", "resamples": 2},
    ],
)
def test_every_kind_of_algorithm_takes_a_frozen_team_mate(tmp_path, algorithm):
    """Two turns; the server is asked once per joint action, never for another answer to learn from."""
    with serve(lambda *_: http(completion("green"))) as served:
        config = mixed_recipe(tmp_path, served.url, **algorithm)
        run = config.run.model_copy(update={"iterations": 2})  # at the first a Q critic knows no difference yet
        still = config.evaluation.model_copy(update={"every": 0})
        rollout = config.rollout.model_copy(update={"tasks": 4})
        env = parse_config({"env": {"name": "agree", "turns": 2}}).env
        trainer = Trainer(
            config.model_copy(update={"run": run, "evaluation": still, "rollout": rollout, "env": env}), quiet=True
        )
        folder = trainer.run()
    assert len(served) == trainer.joint_actions > 0
    records = read_metrics(folder / "metrics.jsonl")[1:]
    assert any(record["agent_1/gradient_norm"] > 0 for record in records)
    assert not [name for record in records for name in record if name.startswith("agent_0/")]


def test_training_refuses_what_gives_no_log_probs(tmp_path, tiny):
    with pytest.raises(ConfigError, match="HttpEngine gives no token ids and log-probs"):
        Trainer(mixed_recipe(tmp_path, "tiny"), engine=engine_for("http://127.0.0.1:9"), quiet=True)
    config = mixed_recipe(tmp_path, "http://127.0.0.1:9")
    everyone = config.team.model_copy(update={"models": dict.fromkeys(("agent_0", "agent_1"), "http://127.0.0.1:9")})
    with pytest.raises(ConfigError, match=r"every agent of team\.models is a server"):
        Trainer(config.model_copy(update={"team": everyone}), quiet=True)


def test_a_dead_team_mate_stops_training_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("collm.engines.http.time.sleep", lambda seconds: None)
    dead = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TrainingError, match=r"every episode failed: agent_0, turn 0: .* cannot be reached"):
        Trainer(replace_evaluation(mixed_recipe(tmp_path, dead)), quiet=True).run()


def replace_evaluation(config):
    """Without held-out evaluation."""
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"every": 0})})
