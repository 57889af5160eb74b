"""How is an agent doing? Its status, which it writes each second beside the federation file, and how that is shown."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from decaf_lora.errors import UserError
from decaf_lora.records import write_json


@dataclass
class EdgeStatus:
    """The state of an edge, as one end sees it."""

    name: str
    """Name of the neighbour."""
    up: bool = False
    since: float = 0.0
    """Time since which the edge is up or down, as `time.time`."""
    why: str = ""
    """Why the edge is down, or was down last."""
    missed: int = 0
    """Number of exchanges without this neighbour."""
    cut_off: int = 0
    """Number of exchanges without this neighbour in which it may have used this agent's message all the same, since the
    link broke between message and answer."""
    waited: float = 0.0
    """Seconds in all."""
    rejected: int = 0
    """Number of its messages that were not usable."""
    sent: int = 0
    """Bytes."""
    received: int = 0
    """Bytes."""


@dataclass
class AgentStatus:
    """The status of an agent, as the agent says it."""

    federation: str
    version: int
    name: str
    process: int
    """Number of its process on its machine."""
    state: str = "starting"
    """starting, alone, training, waiting, serving, done, stopped, gave up or failed."""
    round: int = 0
    """Rounds done."""
    rounds: int = 0
    waits_for: list[str] = field(default_factory=list)
    """Neighbours that the open exchange waits for."""
    loss: float | None = None
    """Mean loss over the steps of the last round."""
    score: float | None = None
    """Score on the site's own test examples."""
    score_at_start: float | None = None
    score_alone: float | None = None
    """Score after as many rounds on the site's data alone."""
    seconds_left: float | None = None
    returned: int | None = None
    """The round at which an agent that was started again came back."""
    said: str = ""
    """Why the agent ended before the end of the run."""
    neighbours: list[EdgeStatus] = field(default_factory=list)
    written: float = 0.0
    """Time of this writing, as `time.time`."""


ENDED = ("done", "stopped", "gave up", "failed")
"""States after which nothing changes any more."""


_SAID = {
    "alone": "training alone first, to compare",
    "serving": "finished, and here until its neighbours are done too",
}
"""What the screen says of a state that its name does not explain."""


def file_of(federation: Path, name: str) -> Path:
    """The file of an agent's status, beside the federation file; a running agent rewrites it each second."""
    return federation.with_name(f"{name}.status.json")


def read(path: Path) -> AgentStatus:
    """The last status of an agent; UserError if it has never run, or something else wrote the file."""
    try:
        values: Any = json.loads(path.read_text())
        neighbours = [EdgeStatus(**edge) for edge in values.pop("neighbours")]
        return AgentStatus(**values, neighbours=neighbours)
    except FileNotFoundError:
        name = path.name.removesuffix(".status.json")
        raise UserError(f"status: {name} has not run here yet; start it with `decaf agent`.") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"status: {path} is not what an agent writes ({error}).") from error


def running(path: Path) -> int | None:
    """The number of the agent's process; None if it does not run."""
    try:
        said = read(path)
        os.kill(said.process, 0)
    except (UserError, OSError):
        return None
    return None if said.state in ENDED or time.time() - said.written > 60 else said.process


class Teller:
    """A context in which an agent's status is written each second, and at the end.

    Args:
        path: the file.
        status: what to write; its owner changes it.
        refresh: called before each writing, to bring `status` up to date.
        pause: seconds between two writings.
    """

    def __init__(
        self, path: Path, status: AgentStatus, refresh: Callable[[], None] = lambda: None, pause: float = 1.0
    ) -> None:
        self._path, self._status, self._refresh, self._pause = path, status, refresh, pause
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> Teller:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.write()

    def write(self) -> None:
        """Writes the status now."""
        self._refresh()
        self._status.written = time.time()
        write_json(self._path, asdict(self._status))

    def _run(self) -> None:
        while not self._over.wait(self._pause):
            with contextlib.suppress(OSError):  # a full disk must not end this thread; the checkpoints report it
                self.write()


def shown(status: AgentStatus) -> RenderableType:
    """The agent's screen."""
    state = _SAID.get(status.state, status.state)
    head = Text(f"{status.federation}, version {status.version}: {status.name}, {state}")
    silent = time.time() - status.written
    if status.state not in ENDED and silent > 10:
        head.append(f" {_span(silent)} ago; it has not been heard of since", style="bold")
    facts = [f"round {status.round} of {status.rounds}"]
    if status.loss is not None:
        facts.append(f"loss {status.loss:.3f}")
    if status.score is not None:
        facts.append(f"score {status.score:.3f}")
    if status.score_at_start is not None:
        facts.append(f"at the start {status.score_at_start:.3f}")
    if status.score_alone is not None:
        facts.append(f"on its own data alone {status.score_alone:.3f}")
    if status.seconds_left is not None and status.state in ("training", "waiting"):
        facts.append(f"about {_span(status.seconds_left)} left")
    lines: list[RenderableType] = [head, Text(", ".join(facts))]
    if status.waits_for and status.state not in ENDED:
        lines.append(Text(f"waits for {', '.join(status.waits_for)}"))
    if status.said:
        lines.append(Text(status.said))
    table = Table(show_edge=False, pad_edge=False)
    for title in ("neighbour", "link", "missed", "waited", "rejected", "sent", "received"):
        table.add_column(title, justify="left" if title in ("neighbour", "link") else "right", no_wrap=True)
    for edge in status.neighbours:
        since = f" {_span(time.time() - edge.since)}" if edge.since else ""
        table.add_row(
            edge.name,
            ("up" if edge.up else "down") + since,
            str(edge.missed),
            f"{edge.waited:.0f} s",
            str(edge.rejected),
            _bytes(edge.sent),
            _bytes(edge.received),
        )
    down = [edge for edge in status.neighbours if edge.why and not edge.up and status.state not in ENDED]
    reasons = [Text(edge.why if edge.why.startswith(edge.name) else f"{edge.name}: {edge.why}") for edge in down]
    return Group(*lines, table, *reasons)


def _span(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
