"""How do several runs go on, one after another or side by side? The same work on every run's configuration.

`several` gives the runner. Both kinds check all runs before the first begins, stop together, and tell of every run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from decaf_lora.config import RunConfig
from decaf_lora.errors import TrainingError, UserError
from decaf_lora.records import Record
from decaf_lora.runs.build import build_run
from decaf_lora.runs.events import Progress, Subscriber, Watch
from decaf_lora.runs.workers import Lost, Stopped, Workers


class Piece(Protocol):
    """A run to be made."""

    @property
    def name(self) -> str:
        """Its folder, in the folder of all; different for every run."""

    @property
    def config(self) -> RunConfig:
        """What to run."""


Work = Callable[[Any, Path, Watch], Any]
"""A function of a module: (piece, folder of all, watch) -> result. It goes on with what is in the piece's folder."""


def several(work: Work, jobs: int, watch: Watch) -> Runner:
    """A context manager that runs pieces.

    Args:
        work: what to do with each.
        jobs: number of runs at a time, each in its own process; 1: one after another in this process.
        watch: gives the subscriber of each run, by the run's name.
    """
    return InProcesses(work, jobs, watch) if jobs > 1 else InTurn(work, watch)


class Runner:
    """Runs pieces; a context manager.

    Attributes:
        stopped: whether a stop was asked for.
        lost: name of a piece -> how its process was lost.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.lost: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        pass

    def stop(self) -> None:
        """Asks the runs to end after their current step; none begins any more."""
        self.stopped = True

    def check(self, left: Sequence[Piece]) -> None:
        """Builds every run, at least one; UserError for the first mistake. Called once, before `run`."""
        raise NotImplementedError

    def run(self, left: Sequence[Piece], out: Path) -> dict[str, Any]:
        """Name of each piece that has ended -> what `work` returned for it. May be called again."""
        raise NotImplementedError


class InTurn(Runner):
    """One run after another, in this process."""

    def __init__(self, work: Work, watch: Watch) -> None:
        super().__init__()
        self._work, self._watch = work, watch

    def check(self, left: Sequence[Piece]) -> None:
        check_pieces(left)

    def run(self, left: Sequence[Piece], out: Path) -> dict[str, Any]:
        rows = {}
        for piece in left:
            if self.stopped:
                break
            rows[piece.name] = self._work(piece, out, self._watch)
        return rows


class InProcesses(Runner):
    """Several runs at a time, each in its own process."""

    def __init__(self, work: Work, jobs: int, watch: Watch) -> None:
        super().__init__()
        self._work, self._jobs, self._watch = work, jobs, watch
        self._workers: Workers | None = None
        self._heard: dict[str, Subscriber] = {}

    def __exit__(self, *raised: Any) -> None:
        if self._workers is not None:
            self._workers.__exit__(*raised)

    def stop(self) -> None:
        self.stopped = True
        if self._workers is not None:
            self._workers.stop()

    def check(self, left: Sequence[Piece]) -> None:
        """Has one worker check all runs, while the others load the libraries."""
        jobs = min(self._jobs, len(left))
        self._workers = Workers(jobs, max(1, (os.cpu_count() or 1) // jobs), self._hear).__enter__()
        for _, result in self._workers.run(_check_in_worker, [left]):
            if isinstance(result, BaseException):
                raise result
            if isinstance(result, Lost):
                raise UserError(f"jobs: a run could not be prepared, {result.how}; try fewer --jobs.")

    def run(self, left: Sequence[Piece], out: Path) -> dict[str, Any]:
        assert self._workers is not None
        rows: dict[str, Any] = {}
        error: BaseException | None = None
        for piece, result in self._workers.run(_run_in_worker, left, self._work, out):
            if isinstance(result, BaseException):
                if error is None:
                    error = result
                    self._workers.stop()
            elif isinstance(result, Lost):
                self.lost[piece.name] = result.how
            elif not isinstance(result, Stopped):
                rows[piece.name] = result
        if error is not None:
            raise error
        return rows

    def _hear(self, told: tuple[str, str, tuple[Any, ...]]) -> None:
        name, method, arguments = told
        if name not in self._heard:
            self._heard[name] = self._watch(name)
        getattr(self._heard[name], method)(*arguments)


def check_pieces(left: Sequence[Piece]) -> None:
    """Builds every run once, so that a mistake in any of them is found before the first begins."""
    for piece in left:
        training = piece.config.training.model_copy(update={"agents_per_pass": 1})  # without a calibration
        build_run(piece.config.model_copy(update={"training": training})).close()


# In a worker


def _check_in_worker(left: Sequence[Piece], tell: Callable[[Any], None]) -> None:
    check_pieces(left)


def _run_in_worker(piece: Piece, tell: Callable[[Any], None], work: Work, out: Path) -> Any:
    return work(piece, out, lambda name: _Telling(name, tell))


class _Telling(Subscriber):
    """Tells the parent process of a run; of its steps at most ten times a second."""

    def __init__(self, name: str, tell: Callable[[Any], None]) -> None:
        self._name, self._tell, self._last = name, tell, 0.0

    def start(self, facts: Mapping[str, Any]) -> None:
        self._tell((self._name, "start", (facts,)))

    def step(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= 0.1:
            self._last = now
            self._tell((self._name, "step", (progress,)))

    def record(self, record: Record) -> None:
        self._tell((self._name, "record", (record,)))

    def close(self, error: BaseException | None) -> None:
        told = None if error is None else TrainingError(str(error)) if isinstance(error, TrainingError) else UserError()
        self._tell((self._name, "close", (told,)))
