"""Clients that others use run against `collm serve` as their docs say: openai, litellm, langchain and lm-eval.

They are the extra `clients`, which `make test-clients` installs; a test whose client is missing is skipped, naming it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import served

from collm.tiny import folder

pytestmark = pytest.mark.slow
USER = {"role": "user", "content": "Name one colour."}
DRAWN = {"temperature": 2.0, "seed": 5}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("records"), folder(), "tiny", words=("--max-tokens", "16")) as (server,):
        yield server.url


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)


def client(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed here; `make test-clients` has it")


def said(url: str, **fields: Any) -> str:
    body = {"model": "tiny", "messages": [USER], **DRAWN, **fields}
    return httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def text(url: str) -> str:
    text = said(url)
    assert len(text) > 8
    assert text.index(text[4:6]) == 4, "choose another seed"
    return text


def test_openai(url: str, text: str) -> None:
    openai = client("openai")
    own = openai.OpenAI(base_url=url, api_key="none")
    assert [model.id for model in own.models.list()] == ["tiny"]
    assert own.models.retrieve("tiny").owned_by == "collm"
    ask = own.chat.completions
    answer = ask.create(model="tiny", messages=[USER], **DRAWN, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert choice.message.content == text
    assert choice.logprobs.content[0].top_logprobs[0].logprob >= choice.logprobs.content[0].logprob - 1e-6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(choice.logprobs.content)

    cut = ask.create(model="tiny", messages=[USER], **DRAWN, stop=[text[4:6]]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[:4], "stop")
    developer = {"role": "developer", "content": "Be brief."}
    again = [developer, USER, choice.message, USER, choice.message.model_dump(), USER]  # its own records, null fields and all
    assert ask.create(model="tiny", messages=again, user="me", n=1).choices[0].message.content is not None

    *chunks, last = ask.create(model="tiny", messages=[USER], **DRAWN, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert len(chunks) > 4
    assert last.usage == answer.usage
    with ask.stream(model="tiny", messages=[USER], **DRAWN, stop=text[4:6]) as stream:
        assert stream.get_final_completion().choices[0].message.content == text[:4]

    with pytest.raises(openai.BadRequestError, match="n=2 asks for several answers"):
        ask.create(model="tiny", messages=[USER], n=2)
    with pytest.raises(openai.NotFoundError, match="this server's only model is 'tiny'"):
        ask.create(model="gpt-5", messages=[USER])


def test_litellm(url: str, text: str) -> None:
    litellm = client("litellm")
    options = {"model": "openai/tiny", "messages": [USER], "api_base": url, "api_key": "none", "num_retries": 0, **DRAWN}
    answer = litellm.completion(**options)
    assert answer.choices[0].message.content == text
    cut = litellm.completion(**options, stop=text[4:6]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[:4], "stop")
    chunks = list(litellm.completion(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    history = [USER, answer.choices[0].message, USER, answer.choices[0].message.model_dump(), USER]
    assert litellm.completion(**{**options, "messages": history}).choices[0].message.content is not None
    with pytest.raises(litellm.BadRequestError, match="n=2 asks for several answers"):
        litellm.completion(**options, n=2)


def test_langchain(url: str, text: str) -> None:
    chat = client("langchain_openai").ChatOpenAI(model="tiny", base_url=url, api_key="none", **DRAWN, max_retries=0)
    answer = chat.invoke(USER["content"])
    assert answer.content == text
    assert answer.usage_metadata["output_tokens"] == answer.response_metadata["token_usage"]["completion_tokens"]
    assert chat.invoke(USER["content"], stop=[text[4:6]]).content == text[:4]
    assert "".join(chunk.content for chunk in chat.stream(USER["content"], stream_usage=True)) == text
    history = [("system", "Be brief."), ("user", USER["content"]), answer, ("user", USER["content"])]
    assert isinstance(chat.invoke(history).content, str)
    measured = chat.bind(logprobs=True, top_logprobs=2).invoke(USER["content"])
    assert len(measured.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["{stop}"]
  max_gen_toks: 16
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def test_lm_eval(url: str, tmp_path: Path) -> None:
    """A generative task of four local documents; the last one's target is wrong."""
    client("lm_eval")
    questions = [f"You are agent_{n} of 2. Name one colour." for n in range(4)]
    greedy = [said(url, messages=[{"role": "user", "content": question}], temperature=0) for question in questions]
    stop = greedy[0][2]
    assert stop.isalpha(), greedy
    answers = [text.partition(stop)[0] for text in greedy[:3]] + ["never said"]
    rows = [{"question": question, "answer": answer} for question, answer in zip(questions, answers, strict=True)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(TASK.format(data=tmp_path / "test.jsonl", stop=stop))
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions",
        "--model_args", f"model=tiny,base_url={url}/chat/completions", "--apply_chat_template",
        "--tasks", "colours", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["colours"]["exact_match,none"] == 0.75
