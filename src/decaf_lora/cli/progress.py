"""What does a person see while runs go on? On a terminal a live display, elsewhere a line for each finished run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from decaf_lora.errors import TrainingError
from decaf_lora.records import Record, mean_score
from decaf_lora.runs import events
from decaf_lora.runs.events import Subscriber, Watch


@contextlib.contextmanager
def display(total: int, console: Console) -> Iterator[Watch]:
    """A context with the display of `total` runs on `console` (standard error); gives their `Watch`."""
    if not console.is_terminal:
        lines = _Lines(total, console)
        yield lambda name: _Line(name, lines)
        return
    live = _Live(total, console)
    try:
        yield lambda name: _Bar(name, live)
    finally:
        with contextlib.suppress(OSError):  # the terminal may be gone, and the run goes on to save itself
            live.bars.stop()


class _Watcher(Subscriber):
    """What both displays know of a run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rounds, self.round = 0, 0
        self.score: float | None = None

    def start(self, facts: Mapping[str, Any]) -> None:
        self.rounds = facts["rounds"]

    def record(self, record: Record) -> None:
        self.round = record.round
        if record.scores:
            self.score = mean_score(record)

    def ended(self, error: BaseException | None) -> bool:
        """Whether the run has a result."""
        return isinstance(error, TrainingError) or (error is None and self.round >= self.rounds)

    def done(self, error: BaseException | None) -> str:
        score = "-" if self.score is None or error is not None else f"{self.score:.3f}"
        return f"{self.name}: mean score {score}"


class _Lines:
    """Counts finished runs."""

    def __init__(self, total: int, console: Console) -> None:
        self.total, self.console = total, console
        self.finished, self.started = 0, time.perf_counter()


class _Line(_Watcher):
    """A line on standard error once the run has ended."""

    def __init__(self, name: str, lines: _Lines) -> None:
        super().__init__(name)
        self._lines = lines

    def close(self, error: BaseException | None) -> None:
        if self.ended(error) and (error is None or self._lines.total > 1):
            lines = self._lines
            lines.finished += 1
            line = f"[{lines.finished}/{lines.total}] {self.done(error)}  ({time.perf_counter() - lines.started:.0f} s)"
            with contextlib.suppress(OSError):
                lines.console.print(line, highlight=False, markup=False)


class _Live:
    """Bars: one over all runs if there are several, and one for each that is under way."""

    def __init__(self, total: int, console: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self.overall = self.bars.add_task("runs", total=total, facts="") if total > 1 else None


class _Bar(_Watcher):
    """The bar of a run."""

    def __init__(self, name: str, live: _Live) -> None:
        super().__init__(name)
        self._live = live
        self._task: TaskID | None = None
        self._loss: float | None = None

    def start(self, facts: Mapping[str, Any]) -> None:
        super().start(facts)
        # Not before: a live display swallows the bars of reading and preprocessing, which come first.
        with contextlib.suppress(OSError):
            self._live.bars.start()
        if self._task is None:  # a run that goes on keeps its bar
            self._task = self._live.bars.add_task(self.name, total=self.rounds, facts="")

    def step(self, progress: events.Progress) -> None:
        self._loss = progress.loss
        self._show(progress.round - 1)

    def record(self, record: Record) -> None:
        super().record(record)
        self._show(record.round)

    def close(self, error: BaseException | None) -> None:
        live = self._live
        if self.ended(error) and live.overall is not None:
            live.bars.update(live.overall, advance=1)
            if self._task is not None:
                live.bars.remove_task(self._task)
            with contextlib.suppress(OSError):
                live.bars.console.print(self.done(error), highlight=False, markup=False)

    def _show(self, completed: int) -> None:
        loss = "" if self._loss is None else f"loss {self._loss:.3f}"
        score = "" if self.score is None else f"score {self.score:.3f}"
        facts = "  ".join(part for part in (loss, score) if part)
        if self._task is None:
            return
        with contextlib.suppress(OSError):
            self._live.bars.update(self._task, completed=completed, facts=facts)
