"""The scripted players that the tiny model learned from: they vary, replay, and show no task that is trained or tested on."""

from __future__ import annotations

import random
import re
import shutil

import pytest

from collm import seeds
from collm.envs.building import font
from collm.envs.building.bridge_build import draw_map as draw_river
from collm.envs.building.str_build import REFERENCE
from collm.envs.gathering import grid
from collm.envs.gathering.resource_gathering import draw_field
from collm.envs.writing.samples import sample_texts
from collm.envs.writing.writing import MARKER, Arxiv, Tldr
from collm.tiny.workshop import demonstrations, gathering, programs, writing

ENVS = {"tldr": Tldr, "arxiv": Arxiv}


def test_pretraining_never_shows_a_word_that_is_trained_or_tested_on():
    known = {*font.english_words(), *REFERENCE["train"], *REFERENCE["eval"]}
    drawn = {demonstrations.pretraining_word(seeds.stream("pretraining words", n)) for n in range(3000)}
    assert not drawn & known
    assert {len(word) for word in drawn} == {1, 2, 3, 4}
    shown = set()
    for number in range(200):
        for chat in demonstrations.str_build(random.Random(number)):
            for observation, _ in chat:
                shown |= set(re.findall(r"Build ([A-Z]+)(?: together)?\.", observation))
    assert len(shown) > 100
    assert not shown & known


def test_demonstrations_vary_and_replay_and_never_show_a_map_that_is_trained_or_tested_on():
    chats = [gathering.bridge_build(random.Random(n)) for n in range(60)]
    assert chats == [gathering.bridge_build(random.Random(n)) for n in range(60)]
    assert {len(chat) for chat in chats} == {1, 2, 3}
    assert len({text for episode in chats for chat in episode for text, _ in chat}) > 200
    for n in range(60):
        assert grid.part_of(grid.drawn(draw_river, "bridge_build", "pretraining", (5, 5), n)) == "pretraining"


def test_demonstrations_vary_and_replay_and_never_show_a_field_that_is_trained_or_tested_on():
    chats = [gathering.resource_gathering(random.Random(n)) for n in range(60)]
    assert chats == [gathering.resource_gathering(random.Random(n)) for n in range(60)]
    assert {len(chat) for chat in chats} == {1, 2, 3}
    assert len({text for episode in chats for chat in episode for text, _ in chat}) > 200
    for n in range(60):
        assert grid.part_of(grid.drawn(draw_field, "resource_gathering", "pretraining", (5, 5), n)) == "pretraining"


@pytest.mark.parametrize("name", ["tldr", "arxiv"])
def test_demonstrations_are_chats_about_train_texts(name):
    player = getattr(writing, name)
    held_out, train = set(sample_texts(ENVS[name].rules.kind, "eval")), set(sample_texts(ENVS[name].rules.kind, "train"))
    answers, sizes = [], set()
    for seed in range(150):
        chats = player(random.Random(seed))
        assert chats == player(random.Random(seed))
        sizes.add(len(chats))
        for chat in chats:
            [(observation, answer)] = chat
            quoted = [line[2:] for line in observation.split("\n") if line.startswith("> ")]
            assert len(quoted) == 1
            assert quoted[0] in train
            assert quoted[0] not in held_out
            assert answer.isascii()
            answers.append(answer)
    assert sizes == {1, 2, 3}
    assert len(set(answers)) > 0.95 * len(answers)
    alone = [player(random.Random(seed)) for seed in range(300)]
    marked = [MARKER in chats[0][0][1] for chats in alone if len(chats) == 1]
    assert 0.5 < sum(marked) / len(marked) < 1  # the format is nearly always right


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_demonstrations_of_coop_code_replay_with_one_turn_or_two():
    chats = [programs.coop_code(random.Random(number)) for number in range(12)]
    assert chats == [programs.coop_code(random.Random(number)) for number in range(12)]
    assert {len(chat) for found in chats for chat in found} == {1, 2}
