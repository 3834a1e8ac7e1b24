"""Rows of a data set: a local file in its public format, or a data set of the Hugging Face hub.

A source is one string: a path (.json, .jsonl, .csv or .parquet; .json, .jsonl and .csv also .gz), `hf:NAME:SPLIT`, or
`hf:NAME:CONFIG:SPLIT`, where NAME is a hub repository or a folder in a hub repository's layout. A suffix `[a:b]` takes rows a
to b, as a Python slice does: "hf:trl-lib/tldr:train[:1100]". The hub needs the extra `collm[hub]`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

from collm.errors import EnvError

Row = dict[str, Any]
T = TypeVar("T")

MOST_BAD = 0.01
"""Largest fraction of a source's rows that is left out because they cannot be read; above it the source is refused."""

_SLICE = re.compile(r"(.+?)\[(-?\d*):(-?\d*)\]")


def split_rows(
    data: str, eval_data: str | None, split: str, *, train: slice = slice(None), held_out: slice | None = None
) -> list[Row]:
    """The rows of one split ("train" or "eval").

    With `eval_data` each split has its own source, taken whole. With `data` alone, the slices `train` and `held_out` select the
    rows of each split; without fixed slices (`held_out=None`) the last fifth is held out. Raises EnvError for a source that
    cannot be read, or a split without a row.
    """
    if split == "eval" and eval_data is not None:
        rows = list(read_rows(eval_data))
    else:
        rows = list(read_rows(data))
        if eval_data is None:
            fifth = max(1, len(rows) // 5)
            parts = {
                "train": rows[train] if held_out is not None else rows[:-fifth],
                "eval": rows[held_out] if held_out is not None else rows[-fifth:],
            }
            rows = parts[split]
    if not rows:
        source = eval_data if split == "eval" and eval_data is not None else data
        raise EnvError(f"data={source!r} has no row for the split {split!r}; give more rows, or eval_data=... besides.")
    return rows


def read_rows(source: str) -> Sequence[Row]:
    """All rows of a source, in order. Raises EnvError with the reason if it cannot be read."""
    found = _SLICE.fullmatch(source)
    name = found[1] if found else source
    rows = _hub(name) if name.startswith("hf:") else _local(name, _modified(name))
    if found:
        return rows[slice(*(int(bound) if bound else None for bound in (found[2], found[3])))]
    return rows


def _modified(path: str) -> float:
    try:
        return Path(path).stat().st_mtime
    except OSError as error:
        raise EnvError(f"data={path!r} cannot be read: {error.strerror}.") from error


@lru_cache(maxsize=32)
def _local(path: str, modified: float) -> tuple[Row, ...]:
    """Rows of a file, cached until it changes, since environments are made anew for every episode."""
    kinds = Path(path).name.lower().removesuffix(".gz").rsplit(".", 1)
    reader: Any = {"json": _json, "jsonl": _jsonl, "csv": csv.DictReader}.get(kinds[-1])
    try:
        if kinds[-1] == "parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif reader is None:
            raise EnvError(f"data={path!r} is neither .json, .jsonl, .csv nor .parquet (the first three also .gz).")
        else:
            opened: Any = gzip.open if path.lower().endswith(".gz") else open
            with opened(path, "rt", newline="", encoding="utf-8-sig") as file:
                rows = list(reader(file))
    except ImportError as error:
        raise EnvError(f"data={path!r} needs pyarrow: pip install 'collm[hub]'.") from error
    except (OSError, EOFError, ValueError, RecursionError, csv.Error) as error:
        raise EnvError(f"data={path!r} cannot be read: {error}.") from error
    if rows and not any(isinstance(row, dict | _Bad) for row in rows):
        raise EnvError(f"data={path!r} must hold a list of objects, one for each task.")
    bad = [
        (number, row.reason if isinstance(row, _Bad) else "it is not an object")
        for number, row in enumerate(rows)
        if not isinstance(row, dict)
    ]
    leave_out(path, bad, len(rows))
    return tuple(row for row in rows if isinstance(row, dict))


@dataclass(frozen=True, slots=True)
class _Bad:
    """A row that cannot be read, and why."""

    reason: str


def leave_out(data: str, bad: Sequence[tuple[int, str]], total: int) -> None:
    """Warn that the `bad` rows (number from 0, reason) are left out. Raises EnvError where they are above 1 % of all."""
    if not bad:
        return
    number, reason = bad[0]
    first = f"the first is row {number} (from 0): {reason.removesuffix('.')}"
    if len(bad) > total * MOST_BAD:
        raise EnvError(f"data={data!r}: {len(bad)} of {total} rows cannot be read, above 1 %; {first}. Mend or remove them.")
    warnings.warn(f"data={data!r}: {len(bad)} of {total} rows cannot be read and are left out; {first}.", stacklevel=3)


def read_each(rows: Sequence[Row], read: Callable[[Row], T], data: str) -> list[T]:
    """Apply `read` to every row. Rows for which it raises EnvError are left out by the rule of `leave_out`."""
    good, bad = [], []
    for number, row in enumerate(rows):
        try:
            good.append(read(row))
        except EnvError as error:
            bad.append((number, str(error).removeprefix(f"data={data!r}: ")))
    leave_out(data, bad, len(rows))
    return good


def _json(file: IO[str]) -> list[Any]:
    """Rows of a JSON list or of a JSON object's values. A file that holds JSON Lines is read as such."""
    text = file.read()
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return list(_jsonl(io.StringIO(text)))
    if isinstance(rows, dict):
        single = not all(isinstance(value, dict) for value in rows.values())
        return [rows] if single else list(rows.values())
    if not isinstance(rows, list):
        raise ValueError("it holds neither a list nor an object")
    return rows


def _jsonl(file: IO[str]) -> Iterator[Row | _Bad]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield _Bad(f"line {number}: {error}")


@lru_cache(maxsize=8)
def _hub(source: str) -> tuple[Row, ...]:
    _, _, rest = source.partition(":")
    name, *parts = rest.split(":")
    if not name or len(parts) not in (1, 2) or not all(parts):
        raise EnvError(f"data={source!r} is not hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT.")
    try:
        import datasets
    except ImportError as error:
        raise EnvError(f"data={source!r} is read with the package datasets: pip install 'collm[hub]'.") from error
    try:
        loaded = datasets.load_dataset(name, *parts[:-1], split=parts[-1])
    except Exception as error:  # of any type: network, hub and format raise their own
        first = str(error).strip().split("\n")[0]
        raise EnvError(f"data={source!r} cannot be loaded: {type(error).__name__}: {first}") from error
    return tuple(dict(row) for row in loaded)


def field(row: Row, names: Sequence[str], data: str) -> str:
    """The text of the first field in `names` that the row has. Raises EnvError listing the fields that the row has."""
    for name in names:
        if isinstance(row.get(name), str):
            return str(row[name])
    raise EnvError(
        f"data={data!r}: a row has none of the text fields {', '.join(names)}; it has {', '.join(row) or 'nothing'}."
    )
