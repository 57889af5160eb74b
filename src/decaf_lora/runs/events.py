"""What does a run say while it goes on? One channel: start, step, record, close.

Whatever wants to hear of a run is a `Subscriber`: the folder on disk, the live display, a tracker. `follow` trains a
run and tells all its subscribers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from decaf_lora.records import Record

if TYPE_CHECKING:
    from torch import Tensor

    from decaf_lora.run import Run


class Progress(NamedTuple):
    """Where a run stands."""

    round: int
    """The round under way, from 1."""
    rounds: int
    fraction: float
    """Share of the run's local steps that are done, 0 to 1."""
    loss: float | None
    """Mean loss over agents and over the steps of this round so far."""


class Subscriber:
    """Hears of one run. A subclass overrides the methods that it needs; the others do nothing."""

    def attach(self, run: Run) -> None:
        """Called first, if the run is in this process. `Folder` needs the run, to save and restore it."""

    def start(self, facts: Mapping[str, Any]) -> None:
        """Called once, before the first step. `facts` are JSON values that do not change from round to round."""

    def step(self, progress: Progress) -> None:
        """Called after every local step."""

    def record(self, record: Record) -> None:
        """Called after every round, and once for the state at the start (round 0)."""

    def close(self, error: BaseException | None) -> None:
        """Called once, also if another subscriber failed. `error` ended the run early; None: nothing did."""


Watch = Callable[[str], Subscriber]
"""Name of a run -> the subscriber that hears of it, for instance a line of a display."""


def nobody(name: str) -> Subscriber:
    """A `Watch` of which nobody hears anything."""
    return Subscriber()


class Several(Subscriber):
    """Passes on to several subscribers, in order, what one hears; closes all, the last first, also if some fail."""

    def __init__(self, *subscribers: Subscriber) -> None:
        self._subscribers = subscribers

    def attach(self, run: Run) -> None:
        for subscriber in self._subscribers:
            subscriber.attach(run)

    def start(self, facts: Mapping[str, Any]) -> None:
        for subscriber in self._subscribers:
            subscriber.start(facts)

    def step(self, progress: Progress) -> None:
        for subscriber in self._subscribers:
            subscriber.step(progress)

    def record(self, record: Record) -> None:
        for subscriber in self._subscribers:
            subscriber.record(record)

    def close(self, error: BaseException | None) -> None:
        _close(self._subscribers, error)


def all_of(*watches: Watch) -> Watch:
    """A `Watch` whose subscribers pass on to those of all `watches`."""
    return lambda name: Several(*(watch(name) for watch in watches))


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The user has stopped the run in round `round`; its checkpoint is in `directory`."""

    def __init__(self, directory: Path, round_: int) -> None:
        super().__init__(f"stopped in round {round_}; go on with --out {directory} --resume")
        self.directory, self.round = directory, round_


def follow(run: Run, *subscribers: Subscriber, facts: Mapping[str, Any] | None = None) -> Generator[Record, None, None]:
    """Trains `run` round by round like `run.train()`, yields its records, and tells the subscribers.

    Args:
        run: a new run, or one that was restored from a checkpoint.
        subscribers: told in this order, and closed in the reverse order, also if the caller leaves the loop.
        facts: what `start` is told; None: `identity.facts_of(run)`.
    """
    from decaf_lora.runs.identity import facts_of

    told = facts_of(run) if facts is None else facts
    error: BaseException | None = None

    def on_step(round_: int, done: int, steps: int, losses: Tensor) -> None:
        fraction = (round_ - 1 + done / steps) / run.rounds
        progress = Progress(round_, run.rounds, fraction, float(losses.mean()) / done)
        for subscriber in subscribers:
            subscriber.step(progress)

    try:
        for subscriber in subscribers:
            subscriber.attach(run)
            subscriber.start(told)
        run.on_step = on_step
        for record in run.train():
            for subscriber in subscribers:
                subscriber.record(record)
            yield record
    except GeneratorExit:  # the caller has left the loop, between two rounds
        raise
    except BaseException as caught:
        error = caught
        raise
    finally:
        run.on_step = None
        _close(subscribers, error)


def _close(subscribers: tuple[Subscriber, ...], error: BaseException | None) -> None:
    """Closes all, the last first, also if some fail: a display whose terminal is gone must not cost a checkpoint."""
    failed: BaseException | None = None
    for subscriber in reversed(subscribers):
        try:
            subscriber.close(error)
        except BaseException as caught:
            failed = failed or caught
    if failed is not None and error is None:
        raise failed
