"""`quote` by hand: what is covered, by whom, when it pays, what is read back, and what is refused."""

from __future__ import annotations

import json

import pytest
from places import ROOT

from collm import check_env, make
from collm.envs.quote import Quote
from collm.envs.quote_texts import texts
from collm.errors import ConfigError
from collm.settings.load import load_config

# content words: fox jumps river bread tower glass
TEXT = "the fox jumps over the river with bread and a tower of glass"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"post": f"{TEXT} and more", "id": n}) + "\n" for n in range(5)))
    return str(path)


def played(env, *turns):
    """Reward, metrics and observations of each turn."""
    env.reset(seed=0, options={"task": 0})
    steps = [env.step(dict(zip(env.possible_agents, answers, strict=True))) for answers in turns]
    first = env.possible_agents[0]
    return [(rewards[first], infos[first]["metrics"], observations) for observations, rewards, _, _, infos in steps]


def short(data, **options):
    return make("quote", data=data, length=13, **{"max_words": 6, **options})


@pytest.mark.parametrize(
    ("first", "second", "covered", "both"),
    [
        ("the fox jumps over the river", "bread and a tower of glass", 1.0, 0.0),
        ("the fox jumps over the river", "the fox jumps over the river", 3 / 6, 3 / 6),
        ("The FOX, the fox!", "fox and glass", 2 / 6, 1 / 6),
        ("the of and", "", 0.0, 0.0),  # stop words earn nothing
        ("foxes jump", "zebra", 0.0, 0.0),  # other forms are other words
        ("a a a a a a glass tower bread", "", 0.0, 0.0),  # only the first six words count
    ],
)
def test_reward_is_the_share_of_content_words_that_somebody_wrote(data, first, second, covered, both):
    ((reward, metrics, _),) = played(short(data), (first, second))
    assert reward == metrics["covered"] == pytest.approx(covered)
    assert metrics["both"] == pytest.approx(both)


def test_metrics_by_hand(data):
    ((_, metrics, _),) = played(short(data), ("Sure: the fox jumps", "glass zebra"))
    assert metrics == pytest.approx(
        {
            "covered": 3 / 6,
            "both": 0.0,
            "share_first": 2 / 6,
            "position_first": (1 + 2) / 2 / 12,
            "share_second": 1 / 6,
            "position_second": 1.0,
            "foreign": 2.0,
            "rejected": 0.0,
        }
    )
    ((_, metrics, _),) = played(short(data), ("", "zebra"))
    assert (metrics["rejected"], metrics["foreign"]) == (2.0, 1.0)
    assert metrics["position_first"] == metrics["position_second"] == 0.5


TURNS = (("fox", "fox"), ("fox jumps", "glass"), ("", ""))


@pytest.mark.parametrize(("reward", "expected"), [("dense", [1 / 6, 2 / 6, 0.0]), ("sparse", [0.0, 0.0, 3 / 6])])
def test_turns_pay_what_is_new_or_all_at_the_end(data, reward, expected):
    steps = played(short(data, turns=3, reward=reward), *TURNS)
    assert [step[0] for step in steps] == pytest.approx(expected)
    assert [step[1]["covered"] for step in steps] == pytest.approx([1 / 6, 3 / 6, 3 / 6])


@pytest.mark.parametrize(
    ("view", "first", "second"),
    [("all", "fox jumps glass", "fox jumps glass"), ("own", "fox jumps", "fox glass")],
)
def test_a_writer_reads_what_all_have_covered_or_itself_alone(data, view, first, second):
    observations = played(short(data, turns=3, view=view), *TURNS)[1][2]
    for agent, words in (("first", first), ("second", second)):
        assert observations[agent].split("\n")[0].endswith(f"covered: {words}.")


def test_the_text_comes_first_and_one_imperative_last(data):
    observations, infos = short(data).reset(seed=0)
    assert observations["second"] == f"{TEXT}\n\nYou are the second writer. Repeat part of this text."
    assert infos == {"first": {}, "second": {}}


@pytest.mark.parametrize("agents", [2, 3, 4, ["ann", "bob", "eve"]])
@pytest.mark.parametrize("options", [{}, {"turns": 3, "reward": "sparse", "view": "own"}])
def test_every_team_keeps_the_contract(agents, options):
    assert len(check_env(make("quote", agents=agents, **options))) == 8


def test_built_in_texts_are_long_enough_and_no_split_shares_one():
    train, held_out = texts("train"), texts("eval")
    assert len({*train, *held_out}) == len(train) + len(held_out) == 80
    assert make("quote").num_tasks == 40
    assert make("quote", split="eval").num_tasks == 40
    beginnings = {" ".join(text.split()[:8]) for text in (*train, *held_out)}
    assert len(beginnings) == 80


def test_nobody_covers_a_built_in_text_alone_and_two_can():
    env = Quote()
    for task in range(env.num_tasks):
        env.reset(seed=0, options={"task": task})
        told = env.text.split()
        alone = env.step({"first": env.text, "second": ""})[1]["first"]
        env.reset(seed=0, options={"task": task})
        shared = env.step({"first": " ".join(told[:10]), "second": " ".join(told[10:])})[1]["first"]
        assert alone < 0.9
        assert shared == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agents": 1}, "agents=1: quote is played by 2 to 4 writers"),
        ({"agents": ["a", "b", "c", "d", "e"]}, "is played by 2 to 4 writers"),
        ({"max_words": 20}, "max_words=20 with length=20: take 1 to length - 1"),
        ({"max_words": 0}, "max_words=0 with"),
        ({"length": 60}, "length=60: no text of the split 'train' has as many words"),
        ({"view": "none"}, "env.view='none'"),
        ({"eval_data": "x.json"}, "eval_data='x.json' comes without data"),
        ({"turns": 0}, "turns=0 leaves nothing to play"),
    ],
)
def test_what_cannot_be_played_is_refused_with_a_way_out(options, message):
    with pytest.raises(ConfigError) as caught:
        make("quote", **options)
    assert message in str(caught.value)


def test_a_text_that_is_too_short_or_has_no_content_is_left_out(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps([{"text": TEXT}, {"text": "the of and a the of and a the of and a the"}, {"text": "fox"}]))
    env = make("quote", data=str(path), eval_data=str(path), length=13)
    assert env.num_tasks == 1


def test_the_recipe_for_a_real_model_holds_what_was_measured_to_learn():
    config = load_config(ROOT / "recipes" / "real" / "quote.toml")
    assert config.rollout.tasks * config.algorithm.group_size == 32
    assert (config.team.lora.rank, config.team.lora.alpha, config.learner.lr) == (16, 32.0, 5e-4)
    assert config.run.iterations * 32 >= 1280
    assert config.run.iterations % config.evaluation.every == 0
