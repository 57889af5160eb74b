"""How does a frame become bytes? As a message of mesh.proto; everything that is received has a bound."""

from __future__ import annotations

from google.protobuf.message import DecodeError

import decaf_lora.engines.links.mesh_pb2 as pb
from decaf_lora.engines.mesh.frames import DIGEST, PART, At, Closed, Data, Frame, Get, Have, Hello, Last, Ping

MOST_BYTES = PART + 1024
"""The most bytes of an encoded frame: a part of a payload, and the fields that say where it belongs."""

MOST_FACTS = PART
"""The most bytes of the facts in a hello."""


class BadFrameError(ValueError):
    """Bytes that are no frame; the message says what is wrong with them."""


ALIVE = pb.Frame(alive=pb.Alive()).SerializeToString()
"""The link's own frame. It opens every connection, and shows that an end with nothing to say still runs."""


def encode(frame: Frame) -> bytes:
    """The bytes of a frame. Raises BadFrameError if they are more than `MOST_BYTES`."""
    out = pb.Frame(next=frame.next)
    match frame:
        case Hello():
            out.hello.life = frame.life
            out.hello.facts = frame.facts
        case Data():
            out.data.exchange, out.data.part, out.data.parts = frame.exchange, frame.part, frame.parts
            out.data.digest, out.data.record, out.data.payload = frame.digest, frame.record, bytes(frame.payload)
        case Have():
            out.have.exchange, out.have.digest = frame.exchange, frame.digest
        case Closed():
            out.closed.exchange, out.closed.digest = frame.exchange, frame.digest
        case At():
            out.at.SetInParent()
        case Get():
            out.get.SetInParent()
        case Last():
            out.last.part, out.last.parts = frame.part, frame.parts
            out.last.digest, out.last.payload = frame.digest, bytes(frame.payload)
        case Ping():
            out.ping.SetInParent()
    encoded = out.SerializeToString()
    if len(encoded) > MOST_BYTES:
        raise BadFrameError(f"a frame of {len(encoded)} bytes, more than {MOST_BYTES}")
    return encoded


def decode(received: bytes) -> Frame | None:
    """The frame that the bytes hold; None for the link's own `ALIVE`.

    Raises:
        BadFrameError: the bytes are no frame, or a field is longer or larger than that of any frame.
    """
    if len(received) > MOST_BYTES:
        raise BadFrameError(f"a frame of {len(received)} bytes, more than {MOST_BYTES}")
    try:
        got = pb.Frame.FromString(received)
    except DecodeError as error:
        raise BadFrameError("bytes that are no frame") from error
    kind = got.WhichOneof("body")
    if got.next >= 1 << 63:
        raise BadFrameError(f"next is {got.next}")
    if kind == "alive":
        return None
    if kind == "hello":
        return Hello(got.next, got.hello.life, _bytes("facts", got.hello.facts, MOST_FACTS))
    if kind in ("data", "have", "closed"):
        return _of_an_exchange(got, kind)
    if kind == "last":
        last = got.last
        _check_part(last.part, last.parts)
        return Last(got.next, last.part, last.parts, _digest(last.digest), _bytes("payload", last.payload, PART))
    if kind in _PLAIN:
        return _PLAIN[kind](got.next)
    raise BadFrameError("a frame of no known kind")


_PLAIN: dict[str, type[At] | type[Get] | type[Ping]] = {"at": At, "get": Get, "ping": Ping}


def _of_an_exchange(got: pb.Frame, kind: str) -> Frame:
    body = getattr(got, kind)
    if not 1 <= body.exchange < 1 << 63:
        raise BadFrameError(f"exchange is {body.exchange}")
    digest = _digest(body.digest)
    if kind == "have":
        return Have(got.next, body.exchange, digest)
    if kind == "closed":
        return Closed(got.next, body.exchange, digest)
    _check_part(body.part, body.parts)
    record, payload = _digest(body.record, "record"), _bytes("payload", body.payload, PART)
    return Data(got.next, body.exchange, body.part, body.parts, digest, record, payload)


def _check_part(part: int, parts: int) -> None:
    if not 0 <= part < parts:
        raise BadFrameError(f"part {part} of {parts} parts")


def _digest(value: bytes, name: str = "digest") -> bytes:
    if len(value) != DIGEST:
        raise BadFrameError(f"{name} has {len(value)} bytes, not {DIGEST}")
    return value


def _bytes(name: str, value: bytes, most: int) -> bytes:
    if len(value) > most:
        raise BadFrameError(f"{name} has {len(value)} bytes, more than {most}")
    return value
