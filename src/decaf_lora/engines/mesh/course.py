"""Where is an agent beside its neighbours, and which exchange is it to open next?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from decaf_lora.engines.mesh.edge import Edge


@dataclass(frozen=True)
class Plan:
    """What an agent whose local steps are done should do."""

    exchange: int
    """The exchange to open; with `catch_up` the first one after catching up, as far as is known."""
    catch_up: bool
    """Whether to take the neighbours' average first."""


@dataclass(frozen=True)
class Course:
    """The exchanges of a run, from one agent's side."""

    row: Callable[[int], frozenset[int]]
    """exchange -> the neighbours in it."""
    last: int
    hops: int
    """Exchanges in a round. Who is late comes back with the first of a round, since a message is made for its hop."""
    catch_up: int
    """Who is so many exchanges behind takes the neighbours' average instead of jumping."""

    def hop(self, exchange: int) -> int:
        """Place of an exchange in its round, from 0."""
        return (exchange - 1) % self.hops

    def first(self, exchange: int) -> int:
        """The first exchange of a round, from `exchange` on."""
        return exchange + -self.hop(exchange) % self.hops

    def leads(self, edge: Edge, exchange: int) -> bool:
        """Whether a neighbour has closed an exchange from `exchange` on that it shares with this agent.

        On a schedule a neighbour may be further along only because the two have not met since.
        """
        return any(edge.peer in self.row(e) for e in range(exchange, edge.next))

    def ahead(self, edges: Iterable[Edge], exchange: int) -> int:
        """The highest `next` of the neighbours in reach that lead an agent at `exchange`; 0 if nobody does."""
        return max((edge.next for edge in edges if edge.heard and self.leads(edge, exchange)), default=0)

    def plan(self, edges: Iterable[Edge], number: int, restarted: bool) -> Plan:
        """What an agent does whose next exchange is `number`.

        Behind by 1 while another is too: the next exchange, those ahead wait. By 2, or if nobody is as far back: the
        exchange that the others are at. By more, or after a restart: their average.
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
