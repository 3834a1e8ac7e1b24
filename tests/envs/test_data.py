"""Rows come unchanged from every public format, from the hub's layout, and bad sources say what to do."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from collm.envs.data import field, read_rows, split_rows
from collm.errors import EnvError

ROWS = [{"prompt": f"post {i}\nline", "label": str(i)} for i in range(10)]


def jsonl(rows: list[dict[str, str]]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


@pytest.fixture
def hub(tmp_path: Path) -> str:
    """A data set in the layout of a hub repository: a card that names the splits' files."""
    folder = tmp_path / "org" / "posts"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text(jsonl(ROWS[:6]))
    (folder / "data" / "test.jsonl").write_text(jsonl(ROWS[6:]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train.jsonl\n"
        "  - split: test\n    path: data/test.jsonl\n- config_name: small\n  data_files:\n  - split: test\n"
        "    path: data/test.jsonl\n---\n"
    )
    return str(folder)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.json.gz", "rows.jsonl.gz", "rows.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if "parquet" in name:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        text = json.dumps(ROWS) if ".json" in name and "jsonl" not in name else jsonl(ROWS)
        if "csv" in name:
            text = "prompt,label\r\n" + "".join(f'"{row["prompt"]}",{row["label"]}\r\n' for row in ROWS)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert list(read_rows(str(path))) == ROWS
    assert list(read_rows(f"{path}[2:4]")) == ROWS[2:4]
    assert list(read_rows(f"{path}[-1:]")) == ROWS[-1:]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl(ROWS))
    assert len(read_rows(str(path))) == 10
    path.write_text(jsonl(ROWS[:3]))
    os.utime(path, (1, 1))
    assert len(read_rows(str(path))) == 3


def test_the_hub_layout_is_read_by_name_split_and_config(hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert list(read_rows(f"hf:{hub}:train")) == ROWS[:6]
    assert list(read_rows(f"hf:{hub}:small:test[1:]")) == ROWS[7:]
    with pytest.raises(EnvError, match="cannot be loaded"):
        read_rows(f"hf:{hub}:validation")
    assert [r["label"] for r in split_rows(f"hf:{hub}:train", f"hf:{hub}:test", "eval")] == ["6", "7", "8", "9"]


def test_splits_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl(ROWS))
    assert split_rows(str(path), None, "train") == ROWS[:8]
    assert split_rows(str(path), None, "eval") == ROWS[8:]
    parts = {"train": slice(4, None), "held_out": slice(0, 3)}
    assert split_rows(str(path), None, "train", **parts) == ROWS[4:]
    assert split_rows(str(path), None, "eval", **parts) == ROWS[:3]
    assert split_rows(f"{path}[:2]", f"{path}[5:6]", "train", **parts) == ROWS[:2]
    assert split_rows(f"{path}[:2]", f"{path}[5:6]", "eval", **parts) == ROWS[5:6]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", "x", "neither .json"),
        ("rows.json", "[1, 2]", "list of objects"),
        ("rows.json", "[" * 5000, "cannot be read"),
        ("rows.jsonl", "{", "cannot be read"),
        ("rows.json.gz", "not gzip", "cannot be read"),
        ("rows.jsonl", "\n", "no row"),
    ],
)
def test_a_bad_file_says_why(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(EnvError, match=message):
        split_rows(str(tmp_path / name), None, "train")


@pytest.mark.parametrize("source", ["absent.jsonl", "hf:", "hf:name", "hf:name:a:b:c"])
def test_a_bad_source_says_why(source: str) -> None:
    with pytest.raises(EnvError, match="data="):
        read_rows(source)


def test_a_row_without_the_field_says_what_it_has() -> None:
    assert field({"post": "x"}, ("prompt", "post"), "f") == "x"
    with pytest.raises(EnvError, match=r"none of the text fields prompt, post; it has a, b"):
        field({"a": "x", "b": 1}, ("prompt", "post"), "f")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_a_mark_of_byte_order_is_no_content(tmp_path: Path, name: str) -> None:
    text = {"rows.json": json.dumps(ROWS), "rows.jsonl": jsonl(ROWS), "rows.csv": "prompt,label\nx,1\n"}[name]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_rows(str(tmp_path / name))[0].keys() == {"prompt", "label"}


def test_json_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(jsonl(ROWS))
    assert list(read_rows(str(path))) == ROWS
    path.write_text(jsonl(ROWS[:1]))
    assert list(read_rows(str(path))) == ROWS[:1]


@pytest.mark.parametrize(("bad", "reason"), [("{", "line 51"), ("[1]", "not an object")])
def test_one_bad_row_is_left_out_and_more_than_one_in_a_hundred_are_refused(tmp_path: Path, bad: str, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = [json.dumps({"x": i}) for i in range(199)]
    path.write_text("\n".join([*good[:50], bad, *good[50:]]))
    with pytest.warns(UserWarning, match=f"1 of 200 rows .*left out; the first is row 50.*{reason}"):
        assert len(read_rows(str(path))) == 199
    path.write_text("\n".join([*good[:50], bad, *good[50:], bad, bad]))
    with pytest.raises(EnvError, match=rf"rows\.jsonl.*3 of 202 rows .*above 1 %; the first is row 50.*{reason}"):
        read_rows(str(path))


def test_an_mbpp_row_that_is_no_problem_is_left_out_and_set_up_code_runs_first(tmp_path: Path) -> None:
    from collm.envs.coding.problems import public

    row = {"task_id": 1, "prompt": "Add one.", "code": "def f(x):\n    return x + 1", "test_setup_code": "two = 2"}
    tests = ["assert f(1) == two", "three = 3", "assert f(two) == three", "assert True"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps({**row, "test_list": tests})] * 150 + [json.dumps({**row, "test_list": []})]))
    with pytest.warns(UserWarning, match=r"1 of 151 rows .*row 150.*test_list of task 1"):
        problems = public(f"{path}[0:151]", f"{path}[0:9]", "train")
    assert len(problems) == 150
    first, second = problems[0].checks
    assert first.split("\n") == ["two = 2", "assert f(1) == two", ""]
    assert second.split("\n") == ["two = 2", "three = 3", "assert f(two) == three", ""]
