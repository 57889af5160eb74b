"""What does a link know of an edge: its other end, its timing, its status?"""

from __future__ import annotations

from dataclasses import dataclass

from decaf_lora.engines.links import tls


@dataclass(frozen=True)
class Neighbour(tls.Pinned):
    """The other end of an edge."""

    number: int
    """Of the agent."""
    dials: bool
    """Whether the neighbour dials; else this agent dials, and `address` is set."""


@dataclass(frozen=True)
class Timing:
    """How long the ends of an edge wait, in seconds."""

    lost: float = 15.0
    """An end that is silent for so long is taken for lost. It is generous because pings share the interpreter with the
    rest of the process, which may be loading a model."""
    first_retry: float = 0.1
    """From the end of a connection to the next attempt; it doubles after each attempt that fails."""
    last_retry: float = 5.0
    """The longest time between two attempts."""
    drain: float = 2.0
    """How long `stop` waits for queued frames to be written."""

    @property
    def ping(self) -> float:
        """After so many seconds without a frame an end sends a ping."""
        return self.lost / 5


@dataclass(frozen=True)
class Status:
    """The state of an edge, for messages to people."""

    up: bool
    since: float
    """Time (as `time.time`) of the last change of `up`."""
    why: str
    """Why the edge is down, or was the last time."""
    sent: int = 0
    """Bytes of frames sent, over all connections."""
    received: int = 0
    """Bytes of frames received, over all connections."""
    connections: int = 0
    """Number of connections that came up."""
    bad: int = 0
    """Number of connections that were ended because the neighbour broke a rule."""
