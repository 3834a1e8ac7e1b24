"""`collm serve` and `collm play`: agents apart say what they say in process; whatever comes, servers stay up."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from served import Server, greedy, played, served, spoken

from collm.cli.main import main
from collm.engines.http import HttpEngine, endpoint
from collm.engines.local import LocalEngine
from collm.models.policy import Policy
from collm.models.team import Team
from collm.runs.directory import run_config
from collm.runs.weights import load_team
from collm.serving.batcher import Batcher
from collm.serving.server import make_app
from collm.serving.wire import Refused
from collm.settings.load import parse_config
from collm.training.trainer import Trainer
from collm.types import Message, Request, Sampling

AGENTS = ("builder_0", "builder_1", "builder_2")
WORDS = ["AN", "AT", "BE", "DO", "GO", "IN"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run of three builders, three turns, each with weights of its own."""
    config = parse_config(
        {
            "run": {"name": "run", "folder": str(tmp_path_factory.mktemp("runs")), "iterations": 2, "threads": 1,
                    "trackers": [], "checkpoint_every": 1},
            "env": {"name": "str_build", "wording": "terse", "world": "persistent", "turns": 3, "agents": 3,
                    "strings": ["HE", "WE"], "eval_strings": WORDS},
            "rollout": {"tasks": 2, "max_tokens": 20},
            "learner": {"lr": 1e-3},
            "critic": {"lr": 1e-3},
            "evaluation": {"every": 0},
        }
    )  # fmt: skip
    return Trainer(config, quiet=True).run()


@pytest.fixture(scope="module")
def team(run, tmp_path_factory) -> Iterator[dict[str, Server]]:
    with served(tmp_path_factory.mktemp("records"), run, *AGENTS) as servers:
        yield dict(zip(AGENTS, servers, strict=True))


@pytest.fixture(scope="module")
def one(team) -> Server:
    return team["builder_0"]


CLIENT = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))


def post(url: str, body: object, **options) -> httpx.Response:
    return CLIENT.post(f"{url}/chat/completions", json=body, timeout=30, **options)


HELLO = {"model": "builder_0", "messages": [{"role": "user", "content": "Name one colour."}], "max_tokens": 8}


# --- one server ----------------------------------------------------------------------------------------------------------


def test_health_and_models(one):
    health = CLIENT.get(one.url.replace("/v1", "/health"))
    assert (health.status_code, health.json()) == (200, {"status": "ok", "agent": "builder_0"})
    (model,) = CLIENT.get(f"{one.url}/models").json()["data"]
    assert (model["id"], model["object"]) == ("builder_0", "model")


@pytest.mark.parametrize("sampling", [Sampling(0, max_tokens=12), Sampling(0.9, 0.8, 20, 12), Sampling(1.0, max_tokens=12)])
def test_the_same_answers_and_log_probs_as_in_process(run, one, sampling):
    """Sampled, too: the seed alone decides."""
    config = run_config(run, {})
    local = LocalEngine(load_team(config, run / "final", agents=("builder_0",)))
    requests = [Request("builder_0", (Message("user", f"Name {n} colours."),), sampling, seed=n) for n in range(6)]
    remote = HttpEngine({"builder_0": endpoint("builder_0", one.url)})
    for here, there in zip(local.generate(requests), remote.generate(requests), strict=True):
        assert (there.text, there.finish_reason) == (here.text, here.finish_reason)
        assert there.token_ids.tolist() == here.token_ids.tolist()
        assert there.prompt_ids.tolist() == here.prompt_ids.tolist()
        np.testing.assert_allclose(there.logprobs, here.logprobs, atol=1e-4)


def test_an_answer_as_openai_writes_it(one):
    answer = post(one.url, {**HELLO, "temperature": 0, "logprobs": True, "user": "me", "n": 1, "stop": None}).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and answer["model"] == "builder_0"  # noqa: PT018
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    assert [token["logprob"] for token in choice["logprobs"]["content"]] == choice["token_logprobs"]
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"]) <= 8
    assert answer["usage"]["prompt_tokens"] == len(answer["prompt_token_ids"])
    parts = [{"role": "user", "content": [{"type": "text", "text": "Name one "}, {"type": "text", "text": "colour."}]}]
    again = post(one.url, {**HELLO, "messages": parts, "temperature": 0}).json()
    assert again["choices"][0]["message"] == choice["message"]
    assert again["choices"][0]["logprobs"] is None


REFUSED = [
    (400, "messages", {}), (400, "messages", {"messages": []}), (400, "messages[0]", {"messages": ["hello"]}),
    (400, "messages[0]", {"messages": [{"role": "tool", "content": "x"}]}),
    (400, "messages[0]", {"messages": [{"role": "user", "content": 5}]}),
    (400, "messages[0]", {"messages": [{"role": "user"}]}),
    (400, "messages[0]", {"messages": [{"role": "user", "content": "x", "colour": 1}]}),
    (400, "messages[0].token_ids", {"messages": [{"role": "assistant", "content": "x", "token_ids": [10**6]}]}),
    (400, "messages[0].token_ids", {"messages": [{"role": "assistant", "content": "x", "token_ids": [-1]}]}),
    (400, "messages[0].token_ids", {"messages": [{"role": "user", "content": "x", "token_ids": [1]}]}),
    (400, "messages", {"messages": [{"role": "user", "content": "x"}] * 1025}),
    (400, "messages", {"messages": [{"role": "user", "content": "word " * 5000}]}),
    (400, "messages", {"messages": [{"role": "user", "content": "w" * 3_000_000}]}),
    (400, "messages", {"max_tokens": 1 << 20}), (400, "max_tokens", {"max_tokens": 0}),
    (400, "max_tokens", {"max_tokens": 1.5}), (400, "max_tokens", {"max_tokens": 10**30}),
    (400, "temperature", {"temperature": -1}), (400, "temperature", {"temperature": "1"}),
    (400, "temperature", {"temperature": True}), (400, "temperature", {"temperature": 1e-9}), (400, "top_p", {"top_p": 0}),
    (400, "top_p", {"top_p": 2}), (400, "top_k", {"top_k": -1}), (400, "seed", {"seed": "x"}), (400, "seed", {"seed": 2**63}),
    (400, "n", {"n": 2}), (400, "stop", {"stop": [""]}), (400, "tools", {"tools": [{}]}), (400, "stream", {"stream": 1}),
    (400, "presence_penalty", {"presence_penalty": 0.5}), (400, "colour", {"colour": "red"}),
    (400, "logprobs", {"logprobs": 3}),
    (404, "model", {"model": "builder_1"}), (404, "model", {"model": ["\ud800"]}),
]  # fmt: skip


@pytest.mark.parametrize(("status", "param", "change"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_answered_is_refused_by_name(one, status, param, change):
    body = {**HELLO, **change} if change else {}
    response = CLIENT.post(
        f"{one.url}/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert response.status_code == status
    error = response.json()["error"]
    assert error["param"] == param
    assert ";" in error["message"]  # the reason; the way out
    assert len(response.content) < 600


def test_an_application_below_a_prefix_answers_and_counts(tiny):
    """Ray Serve gives each agent such a prefix."""
    with TestClient(make_app(tiny, "a"), root_path="/team/a") as client:
        hello = {"messages": HELLO["messages"], "max_tokens": 2}
        assert client.post("/team/a/v1/chat/completions", json=hello).status_code == 200
        assert 'collm_requests_total{agent="a",status="200"} 1.0' in client.get("/team/a/metrics").text


def test_places_that_do_not_exist(one):
    base = one.url.removesuffix("/v1")
    for path in ("/", "/docs", "/openapi.json", "/v1/completions", "/../etc/passwd"):
        response = CLIENT.get(base + path)
        assert (response.status_code, list(response.json())) == (404, ["error"])
    assert CLIENT.get(f"{one.url}/chat/completions").status_code == 405
    form = CLIENT.post(f"{one.url}/chat/completions", content=json.dumps(HELLO), headers={"content-type": "text/plain"})
    assert form.status_code == 415  # what a stranger's web page could send


def test_requests_that_come_together_are_one_batch(tiny):
    """Sixteen at once are one call to the engine; each gets its own answer, and one that cannot be answered harms none."""

    class Counting(LocalEngine):
        calls: ClassVar[list[int]] = []

        def generate(self, requests, observers=()):
            self.calls.append(len(requests))
            return super().generate(requests, observers)

    engine = Counting(Team({"a": tiny}))
    requests = [Request("a", (Message("user", f"Name {n} colours."),), Sampling(max_tokens=8), seed=n) for n in range(16)]
    alone = [engine.generate([request])[0].text for request in requests]
    engine.calls.clear()
    impossible = Request("a", (Message("user", "word " * 6000),), Sampling(max_tokens=8))

    async def together() -> list:
        batcher = Batcher(engine, tiny)
        batcher.start()
        try:
            asked = [*requests[:8], impossible, *requests[8:]]
            return await asyncio.gather(*map(batcher.answer, asked), return_exceptions=True)
        finally:
            await batcher.stop()

    answers = asyncio.run(together())
    refused = answers.pop(8)
    assert isinstance(refused, Refused)
    assert refused.code == "context_length_exceeded"
    assert [answer.text for answer in answers] == alone
    assert engine.calls == [16]


@pytest.mark.parametrize("thinking", ["private", "shown"])
def test_thoughts_are_served_only_if_shown(monkeypatch, thinking):
    policy = Policy.from_pretrained("tiny", thinking=thinking)
    said = "<think>\nblue?\n</think>\n\nred"
    ids = np.array([*policy.chat.text_ids(said), policy.stop_ids[0]], dtype=np.int32)
    logprobs = np.zeros(len(ids), dtype=np.float32)
    monkeypatch.setattr("collm.engines.local.decode", lambda segments: [(ids, logprobs) for s in segments for _ in s.prompts])
    with TestClient(make_app(policy, "a")) as client:
        answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Name a colour"}]}).json()
    assert answer["choices"][0]["message"]["content"] == ("red" if thinking == "private" else said)
    assert answer["choices"][0]["token_ids"] == ids.tolist()


def test_an_engine_that_fails_is_an_error_of_its_batch_alone(tiny, capsys):
    class Failing(LocalEngine):
        def generate(self, requests, observers=()):
            if requests[0].seed == 1:
                raise RuntimeError("out of memory at /secret/place")
            return super().generate(requests, observers)

    async def one_by_one() -> list:
        batcher = Batcher(Failing(Team({"a": tiny})), tiny)
        batcher.start()
        requests = [Request("a", (Message("user", "Hello"),), Sampling(max_tokens=2), seed=n) for n in range(3)]
        answers = [(await asyncio.gather(batcher.answer(request), return_exceptions=True))[0] for request in requests]
        await batcher.stop()
        return answers

    first, second, third = asyncio.run(one_by_one())
    assert first.token_ids is not None
    assert third.token_ids is not None
    assert second.status == 500
    assert "secret" not in second.body().decode()
    assert "out of memory" in capsys.readouterr().err  # whoever runs the server learns why


# --- its life ------------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for(run, tmp_path):
    with served(tmp_path, run, "builder_1", words=("--api-key-env", "KEY_OF_ALL"), env={"KEY_OF_ALL": "s3cret"}) as (server,):
        hello = {**HELLO, "model": "builder_1"}
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}, {"authorization": b"Bearer \xff"}):
            response = post(server.url, hello, headers=header)
            assert response.status_code == 401
            assert "s3cret" not in response.text
            assert CLIENT.get(f"{server.url}/models", headers=header).status_code == 401
        assert post(server.url, hello, headers={"authorization": "Bearer s3cret"}).status_code == 200
        assert CLIENT.get(server.url.replace("/v1", "/health")).status_code == 200


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_graceful_stop_finishes_what_is_under_way(run, tmp_path, signum):
    with served(tmp_path, run, "builder_0") as (server,):
        got: list[httpx.Response] = []
        long = {**HELLO, "max_tokens": 400, "temperature": 5.0, "seed": 3}
        thread = threading.Thread(target=lambda: got.append(post(server.url, long)))
        thread.start()
        time.sleep(0.1)
        server.process.send_signal(signum)
        assert not got
        thread.join()
        assert got[0].status_code == 200
        assert got[0].json()["choices"][0]["token_ids"]
        out, _ = server.process.communicate(timeout=30)
        assert server.process.returncode == 0, server.errors.read_text()
        assert out == "builder_0 has stopped.\n"
        assert server.errors.read_text() == ""


def fails(capsys, *words: str) -> str:
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_a_busy_port_a_missing_agent_and_other_refusals(capsys, run, one, tmp_path):
    port = one.url.split(":")[2].split("/")[0]
    serve = ("serve", str(run), "--agent", "builder_0", "--port")
    assert f"--port {port} on 127.0.0.1 cannot be had: Address already in use" in fails(capsys, *serve, port)
    assert "--port 70000 is not a port" in fails(capsys, *serve, "70000")
    assert "is not an address" in fails(capsys, *serve, "0", "--host", "no such host")
    assert "'NOT_SET_AT_ALL'" in fails(capsys, *serve, "0", "--api-key-env", "NOT_SET_AT_ALL")
    error = fails(capsys, "serve", str(run), "--agent", "helper", "--port", "0")
    assert "no agent 'helper' in this run; its agents are builder_0, builder_1, builder_2" in error
    assert "neither a run directory nor an exported folder" in fails(
        capsys, "serve", str(tmp_path / "nothing"), "--agent", "a", "--port", "0"
    )
    assert "no checkpoint after 77" in fails(capsys, *serve, "0", "--checkpoint", "77")


def test_a_port_is_held_before_the_model_is_loaded(capsys, run):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        started = time.monotonic()
        fails(capsys, "serve", str(run), "--agent", "builder_0", "--port", str(held.getsockname()[1]))
        assert time.monotonic() - started < 5


# --- a team apart --------------------------------------------------------------------------------------------------------


def where(servers: dict[str, Server]) -> list[str]:
    return [word for agent, server in servers.items() for word in ("--agent", f"{agent}={server.url}")]


def test_three_servers_play_the_same_greedy_episodes_as_in_process(run, team):
    """Token for token; no torch in the player; the three work at the same time in every turn."""
    before = {agent: len(server.records()) for agent, server in team.items()}
    code, out, err = played(str(run), *where(team), "--json", "--show")
    assert code == 0, err
    record = json.loads(out)
    here = greedy(run)
    assert len(here) == len(WORDS)
    assert {len(episode.turns) for episode in here} == {3}
    there = [
        [{a: (s["text"], s["prompt_ids"], s["token_ids"]) for a, s in turn["agents"].items()} for turn in episode["turns"]]
        for episode in record["played"]
    ]
    assert there == [spoken(episode) for episode in here]
    assert record["failures"] == {}
    assert record["requests"] == len(WORDS) * 3 * 3
    for agent, cost in record["cost_per_episode"].items():
        answers = [c for e in here for turn in e.turns for name, c in turn.completions.items() if agent in (name, "team")]
        assert cost["requests"] == len(answers) / len(WORDS)
        for kind, ids in (("prompt_tokens", "prompt_ids"), ("sampled_tokens", "token_ids")):
            assert cost[kind] == pytest.approx(sum(len(getattr(c, ids)) for c in answers) / len(WORDS), abs=1e-3)
        assert cost["seconds"] > 0
    assert record["cost_per_episode"].keys() == {*AGENTS, "team"}
    scores = [episode.score for episode in here]
    assert record["reward"]["mean"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert len({str(words) for episode in here for words in spoken(episode)}) > 3  # they do not all say the same

    lines = {agent: server.records()[before[agent] :] for agent, server in team.items()}
    for turn in range(3):
        mine = {agent: [r for r in records if r["messages"] == 2 * turn + 1] for agent, records in lines.items()}
        assert [len(records) for records in mine.values()] == [len(WORDS)] * 3
        begun = max(min(r["began"] for r in records) for records in mine.values())
        ended = min(max(r["ended"] for r in records) for records in mine.values())
        assert begun < ended, f"turn {turn}: one server was done before another began"


def test_one_server_killed_in_the_middle(run, team, tmp_path):
    """Tasks 0 and 1 are over by then; 2 and 3 fail with the reason; play says so and exits with 1."""
    with served(tmp_path, run, "builder_2") as (doomed,):
        servers = {**team, "builder_2": doomed}
        words = ["worlds:Uneven", "--env.doomed", str(doomed.process.pid), *where(servers), "--rollout.max_tokens", "4"]
        code, out, err = played(*words, "--retries", "1", "--json", "--show")
        assert code == 1, err
        record = json.loads(out)
        assert doomed.process.wait() == -signal.SIGKILL
    assert list(record["failures"]) == ["2", "3"]
    for reason in record["failures"].values():
        assert reason.startswith(f"builder_2, turn 2: {doomed.url} cannot be reached: ConnectError")
    assert (record["episodes"], record["failed"]) == (2, 2)
    assert [len(episode["turns"]) for episode in record["played"]] == [1, 2, 2, 2]
    code, out, _ = played("worlds:Uneven", *where(servers), "--rollout.max_tokens", "4", "--retries", "0")
    assert code == 1
    assert "No episode was played to its end." in out
    assert out.count("failed: ") == 4


def test_play_prints_a_table_and_the_episodes(run, team):
    code, out, err = played(str(run), *where(team), "--episodes", "2", "--show", "--split", "train")
    assert code == 0, err
    assert "str_build, 3 agents on separate endpoints: 2 tasks of train, greedy" in " ".join(out.split())
    assert "turn 2, builder_2 wrote:" in out
    (line,) = (line.split() for line in out.splitlines() if line.split()[:1] == ["team"])
    assert line[1] == "9.0"  # requests: three agents, three turns
    assert "reward" in out


def test_play_refuses_clearly(capsys, run):
    url = "http://127.0.0.1:9/v1"
    all_three = [word for agent in AGENTS for word in ("--agent", f"{agent}={url}")]
    assert "no endpoint is given for builder_1, builder_2: add --agent builder_1=URL" in fails(
        capsys, "play", str(run), "--agent", f"builder_0={url}"
    )
    assert "the task's agents are builder_0" in fails(capsys, "play", str(run), "--agent", f"helper={url}")
    assert "is given twice" in fails(capsys, "play", str(run), *all_three, *all_three[:2])
    assert "is not NAME=URL" in fails(capsys, "play", str(run), "--agent", url)
    assert "is not a server's address" in fails(capsys, "play", str(run), "--agent", "builder_0=nowhere")
    assert "--episodes 0 is too few" in fails(capsys, "play", str(run), *all_three, "--episodes", "0")
    assert "--timeout 0.0 is not a time" in fails(capsys, "play", str(run), *all_three, "--timeout", "0")
    assert "'learner.lr' does not apply to" in fails(capsys, "play", str(run), *all_three, "--learner.lr", "1")
    assert "unknown task 'agreee'" in fails(capsys, "play", "agreee", *all_three)
    assert "takes the task as an argument" in fails(capsys, "play", "agree", *all_three, "--env.name", "str_build")


# --- export --------------------------------------------------------------------------------------------------------------

PLAIN = """
import json, sys
class Block:
    def find_spec(self, name, *rest):
        if name.split('.')[0] == 'collm':
            raise ImportError('there is no collm here')
sys.meta_path.insert(0, Block())
try:
    import collm
except ImportError:
    pass
else:
    sys.exit('collm is there after all')
import torch
from pathlib import Path
from typing import ClassVar
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, chats = Path(sys.argv[1]), json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
if (folder / 'adapter_config.json').exists():
    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder)
texts = []
for chat in chats:
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt', return_dict=True)
    out = model.generate(**ids, do_sample=False, max_new_tokens=20)
    texts.append(tokenizer.decode(out[0, ids['input_ids'].shape[1]:], skip_special_tokens=True))
print(json.dumps(texts))
"""


@pytest.mark.parametrize("checkpoint", ["final", pytest.param("1", marks=pytest.mark.slow)])
def test_an_exported_agent_says_the_same_without_collm(capsys, run, tmp_path, checkpoint):
    folder = tmp_path / "out" / "builder_1"
    words = ("export", str(run), str(folder), "--agent", "builder_1", "--checkpoint", checkpoint)
    assert main(list(words)) == 0
    capsys.readouterr()
    assert [path.name for path in folder.parent.iterdir()] == ["builder_1"]  # nothing left beside it
    weights = run / "final" if checkpoint == "final" else run / "checkpoints" / "000001"
    texts = [episode.turns[0].observations["builder_1"] for episode in greedy(run)] + ["Name one colour."]
    local = LocalEngine(load_team(run_config(run, {}), weights))
    asked = [Request("builder_1", (Message("user", text),), Sampling(0, max_tokens=20)) for text in texts]
    expected = [answer.text for answer in local.generate(asked)]
    chats = json.dumps([[{"role": "user", "content": text}] for text in texts])
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), chats], capture_output=True, text=True, timeout=120, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected

    assert "exists already" in fails(capsys, *words)  # and is left as it is
    assert (folder / "config.json").is_file()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """A short run of two agents that are adapters on one base."""
    values = {
        "run": {"name": "lora", "folder": str(tmp_path_factory.mktemp("runs")), "iterations": 4, "threads": 1},
        "env": {"name": "agree", "wording": "terse"},
        "team": {"lora": {"rank": 4}},
        "rollout": {"tasks": 16, "max_tokens": 8},
        "learner": {"lr": 2e-2},
        "evaluation": {"every": 0},
    }
    return Trainer(parse_config(values), quiet=True).run()


@pytest.mark.parametrize(
    "words",
    [(), pytest.param(("--merged",), marks=pytest.mark.slow), pytest.param(("--checkpoint", "4"), marks=pytest.mark.slow)],
)
def test_an_exported_adapter_says_the_same_without_collm(adapters, tmp_path, words):
    folder = tmp_path / "agent_1"
    assert main(["export", str(adapters), str(folder), "--agent", "agent_1", *words]) == 0
    merged = "--merged" in words
    assert (folder / "adapter_config.json").exists() is not merged
    assert (folder / "config.json").exists() is merged
    config = run_config(adapters, {})
    texts = [f"You are agent_1 of 2. Name {colour}." for colour in ("red", "one colour", "the same colour as I do", "a word")]
    asked = [Request("agent_1", (Message("user", text),), Sampling(0, max_tokens=20)) for text in texts]
    local = LocalEngine(load_team(config, adapters / "final"))
    expected = [answer.text for answer in local.generate(asked)]
    untrained = [answer.text for answer in LocalEngine(load_team(config, None)).generate(asked)]
    assert expected != untrained
    chats = json.dumps([[{"role": "user", "content": text}] for text in texts])
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), chats], capture_output=True, text=True, timeout=120, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


@pytest.mark.slow
def test_an_exported_adapter_can_be_served(adapters, tmp_path):
    assert main(["export", str(adapters), str(tmp_path / "a"), "--agent", "agent_0"]) == 0
    with served(tmp_path, tmp_path / "a", "agent_0") as (exported,), served(tmp_path, adapters, "agent_0") as (of_run,):
        bodies = [post(server.url, {**HELLO, "model": "agent_0", "seed": 5}).json() for server in (exported, of_run)]
    assert bodies[0]["choices"] == bodies[1]["choices"]


def test_a_checkpoint_is_not_the_final_weights(run):
    """Else the test above would pass with either."""
    config = run_config(run, {})
    first, final = (load_team(config, run / name, agents=("builder_1",)) for name in ("checkpoints/000001", "final"))
    pairs = zip(first.policies["builder_1"].model.parameters(), final.policies["builder_1"].model.parameters(), strict=True)
    assert any(not a.equal(b) for a, b in pairs)
    assert first.agents == ("builder_1",)


def test_an_exported_folder_can_be_served(capsys, run, one, tmp_path):
    assert main(["export", str(run), str(tmp_path / "a"), "--agent", "builder_0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "final weights"
    with served(tmp_path, tmp_path / "a", "builder_0") as (server,):
        bodies = [post(url, {**HELLO, "seed": 5}).json() for url in (server.url, one.url)]
        assert bodies[0]["choices"] == bodies[1]["choices"]


def test_export_refuses_clearly(capsys, run, tmp_path):
    assert "no agent 'helper'" in fails(capsys, "export", str(run), str(tmp_path / "x"), "--agent", "helper")
    assert "neither a run directory nor an exported folder" in fails(
        capsys, "export", str(tmp_path / "no"), str(tmp_path / "x"), "--agent", "builder_0"
    )
    assert "no checkpoint after 9" in fails(
        capsys, "export", str(run), str(tmp_path / "x"), "--agent", "builder_0", "--checkpoint", "9"
    )
    (tmp_path / "file").touch()
    assert main(["export", str(run), str(tmp_path / "file" / "x"), "--agent", "builder_0"]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# --- a thousand hostile requests -----------------------------------------------------------------------------------------


def hostile(rng: random.Random, number: int) -> tuple[bytes, str]:
    """The bytes of one hostile request, and how its sender leaves: "reads", "half" (closes its sending side, then reads),
    "gone" (closes at once) or "reset"."""
    key = b"authorization: Bearer s3cret\r\n"
    user = {"role": "user", "content": "Name one colour."}
    good = {"model": "builder_0", "messages": [user], "max_tokens": 4}

    def whole(body: bytes, *, length: int | None = None, head: bytes = key, kind: bytes = b"application/json") -> bytes:
        size = len(body) if length is None else length
        lines = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: " + kind + b"\r\n"
        return lines + head + b"content-length: %d\r\n\r\n" % size + body

    def changed(**fields: object) -> bytes:
        return whole(json.dumps({**good, **fields}).encode())

    text = json.dumps(good).encode()
    junk = rng.randbytes(rng.randrange(1, 2000))
    long = "".join(rng.choice("abc \n<|>") for _ in range(50)) * rng.randrange(1, 4000) + str(number)
    field = "x" * rng.randrange(1, 5000) + str(number)
    requests: list[tuple[bytes, str]] = [
        (whole(junk), "reads"),
        (whole(text[: rng.randrange(len(text))]), "reads"),
        (whole(b"[" * 200_000), "reads"),
        (whole(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "reads"),
        (whole(b'{"max_tokens": ' + b"9" * 100_000 + b"}"), "reads"),
        (whole(b'{"temperature": NaN, "seed": -Infinity}'), "reads"),
        (whole(b" " * 6_000_000), "reads"),
        (whole(b" ", length=10**12), "half"),
        (changed(**{field: 1}), "reads"),
        (changed(messages=[{**user, field: 1}]), "reads"),
        (changed(messages=[{**user, "content": long}]), "reads"),
        (changed(messages=[{"role": "assistant", "content": "", "token_ids": [rng.randrange(-5, 2000)] * 50}, user]), "reads"),
        (changed(messages=[{"role": rng.choice(["system", "assistant"]), "content": "\ud800\x00"}] * 40), "reads"),
        (changed(messages=[user] * rng.randrange(1, 3000)), "reads"),
        (changed(max_tokens=rng.choice([-1, 0, 10**9, 1e99, "4", None, [], True])), "reads"),
        (changed(seed=rng.choice([None, -1, {}, 2**70, "x"])), "reads"),
        (changed(model=rng.choice(["", "x" * 9999, None, {}, ["builder_0"]])), "reads"),
        (whole(text, head=b""), "reads"),
        (whole(text, head=b"authorization: Bearer " + junk.hex().encode()[:500] + b"\r\n"), "reads"),
        (whole(text, head=b"authorization: Bearer s3cre\xf6\r\n"), "reads"),
        (whole(text, kind=b"text/plain"), "reads"),
        (whole(text)[: rng.randrange(1, 200)], "half"),
        (whole(text, length=len(text) + 50), "half"),
        (whole(text), "half"),
        (whole(text), "gone"),
        (whole(text, length=5000), "gone"),
        (whole(text), "reset"),
        (junk + b"\r\n\r\n", "reads"),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", "reads"),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + key + b"transfer-encoding: chunked\r\n\r\nzz\r\n", "half"),
        (b"GET /../../etc/passwd HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "reads"),
        (b"DELETE /v1/models HTTP/1.0\r\n\r\n", "reads"),
        (b"", "gone"),
    ]  # fmt: skip
    return requests[number % len(requests)]


def send(port: int, request: bytes, leaves: str) -> bytes:
    """What the server says to it; b"" where it was not listened to."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        got = bytearray()
        try:
            connection.sendall(request)
            if leaves == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if leaves in ("gone", "reset"):
                return b""
            if leaves == "half":
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it hung up in the middle of the request: it may have said why
        try:
            while piece := connection.recv(65536):
                got += piece
        except ConnectionError:
            pass
        return bytes(got)


def resident(process: subprocess.Popen[str]) -> float:
    """MiB of memory that a process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_hostile_requests(run, tmp_path, times):
    """Never a crash, never a traceback, memory flat; an honest client is answered all along."""
    rng = random.Random(0)
    with served(tmp_path, run, "builder_0", words=("--api-key-env", "KEY"), env={"KEY": "s3cret"}) as (server,):
        port = int(server.url.split(":")[2].split("/")[0])
        memory, statuses = [], collections.Counter()
        honest = None
        for number in range(times):
            said = send(port, *hostile(rng, number))
            assert b"Traceback" not in said
            assert b'File "' not in said
            assert b"s3cret" not in said
            statuses[said[9:12].decode() if said.startswith(b"HTTP/1.") else "none" if not said else "odd"] += 1
            if number % 50 == 49:
                answer = post(server.url, {**HELLO, "temperature": 0}, headers={"authorization": "Bearer s3cret"})
                assert answer.status_code == 200
                text = answer.json()["choices"][0]["message"]["content"]
                assert honest in (None, text)
                honest = text
                memory.append(resident(server.process))
        assert server.process.poll() is None
        if times == 1000:
            # In MiB. The allocator alone moves it by 25, up and down, over 4,000 requests.
            assert np.mean(memory[-5:]) - np.mean(memory[3:8]) < 40, memory
        assert "500" not in statuses
        assert "odd" not in statuses
        assert statuses["401"] >= 0.08 * times
        assert statuses["413"] >= 0.02 * times
        assert statuses["400"] >= 0.3 * times
        server.process.terminate()
        assert server.process.wait(30) == 0
        complaints = set(server.errors.read_text().splitlines())
        assert complaints <= {"WARNING:  Invalid HTTP request received."}, complaints
