"""How is an agent doing? What it says of itself, rewritten each second beside the federation file, and how it looks."""

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
    """An edge, as one end sees it."""

    name: str
    """Of the neighbour."""
    up: bool = False
    since: float = 0.0
    """Time since which it is so, as `time.time`."""
    why: str = ""
    """Why it is down, or was before."""
    missed: int = 0
    """Exchanges without it."""
    waited: float = 0.0
    """Seconds in all."""
    rejected: int = 0
    """Messages of it that were not usable."""
    sent: int = 0
    """Bytes."""
    received: int = 0
    """Bytes."""


@dataclass
class AgentStatus:
    """What an agent says of itself."""

    federation: str
    version: int
    name: str
    process: int
    """Its number on its machine."""
    state: str = "starting"
    """starting, alone, training, waiting, serving, done, stopped, gave up or failed."""
    round: int = 0
    """Rounds done."""
    rounds: int = 0
    waits_for: list[str] = field(default_factory=list)
    """Neighbours that the open exchange waits for."""
    loss: float | None = None
    """Mean over the last round's steps."""
    score: float | None = None
    """On the site's own held-out share."""
    score_at_start: float | None = None
    score_alone: float | None = None
    """Of as many rounds on the site's own data alone."""
    seconds_left: float | None = None
    returned: int | None = None
    """The round at which it came back, of an agent that was started again."""
    said: str = ""
    """Why it ended, if not at the end of the run."""
    neighbours: list[EdgeStatus] = field(default_factory=list)
    written: float = 0.0
    """Time of this writing, as `time.time`."""


ENDED = ("done", "stopped", "gave up", "failed")
"""States after which nothing changes any more."""


def file_of(federation: Path, name: str) -> Path:
    """What a running agent rewrites each second, beside the federation file."""
    return federation.with_name(f"{name}.status.json")


def read(path: Path) -> AgentStatus:
    """What an agent last said of itself. UserError where it has never run, or something else wrote the file."""
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
    """The number of the agent's process, if it runs; None if not."""
    try:
        said = read(path)
        os.kill(said.process, 0)
    except (UserError, OSError):
        return None
    return None if said.state in ENDED or time.time() - said.written > 60 else said.process


class Teller:
    """Writes what an agent says of itself, each second and at the end.

    Args:
        path: the file.
        status: what to write; its owner changes it.
        refresh: called before each writing, for what is not told by itself.
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
        """Writes it now."""
        self._refresh()
        self._status.written = time.time()
        write_json(self._path, asdict(self._status))

    def _run(self) -> None:
        while not self._over.wait(self._pause):
            with contextlib.suppress(OSError):  # a full disk must not end the telling; the checkpoints say so
                self.write()


def shown(status: AgentStatus) -> RenderableType:
    """The agent's screen."""
    head = Text(f"{status.federation}, version {status.version}: {status.name}, {status.state}")
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
    if status.seconds_left is not None and status.state not in ENDED:
        facts.append(f"about {_span(status.seconds_left)} left")
    if status.waits_for:
        facts.append(f"waits for {', '.join(status.waits_for)}")
    lines: list[RenderableType] = [head, Text(", ".join(facts))]
    if status.said:
        lines.append(Text(status.said))
    table = Table(show_edge=False, pad_edge=False)
    for title in ("neighbour", "link", "missed", "waited", "rejected", "sent", "received", ""):
        table.add_column(title, justify="left" if title in ("neighbour", "link", "") else "right")
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
            "" if edge.up else edge.why,
        )
    return Group(*lines, table)


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
