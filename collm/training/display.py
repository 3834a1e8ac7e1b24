"""Progress on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from collm.runs.output import Lasting
from collm.settings.rooms import EvaluationSettings
from collm.types import printable

if TYPE_CHECKING:  # the first line is shown before torch is imported
    from collm.engines.base import Engine

SHOWN = (("reward", "reward/raw"), ("return", "reward/return"), ("held-out", "evaluation/reward"), ("loss", "loss"))


class Display:
    """Phases, latest metrics and time left: one redrawn line in a terminal, else sparse lines on standard error.

    In a pipe, the first phase of each name gets a line, and then one every `6 * every` seconds; a finished iteration gets one
    every `every` seconds.

    Args: total: iterations. done: those done before. evaluate_every: iterations between evaluations, 0 for none.
    """

    def __init__(self, total: int, *, done: int = 0, evaluate_every: int = 0, quiet: bool = False, every: float = 5.0):
        self.total, self.first, self.every, self.evaluate_every = total, done, every, evaluate_every
        self.started = self.printed = time.monotonic()
        self.evaluated = self.evaluation = 0.0
        """Seconds of all evaluations, and of the last."""
        self.quiet, self.seen = quiet, set[str]()
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
            (self.bar.console if self.bar else self.console).print(printable(text), markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, engine: Engine | None = None, *, of: int | None = None) -> Iterator[None]:
        """Show what this context does, and with an engine that has `watch` also how many answers it has given.

        of: the iteration that it belongs to.
        """
        iteration = "" if of is None else f"iteration {of}/{self.total}: "
        self._show(name, name if self.bar else iteration + name)

        def watch(done: int, asked: int) -> None:
            self._show(name, f"{'' if self.bar else iteration}{name}, {done}/{asked} answers")

        watched: Any = engine if hasattr(engine, "watch") else None
        if watched is not None:
            watched.watch = watch
        try:
            yield
        finally:
            if watched is not None:
                watched.watch = None

    def _show(self, name: str, text: str) -> None:
        if self.bar:
            self.bar.update(self.task, description=text)
        elif name not in self.seen or time.monotonic() - self.printed > 6 * self.every:
            self.seen.add(name)
            self.printed = time.monotonic()
            self.say(text)

    def update(self, done: int, record: Mapping[str, Any]) -> None:
        """Show the metrics of the last iteration and the time left."""
        self.evaluation = record.get("seconds/evaluation", self.evaluation)
        self.evaluated += record.get("seconds/evaluation", 0.0)
        shown = [f"{name} {record[key]:.3f}" for name, key in SHOWN if isinstance(record.get(key), float)]
        left = self.seconds_left(done)
        numbers = "  ".join([*shown, *([] if left is None else [f"{left / 60:.1f} min left"])])
        if self.bar:
            self.bar.update(self.task, completed=done, numbers=numbers)
        elif not self.quiet and done and (time.monotonic() - self.printed > self.every or done == self.total):
            self.printed = time.monotonic()
            self.say(f"iteration {done}/{self.total}  {numbers}")

    def seconds_left(self, done: int) -> float | None:
        """Iterations to come at the mean time of those of this process, and evaluations to come at the time of the last; None
        before the first iteration."""
        if done == self.first:
            return None
        per_iteration = (time.monotonic() - self.started - self.evaluated) / (done - self.first)
        evaluations = EvaluationSettings(every=self.evaluate_every)
        num = sum(evaluations.due(k, self.total) for k in range(done + 1, self.total + 1))
        return per_iteration * (self.total - done) + self.evaluation * num

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
