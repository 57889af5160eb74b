"""One edge, as one of its ends sees it: is the neighbour up, what has arrived, how long to wait for the rest?"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from decaf_lora.engines.mesh.account import EMPTY
from decaf_lora.engines.mesh.frames import Data, Last


class Verdict(Enum):
    """How an exchange went with one neighbour."""

    USED = "used"
    DECLINED = "declined"
    """The neighbour said that it does not use this agent's message, or closed the exchange without sending its own."""
    SILENT = "silent"
    """Patience ended, and the neighbour's message is not here."""
    CUT_OFF = "cut off"
    """Patience ended with the neighbour's message here, its answer missing and the link down. The neighbour may have
    used this agent's message. Besides a crash this is the only way to a use on one side alone."""


@dataclass(frozen=True)
class Kept:
    """A message of a neighbour that has passed the owner's check."""

    exchange: int
    digest: bytes
    record: bytes
    content: Any
    """What the owner's check returned for the payload."""


@dataclass
class Assembly:
    """A payload whose first parts have arrived."""

    digest: bytes
    parts: int
    pieces: list[bytes] = field(default_factory=list)

    def add(self, frame: Data | Last) -> bool:
        """Adds the next part; false if the part is here already.

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
    """The part of an edge that goes into a checkpoint, besides the tensors f of its account."""

    record: bytes = EMPTY
    """Hash chain over the exchanges in the account (account.py)."""
    used: tuple[int, bytes] = (0, b"")
    """Exchange and digest of the neighbour's message that was used last."""
    misses: int = 0
    """Exchanges without the neighbour since."""


@dataclass
class Edge:
    """The edge to one neighbour."""

    peer: int
    patience: float
    """Seconds without progress after which this neighbour is no longer waited for."""
    saved: Saved = field(default_factory=Saved)
    connection: int | None = None
    latest: int = -1
    """Number of the newest connection so far; -1 before the first."""
    heard: bool = False
    """Whether the neighbour's hello is here on this connection: only then does it count as up."""
    next: int = 0
    """The lowest exchange that the neighbour may still close; 0 before its first hello."""
    life: int | None = None
    """Random number of the neighbour's process (`frames.Hello`); None before its first hello."""
    message: Kept | None = None
    """The neighbour's message of the open exchange."""
    newest: Kept | None = None
    """The neighbour's newest message of a later exchange. Older ones are never needed: it has closed them."""
    coming: tuple[int, Assembly] | None = None
    """Exchange and parts of a message that is not yet whole."""
    fresh: bool = False
    """Whether the last part that arrived was a new one."""
    adapter: Assembly | None = None
    """The neighbour's adapter, as far as it has arrived."""
    sent: bytes = b""
    """Digest of this agent's message of the open exchange to this neighbour; empty if there is none."""
    sent_record: bytes = EMPTY
    """Record of the edge that went with that message."""
    had: bool = False
    """Whether the neighbour has said `have` of that message."""
    declined: bool = False
    """Whether the neighbour has said `closed` of that message."""
    since: float = 0.0
    """When the neighbour last made progress in the open exchange: the opening, a new part, the first hello."""
    greeted: bool = False
    """Whether a hello has counted as progress in the open exchange."""
    changed: float = 0.0
    """When `heard` last changed."""
    settled: float | None = None
    """When it became certain whether the neighbour takes part in the open exchange; None before."""
    mute: bool = False
    """Whether the neighbour has left this agent's message of the open exchange unanswered for too long. Its connections
    are then refused until patience with it has ended, as if the link were down."""
    rejected: int = 0
    """Bad messages since the last sound one."""
    served: tuple[int | None, int] = (None, -1)
    """Connection, and this agent's `next`, when an adapter was last sent to the neighbour."""

    @property
    def usable(self) -> bool:
        """Whether both messages of the open exchange have arrived, as far as this end can know."""
        return self.message is not None and self.had and not self.declined

    def refuses(self, exchange: int) -> bool:
        """Whether this neighbour certainly does not take part in the open exchange."""
        return self.declined or (self.next > exchange and self.message is None)

    def expires(self, exchange: int, down: float) -> float:
        """When patience with a neighbour ends of whom nothing is certain yet.

        Args:
            exchange: the open one.
            down: seconds that patience lasts at most with a neighbour that is out of reach and has sent nothing of its
                message of that exchange.
        """
        if self.heard:
            # With its message here and the link up, its answer will come for certain.
            return math.inf if self.message is not None else self.since + self.patience
        nothing = self.message is None and (self.coming is None or self.coming[0] != exchange)
        return max(self.since, self.changed) + (min(self.patience, down) if nothing else self.patience)

    def owes(self, exchange: int) -> bool:
        """Whether the neighbour is up and has sent its message of the open exchange, but not answered this agent's."""
        return self.heard and self.message is not None and not self.usable and not self.refuses(exchange)

    def verdict(self, exchange: int) -> Verdict:
        """How the exchange went with this neighbour, once it is no longer waited for."""
        if self.usable:
            return Verdict.USED
        if self.refuses(exchange):
            return Verdict.DECLINED
        return Verdict.SILENT if self.message is None else Verdict.CUT_OFF

    def opened(self, exchange: int, now: float) -> None:
        """This agent opens an exchange: a message of it that is here already becomes `message`; older ones go."""
        self.message = self.newest if self.newest is not None and self.newest.exchange == exchange else None
        self.passed(exchange)
        self.since, self.greeted = now, False

    def passed(self, exchange: int) -> None:
        """Forgets what belongs to exchanges up to `exchange`, which are over or (`opened`) just beginning."""
        if self.newest is not None and self.newest.exchange <= exchange:
            self.newest = None
        if self.coming is not None and self.coming[0] < exchange:
            self.coming = None
        self.sent, self.had, self.declined, self.settled, self.mute = b"", False, False, None, False

    def receive(self, frame: Data) -> tuple[bytes, bytes] | None:
        """Takes a part of a message; returns (payload, its SHA-256) once all parts are here, else None.

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
        """Takes a part of an adapter; otherwise like `receive`."""
        if self.adapter is None or self.adapter.digest != frame.digest:
            self.adapter = Assembly(frame.digest, frame.parts)
        assembly = self.adapter
        self.fresh = assembly.add(frame)
        if not assembly.whole:
            return None
        self.adapter = None
        return assembly.content()

    def holds(self, digest: bytes) -> bool:
        """Whether a message with this digest is here."""
        return any(kept is not None and kept.digest == digest for kept in (self.message, self.newest))

    def forget_life(self) -> None:
        """Forgets all that came from the neighbour's former process: it has started a new one."""
        self.message = self.newest = self.coming = self.adapter = None
        self.had = self.declined = False
        self.rejected = 0
