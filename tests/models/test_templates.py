"""`team.system` and `team.thinking`: what they make of a chat template, and that thoughts stay with the agent who had them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from families import CHATML, FAMILIES, HEADERS, THINKING, tokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer

from collm.engines.local import LocalEngine
from collm.envs.agree import Agree
from collm.envs.catalogue import EnvSpec
from collm.errors import ConfigError
from collm.models.chat import Chat
from collm.models.policy import Policy
from collm.models.team import Team
from collm.rollout.collect import collect
from collm.rollout.plan import Plan
from collm.runs.log import episode_record
from collm.types import Message, Sampling, without_thoughts

ALL = pytest.mark.parametrize("family", list(FAMILIES))
TALK = [Message("user", "Name a colour"), Message("assistant", "red"), Message("user", "Again")]
# A default system message inside the loop (SmolLM2).
SMOL = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# The switch of Qwen3, whose default is to think.
SWITCHED = THINKING.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif -%}",
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking -%}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif -%}",
)
OPENED = CHATML.replace("{{ '<|im_start|>assistant\n' }}{% endif -%}", "{{ '<|im_start|>assistant\n<think>\n' }}{% endif -%}")
FIRST = "System: be brief.\n{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n###\n{% endfor %}"


def words_of(template: str, family: str = "qwen2.5") -> Any:
    made = copy.deepcopy(tokenizer(family))
    made.chat_template = template
    return made


def text_of(chat: Chat, messages: list[Message] = TALK, **options: Any) -> str:
    return str(chat.tokenizer.decode(chat.encode(messages, **options)))


def rendered(words: Any, messages: list[Message], **options: Any) -> str:
    plain = [{"role": m.role, "content": m.text} for m in messages]
    fixed = {"add_generation_prompt": True, "strftime_now": lambda form: "01 Jan 2025"}
    return str(words.apply_chat_template(plain, tokenize=False, **{**fixed, **options}))


# --- system messages -----------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("system", ["Be brief.", "Say \"yes\" or 'no' — {{ messages }} {% raw %}\n\\n 🙂"])
def test_a_system_message_stands_at_the_head_of_every_history(family: str, system: str) -> None:
    words = tokenizer(family)
    chat = Chat(words, system=system)
    for messages in (TALK[:1], TALK):
        assert text_of(chat, messages) == rendered(words, [Message("system", system), *messages])
    own = [Message("system", "Another."), *TALK]
    assert text_of(chat, own) == rendered(words, own)  # a caller's own system message is not doubled
    assert chat.grows == Chat(words).grows


@pytest.mark.parametrize("template", [CHATML, SMOL, "\n" + SMOL + "\n"], ids=["start", "loop", "line breaks"])
def test_none_leaves_out_a_default_system_message(template: str) -> None:
    words = words_of(template)
    chat, before = Chat(words, system="none"), Chat(words)
    for messages in (TALK[:1], TALK):
        full, text = text_of(before, messages), text_of(chat, messages)
        start = full.index("<|im_start|>user")
        assert "You " in full[:start]
        assert text == full[start:]
    own = [Message("system", "Another."), *TALK]
    assert text_of(chat, own) == text_of(before, own)


def test_none_keeps_the_begin_of_text_token_and_leaves_the_rest_out() -> None:
    words = words_of(HEADERS, "llama3")
    text = text_of(Chat(words, system="none"))
    assert text.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName a colour<|eot_id|>")
    assert "Today" not in text


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3"])
def test_none_changes_nothing_where_there_is_no_default(family: str) -> None:
    words = tokenizer(family)
    assert Chat(words, system="none").template == words.chat_template


def test_none_leaves_out_a_first_line_that_is_not_a_message() -> None:
    assert text_of(Chat(words_of(FIRST), system="none"), answer=False).startswith("USER: Name a colour\n###\nASSISTANT: red")


def test_what_cannot_be_left_out_is_refused() -> None:
    """The first question is opened otherwise than the following ones, so the default message has no visible end."""
    template = (
        "{% for m in messages %}{% if loop.first %}You help. Q: {% elif m.role == 'user' %}Next: {% else %}A: {% endif %}"
    )
    with pytest.raises(ConfigError, match=r"team\.system='none'.*'You help\. Q: '.*cannot be told from what opens"):
        Chat(words_of(template + "{{ m.content }}\n{% endfor %}"), system="none")


def test_a_template_without_system_messages_refuses_a_text() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML.replace("!=", "==")
    with pytest.raises(ConfigError, match=r"team\.system='Be brief\.'.*no place for system messages.*no system"):
        Chat(words_of(template), system="Be brief.")
    drops = "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    with pytest.raises(ConfigError, match="no place for system messages"):
        Chat(words_of(drops), system="Be brief.")


@pytest.mark.parametrize("system", [None, "Be brief.", "none"])
@pytest.mark.parametrize("thinking", [None, "off", "private"])
def test_a_saved_agent_keeps_its_prompts(tmp_path: Path, system: str | None, thinking: str | None) -> None:
    words = words_of(SWITCHED if thinking else SMOL, "qwen3")
    chat = Chat(words, system=system, thinking=thinking)
    chat.save(tmp_path)
    assert words.chat_template == (SWITCHED if thinking else SMOL)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for messages in (TALK[:1], TALK):
        assert rendered(again, messages) == text_of(chat, messages)
    assert text_of(Chat(again, system=system, thinking=thinking)) == text_of(chat)
    if not system and not thinking:
        assert again.chat_template == SMOL


# --- thoughts ------------------------------------------------------------------------------------------------------------


def test_the_switch_is_turned_where_the_template_offers_it() -> None:
    words = words_of(SWITCHED, "qwen3")
    for thinking, switch in ((None, {}), ("off", {"enable_thinking": False}), ("private", {"enable_thinking": True})):
        chat = Chat(words, thinking=thinking)
        for messages in (TALK[:1], TALK):
            assert text_of(chat, messages) == rendered(words, messages, **switch)
    assert text_of(Chat(words, thinking="off")).endswith("<think>\n\n</think>\n\n")
    assert not Chat(words, thinking="off").grows  # the template shows earlier answers without that block
    assert text_of(Chat(words, thinking="shown")) == text_of(Chat(words, thinking="private"))


@ALL
def test_off_changes_no_template_without_the_switch(family: str) -> None:
    words = tokenizer(family)
    assert Chat(words, thinking="off").template == words.chat_template


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("red", "red"),
        (" red\n", " red\n"),
        ("<think>\nred or blue\n</think>\n\nblue", "blue"),
        ("Well. <think>a</think>b<think>c</think>\nd", "d"),
        ("<think>\nred or", ""),
        ("<think>a</think>b<think>c", ""),
        ("a</think>b", "b"),
        ("", ""),
    ],
)
def test_the_answer_is_what_stands_after_the_last_thought(text: str, answer: str) -> None:
    assert without_thoughts(text) == answer


@pytest.mark.parametrize("special", [False, True])
def test_an_answer_is_read_without_thoughts_unless_they_are_shown(special: bool) -> None:
    """Marks that are special tokens, which decoding leaves out, do not let a thought through."""
    words = copy.deepcopy(tokenizer("qwen2.5"))
    words.add_tokens([AddedToken(mark, special=special) for mark in ("<think>", "</think>")], special_tokens=special)
    written = "<think>\nblue?\n</think>\n\nred"
    ids = [*words(written, add_special_tokens=False)["input_ids"], words.eos_token_id]
    for thinking in (None, "off", "private"):
        assert Chat(words, thinking=thinking).read(ids) == ("red", written)
    assert Chat(words, thinking="shown").read(ids) == (written, None)
    assert Chat(words, thinking="private").read(ids[:2]) == ("", words.decode(ids[:2]))


def test_a_thought_that_the_template_opens_is_one() -> None:
    chat = Chat(words_of(OPENED))
    assert chat.read(chat.text_ids("blue?</think>\n\nred")) == ("red", "<think>blue?</think>\n\nred")
    assert chat.read(chat.text_ids("blue? or")) == ("", "<think>blue? or")
    assert Chat(words_of(CHATML)).read(chat.text_ids("blue? or")) == ("blue? or", None)


class Recorder(Agree):
    """Keeps what it was given."""

    given: ClassVar[list[str]] = []

    def step(self, actions: Any) -> Any:
        self.given.extend(actions.values())
        return super().step(actions)


@pytest.mark.parametrize("protocol", ["parallel", "pipeline", "discussion"])
def test_thoughts_reach_neither_the_environment_nor_a_team_mate(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    policy = Policy.from_pretrained("tiny", thinking="private")
    said = "<think>\nsecret\n</think>\n\nred"
    thought = policy.chat.text_ids(said)
    prompts: list[str] = []

    def decode(segments: Any) -> list[Any]:
        (segment,) = segments
        prompts.extend(segment.policy.chat.tokenizer.decode(ids) for ids in segment.prompts)
        return [(np.asarray(thought, dtype=np.int32), np.zeros(len(thought), dtype=np.float32)) for _ in segment.prompts]

    monkeypatch.setattr("collm.engines.local.decode", decode)
    Recorder.given = []
    spec = EnvSpec(f"{__name__}:Recorder", {"turns": 2})
    engine = LocalEngine(Team({"agent_0": policy, "agent_1": policy}))
    (group,) = collect(Plan(spec, protocol=protocol, sampling=Sampling(max_tokens=40)), engine, [0], [0])
    (episode,) = group.episodes
    assert not episode.failure
    assert Recorder.given == ["red"] * 4
    assert not any("secret" in line for prompt in prompts for line in prompt.splitlines() if line.startswith("> "))
    assert episode.turns[0].completions["agent_0"].token_ids.tolist() == list(thought)  # they are trained on
    record = episode_record(episode)["turns"][0]["agents"]["agent_0"]
    assert (record["wrote"], record["thinking"]) == ("red", said)
    json.dumps(record)
