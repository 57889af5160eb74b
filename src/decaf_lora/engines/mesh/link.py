"""Links: what does the protocol ask of a transport?

The transport authenticates neighbours, keeps one connection for each edge, reconnects, and with pings of its own
notices when the other end falls silent. It knows nothing of exchanges and tensors.
"""

from __future__ import annotations

from typing import Protocol

from decaf_lora.engines.mesh.frames import Frame


class Events(Protocol):
    """What a link tells its owner. The link makes these calls one after another, never two at once.

    `connection` is the number of a connection of this process to a neighbour. Numbers ascend. A new connection
    supersedes the old one at once, and calls that name an old one are ignored.
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
        """Queues a frame on the newest connection to `peer`; without a connection the frame is dropped.

        The call neither waits nor calls back into the owner.
        """

    def close(self, peer: int, reason: str) -> None:
        """Ends the connection to `peer`, which broke a rule as `reason` says; `on_down` follows later."""


def dialler(first: str, second: str, listens: frozenset[str]) -> str:
    """Which end of an edge dials: the only one that can reach the other, or else the name that sorts first.

    One end must be chosen: if both dialled, two connections could replace each other for ever.

    Args:
        first, second: names of the ends.
        listens: names that can be dialled.

    Raises:
        ValueError: neither end can be dialled.
    """
    low, high = sorted((first, second))
    if low not in listens and high not in listens:
        raise ValueError(f"neither {low} nor {high} can be dialled")
    return low if high in listens else high
