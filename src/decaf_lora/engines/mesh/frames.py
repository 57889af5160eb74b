"""Frames: what do two neighbours say to each other?

A frame is a plain value; how it becomes bytes is the link's matter. Payloads (a message, an adapter) are opaque bytes
that travel in parts of at most `PART` bytes, in order.

Every frame carries `next`, the lowest exchange that its sender may still close. A digest is the SHA-256 that names a
message (`account.digest`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

PART = 1 << 20
"""The most bytes of a payload that one frame carries."""

DIGEST = 32
"""Bytes of a digest, and of an edge's record."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The first frame of a connection, in each direction."""

    next: int
    life: int
    """64 random bits, drawn at each start of the sender's process."""
    facts: bytes = b""
    """What both ends must agree on; the protocol does not read it."""


@dataclass(frozen=True, slots=True)
class Data:
    """Part `part` of `parts` of the sender's message of exchange `exchange`."""

    next: int
    exchange: int
    part: int
    parts: int
    digest: bytes
    record: bytes
    """Record of the edge at the sender when it opened the exchange."""
    payload: bytes


@dataclass(frozen=True, slots=True)
class Have:
    """Says to the receiver: your message `digest` of exchange `exchange` is here and sound, or was used."""

    next: int
    exchange: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """Says to the receiver: your message `digest` of exchange `exchange` was not used and will not be."""

    next: int
    exchange: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class At:
    """The sender's `next` has changed."""

    next: int


@dataclass(frozen=True, slots=True)
class Get:
    """Asks for the receiver's newest adapter."""

    next: int


@dataclass(frozen=True, slots=True)
class Last:
    """Part `part` of `parts` of the sender's newest adapter, the answer to `Get`; `digest` is over the payload."""

    next: int
    part: int
    parts: int
    digest: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class Ping:
    """Shows that the sender's process runs. Links send and count pings; the protocol reads only `next`."""

    next: int


Frame = Hello | Data | Have | Closed | At | Get | Last | Ping


def split(payload: bytes, size: int = PART) -> Iterator[bytes]:
    """The parts of a payload, in order; an empty payload is one empty part."""
    for start in range(0, max(len(payload), 1), size):
        yield payload[start : start + size]


def adapter_frames(next_: int, payload: bytes) -> Iterator[Last]:
    """The frames that carry an adapter. next_: the sender's `next`."""
    digest, parts = hashlib.sha256(payload).digest(), list(split(payload))
    for part, piece in enumerate(parts):
        yield Last(next_, part, len(parts), digest, piece)


def fault(frame: Frame, last: int, most_parts: int) -> str | None:
    """Why a frame is impossible, for an error; None if it is not.

    Args:
        frame: what arrived.
        last: the last exchange of the run; the first is 1.
        most_parts: the most parts that a payload may have.
    """
    if not 1 <= frame.next <= last + 1:
        return f"next is {frame.next}, not 1 to {last + 1}"
    if isinstance(frame, Data | Have | Closed) and not 1 <= frame.exchange <= last:
        return f"exchange is {frame.exchange}, not 1 to {last}"
    if isinstance(frame, Data | Have | Closed | Last) and len(frame.digest) != DIGEST:
        return f"digest has {len(frame.digest)} bytes, not {DIGEST}"
    if isinstance(frame, Data) and len(frame.record) != DIGEST:
        return f"record has {len(frame.record)} bytes, not {DIGEST}"
    if isinstance(frame, Data | Last):
        if not 0 <= frame.part < frame.parts <= most_parts:
            return f"part {frame.part} of {frame.parts} parts, of which there may be {most_parts}"
        if len(frame.payload) > PART:
            return f"a part of {len(frame.payload)} bytes, more than {PART}"
    if isinstance(frame, Hello) and not 0 <= frame.life < 1 << 64:
        return "life is not a number of 64 bits"
    return None
