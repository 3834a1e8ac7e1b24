"""No text breaks a world: arbitrary answers to every registered world, spliced from what it says and what its players write.

`make test` plays 2,000 answers over all worlds, `make fuzz` 20,000 (COLLM_FUZZ). The same number gives the same answers; a
failure names the world, its options and the answers, cut short.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import pkgutil
import random
import re
import signal
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from collm import make, seeds
from collm.envs.base import Outcome, TextEnv
from collm.envs.catalogue import ENVIRONMENTS, find
from collm.errors import ConfigError, SandboxError
from collm.tiny import workshop

COUNT = int(os.environ.get("COLLM_FUZZ", "2000"))
SECONDS = 20
"""No step may take longer. A megabyte takes a linear parser a fraction of a second, and a quadratic one hours."""
WAITING_SECONDS = 600
GARBAGE = "zyzzogeton 77 !! ("
"""No colour, no command, no JSON, no Python."""


def share(name: str) -> int:
    """Answers for one world. A world that waits runs each of them in processes of their own, some of them until a time-out,
    so it gets a twentieth."""
    every = COUNT // len(ENVIRONMENTS)
    return every // 20 if getattr(find(name), "waits", False) else every


# --- hostile texts -------------------------------------------------------------------------------------------------------

NUMBERS = [
    "-1",
    "0",
    "007",
    "99999999999999999999",
    "9" * 5000,
    "1e999",
    "NaN",
    "-Infinity",
    "1.5",
    "+3",
    "1_0",
    "0x1",
    "²",
    "٣",
    "½",
]
CHARACTERS = [
    *map(chr, (0, 7, 8, 9, 10, 11, 12, 13, 27, 28, 127, 0x85, 0xA0, 0xAD, 0x200B, 0x202E, 0x2028, 0x2029, 0xD800, 0xFEFF))
]
CHARACTERS += [
    "İ",
    "ß",
    "\u017f",
    "é",
    "e\u0301",
    "\U0001d7d9",
    "😀",
    "\U0010ffff",
    "`",
    "```",
    '"',
    "\\",
    "{",
    "}",
    "[",
    "%s",
    "{0}",
    "<|im_end|>",
    "> ",
]
NASTY = [
    "",
    " ",
    "\n" * 5000,
    "\x00" * 1000,
    "\ud800\udfff",
    "null",
    "[]",
    "{}",
    '{"": {}}',
    '"\\ud800"',
    "[" * 100_000,
    '{"a":' * 100_000,
    "[" * 50_000 + "]" * 50_000,
    "(" * 20_000 + ")" * 20_000,
    "-" * 50_000 + "1",
    "9" * 1_000_000,
    " " * 1_000_000 + "x",
    "a" * 1_000_000,
    "a, " * 300_000,
    "```python\n" * 20_000,
    "1 " * 500_000,
    "/" * 1_000_000,
    "\\" * 999_999 + '"',
    "İ" * 400_000,
]


def hostile(rng: random.Random, texts: Sequence[str]) -> str:
    """One answer, made from texts that a world may understand."""
    return rng.choices(list(KINDS), list(KINDS.values()))[0](rng, texts)


def endless(rng: random.Random, texts: Sequence[str]) -> Iterator[str]:
    """The nasty ones, then hostile ones without end."""
    yield from NASTY
    while True:
        yield hostile(rng, texts)


def _cut(rng: random.Random, text: str) -> str:
    start, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    return text[start:end]


def _whole(rng: random.Random, texts: Sequence[str]) -> str:
    return rng.choice(texts)


def _half(rng: random.Random, texts: Sequence[str]) -> str:
    text = rng.choice(texts)
    place = rng.randint(0, len(text))
    return rng.choice((text[:place], text[place:]))


def _spliced(rng: random.Random, texts: Sequence[str]) -> str:
    pieces = [_cut(rng, rng.choice(texts)) for _ in range(rng.randint(2, 5))]
    return rng.choice(("", " ", "\n")).join(pieces)


def _mangled(rng: random.Random, texts: Sequence[str]) -> str:
    text = rng.choice(texts)
    for _ in range(rng.randint(1, 6)):
        start = rng.randint(0, len(text))
        end = min(len(text), start + rng.randint(0, 8))
        edit = rng.randrange(6)
        if edit == 0:
            text = text[:start] + text[end:]
        elif edit == 1:
            text = text[:end] + text[start:end] * rng.randint(1, 5) + text[end:]
        elif edit == 2:
            text = text[:start] + rng.choice(CHARACTERS) + text[start:]
        elif edit == 3 and (found := list(re.finditer(r"\d+", text))):
            number = rng.choice(found)
            text = text[: number.start()] + rng.choice(NUMBERS) + text[number.end() :]
        elif edit == 4 and (found := list(re.finditer(r"\w+", text))):
            word = rng.choice(found)
            others = re.findall(r"\w+", rng.choice(texts)) or [""]
            text = text[: word.start()] + rng.choice(others) + text[word.end() :]
        else:
            text = text[:start] + text[start:end].swapcase() + text[end:]
    return text


def _shuffled(rng: random.Random, texts: Sequence[str]) -> str:
    lines = [line for text in rng.sample(texts, min(3, len(texts))) for line in text.splitlines()]
    rng.shuffle(lines)
    return "\n".join(lines)


def _noise(rng: random.Random, texts: Sequence[str]) -> str:
    top = rng.choice((0x20, 0x7F, 0x100, 0x3000, 0x110000))
    return "".join(chr(rng.randrange(top)) for _ in range(rng.randint(0, 200)))


def _wrapped(rng: random.Random, texts: Sequence[str]) -> str:
    text = _mangled(rng, texts)
    key = rng.choice(re.findall(r"\w+", rng.choice(texts)) or ["a"])
    forms: list[Callable[[], str]] = [
        lambda: f"```\n{text}\n```",
        lambda: f"```json\n{text}",
        lambda: json.dumps(text),
        lambda: json.dumps({key: text, "": [text]}),
        lambda: json.dumps({key: rng.choice([None, True, -1, 1e308, [], [[[]]], {}, 10**400])}),
        lambda: f"Sure! Here it is:\n\n{text}\n\nI hope this helps.",
        lambda: f"> {text}",
        lambda: f"<think>{text}",
    ]
    return rng.choice(forms)()


def _deep(rng: random.Random, texts: Sequence[str]) -> str:
    keys = re.findall(r'"(\w+)"', "\n".join(texts)) or ["a"]
    key, depth = rng.choice(keys), rng.randint(100, 50_000)
    opened, closed = rng.choice((("[", "]"), ("(", ")"), (f'{{"{key}":', "}"), (f'{{"{key}": [', "]}"), ("not ", "")))
    return (
        opened * depth
        + rng.choice(("1", "", text if len(text := rng.choice(texts)) < 1000 else ""))
        + closed * rng.choice((0, depth))
    )


def _long(rng: random.Random, texts: Sequence[str]) -> str:
    """About a megabyte: of one line, or of lines."""
    piece = (
        rng.choice((rng.choice(CHARACTERS), rng.choice(NUMBERS), _cut(rng, rng.choice(texts)), rng.choice(texts) + "\n")) or "x"
    )
    return piece * (1_000_000 // len(piece))


KINDS: dict[Callable[[random.Random, Sequence[str]], str], float] = {
    _whole: 6, _half: 2, _spliced: 4, _mangled: 8, _shuffled: 2, _noise: 2, _wrapped: 2, _deep: 0.2, _long: 0.15,
}  # fmt: skip


# --- worlds --------------------------------------------------------------------------------------------------------------


@cache
def demonstrations() -> tuple[ModuleType, ...]:
    """Every module of scripted players."""
    names = [module.name for module in pkgutil.iter_modules(workshop.__path__, "collm.tiny.workshop.")]
    return tuple(importlib.import_module(name) for name in names if not name.endswith("pretrain"))


def written_by_players(name: str, rng: random.Random) -> list[str]:
    """Answers of an environment's scripted players: a function named after it in one of the workshop's modules."""
    play = next((getattr(module, name) for module in demonstrations() if hasattr(module, name)), None)
    assert play is not None, f"no module of collm/tiny/workshop has a function {name}(rng)"
    return [answer for _ in range(20) for chat in play(rng) for _, answer in chat]


def known_texts(name: str, rng: random.Random) -> list[str]:
    """What a world says, and what its players write."""
    said: list[str] = []
    for _ in range(8):
        env = varied(name, rng)
        observations, _ = env.reset(seed=rng.getrandbits(32))
        said += observations.values()
        observations, *_ = env.step(dict.fromkeys(env.agents, GARBAGE))
        said += observations.values()
    return [*said, *written_by_players(name, rng)]


def varied(name: str, rng: random.Random) -> Any:
    """A world with one to three agents and options of any allowed kind, where they go together."""
    world = find(name)
    hints = typing.get_type_hints(getattr(world, "__init__", world))
    options: dict[str, Any] = {}
    for option, hint in hints.items():
        if typing.get_origin(hint) is typing.Literal:
            options[option] = rng.choice(typing.get_args(hint))
        elif hint is bool:
            options[option] = rng.random() < 0.5
    if "agents" in hints:
        options["agents"] = rng.randint(1, 3)
    options = {option: value for option, value in options.items() if rng.random() < 0.6}
    try:
        env: Any = make(name, split=rng.choice(("train", "eval")), **options)
    except ConfigError:
        options = {}
        env = make(name)
    env.fuzzed_with = options
    return env


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer; where there are no alarms (outside the main thread) it may take its time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: Any) -> None:
        raise TimeoutError(f"a step takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def play(env: Any, rng: random.Random, texts: Iterator[str]) -> int:
    """One episode of answers; returns how many there were. Raises what the world raises, and on numbers that are none."""
    task = rng.randrange(env.num_tasks)
    env.reset(seed=rng.getrandbits(32), options={"task": task})
    count = 0
    while env.agents:
        answers = {agent: next(texts) for agent in env.agents}
        count += len(answers)
        try:
            with limited(WAITING_SECONDS if getattr(env, "waits", False) else SECONDS):
                observations, rewards, _, _, infos = env.step(answers)
            for agent in answers:
                assert isinstance(observations[agent], str)
                assert math.isfinite(rewards[agent])
                info = infos[agent]
                numbers = [info["raw_reward"], *info["reward_parts"].values(), *info["metrics"].values()]
                assert all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers), info
                assert math.isclose(sum(info["reward_parts"].values()), info["raw_reward"], abs_tol=1e-6), info
                assert info["metrics"].get("rejected", 0) >= 0
            assert len(set(rewards.values())) == 1
        except BaseException as error:
            shown = {agent: f"{len(text)} characters: {text[:300]!r}" for agent, text in answers.items()}
            error.add_note(
                f"{type(env).__name__}, options {getattr(env, 'fuzzed_with', {})}, task {task}, turn {env.turn}: {shown}"
            )
            raise
    return count


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_no_text_breaks_a_world(name):
    rng = seeds.stream("fuzz", name)
    try:
        texts = known_texts(name, rng)
    except SandboxError as error:
        pytest.skip(f"{name} runs code, which this machine cannot isolate: {error}")
    played, wanted = 0, share(name)
    answers = endless(rng, texts)
    while played < wanted:
        played += play(varied(name, rng), rng, answers)
    assert played >= wanted


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_rejections_are_counted(name):
    """A team that writes nothing but garbage has it counted, where the world counts at all."""
    env: Any = make(name)
    try:
        env.reset(seed=1, options={"task": 0})
        while env.agents:
            *_, infos = env.step(dict.fromkeys(env.agents, GARBAGE))
    except SandboxError as error:
        pytest.skip(f"{name} runs code, which this machine cannot isolate: {error}")
    for info in infos.values():
        assert info["metrics"].get("rejected", 1) > 0


def test_every_kind_of_text_is_played():
    """Among 4,000: megabytes, deep nesting, lone surrogates, numbers too long for int(), whole answers and halves."""
    rng = random.Random(0)
    texts = ["/setblock 1 2 0 stone\n/setblock 3 4 0 stone", '{"comm": "here", "path": [[1, 2]]}']
    played = [hostile(rng, texts) for _ in range(4000)]
    assert sum(len(text) > 900_000 for text in played) >= 5
    assert sum("[[[[[[[[" in text or '{"comm":{"comm":{' in text for text in played) >= 5
    assert sum(any("\ud800" <= character <= "\udfff" for character in text[:5000]) for text in played) >= 5
    assert sum("9" * 4301 in text for text in played) >= 5
    assert sum(text in texts for text in played) >= 100
    assert sum(text not in texts and any(text and whole.startswith(text) for whole in texts) for text in played) >= 100
    assert played == [hostile(again, texts) for again in [random.Random(0)] for _ in range(4000)]


# --- the fuzzer finds what it looks for ----------------------------------------------------------------------------------


class Fragile(TextEnv):
    """Reads `move NUMBER`, with one fault of those that worlds have."""

    def __init__(self, fault: Callable[[str], float]):
        super().__init__(["a", "b"], 2)
        self.fault = fault

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        return dict.fromkeys(self.agents, "Answer: move 3")

    def play(self, answers: dict[str, str]) -> Outcome:
        value = sum(self.fault(answer) for answer in answers.values())
        return Outcome(value, {"value": value}, dict.fromkeys(answers, "move 2"), metrics={"rejected": 0.0})


def big_number(text: str) -> float:
    found = re.search(r"move (\d+)", text)
    return float(int(found[1]) > 2) if found else 0.0


def deep_json(text: str) -> float:
    with contextlib.suppress(json.JSONDecodeError):
        json.loads(text)
    return 0.0


def surrogate(text: str) -> float:
    return float(len(text[:1000].encode()))


def endless_number(text: str) -> float:
    found = re.fullmatch(r"move (\S+)", text[:100])
    try:
        return float(found[1]) if found else 0.0
    except ValueError:
        return 0.0


def slow_pattern(text: str) -> float:
    return float(bool(re.fullmatch(r"(\w+\s*)*move", text)))


def sound(text: str) -> float:
    return float(bool(re.fullmatch(r"move \d{1,6}", text[:100], re.ASCII)))


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (big_number, ValueError),
        (deep_json, RecursionError),
        (surrogate, UnicodeEncodeError),
        (endless_number, AssertionError),
        (slow_pattern, TimeoutError),
        (sound, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_faults_are_found(monkeypatch, fault, error):
    monkeypatch.setattr(f"{__name__}.SECONDS", 1)
    rng = random.Random(1)
    texts = ["move 3", "move 12", "Answer: move 3"]

    def search() -> None:
        answers = endless(rng, texts)
        played = 0
        while played < 1000:
            played += play(Fragile(fault), rng, answers)

    if error is None:
        search()
        return
    with pytest.raises(error) as found:
        search()
    assert "Fragile" in found.value.__notes__[0]
    assert len(found.value.__notes__[0]) < 2000
