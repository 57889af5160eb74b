"""Where is an agent beside its neighbours, and which exchange is it to open next?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from decaf_lora.engines.mesh.edge import Edge


@dataclass(frozen=True)
class Plan:
    """What an agent does next, once its local steps are done."""

    exchange: int
    """The exchange to open. With `catch_up` it is the first one after catching up, as far as is known yet."""
    catch_up: bool
    """Whether to take the neighbours' average first."""


@dataclass(frozen=True)
class Course:
    """The exchanges of a run, numbered from 1, as one agent sees them."""

    row: Callable[[int], frozenset[int]]
    """exchange -> the neighbours in it."""
    last: int
    """The last exchange of the run."""
    hops: int
    """Exchanges in a round. A message is made for its place in the round, so an agent that is late comes back with the
    first exchange of a round."""
    catch_up: int
    """An agent that is this many exchanges behind takes the neighbours' average instead of jumping ahead."""

    def hop(self, exchange: int) -> int:
        """Place of an exchange in its round, from 0."""
        return (exchange - 1) % self.hops

    def first(self, exchange: int) -> int:
        """The lowest exchange, from `exchange` on, that is the first of a round."""
        return exchange + -self.hop(exchange) % self.hops

    def leads(self, edge: Edge, exchange: int) -> bool:
        """Whether a neighbour has closed, without this agent, an exchange (from `exchange` on) that the two share.

        A higher number alone does not mean that: on a schedule the two may just not have shared an exchange since.
        """
        return any(edge.peer in self.row(e) for e in range(exchange, edge.next))

    def ahead(self, edges: Iterable[Edge], exchange: int) -> int:
        """The highest `next` of the neighbours in reach that lead (`leads`) an agent at `exchange`; 0 if none does."""
        return max((edge.next for edge in edges if edge.heard and self.leads(edge, exchange)), default=0)

    def plan(self, edges: Iterable[Edge], number: int, restarted: bool) -> Plan:
        """What an agent does next.

        If it is behind by 1 and so is some neighbour: its next exchange; the neighbours ahead wait. If it is behind by
        2, or by 1 as the only one: the exchange that the others are at. If it is behind by `catch_up` or more, or
        behind after a restart: it takes the others' average first.

        Args:
            edges: to all neighbours.
            number: the agent's next exchange.
            restarted: whether its process has just started.
        """
        heard = [edge for edge in edges if edge.heard]
        lead = self.ahead(heard, number) - number
        target = self.first(number + max(lead, 0))
        if restarted and lead > 0:
            return Plan(target, catch_up=True)
        if self.hop(number) != 0 or lead <= 0:
            return Plan(number, catch_up=False)
        if lead >= self.catch_up:
            return Plan(target, catch_up=True)
        if lead >= 2 or not any(edge.next <= number for edge in heard):
            return Plan(target, catch_up=target > self.last)
        return Plan(number, catch_up=False)
