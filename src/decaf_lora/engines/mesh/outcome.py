"""What does the protocol ask of its owner, what does it tell the owner, and which limits does the owner set?"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from decaf_lora.engines.mesh.edge import Saved, Verdict


@dataclass(frozen=True)
class Limits:
    """How long to wait, in seconds, and how much to accept. All agents of a run have the same."""

    patience: float = 60.0
    """D: a neighbour that makes no progress for so many seconds is no longer waited for."""
    give_up: float = 86_400.0
    """How long an exchange may stay open without any neighbour to use before the agent ends."""
    linger: float = 86_400.0
    """How long a finished agent stays for a neighbour that is out of reach, and how long an unfinished agent waits
    while no neighbour at all is up."""
    down: float = 1.0
    """How long to wait at most for a neighbour that is out of reach and has sent nothing in this exchange."""
    answer: float = 10.0
    """In units of D: a neighbour that is up and has sent its message, but does not answer for so long, is hanging."""
    misses: int = 3
    """After so many exchanges in a row without a neighbour the account of its edge is emptied."""
    catch_up: int = 3
    """An agent that is this many exchanges behind takes the neighbours' average instead of jumping ahead."""
    rejections: int = 3
    """From so many bad messages in a row on, every bad one ends the connection."""
    most_parts: int = 4096
    """The most parts that a payload may have."""


class Phase(Enum):
    """What an agent is doing, as far as the protocol knows."""

    IDLE = "idle"
    """No exchange is open: the agent takes local steps, or has not started."""
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
    """Whether this agent's message took part. It did not if the agent left its exchange for a later one that the
    message was not made for, or if the run is over."""
    verdicts: dict[int, Verdict]
    """How the exchange went with each of its neighbours."""
    contents: dict[int, Any]
    """Neighbour that is used -> what the owner's check returned for its payload."""
    emptied: frozenset[int]
    """Neighbours whose accounts are emptied before this exchange is added."""
    waited: dict[int, float]
    """Neighbour -> seconds from the opening until it was certain whether the neighbour takes part."""
    left: dict[int, dict[int, Verdict]] = field(default_factory=dict)
    """Earlier exchange -> verdicts; exchanges that were opened, had nobody to use, and were left for this one."""
    edges: dict[int, Saved] = field(default_factory=dict)
    """Neighbour -> what of its edge goes into a checkpoint made after this exchange."""


@dataclass(frozen=True)
class CaughtUp:
    """The neighbours' adapters, for an agent that is late."""

    exchange: int
    """The next exchange to take part in; one above the last if the run is over."""
    contents: dict[int, Any]
    """Neighbour that answered -> what the owner's check returned for its adapter."""


@dataclass(frozen=True)
class Failure:
    """Why an agent has ended before the run: it has waited as long as it may."""

    alone: bool
    """Whether no neighbour was in reach; else some were, and none answered."""
    missing: list[int]
    """The neighbours that the agent waited for."""


class RejectionError(Exception):
    """A neighbour sent what cannot be used; the text says why."""


class Owner(Protocol):
    """The one who knows what payloads mean. The first three methods raise `RejectionError` to refuse."""

    def agree(self, peer: int, facts: bytes) -> None:
        """Checks that the facts in a neighbour's hello agree with this agent's."""

    def check(self, peer: int, exchange: int, payload: bytes) -> Any:
        """Checks a message before it is answered; the result is kept instead of the payload."""

    def check_adapter(self, peer: int, payload: bytes) -> Any:
        """Checks an adapter of a neighbour, while this agent catches up; the result is kept instead of the payload."""

    def adapter(self) -> bytes:
        """This agent's newest adapter."""
