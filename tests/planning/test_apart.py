"""An iteration in several places: operations by hand, and what `collm plan --cluster` says of the paper's team."""

from __future__ import annotations

import json
from typing import Any

import pytest
from places import ROOT

from collm.cli.main import main
from collm.cluster.outlook import helpful, outlook
from collm.planning.apart import DECODING, apart, costs, iteration
from collm.planning.memory import plan
from collm.planning.shapes import read_shape
from collm.planning.work import Work
from collm.settings.load import apply_overrides, load_config, parse_config
from collm.settings.rooms import Config

PAPER = ROOT / "recipes" / "paper" / "str_build" / "collm-cc-paper.toml"
GIB = 1 << 30


def config_of(**overrides: Any) -> Config:
    values: dict[str, Any] = {"env": {"name": "agree"}, "critic": {"body": "auto"}}
    apply_overrides(values, {name.replace("__", "."): value for name, value in overrides.items()})
    return parse_config(values)


def work(**changes: Any) -> Work:
    facts = {"agents": ("a", "b"), "prompts": {"a": (50, 20), "b": (50, 20)}, "answer": 10, "episodes": 8, "joint_actions": 16}
    return Work(**{**facts, "history": "full", **changes})


def test_an_iteration_waits_for_the_slowest_in_each_phase() -> None:
    a, b, critic = {"x": 4.0, "y": 1.0}, {"x": 2.0, "y": 3.0}, {"x": 0.0, "y": 5.0}
    assert iteration([[a, b, critic]]) == 6 + 9
    assert iteration([[a], [b], [critic]]) == 4 + 5
    assert iteration([[a, b], [critic]]) == 6 + 5


def test_operations_by_hand() -> None:
    """8 episodes of two turns; an agent reads 50 and 20 tokens and decodes 10 per turn; the critic learns once."""
    config = config_of(run__device="cpu", learner__gradient_checkpointing=False)
    agent, _, critic = (costs(found) for found in apart(config, work()))
    shape, plans = read_shape("tiny"), apart(config, work())
    weights = shape.linear_weights + shape.embedding
    assert agent["generation"] == 2 * weights * 8 * (50 + 20 + 2 * 10)
    assert agent["values"] == 0
    assert agent["update"] == 6 * weights * plans[0].passes[0].tokens
    assert critic["generation"] == 0
    tokens = plans[2].passes[0].tokens
    assert (critic["values"], critic["update"]) == (2 * shape.linear_weights * tokens, 6 * shape.linear_weights * tokens)


def test_a_decoding_step_on_a_gpu_reads_all_weights() -> None:
    shape = read_shape("tiny")
    weights, steps = shape.linear_weights + shape.embedding, 2 * 10
    found = costs(apart(config_of(run__device="auto"), work())[0])
    assert found["generation"] == 2 * weights * (8 * 70 + steps * DECODING)
    many = costs(apart(config_of(run__device="auto"), work(episodes=400))[0])
    assert many["generation"] == 2 * weights * 400 * (70 + steps)
    batches = costs(apart(config_of(run__device="auto", rollout__batch_tokens=400), work())[0])  # 2 rows of 122 tokens at once
    assert batches["generation"] > found["generation"]


def test_a_trees_first_turn_has_fewer_rows() -> None:
    config = config_of(run__device="cpu", algorithm__name="magrpo", algorithm__group_size=2, algorithm__tree=True)
    weights = read_shape("tiny").linear_weights + read_shape("tiny").embedding
    found = costs(apart(config, work(group=2, tree=True))[0])
    assert found["generation"] == 2 * weights * (4 * (50 + 10) + 8 * (20 + 10))


def test_frozen_bases_have_a_cheaper_backward_pass() -> None:
    (unit,) = apart(config_of(run__device="cpu", team__lora__rank=4, critic__body="none"), work())
    tokens = sum(passes.tokens for passes in unit.passes)
    assert costs(unit)["update"] == 4 * unit.passes[0].model.products * tokens
    (again,) = apart(
        config_of(run__device="cpu", team__lora__rank=4, critic__body="none", learner__gradient_checkpointing=True), work()
    )
    assert costs(again)["update"] == 6 * unit.passes[0].model.products * tokens


def test_value_heads_read_once_more_and_references_at_every_epoch() -> None:
    again = {"algorithm__epochs": 2, "algorithm__loss": "ppo_clip", "algorithm__kl_coef": 0.1}
    config = config_of(run__device="cpu", learner__gradient_checkpointing=False, **again)
    agent, _, critic = apart(config, work())
    size = 2 * agent.passes[0].model.products * agent.passes[0].tokens
    assert costs(agent)["update"] == 2 * (3 + 1) * size
    assert critic.passes[0].referred == 0
    config = config_of(run__device="cpu", learner__gradient_checkpointing=False, critic__body="policy", critic__reads="own")
    (head, _) = apart(config, work())
    assert costs(head)["values"] == 2 * head.passes[0].model.products * head.passes[0].tokens
    assert head.passes[0].referred == 0


def test_units_read_what_one_process_reads() -> None:
    config = config_of(critic__epochs=3, algorithm__kl_coef=0.1)
    assert sum(found.update_tokens for found in apart(config, work())) == plan(config, work()).update_tokens


def test_the_paper_team_needs_three_devices_where_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("auto", "cuda"):
        words = ["plan", str(PAPER), "--memory", "80GB", "--run.device", device]
        assert main(words) == 1
        assert "does not fit in 74.51 GiB" in capsys.readouterr().out
        assert main([*words, "--cluster"]) == 0
        said = capsys.readouterr().out
        assert "3 devices of 74.51 GiB are needed." in said
        assert [f"device {n}" in said for n in (1, 2, 3, 4)] == [True, True, True, False]
        assert "by arithmetic" in said
        assert "Fewest devices: --team.lora.rank 16 (then 1; it changes results)." in said
    plans = []
    for device in ("auto", "cuda"):  # whether this machine has a GPU does not matter
        assert main(["plan", str(PAPER), "--memory", "80GB", "--run.device", device, "--cluster", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    plain = plans[0]
    assert plain == plans[1]
    assert round(sum(unit["peak_bytes"] for unit in plain["units"].values()) / 3 / GIB) == 72  # docs/planning.md
    assert sorted(plain["devices"]) == [["builder_0"], ["builder_1"], ["critic"]]
    assert plain["bound"]["phase"] == "generation"
    assert 1.9 < plain["speed_up_by_arithmetic"] == plain["speed_up_with_a_device_each"] <= 3


def test_units_on_several_devices_and_rollout_workers_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(PAPER), "--run.device", "cuda", "--cluster", "--json", "--cluster.address", "auto"]
    wide = [f"--cluster.devices.{name}=2" for name in ("critic", "builder_0", "builder_1")]

    def planned(*more: str) -> dict[str, Any]:
        main([*words, *more])
        return dict(json.loads(capsys.readouterr().out))

    whole, copied = planned("--memory", "80GB"), planned("--memory", "80GB", wide[0])
    assert len(copied["devices"]) == 4
    assert copied["units"]["critic, rank 1"]["peak_bytes"] == whole["units"]["critic"]["peak_bytes"]
    split = planned("--memory", "48GB", *wide)
    assert len(split["devices"]) == 6
    held = split["units"]["builder_0, rank 0"]["held_bytes"]
    assert held["optimizer"] == whole["units"]["builder_0"]["held_bytes"]["optimizer"] / 2
    shards = ["--rollout.tasks", "8", "--rollout.shards", "4"]
    away = planned("--memory", "80GB", *shards, "--cluster.rollouts", "2")
    assert len(away["devices"]) == 5
    assert "optimizer" not in away["units"]["rollouts/1"]["held_bytes"]
    assert away["bound"]["unit"].startswith("rollouts/")
    assert planned("--memory", "80GB", *shards, "--cluster.rollouts", "4")["speed_up_by_arithmetic"] == pytest.approx(
        2 * away["speed_up_by_arithmetic"], rel=0.1
    )


def test_a_unit_larger_than_a_device_is_refused_with_a_setting_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(PAPER), "--cluster", "--memory", "40GB"]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "builder_1 needs 71.69 GiB and does not fit on a device of 37.25 GiB. Each unit fits with --" in said
    more = said.split("Each unit fits with ")[1].split("\n")[0].split()
    assert main([*words, *more]) == 0
    capsys.readouterr()
    assert main([*words, "--measure"]) == 2
    assert "--cluster plans by arithmetic alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "shares", "reason"),
    [
        ("80GB", "{critic = 0.5, builder_0 = 0.5}", "(builder_0 0.5, critic 0.5) puts builder_0 and critic on one device"),
        ("40GB", "{critic = 1, builder_0 = 1, builder_1 = 0.9}", "(builder_0 1) puts builder_0 on one device"),
    ],
)
def test_shares_that_put_too_much_on_a_device_are_refused(
    capsys: pytest.CaptureFixture[str], memory: str, shares: str, reason: str
) -> None:
    assert main(["plan", str(PAPER), "--cluster", "--memory", memory, "--cluster.devices", shares]) == 2
    assert f"cluster.devices {reason}" in capsys.readouterr().err


def test_of_settings_that_need_as_few_devices_one_that_keeps_results_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cluster", "--memory", "40GiB", "--team.model", "Qwen/Qwen3-0.6B", "--learner.gradient_checkpointing", "false"]
    assert main(["plan", str(PAPER), *words, "--learner.micro_batch_tokens", "32768"]) == 0
    said = capsys.readouterr().out
    assert "2 devices of 40.00 GiB are needed." in said
    assert "Fewest devices: --learner.gradient_checkpointing true (then 1)." in said  # adapters would be faster


def test_small_units_share_a_device() -> None:
    config = load_config(ROOT / "recipes" / "tiny" / "str_build.toml", {"critic.body": "auto"})
    found = outlook(config, 8 * GIB)
    assert found.devices == (("builder_0", "builder_1", "critic"),)
    assert found.speed_ups[0] == 1
    assert found.speed_ups[1] > 1.5
    fewer, shorter = helpful(config, 8 * GIB, found)
    assert fewer is None
    assert shorter is not None
    assert shorter[1].duration < found.duration
