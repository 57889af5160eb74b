"""Links: what does the protocol ask of a transport?

The transport authenticates neighbours, keeps one connection an edge, reconnects, and takes a connection for down when
the other end falls silent (its own pings). It knows no exchange and no tensor.
"""

from __future__ import annotations

from typing import Protocol

from decaf_lora.engines.mesh.frames import Frame


class Events(Protocol):
    """What a link tells its owner. The link makes these calls one after another, never two at once.

    `connection` numbers the connections of this process to a neighbour, ascending: a new one supersedes the old at
    once, and calls that name an old one are ignored.
    """

    def on_up(self, peer: int, connection: int) -> None:
        """A connection to neighbour `peer` is ready to carry frames; nothing has been said on it yet."""

    def on_frame(self, peer: int, connection: int, frame: Frame) -> None:
        """A frame has arrived. Frames of a connection arrive whole, once, and in the order they were sent."""

    def on_down(self, peer: int, connection: int) -> None:
        """The connection has ended, or its other end has been silent for too long."""


class Link(Protocol):
    """Carries frames between this agent and its neighbours."""

    def up(self, peer: int) -> bool:
        """Whether a connection to neighbour `peer` is up."""

    def send(self, peer: int, frame: Frame) -> None:
        """Queues a frame on the newest connection to `peer`; dropped if there is none.

        Neither waits nor calls back into the owner.
        """

    def close(self, peer: int, reason: str) -> None:
        """Ends the connection to `peer`, which broke a rule as `reason` says; `on_down` follows later."""


def dialler(first: str, second: str, listens: frozenset[str]) -> str:
    """The one end of an edge that dials: the only end that can reach the other, else the name that sorts first.

    If both ends dialled, two connections could replace each other for ever. listens: names that can be dialled.

    Raises:
        ValueError: neither end can be dialled.
    """
    low, high = sorted((first, second))
    if low not in listens and high not in listens:
        raise ValueError(f"neither {low} nor {high} can be dialled")
    return low if high in listens else high
