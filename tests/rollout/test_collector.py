"""An iteration in pieces: each is played as if it were alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from collm.engines.local import LocalEngine
from collm.envs.catalogue import EnvSpec
from collm.models.team import Team
from collm.rollout.collector import LocalCollector, cut
from collm.rollout.plan import Plan
from collm.types import Group, Sampling

ENV = EnvSpec("str_build", {"wording": "terse", "world": "persistent", "turns": 2, "strings": ["IT", "C", "AT", "OH"]})
SIBLINGS = Plan(ENV, sampling=Sampling(max_tokens=12), group_size=2)
TREE = replace(SIBLINGS, tree=True)
ASKED_AGAIN = replace(SIBLINGS, group_size=1, resamples=2, no_op=True)
TASKS, KEYS = [3, 0, 1, 2, 1], [11, 12, 13, 14, 15]


class Watched(LocalEngine):
    """Counts its rests and keeps how many requests each call had."""

    def __init__(self, team: Team):
        super().__init__(team, remember=True)
        self.rests, self.asked = 0, list[int]()

    def generate(self, requests, observers=()):
        self.asked.append(len(requests))
        return super().generate(requests, observers)

    def rest(self) -> None:
        self.rests += 1
        super().rest()


def engine(tiny) -> Watched:
    return Watched(Team({"builder_0": tiny, "builder_1": tiny}))


def bits(groups: list[Group]) -> list:
    """Everything that was sampled, to the bit."""
    return [
        (group.task, episode.seed, episode.path, [
            (agent, c.token_ids.tolist(), np.asarray(c.logprobs).tobytes(), [a.text for a in turn.alternatives.get(agent, ())],
             sorted(turn.no_op))
            for turn in episode.turns for agent, c in turn.completions.items()
        ])
        for group in groups for episode in group.episodes
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("shards", range(1, 7))
def test_pieces_are_contiguous_and_differ_by_one_at_most(number, shards):
    sizes = [len(range(number)[piece]) for piece in cut(number, shards)]
    assert [i for piece in cut(number, shards) for i in range(number)[piece]] == list(range(number))
    assert len(sizes) == max(1, min(number, shards))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("plan", [SIBLINGS, TREE, ASKED_AGAIN], ids=["siblings", "tree", "asked again"])
def test_a_piece_is_played_as_if_it_were_alone(tiny, plan):
    together = LocalCollector(engine(tiny), shards=2).play(plan, TASKS, KEYS)
    alone = [LocalCollector(engine(tiny)).play(plan, TASKS[piece], KEYS[piece]) for piece in (slice(2), slice(2, 5))]
    assert [group.task for group in together] == TASKS
    assert bits(together) == bits([*alone[0], *alone[1]])


def test_one_piece_is_one_play_without_a_rest(tiny):
    once = engine(tiny)
    assert bits(LocalCollector(once).play(SIBLINGS, TASKS, KEYS)) == bits(
        LocalCollector(engine(tiny), shards=1).play(SIBLINGS, TASKS, KEYS)
    )
    assert (once.rests, once.asked) == (0, [20, 20])  # five tasks, two siblings, two agents; two turns


def test_the_engine_rests_between_pieces_and_keeps_nothing(tiny):
    several = engine(tiny)
    LocalCollector(several, shards=3).play(SIBLINGS, TASKS, KEYS)
    assert (several.rests, several.asked) == (2, [4, 4, 8, 8, 8, 8])


def test_a_split_smaller_than_the_number_of_shards_is_cut_into_single_tasks(tiny):
    few = engine(tiny)
    groups = LocalCollector(few, shards=4).play(SIBLINGS, TASKS[:2], KEYS[:2])
    assert [group.task for group in groups] == TASKS[:2]
    assert few.asked == [4, 4, 4, 4]
    assert LocalCollector(few, shards=4).play(SIBLINGS, [], []) == []
