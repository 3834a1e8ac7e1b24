"""What others read: environments by gymnasium, TensorBoard events, episodes by pyarrow and `datasets`, exports."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gymnasium.spaces.utils import flatdim, flatten, flatten_space, unflatten

from collm.envs.base import TextSpace
from collm.models.policy import spell_as_before
from collm.runs.log import RunLog, episode_record
from collm.types import Annotation, Completion, Episode, Turn


def test_text_spaces_flatten_and_print_what_they_are():
    space = TextSpace(12)
    assert (repr(space), flatdim(space)) == ("TextSpace(max_length=12)", 12)
    assert repr(TextSpace()) == "TextSpace(max_length=4194304)"
    for text in ("", "plain", "\n\t\u4f60\U0001f600", "x" * 12):
        flat = flatten(space, text)
        assert flatten_space(space).contains(np.asarray(flat, dtype=np.int32))
        assert unflatten(space, flat) == text
    assert space == TextSpace(12)
    assert space != TextSpace(13)


def test_scalars_are_found_by_readers_of_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, trackers=["tensorboard"])
    log.metrics({"iteration": 1, "reward/raw": 0.5, "episodes": 3, "critic/none": float("nan")})
    log.metrics({"iteration": 2, "reward/raw": 0.75, "episodes": 4})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["episodes", "reward/raw"]
    assert [(e.step, e.value) for e in events.Scalars("reward/raw")] == [(1, 0.5), (2, 0.75)]


def episode(**learned):
    answer = Completion("a", "red", token_ids=np.array([1, 2], dtype=np.int32))
    turn = Turn({"a": "Name one."}, {"a": answer}, 1, 1, parts={"match": 1}, **learned)
    return Episode(0, 3, ("a",), turns=[turn], terminated=True, metrics={"match": 1})


EPISODES = [
    (episode(), {}),
    (episode(), {(0, "a"): Annotation(0.5, 0.25, -1)}),
    (episode(), {(0, "a"): Annotation(advantage=1.0)}),
    (episode(messages={"a": Completion("a", "let us say red")}), {}),
]


def types(value):
    if isinstance(value, dict):
        return {key: types(inner) for key, inner in value.items() if key != "path"}
    return [types(value[0])] if isinstance(value, list) else type(value)


def test_every_episode_has_the_same_keys_of_the_same_types():
    records = [json.loads(json.dumps(episode_record(e, said))) for e, said in EPISODES]
    assert type(None) not in records[0].values()
    assert all(types(record) == types(records[0]) for record in records)
    agents = [record["turns"][0]["agents"]["a"] for record in records]
    assert [agent["learned"] for agent in agents] == ["", "value td_error advantage", "advantage", ""]
    assert [agent["message"]["finish"] for agent in agents] == ["", "", "", "stop"]
    failed = episode_record(Episode(0, 3, ("a",), failure="reset: no"))
    assert (failed["score"], failed["failure"]) == (0.0, "reset: no")


def test_datasets_reads_files_of_several_runs_at_once(tmp_path):
    datasets = pytest.importorskip("datasets")
    for order in (EPISODES, EPISODES[::-1]):
        for number, (e, said) in enumerate(order):
            (tmp_path / f"{number:06d}.jsonl").write_text(json.dumps(episode_record(e, said)) + "\n")
        files = sorted(str(path) for path in tmp_path.glob("*.jsonl"))
        rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        assert len(rows) == len(EPISODES)
        assert {type(row["turns"][0]["agents"]["a"]["value"]) for row in rows} == {float}


def test_exports_are_spelled_for_transformers_4_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend", "pad_token": "é"}))
    spell_as_before(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 5e5
    found = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert found == {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "é"}
