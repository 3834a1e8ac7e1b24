"""Progress on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from collm.runs.output import Lasting
from collm.types import printable

SHOWN = (("reward", "reward/raw"), ("return", "reward/return"), ("held-out", "evaluation/reward"), ("loss", "loss"))


class Display:
    """Progress, latest metrics and time left: a bar in a terminal, else a line every `every` seconds."""

    def __init__(self, total: int, *, done: int = 0, quiet: bool = False, every: float = 5.0):
        self.total, self.first, self.every = total, done, every
        self.started = self.printed = time.monotonic()
        self.quiet = quiet
        self.console = Console(file=cast(TextIO, Lasting(sys.stderr)), highlight=False)  # a run must outlive its terminal
        self.bar: Progress | None = None
        if not quiet and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self.task = self.bar.add_task("training", total=total, completed=done, numbers="")
            self.bar.start()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        if not self.quiet:
            (self.bar.console if self.bar else self.console).print(printable(text), markup=False)

    def update(self, done: int, record: Mapping[str, Any]) -> None:
        """Show the metrics of the last iteration and the time left."""
        spent = time.monotonic() - self.started
        left = spent / max(1, done - self.first) * (self.total - done)
        shown = [f"{name} {record[key]:.3f}" for name, key in SHOWN if isinstance(record.get(key), float)]
        numbers = "  ".join([*shown, f"{left / 60:.1f} min left"])
        if self.bar:
            self.bar.update(self.task, completed=done, numbers=numbers)
        elif not self.quiet and (time.monotonic() - self.printed > self.every or done == self.total):
            self.printed = time.monotonic()
            self.say(f"iteration {done}/{self.total}  {numbers}")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
