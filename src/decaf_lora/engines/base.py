"""The contract of an engine: where do agents live, and how do messages travel?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.graphs import Graph

T = TypeVar("T")

Sizes = Mapping[str, tuple[int, Sequence[int]]]
"""Name of a message's tensor -> (axis, the size along it of each of the N agents), for tensors whose size differs
between agents. What lies beyond an agent's own size is 0 and does not travel."""


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Pending(Generic[T]):
    """A result that is on its way while the process does other things. Call one of the two methods, once."""

    wait: Callable[[], T]
    """Blocks until the result is here, and returns it. Several results may be waited for in any order."""
    abandon: Callable[[], object] = _nothing
    """Gives the result up; afterwards the process is free for other exchanges."""


class Engine(Protocol):
    """Places the agents and moves their messages. The round itself (run.py) is the same on every engine.

    Where agents live in several processes that keep step, all processes call every method, in the same order. In a mesh
    each process is the main process of its own agent, and `gather`, `collect` and `scatter` are about that agent alone.
    """

    num_agents: int
    """N, the agents of the whole run."""
    agents: list[int]
    """Numbers of the n agents that this process holds, ascending."""
    reports: list[int]
    """Numbers of the agents that `gather` and `collect` bring together, ascending: all N; in a mesh this agent only."""
    is_main: bool
    """Whether this process prints and writes."""

    def start(self, message: Tensors, graph: Graph, exchange: int, sizes: Sizes | None = None) -> Pending[Inbox]:
        """Starts an exchange: sends every agent's message to its neighbours, and receives theirs.

        Args:
            message: name -> (n, ...), of this process's agents.
            graph: who listens to whom.
            exchange: number of the exchange, (round - 1) * gossip_steps + hop, from 0: the same for all who take part.
            sizes: what of the message travels, where agents differ.

        Returns:
            The inbox of this process's agents, each one's own message included. `Inbox.exchange` is the given number,
            or where the neighbours were ahead the first exchange of a later round. `message` can take part in that
            later exchange only if it was made for the first exchange of a round, is not too old, and the run goes on
            there. If it could not take part, the inbox has no senders, and the caller asks `current` again.
        """

    def current(self, exchange: int) -> tuple[int, bool]:
        """Which exchange to take part in next; asked before an exchange is started.

        Args:
            exchange: number of the agents' next exchange.

        Returns:
            `exchange`, or the first exchange of a later round if the neighbours are there already; and whether to call
            `catch_up` before it.
        """

    def catch_up(self, tensors: Tensors) -> Inbox:
        """The neighbours' adapters, for an agent that is late or comes back.

        Args:
            tensors: this process's agents as they are, as for `hold`.

        Returns:
            The neighbours' adapters with equal weights; the agents' own has weight 0, unless no neighbour is ahead any
            more. `Inbox.exchange` is the exchange to take part in next: the first of a round, or one beyond the last if
            the run is over.
        """

    def hold(self, tensors: Tensors) -> None:
        """Keeps the agents as they are between two exchanges, for neighbours that catch up.

        Args:
            tensors: name -> (n, ...).
        """

    def wire_bytes(self, message: Tensors, graph: Graph, sizes: Sizes | None = None) -> float | None:
        """Bytes that an exchange of such a message moves between processes, mean over the agents reported.

        None where all agents live in one process. The arguments are those of `start`.
        """

    def gather(self, tensors: Tensors) -> Tensors:
        """Brings the tensors of all agents together in every process. Use it for small tensors.

        name -> (n, ...) of this process to name -> (len(reports), ...).
        """

    def collect(self, tensors: Tensors) -> Pending[Tensors]:
        """Like `gather`, but only the main process receives the result; the others get {} once their part has been
        sent. Use it for large tensors."""

    def scatter(self, tensors: Tensors) -> Tensors:
        """Hands every process the tensors of its own agents, from the main process.

        name -> (len(reports), ...) in the main process to name -> (n, ...) in each. What the other processes pass is
        ignored.
        """

    def anyone_stops(self, asked: bool) -> bool:
        """Whether any process was asked to stop, so that processes that keep step stop at the same step."""

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint must hold for the engine to go on from it, in JSON's types."""

    def restore(self, values: dict[str, Any]) -> None:
        """Goes back to a snapshot. Values of another kind of engine are ignored."""


class InStep:
    """The part of the contract that all engines share whose agents are always in the same exchange."""

    def current(self, exchange: int) -> tuple[int, bool]:
        """Nobody is ahead."""
        return exchange, False

    def catch_up(self, tensors: Tensors) -> Inbox:
        """Nobody is late."""
        raise RuntimeError("agents that keep step have nothing to catch up with")

    def hold(self, tensors: Tensors) -> None:
        """Nothing to keep: no neighbour ever catches up."""

    def snapshot(self) -> dict[str, Any]:
        """Nothing is kept between exchanges."""
        return {}

    def restore(self, values: dict[str, Any]) -> None:
        """Nothing is kept between exchanges."""
