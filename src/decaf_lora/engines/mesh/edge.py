"""One edge as one of its ends sees it: is the neighbour up, what of it is here, how long is it waited for?"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from decaf_lora.engines.mesh.account import EMPTY
from decaf_lora.engines.mesh.frames import Data, Last


class Verdict(Enum):
    """What a neighbour came to in an exchange."""

    USED = "used"
    DECLINED = "declined"
    """It said that it does not use this agent's message, or has closed the exchange without sending its own."""
    SILENT = "silent"
    """Patience ended and its message is not here."""
    CUT_OFF = "cut off"
    """Patience ended with its message here, its answer missing and the link down. The neighbour may have used this
    agent's message: the only way to a one-sided use but for a crash."""


@dataclass(frozen=True)
class Kept:
    """A sound message of a neighbour."""

    exchange: int
    digest: bytes
    record: bytes
    content: Any
    """What the owner's check made of the payload."""


@dataclass
class Assembly:
    """A payload of which the first parts are here."""

    digest: bytes
    parts: int
    pieces: list[bytes] = field(default_factory=list)

    def add(self, frame: Data | Last) -> bool:
        """Adds the next part; false for one that is here already.

        Raises:
            ValueError: a part was left out.
        """
        if frame.parts != self.parts or frame.part > len(self.pieces):
            raise ValueError(f"part {frame.part} of {frame.parts} where {len(self.pieces)} of {self.parts} are here")
        if frame.part < len(self.pieces):
            return False
        self.pieces.append(frame.payload)
        return True

    @property
    def whole(self) -> bool:
        """Whether all parts are here."""
        return len(self.pieces) == self.parts

    def content(self) -> tuple[bytes, bytes]:
        """The payload and its SHA-256."""
        payload = b"".join(self.pieces)
        return payload, hashlib.sha256(payload).digest()


@dataclass
class Saved:
    """What of an edge goes into a checkpoint, beside the tensor f of its account."""

    record: bytes = EMPTY
    used: tuple[int, bytes] = (0, b"")
    misses: int = 0


@dataclass
class Edge:
    """The edge to one neighbour."""

    peer: int
    patience: float
    """Seconds without progress after which this neighbour is no longer waited for."""
    saved: Saved = field(default_factory=Saved)
    connection: int | None = None
    latest: int = -1
    """Number of the newest connection that there has been."""
    heard: bool = False
    """Whether the neighbour's hello is here on this connection: only then does it count as up."""
    next: int = 0
    """The lowest exchange that the neighbour may still close; 0 before its first hello."""
    life: int | None = None
    message: Kept | None = None
    """Its message of the open exchange."""
    newest: Kept | None = None
    """Its newest message of a later exchange. An older one is never needed: its sender has closed that exchange."""
    coming: tuple[int, Assembly] | None = None
    """Exchange and parts of a message that is not yet whole."""
    fresh: bool = False
    """Whether the last part that was received had not been here before."""
    adapter: Assembly | None = None
    """Its adapter, as far as it is here."""
    sent: bytes = b""
    """Digest of this agent's message of the open exchange to this neighbour; empty if there is none."""
    sent_record: bytes = EMPTY
    had: bool = False
    """Whether it has said `have` of that message."""
    declined: bool = False
    """Whether it has said `closed` of that message."""
    since: float = 0.0
    """When it last made progress in the open exchange: the opening, a new part, the first hello."""
    greeted: bool = False
    """Whether a hello has counted as progress in the open exchange."""
    changed: float = 0.0
    """When `heard` last changed."""
    settled: float | None = None
    """When it was certain whether its message of the open exchange is used."""
    mute: bool = False
    """Whether it has left this agent's message of the open exchange unanswered for so long that its connections are
    refused until its patience has ended, as if the link were down."""
    rejected: int = 0
    """Bad messages since the last sound one."""
    served: tuple[int | None, int] = (None, -1)
    """Connection and own `next` of the last adapter that was sent to it."""

    @property
    def usable(self) -> bool:
        """Whether both messages of the open exchange have arrived, as far as this end can know."""
        return self.message is not None and self.had and not self.declined

    def refuses(self, exchange: int) -> bool:
        """Whether this neighbour certainly does not take part in the open exchange."""
        return self.declined or (self.next > exchange and self.message is None)

    def expires(self, exchange: int, down: float) -> float:
        """When patience with an unsettled neighbour ends; `down` is the most it lasts for one that is out of reach
        and of whose message of the open exchange nothing is here."""
        if self.heard:
            # With its message here and the link up its answer is certain.
            return math.inf if self.message is not None else self.since + self.patience
        nothing = self.message is None and (self.coming is None or self.coming[0] != exchange)
        return max(self.since, self.changed) + (min(self.patience, down) if nothing else self.patience)

    def owes(self, exchange: int) -> bool:
        """Whether its message of the open exchange is here and it is up, but has not answered this agent's."""
        return self.heard and self.message is not None and not self.usable and not self.refuses(exchange)

    def verdict(self, exchange: int) -> Verdict:
        """What this neighbour came to, once it is no longer waited for."""
        if self.usable:
            return Verdict.USED
        if self.refuses(exchange):
            return Verdict.DECLINED
        return Verdict.SILENT if self.message is None else Verdict.CUT_OFF

    def opened(self, exchange: int, now: float) -> None:
        """This agent opens an exchange: what is here of it moves up, what is older goes."""
        self.message = self.newest if self.newest is not None and self.newest.exchange == exchange else None
        self.passed(exchange)
        self.since, self.greeted = now, False

    def passed(self, exchange: int) -> None:
        """Everything up to `exchange` is over for this agent, but for an open one."""
        if self.newest is not None and self.newest.exchange <= exchange:
            self.newest = None
        if self.coming is not None and self.coming[0] < exchange:
            self.coming = None
        self.sent, self.had, self.declined, self.settled, self.mute = b"", False, False, None, False

    def receive(self, frame: Data) -> tuple[bytes, bytes] | None:
        """Takes a part of a message; (payload, its SHA-256) once all parts are here.

        Raises:
            ValueError: a part was left out.
        """
        if self.coming is None or self.coming[1].digest != frame.digest:
            self.coming = frame.exchange, Assembly(frame.digest, frame.parts)
        _, assembly = self.coming
        self.fresh = assembly.add(frame)
        if not assembly.whole:
            return None
        self.coming = None
        return assembly.content()

    def receive_adapter(self, frame: Last) -> tuple[bytes, bytes] | None:
        """The same for a part of an adapter."""
        if self.adapter is None or self.adapter.digest != frame.digest:
            self.adapter = Assembly(frame.digest, frame.parts)
        assembly = self.adapter
        self.fresh = assembly.add(frame)
        if not assembly.whole:
            return None
        self.adapter = None
        return assembly.content()

    def holds(self, digest: bytes) -> bool:
        """Whether the message of that name is here."""
        return any(kept is not None and kept.digest == digest for kept in (self.message, self.newest))

    def forget_life(self) -> None:
        """The neighbour's process is another one: nothing of the old counts."""
        self.message = self.newest = self.coming = self.adapter = None
        self.had = self.declined = False
        self.rejected = 0
