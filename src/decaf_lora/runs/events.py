"""What does a run say while it goes on? Events for displays, and how it ends early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The run was stopped by the user and has left a checkpoint; `directory` says where."""

    def __init__(self, directory: Path, round_: int) -> None:
        super().__init__(f"stopped in round {round_}; go on with --out {directory} --resume")
        self.directory, self.round = directory, round_

    def __reduce__(self) -> tuple[Any, ...]:  # it travels from worker processes
        return type(self), (self.directory, self.round)


class Event(NamedTuple):
    """Where a run stands: for progress displays."""

    key: str
    """Name of the run's folder."""
    round: int
    rounds: int
    fraction: float
    """Share of the run's local steps that are done, 0 to 1."""
    loss: float | None
    score: float | None


Watch = Callable[[Event], None]


def nobody(event: Event) -> None:
    """Watches nothing."""
