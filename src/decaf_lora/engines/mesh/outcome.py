"""What the protocol asks of its owner and tells it, and the limits that the owner sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from decaf_lora.engines.mesh.edge import Saved, Verdict


@dataclass(frozen=True)
class Limits:
    """How long to wait, in seconds, and how much to accept. All agents of a run have the same."""

    patience: float = 60.0
    """D: a neighbour that makes no progress for this long is no longer waited for."""
    give_up: float = 86_400.0
    """How long an exchange may be open with nobody to use in it before the agent ends."""
    linger: float = 86_400.0
    """How long a finished agent serves a neighbour that is out of reach, and how long one that is not finished waits
    while no neighbour is up at all."""
    down: float = 1.0
    """The most that a neighbour is waited for that is out of reach and has sent nothing."""
    answer: float = 10.0
    """A neighbour that is up and has sent its message, but does not answer for so many times D, counts as hanging."""
    misses: int = 3
    """After so many exchanges without a neighbour the account of its edge is emptied."""
    catch_up: int = 3
    """Who is so many exchanges behind takes the neighbours' average instead of jumping."""
    rejections: int = 3
    """After so many bad messages in a row every further one ends the connection."""
    most_parts: int = 4096
    """Parts of a payload at most."""


class Phase(Enum):
    """What an agent is doing, as far as the protocol knows."""

    IDLE = "idle"
    """No exchange is open: local steps, or not started."""
    OPEN = "open"
    CATCHING_UP = "catching up"
    CLOSED_ALL = "closed all"
    """The last exchange is over, but the owner has not yet said that its result is on disk."""
    SERVING = "serving"
    """Finished; answers neighbours that are not."""
    LEFT = "left"
    """Finished, and no neighbour needs this agent."""
    GAVE_UP = "gave up"


@dataclass(frozen=True)
class Outcome:
    """An exchange that is over for this agent."""

    exchange: int
    """The exchange that took place: the one that was opened, or a later one that the neighbours were at."""
    took_part: bool
    """Whether this agent took part in it: not if it left it for a later one that its message was not made for, or if
    the run is over."""
    verdicts: dict[int, Verdict]
    """Of every neighbour in it."""
    contents: dict[int, Any]
    """Of every neighbour that is used, what the check made of its payload."""
    emptied: frozenset[int]
    """Neighbours whose accounts are emptied before this exchange is added."""
    waited: dict[int, float]
    """Seconds from the opening until it was certain whether a neighbour takes part."""
    left: dict[int, dict[int, Verdict]] = field(default_factory=dict)
    """Earlier exchanges that were opened and left, with nobody to use in them, for this one."""
    edges: dict[int, Saved] = field(default_factory=dict)
    """What goes into a checkpoint made after this exchange."""


@dataclass(frozen=True)
class CaughtUp:
    """The neighbours' adapters, for an agent that is late."""

    exchange: int
    """The next exchange to take part in; one above the last if the run is over."""
    contents: dict[int, Any]
    """Of every neighbour that answered, what the check made of its adapter."""


@dataclass(frozen=True)
class Failure:
    """Why an agent has ended before the run did: it has waited as long as it may."""

    alone: bool
    """No neighbour has been in reach, rather than none that answers."""
    missing: list[int]
    """The neighbours that it waited for."""


class RejectionError(Exception):
    """What a neighbour sent is not usable, for the reason that the text says."""


class Owner(Protocol):
    """Who knows what payloads mean. Each of the first three raises `RejectionError` with a reason."""

    def agree(self, peer: int, facts: bytes) -> None:
        """Compares the facts of a neighbour's hello with the own ones."""

    def check(self, peer: int, exchange: int, payload: bytes) -> Any:
        """A message, before it is answered; what it returns is kept instead of the payload."""

    def check_adapter(self, peer: int, payload: bytes) -> Any:
        """An adapter that a neighbour sent to one who catches up."""

    def adapter(self) -> bytes:
        """This agent's newest adapter."""
