"""What is known of an edge: its other end, how long it may be silent, and how it is."""

from __future__ import annotations

from dataclasses import dataclass

from decaf_lora.engines.links import tls


@dataclass(frozen=True)
class Neighbour(tls.Pinned):
    """The other end of an edge."""

    number: int
    """The agent's."""
    dials: bool
    """Whether that end dials; else this one does, and `address` is set."""


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    lost: float = 15.0
    """An end that is silent for so long is taken for lost. Pings share the interpreter with what else the process
    does, such as loading a model."""
    first_retry: float = 0.1
    """From the end of a connection to the next attempt; twice as long after each that fails."""
    last_retry: float = 5.0
    """The longest time between two attempts."""
    drain: float = 2.0
    """How long `stop` lets what was queued go out."""

    @property
    def ping(self) -> float:
        """An end that has had nothing to say for so long says that it is there."""
        return self.lost / 5


@dataclass(frozen=True)
class Status:
    """An edge, for people."""

    up: bool
    since: float
    """Time (as `time.time`) since which it is so."""
    why: str
    """Why it is down, or was before."""
    sent: int = 0
    """Bytes of frames."""
    received: int = 0
    """Bytes of frames."""
    connections: int = 0
    """Connections that came up."""
    bad: int = 0
    """Frames that were none, and ended a connection."""
