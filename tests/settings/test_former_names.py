"""Settings under names of before: a recipe is refused with the present name, and an old run is read as what it was."""

from __future__ import annotations

import pytest
from refusals import refused, rooms

from collm.settings import former
from collm.settings.load import parse_config, parse_resolved

OLD = {
    "run": {"keep": 3, "episodes_saved": 1},
    "algorithm": {
        "name": "collm-dc", "advantage": "td_lambda", "critic": "own", "critic_kind": "V", "critic_body": "policy",
        "critic_lam": 0.9
    },
    "critic": {"coef": 0.6, "value_clip": None, "difference": False, "lr": 1e-4},
    "learner": {"betas": [0.9, 0.999], "weight_decay": 0.0, "warmup": 0, "lr": 1e-3},
    "rollout": {"vllm": None, "protocol": "single"},
}  # fmt: skip
OLD_LORA = {
    "rank": 8,
    "alpha": 32.0,
    "dropout": 0.0,
    "targets": ["all-linear"],
    "base": "float32",
    "agents": None,
    "critics": False,
}
NO_CRITIC = {"critic__metrics": False, "algorithm__lam": 0.0, "algorithm__critic_lam": 0.0, "algorithm__critic": "none"}


def old_run(**changes):
    """What a run directory of before held, as far as names changed: collm-dc with value heads."""
    kept = parse_config(rooms(run__seed=3)).resolved()
    for room, gone in (("algorithm", ("baseline", "teammates")), ("critic", ("reads", "body", "lam"))):
        kept[room] = {key: value for key, value in kept[room].items() if key not in gone}
    for room, values in OLD.items():
        kept[room] = {**kept[room], **values}
    kept["team"]["lora"] = dict(OLD_LORA)
    for name, value in changes.items():
        room, _, key = name.partition("__")
        kept[room][key] = value
    return kept


@pytest.mark.parametrize("name", list(former.NAMES))
def test_a_former_name_is_refused_with_what_takes_its_place(name):
    room, *path = name.split(".")
    value = 1
    for key in reversed(path):
        value = {key: value}
    message = refused({"env": {"name": "agree"}, room: value})
    assert message == f"{name} is not a setting any more: {former.NAMES[name]}"


def test_the_settings_of_an_old_run_are_read_under_their_present_names():
    config = parse_resolved(old_run())
    assert (config.algorithm.baseline, config.algorithm.teammates, config.critic.reads) == ("value", "none", "own")
    assert (config.critic.body, config.critic.lam, config.critic.lr, config.run.seed) == ("policy", 0.9, 1e-4, 3)
    assert config.rollout.protocol == "parallel"
    assert config.team.lora.rank == 8
    assert parse_resolved(config.resolved()) == config, "settings of today are taken as they are"


JOINT = {"algorithm__critic": "joint", "algorithm__critic_body": "model"}
FORMS = [
    ({"algorithm__advantage": "return", "algorithm__critic_body": "model", **NO_CRITIC}, ("none", "none", "joint", "model")),
    ({"algorithm__advantage": "group_max", "algorithm__group_size": 4, **NO_CRITIC}, ("group_max", "none", "joint", "policy")),
    ({"algorithm__advantage": "counterfactual", **JOINT}, ("counterfactual", "none", "joint", "model")),
    ({"critic__difference": True, "critic__metrics": True, **JOINT}, ("value", "replay", "joint", "model")),
    ({"algorithm__critic_body": "model", "team__lora": None}, ("value", "none", "own", "auto")),
]


@pytest.mark.parametrize(("changes", "found"), FORMS)
def test_every_old_algorithm_has_its_present_form(changes, found):
    config = parse_resolved(old_run(**changes))
    assert (config.algorithm.baseline, config.algorithm.teammates, config.critic.reads, config.critic.body) == found


def test_what_an_old_run_learned_with_and_is_gone_is_named():
    assert former.lost(old_run()) == []
    assert former.lost(old_run(learner__betas=[0.8, 0.9], critic__value_clip=0.2)) == [
        "critic.value_clip=0.2",
        "learner.betas=[0.8, 0.9]",
    ]
    assert former.lost(old_run(team__compute="bfloat16")) == ["team.lora.base='float32'"]


def test_old_runs_show_thoughts_and_keep_the_templates_system_message():
    kept = parse_config(rooms()).resolved()
    for key in ("system", "thinking"):
        del kept["team"][key]
    assert (parse_resolved(kept).team.system, parse_resolved(kept).team.thinking) == (None, "shown")
    assert parse_config(rooms()).team.thinking == "off"


def test_a_setting_that_came_later_keeps_the_meaning_of_older_runs(monkeypatch):
    """Whatever its preset says today: otherwise a resumed run would go on as another algorithm."""
    monkeypatch.setitem(former.ADDED, ("critic", "metrics"), False)
    kept = parse_config(rooms(run__seed=3)).resolved()
    assert parse_resolved(kept).critic.metrics == "auto"
    del kept["critic"]["metrics"]
    assert parse_resolved(kept).critic.metrics == "none"


@pytest.mark.parametrize(("before", "now"), [(True, "global"), ("true", "global"), (False, "none"), ("readings", "readings")])
def test_truth_values_of_critic_metrics_keep_their_meaning(before, now):
    assert parse_config(rooms(critic__metrics=before)).critic.metrics == now
    kept = parse_config(rooms()).resolved()
    kept["critic"]["metrics"] = before
    assert parse_resolved(kept).critic.metrics == now


def test_an_old_run_keeps_its_prompts_and_a_run_of_today_records_its_own():
    kept = parse_config(rooms()).resolved()
    assert kept["env"]["wording"] == "plain"
    del kept["env"]["wording"]
    assert parse_resolved(kept).env.options["wording"] == "terse"
    own = {**kept, "env": {"name": "module:Own"}}
    assert parse_resolved(own).env.options == {}, "environments of the user's own have their own options"
