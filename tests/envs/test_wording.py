"""The wordings of the built-in environments: "terse", which the tiny model was pre-trained on, is unchanged to the byte."""

# ruff: noqa: E501

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from collm.envs.catalogue import make

RECORDED = Path(__file__).with_name("terse_observations.json")
"""Name of a case -> hash of every observation of its episode."""
MBPP = '{"task_id": 9, "prompt": "Write a function to add.", "code": "def add(a, b):\\n    return a + b", "test_list": ["assert add(1, 2) == 3"]}'
BUILT = "/setblock 0 0 0 oak_planks\n/setblock 1 4 0 stone\n/setblock 3 2 0 obsidian\nnothing"
FILLED = "/fill 0 0 0 1 0 1 white_concrete\n/fill 0 0 0 9 9 9 planks\n/fill 0 0 0 2 0 2 stone_bricks\nnothing"
PLANKED = '{"comm": "I begin <here>", "probe": [[1, 1], [2, 2], [3, 1]], "cmds": ["/fill 1 1 1 3 oak_planks"], "path": [[1, 1], [1, 2]]}'
WALKED = '{"comm": {"kind": "stone", "at": [1, 1]}, "path": [[1, 1], [2, 1], [2, 2]]}'
CODE = "def aux(xs):\n    return sorted(xs)"
ANSWERS: dict[str, tuple[str, ...]] = {
    "agree": ("red", "I say green", "nothing", "blue"),
    "quote": ("the old man", "nothing at all", "a school in our street"),
    "str_build": (BUILT, "", "/setblock 0 1 0 white_concrete"),
    "house_build": (FILLED, "/kill", ""),
    "bridge_build": (PLANKED, "nothing", "{}"),
    "resource_gathering": (WALKED, "nothing", '{"path": [[3, 3]]}'),
    "tldr": ("a b c d e f g h also", "nothing"),
    "arxiv": ("a b c d e f g h also", "nothing"),
    "coop_code": (CODE, "def add(a, b):\n    return a + b", "pass"),
    "class_eval": ("def total(self):\n    return 0", "(", "pass"),
}
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "agree": ({}, {"agents": 1, "turns": 2}, {"agents": 3, "turns": 3}, {"colours": ["Teal", "red"], "turns": 2}),
    "quote": (
        {}, {"turns": 3}, {"turns": 3, "view": "own"}, {"agents": 4, "turns": 2, "reward": "sparse"}, {"length": 16, "max_words": 6},
    ),
    "str_build": (
        {}, {"agents": 1}, {"agents": 3, "turns": 2}, {"feedback": "perfect"}, {"feedback": "score"}, {"blind_first_turn": True},
        {"world": "persistent"}, {"world": "persistent", "reward": "sparse", "turns": 8, "feedback": "score"},
        {"world": "persistent", "feedback": "perfect", "agents": 3}, {"strings": "english", "lengths": [2, 4]},
    ),
    "house_build": (
        {}, {"agents": 1}, {"agents": 3}, {"feedback": "position"}, {"feedback": "perfect"}, {"feedback": "position", "agents": 1},
        {"size": [4, 3, 4], "turns": 2, "reward": "coverage"}, {"size": [4, 3, 4], "agents": 3, "feedback": "position"},
    ),
    "bridge_build": ({}, {"agents": 1}, {"agents": 3}, {"size": [5, 5], "turns": 3}, {"view": 1, "steps": 2}),
    "resource_gathering": ({}, {"agents": 1}, {"agents": 3}, {"size": [5, 5]}, {"view": 1, "steps": 2, "load": 3}),
    "tldr": ({}, {"agents": 1}, {"agents": 3}, {"agents": 4}, {"reward": "guarded"}),
    "arxiv": ({}, {"agents": 1}, {"agents": 3}, {"agents": 4}),
    "coop_code": ({}, {"agents": 1}, {"agents": 3}, {"feedback": "plain"}, {"data": "mbpp.jsonl[0:1]", "eval_data": "mbpp.jsonl[0:1]"}),
    "class_eval": ({}, {"agents": 1}, {"agents": 3}, {"feedback": "plain"}, {"share": "round_robin"}),
}  # fmt: skip
CASES = [
    (f"{name} {split} {json.dumps(options)}", name, split, options)
    for name, listed in OPTIONS.items()
    for options in listed
    for split in ("train", "eval")
]


def episode(name: str, split: str, options: dict[str, Any], task: int = 0) -> list[dict[str, str]]:
    """All observations of an episode with fixed answers, good and bad ones."""
    env: Any = make(name, split=split, **options)
    observations, _ = env.reset(seed=1, options={"task": task})
    seen = [observations]
    while env.agents:
        place = len(seen) - 1
        observations, *_ = env.step(
            {agent: ANSWERS[name][(place + i) % len(ANSWERS[name])] for i, agent in enumerate(env.agents)}
        )
        seen.append(observations)
    return seen


def hashed(seen: list[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


@pytest.mark.parametrize(("case", "name", "split", "options"), CASES, ids=[case[0] for case in CASES])
def test_terse_observations_are_unchanged_to_the_byte(
    case: str, name: str, split: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mbpp.jsonl").write_text(MBPP + "\n", encoding="utf-8")
    assert (
        hashed(episode(name, split, {**options, "wording": "terse"})) == json.loads(RECORDED.read_text(encoding="utf-8"))[case]
    )
