"""The blueprint: each way of sharing by hand, then against what is built: parameters of units, and names in a checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from learners import critic_parts, frozen_parts, policy_parts

from collm.errors import ConfigError
from collm.models.blueprint import BaseSpec, Blueprint, CriticSpec, PolicySpec, ReferenceSpec, policies_of, saved_policies
from collm.models.sources import base_named_by, resolve
from collm.settings.load import apply_overrides, parse_config
from collm.settings.rooms import Config, LoraSettings

AGENTS = ("agent_0", "agent_1", "agent_2")
TINY = BaseSpec(resolve("tiny"), "float32")
OWN = {"algorithm.name": "collm-dc"}
HEADS = {**OWN, "critic.body": "policy"}
LORA = {"team.lora.rank": 4}
ELSEWHERE = {"team.models": {"agent_0": "http://127.0.0.1:9/v1"}}


def config_of(**overrides: Any) -> Config:
    values: dict[str, Any] = {"env": {"name": "agree", "agents": 3}, "critic": {"body": "auto"}, "run": {"device": "cpu"}}
    apply_overrides(values, overrides)
    return parse_config(values)


def blueprint_of(**overrides: Any) -> Blueprint:
    return Blueprint.of(config_of(**overrides), AGENTS)


def grouped(blueprint: Blueprint) -> list[tuple[list[str], list[str], list[str]]]:
    """Names of the policies, critics and references of each unit."""
    return [
        ([p.name for p in unit.policies], [c.name for c in unit.critics], [r.policy for r in unit.references])
        for unit in blueprint.units
    ]


def bodies(blueprint: Blueprint) -> list[tuple[str, str, str]]:
    return [(critic.name, critic.body, critic.policy) for critic in blueprint.critics]


# --- policies -----------------------------------------------------------------------------------------------------------


def test_whole_models_share_nothing() -> None:
    found = blueprint_of()
    assert found.policies == tuple(PolicySpec((agent,), "tiny") for agent in AGENTS)
    assert found.critics == (CriticSpec("team", AGENTS, True, "V", "copy", "agent_0", "tiny"),)
    assert found.critics[0].label == "critic"
    assert found.references == ()
    assert found.remote == ()
    assert grouped(found) == [(["agent_0"], [], []), (["agent_1"], [], []), (["agent_2"], [], []), ([], ["team"], [])]
    assert [unit.base for unit in found.units] == [None] * 4
    assert found.checkpoint_names == (
        "policy-agent_0", "optimizer-agent_0", "policy-agent_1", "optimizer-agent_1", "policy-agent_2", "optimizer-agent_2",
        "critic-team", "optimizer-critic-team",
    )  # fmt: skip


def test_a_shared_policy_answers_for_all_that_start_alike() -> None:
    found = blueprint_of(**{"team.shared": True})
    assert found.policies == (PolicySpec(AGENTS, "tiny"),)
    assert found.policy_of("agent_2").name == "agent_0"
    two = blueprint_of(**{"team.shared": True, "team.models": {"agent_1": "another"}})
    assert two.policies == (PolicySpec(("agent_0", "agent_2"), "tiny"), PolicySpec(("agent_1",), "another"))
    assert two.agents == two.critics[0].agents == AGENTS
    with pytest.raises(KeyError):
        two.policy_of("agent_3")


def test_adapters_of_one_model_sit_on_one_base() -> None:
    found = blueprint_of(**LORA)
    lora = LoraSettings(rank=4)
    assert found.policies == tuple(PolicySpec((agent,), "tiny", TINY, lora) for agent in AGENTS)
    assert bodies(found) == [("team", "adapter", "agent_0")]
    assert found.critics[0].base == TINY
    assert grouped(found) == [(list(AGENTS), ["team"], [])]
    assert found.units[0].base == TINY


def test_adapters_of_other_models_or_formats_do_not() -> None:
    found = blueprint_of(**LORA, **{"team.models": {"agent_1": "another"}})
    assert grouped(found) == [(["agent_0", "agent_2"], ["team"], []), (["agent_1"], [], [])]
    assert [unit.base for unit in found.units] == [TINY, BaseSpec("another", "float32")]
    half = blueprint_of(**LORA, **{"team.compute": "bfloat16"})
    assert half.policies[0].base == BaseSpec(resolve("tiny"), "bfloat16")
    assert half.critics[0].base == half.policies[0].base


def test_one_model_under_two_names_is_one_base() -> None:
    found = blueprint_of(**LORA, **{"team.models": {"agent_1": resolve("tiny")}, "critic.model": resolve("tiny")})
    assert grouped(found) == [(list(AGENTS), ["team"], [])]


def test_adapters_beside_whole_models() -> None:
    some = {"team.lora.agents": ["agent_1"]}
    found = blueprint_of(**some)
    assert [policy.base for policy in found.policies] == [None, TINY, None]
    assert bodies(found) == [("team", "adapter", "agent_1")]  # it reads for agent_0 first, and sits on the one base there is
    assert grouped(found) == [(["agent_0"], [], []), (["agent_1"], ["team"], []), (["agent_2"], [], [])]
    shared = blueprint_of(**some, **{"team.shared": True})
    assert [policy.agents for policy in shared.policies] == [("agent_0", "agent_2"), ("agent_1",)]


def test_the_folder_of_an_adapter_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny"}')
    found = blueprint_of(**{"team.models": {"agent_1": str(tmp_path)}})
    assert [policy.base for policy in found.policies] == [None, TINY, None]
    assert bodies(found) == [("team", "adapter", "agent_1")]
    for damaged in ("{}", "[]"):
        (tmp_path / "adapter_config.json").write_text(damaged)
        with pytest.raises(ConfigError, match="does not name its base"):
            blueprint_of(**{"team.models": {"agent_1": str(tmp_path)}})


def test_an_adapter_for_another_revision_of_its_base_is_refused(tmp_path: Path) -> None:
    def base_with(base: str, revision: str | None) -> str:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "revision": revision}))
        return base_named_by(str(tmp_path))

    assert base_with("owner/base", None) == base_with("owner/base", "main") == "owner/base"
    assert base_with(str(tmp_path), "4f1c") == str(tmp_path)  # a folder is what it is
    with pytest.raises(
        ConfigError, match=r"for revision '4f1c' of its base 'owner/base'.*`hf download owner/base --revision 4f1c"
    ):
        base_with("owner/base", "4f1c")


def test_team_mates_on_servers_have_no_parameters_here() -> None:
    found = blueprint_of(**ELSEWHERE)
    assert found.remote == ("agent_0",)
    assert found.agents == ("agent_1", "agent_2")
    assert bodies(found) == [("team", "copy", "agent_1")]
    assert found.critics[0].agents == ("agent_1", "agent_2")
    assert [critic.name for critic in blueprint_of(**ELSEWHERE, **OWN).critics] == ["agent_1", "agent_2"]
    with pytest.raises(ConfigError, match="nothing is left to train here"):
        blueprint_of(**{"team.model": "tiny", "team.models": dict.fromkeys(AGENTS, "http://127.0.0.1:9/v1")})


# --- critics and references ---------------------------------------------------------------------------------------------


def test_methods_without_a_critic_have_none() -> None:
    found = blueprint_of(**{"algorithm.name": "magrpo"})
    assert found.critics == ()
    assert not found.metric_regression
    assert not found.difference_baseline


def test_which_regressions_there_are() -> None:
    def which(**overrides: Any) -> tuple[bool, bool]:
        found = blueprint_of(**overrides)
        return found.metric_regression, found.difference_baseline

    assert which() == (True, True)
    assert which(**OWN) == (True, False)
    assert which(**{"algorithm.name": "collm-cc-paper"}) == (False, False)
    assert which(**{"algorithm.name": "magrpo", "algorithm.teammates": "effects"}) == (False, True)


def test_own_critics_have_views_of_their_own_where_regressions_read_texts() -> None:
    own = tuple((agent, (agent,)) for agent in AGENTS)
    assert blueprint_of().views == (("team", AGENTS),)
    assert blueprint_of(**OWN).views == own
    assert blueprint_of(**OWN, **{"critic.metrics": "global"}).views == (("team", AGENTS),)
    alone = blueprint_of(**OWN, **{"critic.body": "none"})
    assert alone.labels == {f"{agent}/critic": agent for agent in AGENTS}


def test_own_critics_are_as_many_as_agents_also_where_those_share_weights() -> None:
    found = blueprint_of(**OWN, **{"team.shared": True})
    assert bodies(found) == [(agent, "copy", "agent_0") for agent in AGENTS]
    assert [critic.label for critic in found.critics] == [f"{agent}/critic" for agent in AGENTS]
    assert len(found.units) == 1 + 3
    assert blueprint_of(**OWN, **{"team.models": {"agent_1": "another"}}).critics[1].model == "another"


def test_value_heads_belong_to_the_policy() -> None:
    found = blueprint_of(**HEADS, **{"team.shared": True})
    assert bodies(found) == [(agent, "policy", "agent_0") for agent in AGENTS]
    assert grouped(found) == [(["agent_0"], list(AGENTS), [])]
    assert found.checkpoint_names == (
        "policy-agent_0", "optimizer-agent_0", "critic-agent_0", "critic-agent_1", "critic-agent_2",
    )  # fmt: skip
    assert grouped(blueprint_of(**HEADS, **LORA)) == [(list(AGENTS), list(AGENTS), [])]
    assert blueprint_of(**HEADS, **LORA).critics[1].base == TINY


def test_critics_need_not_be_adapters() -> None:
    found = blueprint_of(**LORA, **{"critic.body": "model"})
    assert found.critics == (CriticSpec("team", AGENTS, True, "V", "model", "agent_0", resolve("tiny")),)
    assert grouped(found) == [(list(AGENTS), [], []), ([], ["team"], [])]
    other = blueprint_of(**LORA, **{"critic.model": "another"})
    assert (other.critics[0].body, other.critics[0].model, other.critics[0].base) == ("model", "another", None)
    assert blueprint_of(**{"critic.model": "tiny"}).critics[0].body == "model"
    q = blueprint_of(**{"algorithm.baseline": "counterfactual"})
    assert q.critics[0].kind == "Q"


def test_a_frozen_body_is_a_base() -> None:
    frozen = {"critic.body": "frozen"}
    found = blueprint_of(**frozen, **OWN)
    assert [(c.body, c.base, c.replay) for c in found.critics] == [("frozen", TINY, 32)] * 3
    assert grouped(found) == [([agent], [], []) for agent in AGENTS] + [([], list(AGENTS), [])]
    assert found.units[-1].base == TINY
    assert found.checkpoint_names[-3:] == tuple(f"replay-critic-{agent}" for agent in AGENTS)
    assert set(found.rates(config_of(**frozen, **OWN))) == set(AGENTS)
    shared = blueprint_of(**frozen, **LORA, **{"team.compute": "bfloat16", "critic.replay": 5})
    assert grouped(shared) == [(list(AGENTS), ["team"], [])]
    assert (shared.critics[0].base, shared.critics[0].replay) == (BaseSpec(resolve("tiny"), "bfloat16"), 5)
    other = blueprint_of(**frozen, **LORA, **{"critic.model": "another"})
    assert grouped(other) == [(list(AGENTS), [], []), ([], ["team"], [])]
    assert other.units[1].base == BaseSpec("another", "float32")
    with pytest.raises(ConfigError, match=r"critic\.body='frozen' reads with the initial model .* Set critic\.model"):
        Blueprint.around(config_of(**frozen), AGENTS, [PolicySpec(AGENTS, "")])


def test_a_replay_is_in_the_checkpoint() -> None:
    found = blueprint_of(**{"critic.replay": 8, "critic.epochs": 50})
    assert found.critics[0].replay == 8
    assert found.checkpoint_names[-3:] == ("critic-team", "optimizer-critic-team", "replay-critic-team")


@pytest.mark.parametrize(
    ("overrides", "units"),
    [
        ({}, {"agent_0": ["agent_0"], "agent_1": ["agent_1"], "agent_2": ["agent_2"], "critic": ["team"]}),
        (HEADS, {agent: [agent] for agent in AGENTS}),
        ({**OWN, "team.shared": True}, {"agent_0": ["agent_0"], **{f"{agent}/critic": [agent] for agent in AGENTS}}),
        (LORA, {"agent_0": ["team", *AGENTS]}),
        ({**LORA, "critic.body": "model"}, {"agent_0": [*AGENTS], "critic": ["team"]}),
        (
            {**LORA, "team.lora.agents": ["agent_1"]},
            {"agent_0": ["agent_0"], "agent_1": ["team", "agent_1"], "agent_2": ["agent_2"]},
        ),
    ],
)
def test_every_part_is_in_one_unit_in_the_learners_order(overrides: dict[str, Any], units: dict[str, list[str]]) -> None:
    found = blueprint_of(**overrides)
    assert {unit.name: [part.name for part in found.alone(unit).parts] for unit in found.units} == units
    together = [part.weights_name for unit in found.units for part in found.alone(unit).parts]
    assert sorted(together) == sorted(part.weights_name for part in found.parts)
    kinds = [isinstance(part, CriticSpec) for part in found.parts]
    assert kinds == sorted(kinds, reverse=True)  # critics first


def test_references_stay_with_their_policies() -> None:
    found = blueprint_of(**{"algorithm.kl_coef": 0.1, "team.lora.agents": ["agent_1"]})
    assert found.references == (ReferenceSpec("agent_0"), ReferenceSpec("agent_1", TINY), ReferenceSpec("agent_2"))
    assert grouped(found)[1] == (["agent_1"], ["team"], ["agent_1"])
    assert len(blueprint_of(**{"algorithm.kl_coef": 0.1, "team.shared": True}).references) == 1


def test_policies_are_found_among_the_names_in_a_checkpoint() -> None:
    names = blueprint_of(**{"team.models": {"agent_1": "another"}}).checkpoint_names
    assert saved_policies([*names, "regression"]) == AGENTS
    assert saved_policies(["policy-a.b", "critic-policy-a"]) == ("a.b",)


def test_without_a_text_critic_there_is_no_critic_but_a_regression() -> None:
    found = blueprint_of(**{"critic.body": "none"})
    assert found.critics == ()
    assert found.labels == {"critic": "agent_0"}
    assert grouped(found) == [([agent], [], []) for agent in AGENTS]
    assert (found.metric_regression, found.difference_baseline) == (True, True)
    alone = blueprint_of(**{"critic.body": "none", "critic.metrics": False})
    assert (alone.metric_regression, alone.difference_baseline) == (True, False)
    none = blueprint_of(**{"critic.body": "none", "algorithm.name": "magrpo"})
    assert (none.critics, none.metric_regression, none.labels) == ((), False, {})


# --- against what is built ----------------------------------------------------------------------------------------------

BUILT: dict[str, dict[str, Any]] = {
    "whole": {},
    "shared": {"team.shared": True},
    "shared, own critics": {"team.shared": True, **OWN},
    "LoRA": LORA,
    "LoRA, own critics, KL": {**LORA, **OWN, "algorithm.kl_coef": 0.1},
    "LoRA, whole critic": {**LORA, "critic.body": "model"},
    "LoRA, another critic": {**LORA, "critic.model": "ANOTHER"},
    "mixture": {"team.lora.agents": ["agent_1"], "algorithm.kl_coef": 0.1},
    "mixture, shared": {"team.lora.agents": ["agent_1"], "team.shared": True},
    "mixture, own critics": {"team.lora.agents": ["agent_1", "agent_2"], **OWN},
    "models": {"team.models": {"agent_1": "ANOTHER"}, "team.shared": True, "algorithm.kl_coef": 0.1},
    "models, LoRA": {"team.models": {"agent_1": "ANOTHER"}, **LORA, **OWN},
    "remote": ELSEWHERE,
    "remote, LoRA": {**ELSEWHERE, **LORA},
    "value heads": HEADS,
    "value heads, shared": {**HEADS, "team.shared": True},
    "value heads, LoRA, KL": {**HEADS, **LORA, "algorithm.kl_coef": 0.1},
    "frozen": {"critic.body": "frozen", **OWN},
    "frozen, LoRA": {"critic.body": "frozen", **LORA},
    "frozen, another critic, LoRA": {"critic.body": "frozen", **LORA, **OWN, "critic.model": "ANOTHER"},
    "replay": {"critic.replay": 4, "critic.epochs": 8},
    "no critic": {"algorithm.name": "magrpo"},
    "no text critic": {"critic.body": "none"},
}


def places(*modules: Any) -> set[int]:
    return {parameter.data_ptr() for module in modules for parameter in module.parameters()}


@pytest.mark.parametrize("case", BUILT)
def test_what_is_built_shares_parameters_as_the_blueprint_says(case: str, tmp_path: Path) -> None:
    """Every policy, critic and reference by where its parameters lie: the same within a unit, none in two."""
    from collm.training.assemble import make_learner, make_team
    from collm.types import Sampling

    another = str(tmp_path / "another")
    overrides = {key: _named(value, another) for key, value in BUILT[case].items()}
    if "ANOTHER" in str(BUILT[case]):
        shutil.copytree(resolve("tiny"), another)
    config = config_of(**overrides)
    blueprint = Blueprint.of(config, AGENTS)
    team = make_team(config, AGENTS)
    assert [(p.agents, p.base) for p in team.specs] == [(p.agents, p.base) for p in blueprint.policies]
    again = Blueprint.around(config, team.agents, team.specs)
    assert bodies(again) == bodies(blueprint)
    assert grouped(again) == grouped(blueprint)
    assert again.checkpoint_names == blueprint.checkpoint_names

    learner = make_learner(team, config, Sampling(max_tokens=4))
    policies = policy_parts(learner)
    critics: dict[str, Any] = {
        part.name.removeprefix("critic-"): part for part in (*critic_parts(learner), *frozen_parts(learner))
    }
    regressions = {} if learner.regressions is None else learner.regressions.modules()
    assert set(learner.tensors()) - set(regressions) == set(blueprint.checkpoint_names)
    assert list(policies) == [policy.name for policy in blueprint.policies]
    assert learner.critic_labels == blueprint.labels
    taken: set[int] = set()
    for unit in blueprint.units:
        held: list[set[int]] = []
        for policy in unit.policies:
            part = policies[policy.name]
            assert part.agents == policy.agents
            held.append(places(part.policy.model, part.policy.trained))
            heads = {c.name for c in unit.critics if c.body == "policy" and c.policy == policy.name}
            assert set(part.heads) == heads
        for critic in unit.critics:
            if critic.body == "policy":
                continue
            module = critics[critic.name].critic
            assert critics[critic.name].agents == critic.agents
            assert critics[critic.name].label == critic.label
            held.append(places(module, *([module.body.base.model] if critic.body in ("adapter", "frozen") else [])))
        for reference in unit.references:
            found = policies[reference.policy].reference
            assert found is not None
            if reference.base is not None:
                held.append(places(found.model, found.body))
            else:  # a copy: it belongs to its policy, and shares no parameter with it
                assert not places(found.model) & (set().union(*held) | taken)
        together = set().union(*held)
        assert len(held) == 1 or set.intersection(*held), "the members of a unit share parameters"
        assert not together & taken, "units share nothing"
        taken |= together
    expected = {r.policy for r in blueprint.references}
    assert {name for name, part in policies.items() if part.reference is not None} == expected


def _named(value: Any, another: str) -> Any:
    if isinstance(value, dict):
        return {key: _named(inner, another) for key, inner in value.items()}
    return another if value == "ANOTHER" else value


def test_a_team_of_ones_own_is_described_by_the_policies_it_holds() -> None:
    from collm.models.team import Team

    team = Team.from_pretrained({"a": "tiny", "b": "tiny"})
    crossed = Team({"x": team.policies["a"], "y": team.policies["b"], "z": team.policies["a"]})
    assert [spec.agents for spec in crossed.specs] == [("x", "z"), ("y",)]
    assert [spec.agents for spec in policies_of({"a": "tiny", "b": "tiny"})] == [("a",), ("b",)]


def test_no_torch_is_loaded() -> None:
    code = "import sys; import collm.models.blueprint; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, {"agent_0": 5e-4, "agent_1": 5e-4, "agent_2": 5e-4, "critic": 5e-4}),
        ({"team.model": "some/model"}, {"agent_0": 5e-6, "agent_1": 5e-6, "agent_2": 5e-6, "critic": 5e-6}),
        ({"team.model": "some/model", **LORA}, {"agent_0": 5e-4, "agent_1": 5e-4, "agent_2": 5e-4, "critic": 1e-4}),
        (
            {**LORA, "team.lora.agents": ["agent_1"], "team.model": "some/model"},
            {"agent_0": 5e-6, "agent_1": 5e-4, "agent_2": 5e-6, "critic": 1e-4},
        ),
        ({"learner.lr": 3e-3, **LORA}, {"agent_0": 3e-3, "agent_1": 3e-3, "agent_2": 3e-3, "critic": 1e-4}),
        ({"learner.lr": 3e-3}, {"agent_0": 3e-3, "agent_1": 3e-3, "agent_2": 3e-3, "critic": 3e-3}),
        ({"learner.lr": 3e-3, "critic.lr": 2e-3, **LORA}, {"agent_0": 3e-3, "agent_1": 3e-3, "agent_2": 3e-3, "critic": 2e-3}),
        ({"team.shared": True, "algorithm.name": "magrpo"}, {"agent_0, agent_1, agent_2": 5e-4}),
        (
            {"algorithm.name": "collm-dc", "critic.body": "policy", "learner.lr": 1e-3},
            {**dict.fromkeys(AGENTS, 1e-3), **dict.fromkeys([f"{agent}/critic" for agent in AGENTS], 1e-3)},
        ),
    ],
)  # fmt: skip
def test_learning_rates_fit_what_learns(changes: dict[str, Any], rates: dict[str, float]) -> None:
    """5e-4 for adapters and the tiny model, 5e-6 for other whole models; critics follow, but for adapters, which have 1e-4."""
    config = config_of(**changes)
    assert Blueprint.of(config, AGENTS).rates(config) == rates
