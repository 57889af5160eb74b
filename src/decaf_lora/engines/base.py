"""Where do agents live and how do messages travel? The contract of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.graphs import Graph

T = TypeVar("T")

Sizes = Mapping[str, tuple[int, Sequence[int]]]
"""Tensor of a message -> (axis, size along it of each of the N agents), where agents differ. What lies beyond an
agent's size is 0 and does not travel."""


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Pending(Generic[T]):
    """What is on its way while the process does other things. Either method is called, once."""

    wait: Callable[[], T]
    """Returns it once it is here. Several that are under way may be waited for in any order."""
    abandon: Callable[[], object] = _nothing
    """Gives it up: nobody will use it. The process is then free for what comes next."""


class Engine(Protocol):
    """Places the agents and moves their messages; the round itself is in run.py and the same for all.

    Where agents live in several processes that keep step, all of them call every method, in the same order. In a mesh
    each process is the main process of its own agent, and collectives are about that agent alone.
    """

    num_agents: int
    """N, the agents of the whole run."""
    agents: list[int]
    """Numbers of the n agents that this process holds, ascending."""
    reports: list[int]
    """Numbers of the agents that `gather` and `collect` bring together, ascending: all N, or in a mesh the own one."""
    is_main: bool
    """Whether this process prints and writes."""

    def start(self, message: Tensors, graph: Graph, exchange: int, sizes: Sizes | None = None) -> Pending[Inbox]:
        """Starts an exchange: every agent's message to its neighbours, and what they send.

        Args:
            message: name -> (n, ...), of this process's agents.
            graph: who listens to whom.
            exchange: its number, (round - 1) * gossip_steps + hop, from 0: the same for all who take part in it.
            sizes: what of the message travels, where agents differ.

        Returns:
            The inbox of this process's agents, each one's own message included. `Inbox.exchange` is the number that was
            given, or a later one where the neighbours were ahead: the first exchange of a round. `message` took part in
            it if it was made for a first one too and the run is not over there; otherwise, and if `message` is too old
            to take part, the inbox has no senders, and `current` is asked anew.
        """

    def current(self, exchange: int) -> tuple[int, bool]:
        """Asked before an exchange is started: the one to take part in, and whether to catch up first.

        It is `exchange`, or the first one of a later round that the neighbours are at.
        """

    def catch_up(self, tensors: Tensors) -> Inbox:
        """What the neighbours hold, for an agent that is late or comes back.

        Args:
            tensors: as for `hold`, of the agents as they are; in the inbox they have no weight.

        Returns:
            `Inbox.exchange` is the one to take part in next: the first of a round, or one beyond the last if the run is
            over.
        """

    def hold(self, tensors: Tensors) -> None:
        """The agents between two exchanges, name -> (n, ...): what a neighbour gets that catches up."""

    def wire_bytes(self, message: Tensors, graph: Graph, sizes: Sizes | None = None) -> float | None:
        """Bytes that such an exchange moves between processes, mean over the agents reported; None in one process."""

    def gather(self, tensors: Tensors) -> Tensors:
        """name -> (n, ...) of this process to the agents reported, in every process. Use it for small tensors."""

    def collect(self, tensors: Tensors) -> Pending[Tensors]:
        """Like `gather`, but only the main process receives the result; the others get {} once their part has been
        sent. Use it for large tensors."""

    def scatter(self, tensors: Tensors) -> Tensors:
        """name -> tensors of the agents reported, in the main process, to name -> (n, ...), everybody's own agents.

        What the other processes pass is ignored.
        """

    def anyone_stops(self, asked: bool) -> bool:
        """Whether any process was asked to stop, so that those that keep step stop in the same one."""

    def snapshot(self) -> dict[str, Any]:
        """What the engine needs to go on from a checkpoint: values for JSON."""

    def restore(self, values: dict[str, Any]) -> None:
        """Goes back to a snapshot; it may be of another engine, whose values mean nothing here."""


class InStep:
    """What is the same for all engines whose agents are always in the same exchange."""

    def current(self, exchange: int) -> tuple[int, bool]:
        """Nobody is ahead."""
        return exchange, False

    def catch_up(self, tensors: Tensors) -> Inbox:
        """Nobody is late."""
        raise RuntimeError("agents that keep step have nothing to catch up with")

    def hold(self, tensors: Tensors) -> None:
        """Nobody will ask."""

    def snapshot(self) -> dict[str, Any]:
        """Nothing is kept between exchanges."""
        return {}

    def restore(self, values: dict[str, Any]) -> None:
        """Nothing is kept between exchanges."""
