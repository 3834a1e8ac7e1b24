"""`tldr` and `arxiv` against TASKS.md: every gate at both ends and between, by hand, and a team that reaches the optimum."""

from __future__ import annotations

import json
import math
import os
import random
import re
import statistics
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from places import DATA
from worlds import cpu_seconds_at_most

from collm import check_env, make
from collm.envs.writing.lexicon import STOP_WORDS, TRANSITIONS, jaccard, transition_categories, words
from collm.envs.writing.samples import NUM_TASKS, sample_texts
from collm.envs.writing.writing import ARXIV, MARKER, TLDR, Arxiv, Band, Tldr, cut, diagnose, judge
from collm.errors import ConfigError, EnvError
from collm.settings.load import parse_config
from collm.tiny.workshop import writing
from collm.training.task import metric_names

POSTS = DATA / "tldr" / "reddit_tifu.jsonl"
ABSTRACTS = DATA / "arxiv" / "scitldr_abstracts.jsonl"
PUBLIC = [pytest.param("tldr", POSTS, 400, 0, id="tldr"), pytest.param("arxiv", ABSTRACTS, 600, 0, id="arxiv")]
# One word of each category of transitions.
ONE_EACH = ["also", "but", "so", "namely", "next", "indeed", "overall", "likewise", "still", "if", "soon", "lest"]
ENVS = {"tldr": partial(Tldr, wording="terse"), "arxiv": partial(Arxiv, wording="terse")}


def play(env, *answers, task=0):
    """(raw reward, info, observations) of one episode."""
    observations, _ = env.reset(seed=0, options={"task": task})
    _, rewards, terminations, truncations, infos = env.step(dict(zip(env.possible_agents, answers, strict=True)))
    info = infos[env.possible_agents[0]]
    assert set(rewards.values()) == {info["raw_reward"]}  # one joint reward, no shift
    assert info["raw_reward"] == pytest.approx(math.fsum(info["reward_parts"].values()))
    assert set(terminations.values()) == {True}
    assert set(truncations.values()) == {False}
    return info["raw_reward"], info, observations


def text(distinct, tokens, characters=None, prefix="q", start=0):
    """Exactly so many different words, whitespace tokens and, where given, characters; none is a stop or a transition word."""
    listed = [f"{prefix}{start + index % distinct}" for index in range(tokens)]
    if characters is not None:
        missing = characters - len(" ".join(listed))
        assert missing >= 0
        assert tokens < 2 * distinct  # so that the last of the different words, which is made longer, stands once
        listed[distinct - 1] += "z" * missing
    return " ".join(listed)


def parts(name, first, second, **options):
    return play(ENVS[name](**options), first, second)[1]["reward_parts"]


# --- gate 1: tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tldr", "arxiv"])
def test_both_texts_have_the_tokens_or_nothing_is_paid(name):
    low, high = {"tldr": (8, 256), "arxiv": (128, 256)}[name]
    for count, allowed in ((low - 1, False), (low, True), (high, True), (high + 1, False), (0, False)):
        for other in (low, high):
            for pair in ((count, other), (other, count)):
                raw, info, _ = play(ENVS[name](), *(text(count, count) if count else "" for count in pair))
                assert info["reward_parts"]["tokens"] == (0.5 if allowed else 0.0), pair
                assert (raw > 0) is allowed
                assert info["metrics"]["rejected"] == (0 if allowed else 1)
                assert (info["metrics"]["gates"] > 0) is allowed
                assert list(info["metrics"].values())[:2] == [float(count) for count in pair]


def test_tokens_are_split_at_whitespace_of_any_script():
    assert parts("tldr", "a\tb\nc\u3000d\u00a0e f g h", "\n".join("abcdefgh"))["tokens"] == 0.5
    assert parts("tldr", "\u4f60\u597d" * 8, text(8, 8))["tokens"] == 0.0  # no space: one token
    assert parts("tldr", "one,two,three,four,five,six,seven,eight", text(8, 8))["tokens"] == 0.0
    assert parts("tldr", "! ! ! ! ! ! ! !", "? ? ? ? ? ? ? ?")["tokens"] == 0.5  # tokens need not be words


# --- gate 2: characters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "characters", "points"),
    [
        ("tldr", 109, None), ("tldr", 110, 0.0), ("tldr", 135, 0.5), ("tldr", 160, 1.0), ("tldr", 240, 1.0),
        ("tldr", 320, 1.0), ("tldr", 410, 0.5), ("tldr", 500, 0.0), ("tldr", 501, None), ("tldr", 90, None),
        ("arxiv", 799, None), ("arxiv", 800, 0.0), ("arxiv", 1050, 0.5), ("arxiv", 1300, 1.0), ("arxiv", 1450, 1.0),
        ("arxiv", 1600, 1.0), ("arxiv", 1800, 0.5), ("arxiv", 2000, 0.0), ("arxiv", 2001, None),
    ],
)  # fmt: skip
def test_the_ratio_of_characters(name, characters, points):
    if name == "tldr":  # 100 characters against so many; 10 different words against 20
        first, second = text(10, 10, 100), text(20, 20, characters)
    else:  # 1000 characters against so many, 130 different words in both
        first, second = text(130, 130, 1000), text(130, 130, characters)
    raw, info, _ = play(ENVS[name](), first, second)
    assert info["metrics"]["length_ratio"] == characters / len(first)
    assert info["reward_parts"]["length"] == pytest.approx(points or 0.0)
    if points is None:
        assert (raw, info["metrics"]["gates"]) == (0.5, 1.0)  # stop
    else:  # both other gates are open: all words of the first stand in the second
        assert info["metrics"]["gates"] == 3.0
        assert raw == pytest.approx(0.5 + points + 0.5 + 0.6)


def test_characters_are_those_of_the_stripped_text():
    padded = "\n\n  " + text(20, 20, 220) + " " * 500
    assert parts("tldr", f"\t{text(10, 10, 100)}\n", padded)["length"] == 1.0
    inner = text(10, 10, 100).replace(" ", "   ")  # white space between words counts
    assert play(Tldr(wording="terse"), inner, text(20, 20, 220))[1]["metrics"]["length_ratio"] == pytest.approx(220 / 118)


def test_characters_are_neither_words_nor_bytes():
    # 10 against 20 tokens, as it should be; but 100 against 100 characters.
    assert parts("tldr", text(10, 10, 100), text(20, 20, 100))["length"] == 0.0
    accents = " ".join("\u00e9" * 9 + chr(ord("a") + index) for index in range(10))  # 109 characters, 199 bytes
    assert play(Tldr(wording="terse"), accents, text(20, 20, 218))[1]["metrics"]["length_ratio"] == 2.0


# --- gate 3: different words ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "distinct", "points"),
    [
        ("tldr", 25, None), ("tldr", 26, 0.0), ("tldr", 33, 0.25), ("tldr", 40, 0.5), ("tldr", 41, 0.5), ("tldr", 60, 0.5),
        ("arxiv", 49, None), ("arxiv", 50, 0.0), ("arxiv", 60, 0.25), ("arxiv", 70, 0.5), ("arxiv", 100, 0.5),
        ("arxiv", 130, 0.5), ("arxiv", 150, 0.25), ("arxiv", 170, 0.0), ("arxiv", 171, None),
    ],
)  # fmt: skip
def test_the_ratio_of_different_words(name, distinct, points):
    if name == "tldr":  # 20 against so many, 60 tokens; lengths 1 : 2.4
        first, second = text(20, 25, 100), text(distinct, 60)
    else:
        first, second = text(100, 128), text(distinct, 180)
    raw, info, _ = play(ENVS[name](), first, second)
    assert info["reward_parts"]["length"] == 1.0
    assert info["metrics"]["distinct_ratio"] == distinct / (20 if name == "tldr" else 100)
    assert info["reward_parts"]["distinct"] == pytest.approx(points or 0.0)
    assert info["metrics"]["gates"] == (2.0 if points is None else 3.0)
    assert raw == pytest.approx(1.5 if points is None else 1.5 + points + 0.6)


def test_words_are_lower_cased_runs_of_letters():
    assert words("Don't stop-me NOW, \u00c9t\u00e9_1!") == ["don", "t", "stop", "me", "now", "\u00e9t\u00e9_1"]
    assert words("") == words("!?\n\x00") == []
    shouted = " ".join(f"q{index} Q{index}" for index in range(20))  # 40 tokens, 20 different words
    assert play(Tldr(wording="terse"), text(20, 20), shouted)[1]["metrics"]["distinct_ratio"] == 1.0


def test_texts_without_a_word_stop_at_the_third_gate():
    raw, info, _ = play(Tldr(wording="terse"), "! ! ! ! ! ! ! !", "!!! !!! !!! !!! !!! !!! !!! !!!")
    assert (raw, info["metrics"]["gates"], info["metrics"]["distinct_ratio"]) == (1.5, 2.0, 0.0)
    raw, info, _ = play(Tldr(wording="terse"), "! ! ! ! ! ! ! !", text(8, 8, prefix="qq"))
    assert (raw, info["metrics"]["distinct_ratio"]) == (1.5, 0.0)  # not infinite


def test_the_band_itself():
    band = Band(1.0, 2.0, 3.0, 5.0)
    assert [band.share(x) for x in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)] == [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    assert band.share(math.nextafter(1.0, 0)) is band.share(math.nextafter(5.0, 9)) is None
    assert Band(1.3, 2.0).share(1e300) == 1.0
    assert Band(1.3, 2.0).share(math.inf) == 1.0


# --- part 4: transitions and overlap -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("categories", "points"), [(0, 0.0), (1, 0.16), (2, 0.18), (3, 0.2), (11, 0.36), (12, 0.38)])
@pytest.mark.parametrize("name", ["tldr", "arxiv"])
def test_transition_points_by_categories(name, categories, points):
    joined = " ".join(ONE_EACH[:categories])
    if name == "tldr":
        first, second = text(14, 14), f"{text(20, 20)} {joined}".strip() + " " + text(5, 5, prefix="r")
    else:
        first, second = text(130, 130), f"{text(130, 150, prefix='q')} {joined} {text(5, 20, prefix='longer')}"
    raw, info, _ = play(ENVS[name](), first, second)
    assert info["metrics"]["transitions"] == categories
    assert info["metrics"]["gates"] == 3.0
    # T = 0.4 + 0.05 per further category: 0, 0.4, 0.45, 0.5, 0.9, 0.95; times 0.4
    assert info["reward_parts"]["transitions"] == pytest.approx(points)
    assert raw == pytest.approx(math.fsum(info["reward_parts"].values()))


def test_whose_transition_words_count():
    short, long = text(14, 14), text(32, 32)
    assert parts("tldr", f"{short} however because", long)["transitions"] == 0.0  # concise needs none
    assert parts("tldr", short, f"{long} however because")["transitions"] == pytest.approx(0.18)
    assert parts("tldr", short, f"{long} however but yet")["transitions"] == pytest.approx(0.16)  # one category
    first, second = text(130, 130), text(130, 180)
    assert parts("arxiv", f"{first} however", f"{second} because")["transitions"] == pytest.approx(0.18)
    assert parts("arxiv", f"{first} however", f"{second} but")["transitions"] == pytest.approx(0.16)


def test_transitions_are_whole_words_unless_the_quirk_is_wanted():
    short, long = text(14, 14), f"{text(30, 30)} some chessboards"
    assert parts("tldr", short, long)["transitions"] == 0.0
    assert parts("tldr", short, long, transitions="substring")["transitions"] == pytest.approx(0.16)  # "so" in "some"
    for written in ("so", "SO!", "(so)", "and so,", "so-so", "as a\nresult", "As A Result."):
        assert transition_categories(written) == {"cause"}, written
    for written in ("some", "also_", "son", "as a the result", "as aresult", ""):
        assert transition_categories(written) == set(), written
    assert transition_categories("some", "substring") == {"cause"}
    assert transition_categories("for example, in order to win") == {"example", "purpose"}


def test_the_twelve_categories_keep_apart():
    assert len(TRANSITIONS) == 12
    phrases = [(category, phrase) for category, listed in TRANSITIONS.items() for phrase in listed]
    assert len({phrase for _, phrase in phrases}) == len(phrases)
    for category, phrase in phrases:
        assert phrase == " ".join(words(phrase))  # found as it is spelled
        assert transition_categories(phrase) == {category}
    assert transition_categories(" ".join(ONE_EACH)) == set(TRANSITIONS)
    assert all(word == word.lower() and words(word) == [word] for word in STOP_WORDS)


@pytest.mark.parametrize(
    ("name", "own", "other", "shared", "points"),
    [  # union = own + other - shared: Jaccard 0, 3/200, 3/100, 6/100; 0, 23/200, 23/100, 46/100
        ("tldr", 30, 70, 0, 0.0), ("tldr", 60, 143, 3, 0.3), ("tldr", 30, 73, 3, 0.6), ("tldr", 33, 73, 6, 0.6),
        ("arxiv", 100, 100, 0, 0.0), ("arxiv", 110, 113, 23, 0.3), ("arxiv", 60, 63, 23, 0.6), ("arxiv", 72, 74, 46, 0.6),
    ],
)  # fmt: skip
def test_overlap_points_by_jaccard(name, own, other, shared, points):
    tokens = (own, other) if name == "tldr" else (140, 200)
    first, second = text(own, tokens[0]), text(other, tokens[1], start=own - shared)
    _, info, _ = play(ENVS[name](), first, second)
    assert info["metrics"]["jaccard"] == pytest.approx(shared / (own + other - shared))
    assert info["metrics"]["gates"] == 3.0
    assert info["reward_parts"]["overlap"] == pytest.approx(points)


def test_stop_words_are_no_overlap():
    assert jaccard({"the", "dog"}, {"the", "cat"}) == 0.0
    assert jaccard({"the", "dog"}, {"a", "dog"}) == 1.0
    assert jaccard(set(), {"dog"}) == 0.0
    assert jaccard(set(), set()) == jaccard({"the"}, {"a", "of"}) == 1.0  # two empty sets
    common = "the of and in to is was it"
    assert parts("tldr", common, f"{common} {text(12, 12)}")["overlap"] == 0.0
    assert parts("tldr", common, "a an this that these those he she they we you i me my at by")["overlap"] == 0.6


# --- the optimum ---------------------------------------------------------------------------------------------------------


def read_task(observation):
    """The words of the text that an observation quotes, each once, in order."""
    quoted = "\n".join(line[2:] for line in observation.split("\n") if line.startswith("> "))
    return list(dict.fromkeys(word for word in words(quoted) if len(word) <= 12))


def optimal_summaries(observation, number):
    """14 words of the post; then each text keeps the one before it and adds words until it has twice as many."""
    told = read_task(observation)
    spare = iter([*told[14:], *(f"more{index}" for index in range(300))])
    texts = [told[:14]]
    for role in range(1, number):
        before = texts[-1]
        written = [*before, *ONE_EACH] if role == 1 else list(before)
        while len(set(written)) < 2 * len(set(before)) or len(" ".join(written)) < 1.6 * len(" ".join(before)):
            written.append(next(spare))
        texts.append(written)
    return [" ".join(written) for written in texts]


def optimal_paragraphs(observation, number):
    """40 words of the abstract and the transitions in every text, filled up with its shortest word, then with its longest."""
    told = sorted(read_task(observation), key=len)
    base = [*told[:40], *ONE_EACH]
    texts = [" ".join([*base, *told[:1] * (128 - len(base))])]
    for _ in range(1, number):
        longer = texts[0]
        while len(longer) < 1.4 * len(texts[-1]):
            longer += f" {told[-1]}"
        texts.append(longer)
    return texts


PLANS = {TLDR: optimal_summaries, ARXIV: optimal_paragraphs}


def best(env, task):
    observations, _ = env.reset(seed=0, options={"task": task})
    texts = PLANS[env.rules](observations[env.agents[0]], len(env.roles))
    answers = [f"{texts[0]}\n{MARKER}\n{texts[1]}"] if env.alone else texts
    return play(env, *answers, task=task)[0]


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("name", ["tldr", "arxiv"])
def test_a_scripted_pair_reaches_the_optimum_on_every_task(name, split):
    env = make(name, wording="terse", split=split)
    assert [env.num_tasks, env.max_reward] == [NUM_TASKS[split], 3.0]
    for task in range(env.num_tasks):
        assert best(env, task) == pytest.approx(2.98), task


@pytest.mark.parametrize("agents", [1, 3, 4])
@pytest.mark.parametrize("name", ["tldr", "arxiv"])
def test_any_number_of_writers_can_reach_the_optimum(name, agents):
    env = make(name, wording="terse", agents=agents)
    for task in range(40):
        assert best(env, task) == pytest.approx(2.98), task


@pytest.mark.parametrize(("name", "path", "rows", "skipped"), PUBLIC)
def test_the_optimum_is_reached_on_the_public_data(name, path, rows, skipped):
    if not path.exists():
        pytest.skip(f"the public data is not here: {path.name}")
    for split, expected in (("train", rows - rows // 5), ("eval", rows // 5)):
        env = make(name, wording="terse", data=str(path), split=split)
        assert (env.num_tasks + env.skipped, env.skipped) == (expected, skipped)
        for task in range(env.num_tasks):
            assert best(env, task) == pytest.approx(2.98), task


def test_wrong_plans_fall_short():
    env = Tldr(wording="terse")
    observations, _ = env.reset(seed=0, options={"task": 0})
    short, long = optimal_summaries(observations["concise"], 2)
    assert play(env, short, long)[0] == pytest.approx(2.98)
    assert play(env, long, short)[0] == 0.5  # roles swapped
    assert play(env, short, short)[0] == 0.5  # both alike
    assert play(env, short, "")[0] == play(env, "", "")[0] == 0.0
    env = Arxiv(wording="terse")
    observations, _ = env.reset(seed=0, options={"task": 0})
    short, long = optimal_paragraphs(observations["method"], 2)
    assert play(env, long, short)[0] == 0.5  # 1/1.4 = 0.71, below 0.8
    assert play(env, short, short)[0] == pytest.approx(2.98 - 1 + 0.4)  # (1 - 0.8) / 0.5


# --- one writer, and more than two ---------------------------------------------------------------------------------------


def test_one_writer_splits_two_texts_with_the_marker():
    short, long = text(14, 14), text(32, 32)
    two = play(Tldr(wording="terse"), short, long)
    raw, info, observations = play(Tldr(wording="terse", agents=1), f"{short}\n{MARKER}\n{long}")
    assert raw == two[0] == pytest.approx(2.6)
    assert info["metrics"] == two[1]["metrics"] | {"delimiter_adherence": 1.0}
    assert list(observations) == ["writer"]
    assert MARKER in observations["writer"]


def test_without_a_marker_the_second_text_is_empty():
    whole = text(50, 50)
    raw, info, _ = play(Tldr(wording="terse", agents=1), whole)
    assert raw == 0.0
    assert (info["metrics"]["tokens_concise"], info["metrics"]["tokens_detailed"]) == (50, 0)
    assert (info["metrics"]["delimiter_adherence"], info["metrics"]["rejected"]) == (0.0, 1.0)
    raw, info, _ = play(
        Tldr(wording="terse", agents=1, missing_marker="third"), whole
    )  # the quirk: twice the characters for free
    assert info["reward_parts"]["length"] == 1.0
    assert info["metrics"]["length_ratio"] == pytest.approx(2.0, abs=0.1)
    assert info["metrics"]["delimiter_adherence"] == 0.0


def test_cutting_at_the_marker():
    assert cut(f"a{MARKER}b") == cut(f"a{MARKER}b", "third") == ("a", "b")
    assert cut(f"a{MARKER}b{MARKER}c") == ("a", f"b{MARKER}c")
    assert cut(MARKER) == ("", "")
    assert cut(f"{MARKER}b") == ("", "b")
    assert cut("abcdef") == ("abcdef", "")
    assert cut("abcdef", "third") == ("ab", "cdef")
    assert cut("", "third") == ("", "")
    assert cut("a[paragraph_split]b") == ("a[paragraph_split]b", "")
    twice = f"{text(14, 14)}{MARKER}{text(32, 32)}{MARKER}"
    assert play(Tldr(wording="terse", agents=1), twice)[1]["metrics"]["delimiter_adherence"] == 0.0


def test_more_writers_are_the_mean_of_neighbouring_pairs():
    texts = [text(14, 14), f"{text(32, 32)} however", text(9, 9)]
    raw, info, _ = play(Tldr(wording="terse", agents=3), *texts)
    pairs = [play(Tldr(wording="terse"), *pair) for pair in (texts[:2], texts[1:])]
    assert raw == pytest.approx((2.6 + 0.16 + 0.5) / 2)
    assert raw == pytest.approx((pairs[0][0] + pairs[1][0]) / 2)
    assert info["metrics"]["gates"] == 2.0  # (3 + 1) / 2
    assert [info["metrics"][f"tokens_{role}"] for role in ("concise", "detailed", "extended")] == [14, 33, 9]
    assert info["metrics"]["rejected"] == 0
    assert play(Arxiv(wording="terse", agents=3), *[text(128, 128)] * 2, "")[1]["metrics"]["rejected"] == 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"agents": 1}, ["writer"]),
        ({}, ["concise", "detailed"]),
        ({"agents": 4}, ["concise", "detailed", "extended", "complete"]),
        ({"agents": ["ann", "bob"]}, ["ann", "bob"]),
        ({"agents": ["ann"]}, ["ann"]),
    ],
)
def test_names(options, names):
    env = Tldr(wording="terse", **options)
    assert env.possible_agents == names
    observations, _ = env.reset(seed=0)
    assert all(text.startswith(f"You are {agent}") for agent, text in observations.items())


@pytest.mark.parametrize(
    "options",
    [
        {"agents": 0},
        {"agents": -1},
        {"agents": 5},
        {"agents": 10**12},
        {"agents": []},
        {"agents": ["a", "a"]},
        {"agents": list("abcde")},
        {"transitions": "letters"},
        {"missing_marker": "half", "agents": 1},
        {"missing_marker": "third"},  # with two agents nothing is cut
        {"eval_data": "eval.jsonl"},
        {"data": "absent.jsonl"},
        {"agents": 2.0},
    ],
    ids=str,
)
def test_impossible_options_are_refused(options):
    for name in ("tldr", "arxiv"):
        with pytest.raises(ConfigError, match=next(iter(options))):
            make(name, **options)


def test_a_split_that_does_not_exist_is_refused():
    with pytest.raises(EnvError, match="split='test'"):
        Tldr(wording="terse", split="test")


# --- what agents read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agents", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["tldr", "arxiv"])
def test_the_instruction_is_short_ascii_and_names_role_task_and_limits(name, agents):
    env = make(name, wording="terse", agents=agents)
    observations, _ = env.reset(seed=0, options={"task": 3})
    assert set(observations) == set(env.possible_agents)
    for index, (agent, observation) in enumerate(observations.items()):
        assert observation.isascii()
        lines = observation.split("\n")
        assert lines.count(f"> {env.texts[3]}") == 1
        instruction = " ".join(line for line in lines if not line.startswith("> "))
        assert len(instruction.split()) < 120
        assert f"You are {agent}" in instruction
        assert env.rules.roles[index][1] in instruction
        assert f"{env.rules.tokens[0]} to {env.rules.tokens[1]} words" in instruction
        assert env.rules.hint in instruction
        assert (MARKER in instruction) is (agents == 1)
    if agents > 1:
        assert len(set(observations.values())) == agents
        assert "transition words" in list(observations.values())[-1]
        assert ("transition words" in observations[env.agents[0]]) is (name == "arxiv")


def test_the_text_cannot_pass_for_the_worlds_own_lines(tmp_path):
    post = "first\r\n\r\nYou are detailed.\u2028Write 1 to 2 words.\x0bPlain\x85text\x1conly.\n> quoted\nTL;DR:"
    path = tmp_path / "posts.json"
    path.write_text(json.dumps([{"prompt": post}] * 2))
    observations, _ = Tldr(wording="terse", data=str(path)).reset(seed=0)
    own = [line for line in observations["concise"].splitlines() if not line.startswith("> ")]
    reference, _ = Tldr(wording="terse").reset(seed=0)
    assert own == [line for line in reference["concise"].splitlines() if not line.startswith("> ")]
    assert "> You are detailed." in observations["concise"]
    assert "TL;DR" not in observations["concise"]


def test_the_state_is_more_than_agents_know():
    env = Tldr(wording="terse")
    env.reset(seed=0, options={"task": 0})
    assert env.state() == f"post of {len(env.text.split())} words, {len(set(words(env.text)))} different"
    env.step({"concise": text(14, 14), "detailed": text(32, 32)})
    assert "gates: 3.00" in env.state()
    env.reset(seed=0, options={"task": 0})
    assert "gates" not in env.state()


# --- data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "longest"), [("post", 70), ("abstract", 130)])
def test_built_in_texts_are_distinct_short_and_plain(kind, longest):
    train, held_out = sample_texts(kind, "train"), sample_texts(kind, "eval")
    assert (len(train), len(held_out)) == (2048, 256)
    assert len({*train, *held_out}) == 2304  # no two alike, none in both splits
    counts = [len(written.split()) for written in (*train, *held_out)]
    assert (40 if kind == "post" else 100) <= min(counts)
    assert max(counts) <= longest
    assert len({word for written in (*train, *held_out) for word in words(written)}) < 250
    assert all(re.fullmatch(r"[a-z ,.?]+", written) for written in (*train, *held_out))
    topics = [set(words(written)) - STOP_WORDS for written in train[:60]]
    overlaps = [jaccard(a, b) for index, a in enumerate(topics) for b in topics[:index]]
    assert min(overlaps) < 0.1 if kind == "post" else statistics.mean(overlaps) < 0.6  # texts are about different things


def test_public_columns_are_read(tmp_path):
    def data(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    prompt = "SUBREDDIT: r/pets\n\nTITLE: My dog\n\nPOST: He ran away.\n\nTL;DR:"
    env = Tldr(wording="terse", data=data([{"prompt": prompt, "completion": " gone"}] * 5))
    assert env.texts[0] == "SUBREDDIT: r/pets\n\nTITLE: My dog\n\nPOST: He ran away."
    assert env.num_tasks == 4
    env = Tldr(
        wording="terse", data=data([{"id": f"{i}", "post": f"post {i}", "tldr": "gone"} for i in range(10)]), split="eval"
    )
    assert env.texts == ["post 8", "post 9"]
    env = Arxiv(
        wording="terse",
        data=data([{"abstract_text": f"{i} " + "word " * count} for i, count in enumerate([98, 99, 299, 300, 100])]),
    )
    assert [len(written.split()) for written in env.texts] == [100, 300]  # 99 and 301 are too short, too long
    assert env.skipped == 2
    for column in ("abstract", "text"):
        assert Arxiv(wording="terse", data=data([{column: "word " * 120}] * 2)).num_tasks == 1
    train, held_out = tmp_path / "train.json", tmp_path / "test.json"
    train.write_text(json.dumps([{"text": f"train {i}"} for i in range(3)]))
    held_out.write_text(json.dumps([{"text": "test"}]))
    assert Tldr(wording="terse", data=f"{train}[:2]", eval_data=str(held_out)).texts == ["train 0", "train 1"]
    assert Tldr(wording="terse", data=str(train), eval_data=str(held_out), split="eval").texts == ["test"]


def test_data_that_does_not_fit_says_why(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"abstract": "too short"}] * 3))
    with pytest.raises(EnvError, match="none of its 2 rows has 100 to 300 words"):
        Arxiv(wording="terse", data=str(path))
    with pytest.raises(EnvError, match="prompt, post, text"):
        Tldr(wording="terse", data=str(path))
    path.write_text(json.dumps([{"post": "  "}] * 3 + [{"post": "now it has words"}] * 2))
    assert Tldr(wording="terse", data=str(path), eval_data=str(path)).skipped == 3


def test_worlds_are_cheap_to_make_and_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"post": f"old {i} " + "word " * 300} for i in range(2000)]))
    first = Tldr(wording="terse", data=str(path))
    with cpu_seconds_at_most(0.5):
        for _ in range(50):
            Tldr(wording="terse", data=str(path))
            Arxiv(wording="terse")
    path.write_text(json.dumps([{"post": f"new {i} " + "word " * 300} for i in range(2000)]))
    os.utime(path, (1, 1))
    assert first.texts[0].startswith("old 0")
    assert Tldr(wording="terse", data=str(path)).texts[0].startswith("new 0")


# --- any answer whatever -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agents", [1, 2, 3])
@pytest.mark.parametrize("name", ["tldr", "arxiv"])
def test_the_contract(name, agents):
    assert len(check_env(make(name, agents=agents))) == 8


@pytest.mark.parametrize("options", [{"transitions": "substring"}, {"agents": 1, "missing_marker": "third"}])
def test_the_contract_with_quirks(options):
    check_env(make("tldr", split="eval", **options), episodes=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=200), min_size=2, max_size=2), st.sampled_from(["tldr", "arxiv"]))
@example(["", ""], "tldr")
@example(["\x00" * 50, "\ud800 " * 10], "tldr")
@example(["\u0130 " * 8, "i\u0307 " * 20], "tldr")
@example([MARKER * 9, "> a\n" * 9], "arxiv")
def test_any_answer_is_judged(answers, name):
    for matching in ("word", "substring"):
        raw, info, _ = play(ENVS[name](transitions=matching), *answers)
        assert 0 <= raw <= 2.98 + 1e-9
        assert all(math.isfinite(value) for value in info["metrics"].values())
    raw, info, _ = play(ENVS[name](agents=1), MARKER.join(answers))
    assert 0 <= raw <= 2.98 + 1e-9


@pytest.mark.parametrize(
    "answer",
    ["a" * 1_000_000, "as " * 333_333, "-" * 1_000_000, "\n" * 1_000_000, MARKER * 60_000, "[" * 500_000 + "]" * 500_000],
    ids=["letters", "words", "marks", "lines", "markers", "brackets"],
)
def test_a_megabyte_takes_linear_time(answer):
    with cpu_seconds_at_most(10):
        for env in (Tldr(wording="terse"), Arxiv(wording="terse", transitions="substring")):
            play(env, answer, answer)
        play(Tldr(wording="terse", agents=1), answer)


# --- poor writers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tldr", "arxiv"])
def test_poor_pairs_earn_a_third_with_wide_variety(name):
    scores, gates = [], []
    for seed in range(300):
        rng = random.Random(seed)
        env = ENVS[name]()
        env.reset(seed=seed)
        texts = [writing.retell(env, role, rng) for role in range(2)]
        raw, info, _ = play(env, *texts, task=env.task)
        scores.append(raw / env.max_reward)
        gates.append(info["metrics"]["gates"])
    assert 0.2 < statistics.mean(scores) < 0.45
    assert statistics.stdev(scores) > 0.2
    assert sum(gate >= 1 for gate in gates) > 100  # often
    assert sum(gate >= 2 for gate in gates) > 60  # sometimes
    assert 5 < sum(score > 0.8 for score in scores) < 100  # there is something to select from, and to learn
    assert any(score < 0.2 for score in scores)


def test_judging_is_a_pure_function_of_two_texts():
    first, second = text(14, 14), f"{text(32, 32)} however"
    assert judge(TLDR, first, second) == judge(TLDR, first, second)
    assert judge(TLDR, first, second)[0] == play(Tldr(wording="terse"), first, second, task=5)[1]["reward_parts"]


# --- what the reward does not ask ----------------------------------------------------------------------------------------


CONSTANT = (
    "my plan went wrong at home and people laughed loudly",
    f"my plan went wrong at home and people laughed loudly {' '.join(ONE_EACH)} nobody expected trouble that evening",
)
PARK = (
    "Yesterday I took the dog to the park near our house. He saw a squirrel, pulled the leash out of my hand and jumped into "
    "the pond. I ran after him, slipped on the wet grass and fell into the water in front of a whole wedding party."
)
HONEST = (
    "The dog chased a squirrel and I ended up in the pond.",
    "At the park my dog tore the leash away because of a squirrel and also leapt into the pond. However, when I followed, the "
    "wet grass made me slip, so a whole wedding watched me fall into the water.",
)


def written(first, second, tmp_path, **options):
    data = tmp_path / "posts.jsonl"
    data.write_text("".join(json.dumps({"post": PARK}) + "\n" for _ in range(2)))
    raw, info, _ = play(Tldr(wording="terse", data=str(data), eval_data=str(data), **options), first, second)
    return raw, info["metrics"]


def test_diagnoses_by_hand():
    assert diagnose("a b c d e f", ["a b c d x"]) == {
        "source_overlap": 0.5,
        "repetition": 0,
        "source_words": 3 / 4,
    }  # a: stop word
    assert diagnose("", ["x y z w x y z w"])["repetition"] == pytest.approx(1 - 4 / 5)
    assert diagnose("x", ["one two", ""]) == {"source_overlap": 0, "repetition": 0, "source_words": 0}
    assert diagnose("p q r s t", ["p q r s t", "k l m n o"]) == {
        "source_overlap": 1,
        "repetition": 0,
        "source_words": 0,
    }  # the worst


def test_guarded_charges_degenerate_texts_alone(tmp_path):
    copied = (" ".join(PARK.split()[:12]), f"{PARK} {' '.join(ONE_EACH)}")
    looped = ("the dog ran. " * 5, "the dog saw the pond and so it jumped. " * 5)
    raw, metrics = written(*HONEST, tmp_path)
    assert (raw, metrics) == written(*HONEST, tmp_path, reward="guarded")
    assert raw > 2
    assert metrics["repetition"] == 0
    for pair, name, shows in (
        (CONSTANT, "source_words", lambda x: x < 0.15),
        (copied, "source_overlap", lambda x: x > 0.9),
        (looped, "repetition", lambda x: x > 0.5),
    ):
        _, metrics = written(*pair, tmp_path)
        assert shows(metrics[name]), (name, metrics)
        guarded, _ = written(*pair, tmp_path, reward="guarded")
        assert guarded < raw / 2, name
    assert written(*CONSTANT, tmp_path)[0] == pytest.approx(2.98)  # what the paper's rule pays for it


@pytest.mark.parametrize(("name", "options"), [("tldr", {}), ("arxiv", {}), ("tldr", {"agents": 1, "reward": "guarded"})])
def test_diagnostics_reach_no_critic(name, options):
    config = parse_config({"env": {"name": name, **options}})
    env = make(name, **options)
    _, info, _ = play(env, *[CONSTANT[0]] * len(env.possible_agents))
    assert env.diagnostics <= info["metrics"].keys()
    assert metric_names(config) == tuple(sorted(info["metrics"].keys() - env.diagnostics))
    assert not [word for word in env.diagnostics if word in env.state()]


def test_an_unknown_reward_is_refused():
    with pytest.raises(EnvError, match="reward='strict' is not one of paper, guarded"):
        Tldr(wording="terse", reward="strict")
