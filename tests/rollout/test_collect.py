"""The one driver: calls, failures, trees, seeds; with engines and worlds that are real classes."""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from collm.engines.local import LocalEngine
from collm.engines.scripted import ScriptedEngine
from collm.envs.base import Outcome, TextEnv
from collm.envs.building import font
from collm.envs.building.str_build import PALETTES
from collm.envs.catalogue import EnvSpec
from collm.errors import EngineError, EnvError
from collm.learning.batch import Batch
from collm.learning.diagnostics import replayed as fractions
from collm.learning.residual import replayed
from collm.models.team import Team
from collm.rollout.collect import collect
from collm.rollout.plan import Plan
from collm.rollout.replay import replay_without, resample
from collm.types import Completion, Episode, Sampling


class Counting:
    """An engine whose answer is a function of the request's seed; it keeps every call."""

    trains = True

    def __init__(self, answer=None):
        self.answer = answer or (lambda request: f"word{request.seed % 1009}")
        self.calls = []

    def generate(self, requests):
        self.calls.append(list(requests))
        return [self.complete(request) for request in requests]

    def complete(self, request):
        try:
            text = self.answer(request)
        except EngineError as error:
            return Completion(request.agent, "", finish_reason="error", error=str(error))
        ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
        prompt = np.arange(3, dtype=np.int32)
        return Completion(request.agent, text, prompt, ids, np.zeros(len(ids), dtype=np.float32))

    def load(self, team):
        return None


class Lengths(TextEnv):
    """Task k lasts k + 1 turns. Tasks 7 and above break: 7 at reset, 8 at its second turn, 9 by a bug."""

    num_tasks = 10

    def __init__(self):
        super().__init__(["a", "b", "c"], 20)

    def begin(self, task, rng):
        if task == 7:
            raise EnvError("the seventh seal")
        self.number = rng.randrange(1000)
        return {agent: f"{agent} of task {task}, {self.number}" for agent in self.agents}

    def play(self, answers):
        if self.task == 8 and self.turn == 1:
            raise EnvError("the lid jams")
        if self.task == 9:
            raise ZeroDivisionError("a bug")
        reward = float(sum(map(len, answers.values())))
        return Outcome(
            reward, {"length": reward}, {agent: f"turn {self.turn}" for agent in answers}, done=self.turn == self.task
        )

    def state(self):
        return f"privileged {self.task}.{self.turn}"

    def task_name(self, task):
        return f"task-{task}"


LENGTHS = EnvSpec("test_collect:Lengths")


def texts(episode):
    return [[turn.completions[a].text for a in episode.agents] for turn in episode.turns]


# --- calls ---------------------------------------------------------------------------------------------------------------


def test_one_engine_call_a_turn_for_all_live_episodes():
    engine = Counting()
    groups = collect(Plan(LENGTHS, group_size=2), engine, [0, 3, 1], [1, 2, 3])
    # Tasks 0, 3, 1 last 1, 4, 2 turns; two episodes each, three agents: 18, then 12, then 6, then 6 requests.
    assert [len(call) for call in engine.calls] == [18, 12, 6, 6]
    assert [[len(e.turns) for e in group.episodes] for group in groups] == [[1, 1], [4, 4], [2, 2]]
    assert [group.task for group in groups] == [0, 3, 1]
    for group in groups:
        for sibling, episode in enumerate(group.episodes):
            assert (episode.task, episode.sibling, episode.label) == (group.task, sibling, f"task-{group.task}")
            assert (episode.terminated, episode.truncated, episode.failure) == (True, False, "")
            assert episode.agents == ("a", "b", "c")
            assert episode.seconds >= 0


def test_answers_reach_the_seat_that_asked():
    engine = Counting(lambda request: f"{request.agent}|{request.messages[-1].text}")
    groups = collect(Plan(LENGTHS, group_size=3), engine, [2, 0, 4], [5, 6, 7])
    for episode in (e for g in groups for e in g.episodes):
        for turn in episode.turns:
            for agent in "abc":
                assert turn.completions[agent].text == f"{agent}|{turn.observations[agent]}"
                assert turn.completions[agent].agent == agent
        assert f"task {episode.task}," in episode.turns[0].observations["a"]


def test_a_recorded_turn_is_what_the_world_said():
    (group,) = collect(Plan(LENGTHS), Counting(lambda r: r.agent * 2), [1], [4])
    (episode,) = group.episodes
    assert [turn.reward for turn in episode.turns] == [6.0, 6.0]
    assert [turn.parts for turn in episode.turns] == [{"length": 6.0}] * 2
    assert [turn.state for turn in episode.turns] == ["privileged 1.0", "privileged 1.1"]
    assert episode.state == "privileged 1.2"
    assert episode.turns[1].observations == {a: "turn 0" for a in "abc"}
    assert episode.observations == {a: "turn 1" for a in "abc"}
    assert episode.turns[0].observations["b"].startswith("b of task 1")


def test_an_agent_reads_its_own_history_alone():
    engine = Counting(lambda request: f"secret of {request.agent}")
    collect(Plan(LENGTHS), engine, [2], [1])
    for number, call in enumerate(engine.calls):
        for request in call:
            joined = "\n".join(message.text for message in request.messages)
            assert joined.count(f"secret of {request.agent}") == number
            assert not any(f"secret of {other}" in joined for other in "abc" if other != request.agent)
            assert len(request.messages) == 2 * number + 1
            assert "privileged" not in joined


def test_history_last_is_a_fresh_prompt_with_instruction_last_answer_and_feedback():
    engine = Counting()
    (group,) = collect(Plan(LENGTHS, history="last"), engine, [4], [1])
    episode = group.episodes[0]
    for number, call in enumerate(engine.calls[2:], 2):
        for request in call:
            first, mine, newest = request.messages
            assert first.text == episode.turns[0].observations[request.agent]
            assert mine.text == episode.turns[number - 1].completions[request.agent].text
            assert mine.token_ids is episode.turns[number - 1].completions[request.agent].token_ids
            assert newest.text == episode.turns[number].observations[request.agent]


def test_every_agent_can_have_its_own_sampling():
    hot, cold = Sampling(temperature=2.0), Sampling(temperature=0.1)
    engine = Counting()
    collect(Plan(LENGTHS, sampling=hot, agent_sampling=(("b", cold),)), engine, [0], [1])
    assert {r.agent: r.sampling for r in engine.calls[0]} == {"a": hot, "b": cold, "c": hot}


def test_cutting_truncates_without_asking_further():
    engine = Counting()
    groups = collect(Plan(LENGTHS, max_turns=2), engine, [0, 1, 4], [1, 2, 3])
    cut = [group.episodes[0] for group in groups]
    assert [len(e.turns) for e in cut] == [1, 2, 2]
    assert [e.truncated for e in cut] == [False, False, True]
    assert [e.terminated for e in cut] == [True, True, False]
    assert cut[2].observations == {a: "turn 1" for a in "abc"}  # what they would have read next
    assert cut[2].failure == ""
    assert len(engine.calls) == 2


def test_stop_is_asked_before_every_call_and_may_leave():
    class Enough(Exception):
        pass

    asked = []

    def stop():
        asked.append(len(engine.calls))
        if len(asked) == 3:
            raise Enough

    engine = Counting()
    with pytest.raises(Enough):
        collect(Plan(LENGTHS), engine, [6], [1], stop=stop)
    assert asked == [0, 1, 2]
    assert len(engine.calls) == 2


# --- failures ------------------------------------------------------------------------------------------------------------


def test_a_failed_completion_fails_its_episode_alone():
    def answer(request):
        if request.agent == "b" and "task 3" in request.messages[0].text and len(request.messages) == 5:
            raise EngineError("the prompt is too long")
        return "fine"

    engine = Counting(answer)
    groups = collect(Plan(LENGTHS), engine, [3, 4], [1, 2])
    failed, whole = (group.episodes[0] for group in groups)
    assert failed.failure == "b, turn 2: the prompt is too long"
    assert len(failed.turns) == 2  # what was played is kept
    assert not failed.terminated
    assert not failed.truncated
    assert (whole.failure, len(whole.turns), whole.terminated) == ("", 5, True)
    assert [len(call) for call in engine.calls] == [6, 6, 6, 3, 3]
    assert Batch.of(groups, ("a", "b", "c")).episodes == [whole]  # never trained on


def test_a_world_that_breaks_its_contract_fails_its_episode_alone():
    engine = Counting()
    groups = collect(Plan(LENGTHS), engine, [7, 8, 2, 7], [1, 2, 3, 4])
    episodes = [group.episodes[0] for group in groups]
    assert [e.failure for e in episodes] == ["reset: the seventh seal", "step 1: the lid jams", "", "reset: the seventh seal"]
    assert [len(e.turns) for e in episodes] == [0, 1, 3, 0]
    assert [e.terminated for e in episodes] == [False, False, True, False]
    assert [len(call) for call in engine.calls] == [6, 6, 3]


def test_a_bug_is_a_crash():
    with pytest.raises(ZeroDivisionError):
        collect(Plan(LENGTHS), Counting(), [9], [1])


def test_an_engine_that_is_gone_is_a_crash():
    class Gone(Counting):
        def generate(self, requests):
            raise EngineError("connection refused")

    with pytest.raises(EngineError, match="refused"):
        collect(Plan(LENGTHS), Gone(), [0], [1])


def test_nothing_to_play_asks_nothing():
    engine = Counting()
    assert collect(Plan(LENGTHS), engine, [], []) == []
    (group,) = collect(Plan(LENGTHS), engine, [7], [1])
    assert group.episodes[0].failure
    assert engine.calls == []


def test_tasks_and_seeds_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        collect(Plan(LENGTHS), Counting(), [0, 1], [1])


# --- seeds ---------------------------------------------------------------------------------------------------------------


def test_same_seeds_same_texts_whatever_is_played_beside():
    def play(tasks, keys, size=2):
        return {
            (e.task, e.seed, e.sibling): texts(e)
            for g in collect(Plan(LENGTHS, group_size=size), Counting(), tasks, keys)
            for e in g.episodes
        }

    whole = play([1, 4, 2], [10, 20, 30])
    assert whole == play([1, 4, 2], [10, 20, 30])
    assert whole == play([2, 1, 4], [30, 10, 20])
    assert play([4], [20], size=1).items() <= whole.items()
    assert play([4], [21]).values() != play([4], [20]).values()


def test_no_two_answers_share_their_random_numbers():
    engine = Counting()
    collect(Plan(LENGTHS, group_size=4), engine, [3, 3, 2], [1, 2, 3])
    seeds = [request.seed for call in engine.calls for request in call]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_group_shares_its_world_and_nothing_else():
    (group,) = collect(Plan(LENGTHS, group_size=4), Counting(), [2], [77])
    assert len({e.turns[0].observations["a"] for e in group.episodes}) == 1
    assert len({str(texts(e)) for e in group.episodes}) == 4
    assert {e.seed for e in group.episodes} == {77}


def test_resampled_answers_belong_to_the_same_history():
    engine = Counting()
    plan = Plan(LENGTHS)
    groups = collect(plan, engine, [2, 8], [1, 2])
    asked = {(r.agent, len(r.messages)): r.messages for call in engine.calls for r in call if "task 2" in r.messages[0].text}
    first = [request.seed for call in engine.calls for request in call]
    engine.calls.clear()
    episodes = [g.episodes[0] for g in groups]
    before = [texts(e) for e in episodes]
    resample(replace(plan, resamples=3), engine, episodes)
    assert [len(call) for call in engine.calls] == [3 * 3 * 3]  # one call; the failed episode is left out
    for request in engine.calls[0]:
        assert request.messages == asked[request.agent, len(request.messages)]
    seeds = [request.seed for request in engine.calls[0]]
    assert len(set(seeds) | set(first)) == len(seeds) + len(first)  # the answer taken is excluded
    for turn in episodes[0].turns:
        for agent in "abc":
            alternatives = [c.text for c in turn.alternatives[agent]]
            assert len(alternatives) == 3
            assert all(c.agent == agent for c in turn.alternatives[agent])
            assert turn.completions[agent].text not in alternatives
    assert [texts(e) for e in episodes] == before
    assert all(turn.alternatives == {} for turn in episodes[1].turns)
    resample(replace(plan, resamples=3), engine, episodes)
    assert [r.seed for r in engine.calls[1]] == seeds  # again the same


def test_what_silence_would_have_led_to_is_the_worlds_own_word():
    """Every replayed turn equals the one of a world played by hand with the same answers before and that one left out."""
    plan = Plan(EnvSpec("str_build", {"world": "persistent", "turns": 3, "strings": ["CI", "LL"]}))
    words = ["/setblock 0 0 0 stone", "/setblock 1 1 0 obsidian\n/setblock 9 2 0 white_concrete", "/setblock 2 4 0 oak_planks"]
    engine = Counting(lambda request: words[request.seed % 3])
    episodes = [episode for group in collect(replace(plan, group_size=2), engine, [0, 1], [5, 6]) for episode in group.episodes]
    before, num_calls = [texts(e) for e in episodes], len(engine.calls)
    replay_without(plan, episodes)
    assert len(engine.calls) == num_calls  # nothing is generated
    assert [texts(e) for e in episodes] == before
    seen = set()
    for episode in episodes:
        for t, turn in enumerate(episode.turns):
            assert set(turn.no_op) == {"builder_0", "builder_1"}
            for agent, found in turn.no_op.items():
                env = plan.env.make("train")
                env.reset(seed=episode.seed, options={"task": episode.task})
                for past in episode.turns[:t]:
                    env.step({a: c.text for a, c in past.completions.items()})
                said = {a: c.text for a, c in turn.completions.items()} | {agent: ""}
                observations, rewards, _, _, infos = env.step(said)
                assert found.reward == rewards[agent]
                assert found.raw_reward == infos[agent]["raw_reward"]
                assert found.metrics == infos[agent]["metrics"]
                assert found.observations == observations
                assert found.matches
                seen.add((found.metrics["coverage"], t))
    assert len(seen) > 6


def test_nobody_is_asked_about_who_acts_alone_and_of_the_agents_named_alone():
    plan = Plan(EnvSpec("agree", {"agents": 1}))
    (group,) = collect(plan, Counting(), [0], [1])
    replay_without(plan, group.episodes)
    assert all(turn.no_op == {} for turn in group.episodes[0].turns)
    plan = Plan(LENGTHS)
    (group,) = collect(plan, Counting(), [2], [1])
    replay_without(replace(plan, agents=("b",)), group.episodes)
    assert all(set(turn.no_op) == {"b"} for turn in group.episodes[0].turns)


def test_what_a_world_that_breaks_on_silence_would_have_done_stays_unknown():
    class Loud(TextEnv):
        def __init__(self):
            super().__init__(["a", "b"], 1)

        def begin(self, task, rng):
            return dict.fromkeys(self.agents, "Speak.")

        def play(self, answers):
            if "" in answers.values():
                raise EnvError("nobody may be silent")
            return Outcome(1.0, {}, dict.fromkeys(answers, ""))

    class Maker:
        def make(self, split):
            return Loud()

    (group,) = collect(Plan(Maker()), Counting(), [0], [1])
    assert not group.episodes[0].failure
    replay_without(Plan(Maker()), group.episodes)
    assert not group.episodes[0].failure  # what was played stays sound
    assert group.episodes[0].turns[0].no_op == {}


class Unseeded(TextEnv):
    """Its seed does not determine its metrics, observations or rewards."""

    diagnostics = frozenset({"clock"})

    def __init__(self, hidden: str):
        super().__init__(["a", "b"], 3)
        self.hidden = hidden

    def begin(self, task, rng):
        return dict.fromkeys(self.agents, "Begin.")

    def play(self, answers):
        drawn = random.SystemRandom().random()
        seen = {"metric": 0.0, "clock": drawn} | ({"metric": drawn} if self.hidden == "metrics" else {})
        text = f"Again {drawn}." if self.hidden == "observations" else "Again."
        reward = drawn if self.hidden == "rewards" else 1.0
        return Outcome(reward, {}, dict.fromkeys(answers, text), metrics=seen)


@pytest.mark.parametrize("hidden", ["metrics", "observations", "rewards", "nothing"])
def test_a_replay_that_came_to_something_else_is_unknown_and_counted(hidden):
    """The first turn of three is the seed's; of the others no replay repeats the record. Diagnostics may differ."""

    class Maker:
        def make(self, split):
            return Unseeded(hidden)

    groups = collect(Plan(Maker()), Counting(), [0, 0], [1, 2])
    replay_without(Plan(Maker()), [group.episodes[0] for group in groups])
    batch = Batch.of(groups, ("a", "b"))
    turns = (0,) if hidden != "nothing" else (0, 1, 2)
    assert set(replayed(batch, "a")) == {(e, t) for e in (0, 1) for t in turns}
    share = len(turns) / 3
    assert fractions(batch) == pytest.approx({"critic/replayed": share, "critic/replay_mismatch": 1 - share})


# --- turn trees ----------------------------------------------------------------------------------------------------------


def nodes_of(leaves):
    """Path -> the episodes that hold that joint action."""
    found = {}
    for leaf in leaves:
        for t in range(len(leaf.turns)):
            found.setdefault(leaf.path[: t + 1], []).append(leaf)
    return found


@pytest.mark.parametrize(("G", "task"), [(2, 2), (3, 1), (4, 0)])
def test_a_tree_has_g_joint_actions_per_node(G, task):
    engine = Counting()
    groups = collect(Plan(LENGTHS, group_size=G, tree=True), engine, [task, task], [5, 6])
    T = task + 1
    assert [len(call) for call in engine.calls] == [2 * 3 * G ** (t + 1) for t in range(T)]  # one call a level, both trees
    for group in groups:
        assert len(group.episodes) == G**T
        assert sorted(leaf.path for leaf in group.episodes) == list(itertools.product(range(G), repeat=T))
        nodes = nodes_of(group.episodes)
        assert Counter(map(len, nodes)) == {t + 1: G ** (t + 1) for t in range(T)}
        # Every joint action is some leaf's own, exactly once: (its path, its turn) with turn >= own_from.
        own = Counter(leaf.path[: t + 1] for leaf in group.episodes for t in range(leaf.own_from, len(leaf.turns)))
        assert own == dict.fromkeys(nodes, 1)
        for path, holders in nodes.items():
            t = len(path) - 1
            answers = {tuple(h.turns[t].completions[a].text for a in "abc") for h in holders}
            assert len(answers) == 1  # branches share their parent's answers exactly
            for holder in holders[1:]:
                for a in "abc":
                    assert np.array_equal(
                        holder.turns[t].completions[a].token_ids, holders[0].turns[t].completions[a].token_ids
                    )
                assert holder.turns[t].reward == holders[0].turns[t].reward
                assert holder.turns[t].observations == holders[0].turns[t].observations
                assert holder.turns[t].state == holders[0].turns[t].state
        joint = {path: tuple(h[0].turns[len(path) - 1].completions[a].text for a in "abc") for path, h in nodes.items()}
        for path, other in itertools.combinations(joint, 2):
            if path[:-1] == other[:-1]:
                assert joint[path] != joint[other]  # siblings answer differently
        assert all(leaf.terminated for leaf in group.episodes)
    assert len({r.seed for call in engine.calls for r in call}) == sum(map(len, engine.calls))


def test_tokens_of_a_tree_are_counted_once():
    engine = Counting()
    (group,) = collect(Plan(LENGTHS, group_size=2, tree=True), engine, [2], [5])
    sampled = sum(len(engine.complete(r).token_ids) for call in engine.calls for r in call)
    assert sum(leaf.num_tokens() for leaf in group.episodes) == sampled


def test_a_trees_histories_are_those_of_its_own_branch():
    engine = Counting()
    (group,) = collect(Plan(LENGTHS, group_size=2, tree=True), engine, [2], [5])
    nodes = nodes_of(group.episodes)
    expected = Counter(
        tuple(nodes[path[: t + 1]][0].turns[t].completions[agent].text for t in range(2))
        for path in itertools.product(range(2), repeat=2)
        for agent in "abc"
        for _ in range(2)  # each node of the second level is asked for two more joint answers
    )
    got = Counter(tuple(m.text for m in request.messages if m.role == "assistant") for request in engine.calls[-1])
    assert got == expected
    assert len(got) == 12


def test_branches_that_end_early_stop_growing():
    """With str_build a perfect build ends its branch: the tree is uneven."""
    best = optimal_build("I", agents=1)["builder_0"]

    def answer(request):
        return best if request.seed % 3 == 0 else "pass"

    plan = Plan(EnvSpec("str_build", {"strings": ["I"], "turns": 3, "agents": 1}), group_size=3, tree=True)
    (group,) = collect(plan, Counting(answer), [0], [8])
    for leaf in group.episodes:
        perfect = [turn.raw_reward > 1.9 for turn in leaf.turns]
        assert perfect == [False] * (len(perfect) - 1) + [perfect[-1]]
        assert perfect[-1] or len(leaf.turns) == 3
        assert len(leaf.path) == len(leaf.turns)
    assert len({len(leaf.turns) for leaf in group.episodes}) > 1
    nodes = nodes_of(group.episodes)
    own = Counter(leaf.path[: t + 1] for leaf in group.episodes for t in range(leaf.own_from, len(leaf.turns)))
    assert own == dict.fromkeys(nodes, 1)


class FirstBranchFails(Counting):
    """At the second turn, the first joint answer asked for (that of leaf (0, 0), which owns joint action (0,)) fails."""

    def generate(self, requests):
        completions = super().generate(requests)
        if len(self.calls) == 2:
            completions[0] = Completion(requests[0].agent, "", finish_reason="error", error="lost")
        return completions


def test_a_failed_branch_takes_no_other_branch_with_it():
    """Every joint action that was played on from is still trained once, though the leaf that owns it failed later."""
    groups = collect(Plan(LENGTHS, group_size=3, tree=True), FirstBranchFails(), [1], [5])
    leaves = {leaf.path: leaf for leaf in groups[0].episodes}
    assert len(leaves) == 9
    assert [path for path, leaf in leaves.items() if leaf.failure] == [(0, 0)]
    batch = Batch.of(groups, ("a", "b", "c"))
    trained = Counter(
        episode.path[: t + 1]
        for e, episode in enumerate(batch.episodes)
        for t in range(len(episode.turns))
        if batch.live_ENT[e, 0, t]
    )
    assert trained == dict.fromkeys(nodes_of(leaf for leaf in leaves.values() if not leaf.failure), 1)


def test_trees_repeat_with_their_seeds():
    def play(keys):
        return [
            [(leaf.path, texts(leaf)) for leaf in g.episodes]
            for g in collect(Plan(LENGTHS, group_size=2, tree=True), Counting(), [1] * len(keys), keys)
        ]

    assert play([3, 4]) == play([3, 4])
    assert play([4])[0] == play([3, 4])[1]
    assert play([3])[0] != play([4])[0]


def test_a_cut_tree_is_truncated_everywhere():
    engine = Counting()
    (group,) = collect(Plan(LENGTHS, group_size=2, tree=True, max_turns=2), engine, [5], [1])
    assert len(group.episodes) == 4
    assert all(leaf.truncated and len(leaf.turns) == 2 for leaf in group.episodes)


# --- whole games ---------------------------------------------------------------------------------------------------------


def chessboard(word, palettes):
    blocks = [block for palette in palettes for block in palette]
    answers = ["" for _ in palettes]
    for x, y in sorted(font.cells(word)):
        shade = (x + y) % 2 if len(blocks) == 2 else (x + 2 * y) % len(blocks)
        answers[shade // 2] += f"/setblock {x} {y} 0 {blocks[shade]}\n"
    return answers


def optimal_build(word, agents=2):
    return {f"builder_{n}": text for n, text in enumerate(chessboard(word, PALETTES[:agents]))}


def test_optimal_play_of_agree():
    groups = collect(
        Plan(EnvSpec("agree", {"turns": 4, "agents": 3})), ScriptedEngine(lambda request: "red"), [0] * 5, range(5)
    )
    assert all(sum(turn.reward for turn in g.episodes[0].turns) == 4.0 for g in groups)
    assert all(g.episodes[0].metrics == {"match": 1.0, "rejected": 0.0} for g in groups)
    alone = Plan(EnvSpec("agree", {"agents": 1}))
    target = ScriptedEngine(lambda request: re.search(r"colour (\w+)", request.messages[0].text)[1])
    assert all(g.episodes[0].score == 1.0 for g in collect(alone, target, [0, 1, 2, 3], range(4)))


def test_uniform_play_of_agree_returns_one_in_k():
    rng = random.Random(0)
    engine = ScriptedEngine(lambda request: rng.choice(["red", "green", "blue", "yellow"]))
    groups = collect(Plan(EnvSpec("agree")), engine, [0] * 2000, range(2000))
    mean = sum(g.episodes[0].score for g in groups) / 2000
    assert mean == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_optimal_play_of_str_build(split):
    def answer(request):
        word = re.search(r"Build ([A-Z]+) together", request.messages[0].text)[1]
        return optimal_build(word)[request.agent]

    tasks = range(8) if split == "train" else range(2)
    engine = Counting(answer)
    groups = collect(Plan(EnvSpec("str_build", {"wording": "terse"}), split=split), engine, tasks, tasks)
    for group in groups:
        (episode,) = group.episodes
        assert (len(episode.turns), episode.score, episode.turns[0].reward, episode.metrics["iou"]) == (1, 2.0, 0.0, 1.0)
    assert len(engine.calls) == 1


def test_a_persistent_build_is_finished_over_several_turns():
    def answer(request):
        turn, limit = len(request.messages) // 2, int(re.search(r"At most (\d+)", request.messages[0].text)[1])
        lines = optimal_build("MC")[request.agent].splitlines()
        return "\n".join(lines[turn * limit : (turn + 1) * limit])

    plan = Plan(
        EnvSpec("str_build", {"strings": ["MC"], "world": "persistent", "reward": "sparse", "turns": 4, "wording": "terse"})
    )
    (group,) = collect(plan, Counting(answer), [0], [0])
    assert [turn.reward for turn in group.episodes[0].turns] == [0.0, 0.0, 0.0, 2.0]


def test_the_tiny_team_plays_a_tree_and_repeats_it(tiny):
    plan = Plan(EnvSpec("agree", {"turns": 2}), sampling=Sampling(max_tokens=4), group_size=2, tree=True)
    engine = LocalEngine(Team({"agent_0": tiny, "agent_1": tiny}))
    one, two = (collect(plan, engine, [0, 0], [1, 2]) for _ in range(2))
    for left, right in zip(one, two, strict=True):
        assert [texts(e) for e in left.episodes] == [texts(e) for e in right.episodes]
        for leaf, again in zip(left.episodes, right.episodes, strict=True):
            for turn, other in zip(leaf.turns, again.turns, strict=True):
                for agent in leaf.agents:
                    assert np.array_equal(turn.completions[agent].token_ids, other.completions[agent].token_ids)
                    assert np.allclose(turn.completions[agent].logprobs, other.completions[agent].logprobs, atol=1e-5)


def test_scripted_engines_fail_a_request_alone():
    def answer(request):
        if request.agent == "a":
            raise EngineError("no script")
        return "ok"

    engine = ScriptedEngine(answer)
    assert engine.trains is False
    (group,) = collect(Plan(LENGTHS), engine, [0], [0])
    assert group.episodes[0].failure == "a, turn 0: no script"
    assert isinstance(group.episodes[0], Episode)


# --- worlds that wait ----------------------------------------------------------------------------------------------------


def records(groups):
    """Everything of the episodes but the seconds they took."""
    return [repr(replace(episode, seconds=0.0)) for group in groups for episode in group.episodes]


@pytest.mark.parametrize(("size", "tree"), [(4, False), (2, True)])
def test_worlds_that_wait_are_stepped_together_with_the_same_results(size, tree):
    def play(world):
        plan = Plan(EnvSpec(f"worlds:{world}", {"pause": 0.02}), group_size=size, tree=tree)
        started = time.monotonic()
        groups = collect(plan, Counting(), [1, 9, 3, 4], [5, 6, 7, 8])
        return records(groups), time.monotonic() - started

    together, seconds = play("Waiting")
    one_by_one, seconds_one_by_one = play("Computing")
    assert together == one_by_one
    assert sum("the world is gone" in record for record in together) == 4  # a failed episode is data
    # Slept in all: 16 episodes, a reset and two turns each; in trees further resets and replays. At least four sleep at a time.
    assert seconds_one_by_one >= 16 * 3 * 0.02
    assert seconds < 0.6 * seconds_one_by_one


def test_four_worlds_wait_at_the_same_time():
    groups = collect(Plan(EnvSpec("worlds:Meeting", {"pause": 0.0})), Counting(), [1, 2, 3, 4], [1, 2, 3, 4])
    assert [len(group.episodes[0].turns) for group in groups] == [2, 2, 2, 2]


def test_a_bug_in_a_world_that_waits_is_a_crash_of_the_first_seat():
    engine = Counting()
    with pytest.raises(ZeroDivisionError, match="task 4"):
        collect(Plan(EnvSpec("worlds:Buggy", {"pause": 0.0})), engine, [0, 4, 1, 3, 2], [1, 2, 3, 4, 5])
    assert len(engine.calls) == 1


class Here(Lengths):
    """Breaks where it is stepped in another thread than its maker's."""

    def __init__(self):
        super().__init__()
        self.home = threading.current_thread()

    def play(self, answers):
        assert threading.current_thread() is self.home
        return super().play(answers)


def test_worlds_that_compute_stay_in_their_thread():
    groups = collect(Plan(EnvSpec("test_collect:Here"), group_size=2), Counting(), [1, 2, 3], [1, 2, 3])
    assert all(episode.terminated for group in groups for episode in group.episodes)
