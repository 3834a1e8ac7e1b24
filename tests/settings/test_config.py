"""Settings: unknown ones, wrong types, contradictions; each refused in one message with value, reason and way out."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from refusals import refused, rooms

from collm.cli.main import main, split_overrides
from collm.errors import ConfigError
from collm.settings.load import describe, load_config, parse_config, parse_resolved, parse_value
from collm.settings.presets import ALGORITHMS, BASELINES
from collm.settings.rooms import TABLES, Config

ENV = {"env": {"name": "agree"}}


# --- unknown names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (rooms(algorithm__lamda=0.5), "unknown setting 'algorithm.lamda'. Did you mean 'algorithm.lam'?"),
        (rooms(learner__rl=1e-3), "unknown setting 'learner.rl'. Did you mean 'learner.lr'?"),
        (rooms(run__sed=3), "unknown setting 'run.sed'. Did you mean 'run.seed'?"),
        (
            rooms(critic__normalise_targets=True),
            "unknown setting 'critic.normalise_targets'. Did you mean 'critic.normalize_targets'?",
        ),
        (ENV | {"algoritm": {"lam": 1}}, "unknown room 'algoritm'. Did you mean 'algorithm'?"),
        (ENV | {"seed": 1}, "unknown room 'seed'."),
    ],
)
def test_unknown_settings_are_refused_with_the_nearest_name(values, expected):
    assert refused(values).startswith(expected)


def test_every_mistake_is_named_at_once():
    message = refused(rooms(algorithm__lamda=1, run__sed=1, learner__lr=-1))
    assert len(message.split("\n")) == 3
    for name in ("algorithm.lamda", "run.sed", "learner.lr"):
        assert name in message


def test_the_place_that_an_unknown_setting_points_to_lists_all_settings(capsys):
    """The message of a name without a near one sends the reader to a command: it must list every setting."""
    message = refused(rooms(run__qqqq=1))
    assert "`collm train --" in message
    option = message.split("`collm train ")[1].split("`")[0]
    with contextlib.suppress(SystemExit):
        main(["train", option])
    shown = capsys.readouterr().out
    assert [name for name, _, _ in describe() if name not in shown] == []


def test_a_missing_task_is_explained():
    for values in ({}, {"env": {}}, {"run": {"seed": 1}}):
        message = refused(values)
        assert "env.name is missing" in message
        assert "collm tasks" in message


def test_unknown_presets_are_refused_with_the_nearest_name():
    assert "Did you mean 'collm-cc'?" in refused(rooms(algorithm__name="colm-cc"))
    assert "Did you mean 'magrpo'?" in refused(rooms(algorithm__name="magrp0"))
    message = refused(rooms(algorithm__name="ppo-for-everything"))
    assert "'ppo-for-everything' is not an algorithm" in message
    assert "collm algorithms" in message


# --- wrong values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("run__iterations", "many", "integer"),
        ("run__iterations", 2.5, "integer"),
        ("run__iterations", 0, "1"),
        ("run__seed", -1, "0"),
        ("run__name", "../escape", "match"),
        ("run__name", "", "match"),
        ("run__trackers", "perhaps", "'tensorboard'"),
        ("learner__lr", 0, "greater than 0"),
        ("learner__lr", float("nan"), "should be"),
        ("learner__lr", "fast", "number"),
        ("learner__schedule", "sine", "cosine"),
        ("rollout__top_p", 0, "greater than 0"),
        ("rollout__top_p", 1.5, "1"),
        ("rollout__temperature", -1, "0"),
        ("rollout__max_tokens", 0, "1"),
        ("rollout__history", "all", "'full'"),
        ("algorithm__gamma", 1.01, "1"),
        ("algorithm__baseline", "gae", "group_mean"),
        ("algorithm__loss", "dpo", "reinforce"),
        ("critic__max_tokens", 3, "16"),
        ("critic__reads", True, "'joint'"),
        ("team__compute", "float16", "bfloat16"),
        ("env__name", 3, "string"),
    ],
)
def test_a_wrong_value_is_named_with_the_setting_and_the_reason(key, value, reason):
    message = refused(rooms(**{key: value}))
    setting = key.replace("__", ".")
    assert setting in message
    assert reason in message
    assert "\n" not in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"env": "agree"}, "env"),
        (ENV | {"run": 3}, "run"),
        (ENV | {"algorithm": "magrpo"}, "algorithm"),
        (ENV | {"learner": [1]}, "learner"),
    ],
)
def test_a_room_that_is_no_table_is_explained(values, named):
    """`env = "agree"` in a recipe: the message says that a table [env] is wanted, not what class pydantic looked for."""
    message = refused(values)
    assert named in message
    assert "table" in message
    assert "None" not in message


@pytest.mark.parametrize("value", [float("inf"), True])
@pytest.mark.parametrize("key", ["learner__lr", "critic__lr", "rollout__temperature", "algorithm__kl_coef"])
def test_a_rate_is_a_finite_number(key, value):
    """`--learner.lr inf` would make every weight NaN; `--learner.lr true` would train at a rate of 1."""
    assert key.replace("__", ".") in refused(rooms(**{key: value}))


def test_a_preset_that_is_not_a_name_is_a_config_error():
    for name in ([1], {"a": 1}, 3, None):
        refused(rooms(algorithm__name=name))


# --- contradictions ------------------------------------------------------------------------------------------------------

# Settings that contradict each other, what the message must name, and its ways out: each must then be accepted.
CONTRADICTIONS = [
    (
        {"algorithm__name": "magrpo", "algorithm__group_size": 1},
        ["algorithm.baseline='group_mean'", "algorithm.group_size=1", "Set algorithm.group_size=4", "'value'"],
        [{"algorithm__group_size": 4}, {"algorithm__baseline": "value"}],
    ),
    (
        {"algorithm__name": "mareinforce", "algorithm__baseline": "mine:f", "algorithm__group_size": 1},
        ["algorithm.baseline='mine:f'", "algorithm.group_size=1", "Set algorithm.group_size=4"],
        [{"algorithm__group_size": 4}],
    ),
    (
        {"critic__body": "policy"},
        ["critic.body='policy'", "Set critic.reads='own'", "critic.body='auto'"],
        [{"critic__reads": "own"}, {"critic__body": "auto"}],
    ),
    (
        {"critic__body": "policy", "critic__reads": "own", "algorithm__baseline": "counterfactual"},
        ["critic.body='policy'", "algorithm.baseline='value'"],
        [{"algorithm__baseline": "value"}, {"critic__body": "auto"}],
    ),
    (
        {"critic__body": "none", "algorithm__baseline": "counterfactual"},
        ["algorithm.baseline='counterfactual'", "critic.body='none'", "Set algorithm.baseline='value'"],
        [{"algorithm__baseline": "value"}, {"critic__body": "auto"}],
    ),
    (
        {"critic__epochs": 2},  # of collm-cc, whose V is a regression alone
        ["critic.epochs=2", "critic.body='none'", "Leave it out, or set critic.body='auto'"],
        [{"critic__epochs": 1}, {"critic__body": "auto"}],
    ),
    (
        {"critic__body": "none", "critic__replay": 4},
        ["critic.replay=4", "critic.body='none'", "Leave it out, or set critic.body='auto'"],
        [{"critic__replay": None}, {"critic__body": "auto", "critic__epochs": 2}],
    ),
    (
        {"critic__body": "frozen", "algorithm__baseline": "counterfactual"},
        ["algorithm.baseline='counterfactual'", "critic.body='frozen'", "Set algorithm.baseline='value'"],
        [{"algorithm__baseline": "value"}, {"critic__body": "auto"}],
    ),
    (
        {"critic__body": "frozen", "critic__loss": "hl_gauss"},
        ["critic.loss='hl_gauss'", "critic.body='frozen'", "Leave it out, or set critic.body='auto'"],
        [{"critic__loss": "mse"}, {"critic__body": "auto"}],
    ),
    (
        {"critic__body": "auto", "critic__replay": 4},
        ["critic.replay=4", "critic.epochs=1", "Set critic.epochs=50, or critic.replay=1"],
        [{"critic__epochs": 50}, {"critic__replay": 1}],
    ),
    (
        {"critic__body": "auto", "critic__loss": "hl_gauss", "critic__normalize_targets": True},
        ["critic.normalize_targets=true", "critic.loss='hl_gauss'", "set critic.loss='mse'"],
        [{"critic__normalize_targets": False}, {"critic__loss": "mse"}],
    ),
    (
        {"critic__body": "policy", "critic__reads": "own", "critic__replay": 4},
        ["critic.replay=4", "value head", "Leave it out, or set critic.body='auto'"],
        [{"critic__replay": None}, {"critic__body": "auto", "critic__epochs": 50}],
    ),
    (
        {"algorithm__name": "magrpo", "algorithm__normalize": "group", "algorithm__group_size": 3},
        ["algorithm.normalize='group'", "at least 4", "3", "Set normalize='agent'"],
        [{"algorithm__normalize": "agent"}, {"algorithm__group_size": 4}],
    ),
    (
        {"algorithm__normalize": "group"},
        ["algorithm.normalize='group'", "'value'", "Set normalize='agent'"],
        [{"algorithm__normalize": "agent"}],
    ),
    (
        {"algorithm__epochs": 2},
        ["algorithm.epochs=2", "loss='reinforce'", "Set algorithm.loss='ppo_clip'", "epochs=1"],
        [{"algorithm__loss": "ppo_clip"}, {"algorithm__loss": "sequence_clip"}, {"algorithm__epochs": 1}],
    ),
    ({"algorithm__tree": True}, ["algorithm.tree=true", "Set algorithm.tree=false"], [{"algorithm__tree": False}]),
    (
        {"algorithm__name": "mareinforce", "algorithm__tree": True, "algorithm__group_size": 1},
        ["algorithm.tree=true", "group_size >= 2"],
        [{"algorithm__tree": False}, {"algorithm__group_size": 2}],
    ),
    (
        {"rollout__temperature": 0},
        ["rollout.temperature=0", "nothing to learn", "Set rollout.temperature=1.0"],
        [{"rollout__temperature": 1.0}],
    ),
    (
        {"algorithm__name": "magrpo", "critic__warmup": 5},
        ["critic.warmup=5", "magrpo has no critic", "Set critic.warmup=0"],
        [{"critic__warmup": 0}],
    ),
]


@pytest.mark.parametrize(("settings", "parts", "ways_out"), CONTRADICTIONS, ids=["-".join(c[0]) for c in CONTRADICTIONS])
def test_a_contradiction_is_refused_and_its_way_out_works(settings, parts, ways_out):
    message = refused(rooms(**settings))
    assert "\n" not in message, "one message"
    for part in parts:
        assert part in message
    for way_out in ways_out:
        parse_config(rooms(**{**settings, **way_out}))


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm__name": "collm-dc", "critic__body": "policy", "critic__state": True},
        {"algorithm__name": "collm-dc", "critic__body": "policy", "critic__model": "tiny"},
        {"critic__body": "none", "critic__state": True},
        {"critic__body": "none", "critic__model": "tiny"},
        {"critic__body": "none", "critic__normalize_targets": True},
        {"algorithm__name": "magrpo", "critic__state": True},
        {"algorithm__name": "magrpo", "critic__normalize_targets": True},
        {"algorithm__name": "magrpo", "algorithm__lam": 0.9},
        {"run__iterations": 5, "critic__warmup": 5},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_a_setting_that_would_do_nothing_is_refused(settings):
    """Contradictions are refused at once; here one setting has no effect beside the others, or the actors never learn."""
    refused(rooms(**settings))


# --- presets, overrides, round trips -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_preset_is_a_valid_config_that_survives_saving(name):
    config = parse_config(rooms(algorithm__name=name))
    for setting, value in ALGORITHMS[name].settings().items():
        room, _, key = setting.partition(".")
        assert getattr(getattr(config, room), key) == value
    assert config.run_name == f"agree-{name}-seed0"
    again = parse_config(json.loads(json.dumps(config.resolved())))
    assert again == config


def test_presets_stand_for_what_the_method_says():
    configs = {name: parse_config(rooms(algorithm__name=name)) for name in ALGORITHMS}
    told = {
        n: (c.algorithm.baseline, c.algorithm.teammates, c.algorithm.has_critic and c.critic.reads) for n, c in configs.items()
    }
    assert told == {
        "collm-cc": ("value", "replay", "joint"),
        "collm-cc-paper": ("value", "none", "joint"),
        "collm-dc": ("value", "none", "own"),
        "magrpo": ("group_mean", "none", False),
        "marloo": ("leave_one_out", "none", False),
        "maremax": ("group_max", "none", False),
        "mareinforce": ("none", "none", False),
        "ac": ("value", "none", "joint"),
        "grpo": ("group_mean", "none", False),
    }
    for (
        name,
        config,
    ) in configs.items():  # switches beyond the paper's recipe are off, but lambda where its ablation shows that it pays
        a = config.algorithm
        assert (a.gamma, a.lam, config.critic.lam, a.epochs, a.normalize, a.kl_coef, a.loss) == (
            0.9,
            0.9 if name in ("collm-dc", "ac") else 0.0,
            0.9 if name in ("collm-cc", "collm-dc", "ac") else 0.0,
            1,
            "agent" if name == "collm-cc-paper" else "none",
            0.0,
            "reinforce",
        )


def test_a_preset_without_its_critic_has_no_critic_settings():
    config = parse_config(rooms(algorithm__baseline="group_mean", algorithm__group_size=4))
    assert not config.algorithm.has_critic
    assert config.critic.metrics == "none"


def test_the_presets_difference_baseline_goes_with_its_baseline_and_its_metrics():
    def teammates(**settings):
        return parse_config(rooms(**settings)).algorithm.teammates

    assert teammates() == "replay"
    for no in (False, 0, "off", "no", "False"):
        assert teammates(critic__metrics=no) == "none"
    assert "critic.metrics" in refused(rooms(critic__metrics="perhaps"))
    for baseline in ("counterfactual", "none"):
        assert teammates(algorithm__baseline=baseline) == "none"


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("reads", ["joint", "own"])
def test_the_difference_baseline_goes_with_every_baseline(baseline, reads):
    config = parse_config(
        rooms(algorithm__baseline=baseline, algorithm__teammates="replay", algorithm__group_size=4, critic__reads=reads)
    )
    assert config.algorithm.teammates == "replay"
    assert config.algorithm.critic_kind == ("Q" if baseline == "counterfactual" else "V")


def test_trackers_are_a_list_of_known_names():
    def trackers(value):
        return parse_config(rooms(run__trackers=value)).run.trackers

    assert parse_config(ENV).run.trackers == ["tensorboard"]
    assert trackers("wandb") == ["wandb"]
    assert trackers([]) == []
    assert "'mlflow'" in refused(rooms(run__trackers=["tensorboard", "mlflw"]))


def test_there_are_at_most_74_settings():
    assert len(list(describe())) <= 74


def test_an_iteration_is_not_cut_into_more_pieces_than_it_has_tasks():
    assert parse_config(rooms(rollout__shards=3, rollout__tasks=3)).rollout.shards == 3
    assert "Set rollout.shards=3 at most, or more tasks." in refused(rooms(rollout__shards=4, rollout__tasks=3))
    assert "rollout.shards" in refused(rooms(rollout__shards=0))


def test_runs_of_before_there_were_shards_have_one():
    kept = parse_config(rooms()).resolved()
    del kept["rollout"]["shards"]
    assert parse_resolved(kept).rollout.shards == 1


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.1:6379", "head.cluster-2:6379", "[fe80::1]:6379", "none", None])
def test_addresses_of_a_cluster(address):
    assert parse_config(rooms(cluster__address=address)).cluster.address == (None if address == "none" else address)


@pytest.mark.parametrize("address", ["", "here", "10.0.0.1", "ray://10.0.0.1:10001", "10.0.0.1:port", "a b:1"])
def test_other_addresses_are_refused(address):
    assert "Set 'local', 'auto', or HOST:PORT" in refused(rooms(cluster__address=address))


@pytest.mark.parametrize("name", ["collm-cc", "collm-dc", "ac"])
@pytest.mark.parametrize(
    ("changes", "body"),
    [
        ({}, "none"),
        ({"critic__metrics": "readings"}, "none"),
        ({"critic__metrics": "none"}, "auto"),
        ({"algorithm__baseline": "counterfactual"}, "auto"),
        ({"critic__metrics": "none", "critic__body": "none"}, "none"),
        ({"critic__body": "frozen"}, "frozen"),
    ],
)
def test_a_language_model_is_the_critic_where_no_regression_can_be(name, changes, body):
    """A critic of text, or of answers, cannot be a regression on numbers; what a recipe sets itself stays."""
    assert parse_config(rooms(algorithm__name=name, **changes)).critic.body == body


@pytest.mark.parametrize("share", [0, -1, 1.5, "much"])
def test_a_model_has_a_fraction_of_a_device(share):
    assert "cluster.devices" in refused(rooms(cluster__devices={"critic": share}))
    assert parse_config(rooms(cluster__devices={"critic": 1, "a": 0.5})).cluster.devices == {"critic": 1.0, "a": 0.5}


def test_what_regressions_read():
    """(with environment metrics, without) of the returns; then of the difference baseline."""

    def read(**settings):
        config = parse_config(rooms(**settings))
        reads = [(config.returns_read(reported=r), config.changes_read(reported=r)) for r in (True, False)]
        return tuple(zip(*reads, strict=True))

    assert read() == (("global", "readings"), ("global", "readings"))
    assert read(algorithm__name="collm-dc") == (("readings", "readings"),) * 2
    assert read(critic__reads="own")[0] == ("readings", "readings")
    assert read(algorithm__name="ac")[0] == ("readings", "readings")
    for metrics in ("global", "readings", "none", "mine:read"):
        assert read(critic__metrics=metrics)[0] == (metrics, metrics)
    assert read(critic__metrics="none", algorithm__teammates="replay")[1] == ("global", "global")
    assert read(critic__metrics="none", critic__body="none", algorithm__teammates="replay")[1] == ("none", "none")
    assert read(algorithm__teammates="effects")[1] == ("readings", "readings")
    assert read(algorithm__teammates="effects", critic__metrics="mine:read")[1] == ("mine:read", "mine:read")
    magrpo = {"algorithm__name": "magrpo", "algorithm__teammates": "replay"}
    assert read(**magrpo)[1] == ("global", "global")
    assert read(**magrpo, critic__metrics="readings")[1] == ("readings", "readings")


def test_what_regressions_cannot_read_is_refused():
    assert "Did you mean 'readings'?" in refused(rooms(critic__metrics="reading"))
    message = refused(rooms(algorithm__name="magrpo", critic__metrics="readings"))
    assert message.startswith("critic.metrics='readings', but magrpo has no critic. Set critic.metrics='none'")


def test_settings_of_a_recipe_beat_the_preset():
    config = parse_config(rooms(algorithm__name="magrpo", algorithm__group_size=8, algorithm__gamma=0.5))
    assert (config.algorithm.group_size, config.algorithm.gamma, config.algorithm.baseline) == (8, 0.5, "group_mean")


def test_overrides_beat_the_recipe(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[env]\nname = "agree"\nturns = 3\n[run]\nseed = 1\n[team.models]\nagent_0 = "a"\n[algorithm]\nname = "magrpo"\n'
    )
    plain = load_config(recipe)
    assert (plain.run.seed, plain.env.options, plain.algorithm.group_size) == (1, {"turns": 3, "wording": "plain"}, 4)
    changed = load_config(
        recipe,
        {
            "run.seed": 7,
            "env.turns": 5,
            "env.colours": 2,
            "team.models.agent_1": "b",
            "algorithm.name": "collm-dc",
            "learner.lr": 1e-3,
        },
    )
    assert changed.run.seed == 7
    assert changed.env.options == {"turns": 5, "colours": 2, "wording": "plain"}
    assert changed.team.models == {"agent_0": "a", "agent_1": "b"}
    assert changed.critic.reads == "own"
    assert changed.learner.lr == 1e-3
    assert load_config(str(recipe)) == plain  # nothing is remembered; a name does as well as a path
    assert load_config(None, {"env.name": "agree"}).env.name == "agree"


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ('run = 3\nenv = {name = "agree"}', {"run.seed": 1}),
        ('[env]\nname = "agree"\n[run]\nseed = 3', {"run.seed.x": 1}),
        ('[env]\nname = "agree"', {"lr": 1}),
        ('[env]\nname = "agree"', {"run.": 1}),
        ('[env]\nname = "agree"', {".seed": 1}),
    ],
)
def test_an_override_that_does_not_fit_the_recipe_is_a_config_error(tmp_path, recipe, overrides):
    path = tmp_path / "r.toml"
    path.write_text(recipe)
    with pytest.raises(ConfigError):
        load_config(path, overrides)


def test_unreadable_recipes_are_config_errors(tmp_path):
    (tmp_path / "broken.toml").write_text("[env\nname=")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "twice.toml").write_text("[run]\nseed=1\nseed=2\n")
    for path, reason in (
        (tmp_path / "none.toml", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "broken.toml", "not valid TOML"),
        (tmp_path / "binary.toml", "not valid TOML"),
        (tmp_path / "twice.toml", "not valid TOML"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(path) in str(caught.value)
        assert reason in str(caught.value)


def test_describe_covers_every_setting_with_a_sentence():
    described = {name: (default, sentence) for name, default, sentence in describe()}
    config = parse_config(ENV).model_dump()
    inner = {
        f"{name}.{key}": field.get_default() for name, table in TABLES.items() for key, field in table.model_fields.items()
    }
    plain = {f"{room}.{key}" for room, settings in config.items() for key in settings} - {*TABLES, "env.wording"}
    assert set(described) == plain | set(inner)
    for name, (_, sentence) in described.items():
        assert sentence.endswith("."), name
        assert len(sentence.split()) >= 3, name
        assert "\n" not in sentence
        assert sentence[0].isupper() or sentence[0] in '"0', name
    # The defaults shown are those a run gets.
    for name, (default, _) in described.items():
        room, _, key = name.partition(".")
        if name in inner:
            assert json.loads(default) == inner[name], name
        elif name != "env.name":
            assert json.loads(default) == json.loads(json.dumps(config[room][key])), name


def test_a_config_cannot_be_changed_in_passing():
    config = parse_config(ENV)
    with pytest.raises((ValueError, dataclasses.FrozenInstanceError)):
        config.run.seed = 5
    assert isinstance(config, Config)


# --- command-line values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1", -1),
        ("1e-3", 1e-3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('["IT", "ME"]', ["IT", "ME"]),
        ("magrpo", "magrpo"),
        ('"3"', "3"),
        ("", ""),
        ("runs/a b", "runs/a b"),
        ("[1, 2", "[1, 2"),
        ("'quoted'", "quoted"),
    ],
)
def test_command_line_values(text, value):
    got = parse_value(text)
    assert got == value
    assert type(got) is type(value)


def test_a_value_cannot_bring_further_settings():
    for text in ("1\nother = 2", "1 # comment"):
        got = parse_value(text)
        assert got == text


@pytest.mark.parametrize("name", ["2024", "7", "1e3", "2024-01-01", "true", "inf"])
def test_any_allowed_name_of_a_run_can_be_given_on_the_command_line(name):
    """`--run.name 2024-01-01` is a natural name, and one that the pattern allows."""
    _, overrides = split_overrides(["--env.name", "agree", "--run.name", name])
    assert load_config(None, overrides).run_name == name
