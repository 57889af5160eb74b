"""Which graph does each round take, and what do several exchanges in a row make?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from decaf_lora.errors import UserError

from .checks import check_consensus, check_count, is_average, second_singular_value
from .graph import Graph

DRAWS = 1000  # the most rounds of a random schedule until all agents have heard from all others
SAMPLE = 100  # rounds of a random schedule over which means are taken


@dataclass(frozen=True, eq=False)
class Schedule:
    """The graph of every round.

    Attributes:
        name: what tables and figures call the schedule.
        num_agents: N.
        graph_at: round, from 0 -> Graph; a pure function, so that a resumed run sees the same graphs. With a period it
            is called for rounds below `period` only.
        period: after how many rounds the schedule starts again; None: never (a random schedule).

    Raises:
        UserError: a graph has another number of agents, or a period does not connect all agents. A schedule without a
            period is not checked.
    """

    name: str
    num_agents: int
    graph_at: Callable[[int], Graph]
    period: int | None = None

    def __post_init__(self) -> None:
        check_count(self.num_agents)
        if self.period is None:
            return
        if self.period < 1:
            raise UserError(f"schedule: the period is {self.period}; it must be at least 1 round.")
        graphs = [self.at(round) for round in range(self.period)]
        if any(graph.is_server for graph in graphs):
            return  # everybody receives everything in that round
        check_consensus(_heard(graphs), "schedule", " in some round of the period")

    @classmethod
    def constant(cls, graph: Graph) -> "Schedule":
        """The same graph in every round."""
        return cls.cycle([graph], graph.name)

    @classmethod
    def cycle(cls, graphs: Sequence[Graph], name: str) -> "Schedule":
        """The graphs one after the other, again and again."""
        if not graphs:
            raise UserError("schedule: there is no graph in it; give at least one.")
        return cls(name, graphs[0].num_agents, tuple(graphs).__getitem__, len(graphs))

    @property
    def names(self) -> tuple[str, ...]:
        """(N,) what the agents are called; () if they only have numbers."""
        return self.at(0).names

    def arranged(self, names: Sequence[str]) -> "Schedule":
        """The same schedule with its agents in the order of `names`."""
        return Schedule(self.name, self.num_agents, lambda round: self.graph_at(round).arranged(names), self.period)

    def at(self, round: int) -> Graph:
        """The graph of `round`, counted from 0."""
        graph = self.graph_at(round if self.period is None else round % self.period)
        if graph.num_agents != self.num_agents:
            raise UserError(
                f"schedule: the graph of round {round} has {graph.num_agents} agents, not {self.num_agents}; "
                "every round must have the same agents."
            )
        return graph

    def weights_of_period(self) -> NDArray[np.float64]:
        """(N, N) the weights of a whole period as one exchange: `W[period - 1] @ ... @ W[0]`.

        Raises:
            UserError: the schedule has no period.
        """
        if self.period is None:
            raise UserError(f"schedule: {self.name} never starts again, so it has no weights of a period.")
        product = np.eye(self.num_agents)
        for round in range(self.period):
            product = self.at(round).weights @ product
        return product

    @cached_property
    def sigma_2(self) -> float:
        """The second largest singular value of a whole period: 0 where the period averages exactly."""
        return second_singular_value(self.weights_of_period())

    @cached_property
    def exact_after(self) -> int | None:
        """Rounds from the start of a period until all agents hold the exact average; None: not within a period."""
        product = np.eye(self.num_agents)
        for round in range(self.period or 0):
            product = self.at(round).weights @ product
            if is_average(product):
                return round + 1
        return None

    @cached_property
    def pace(self) -> int:
        """Rounds until every agent's message has reached all others: the period, or counted if there is none.

        Raises:
            UserError: a random schedule does not get there in 1000 rounds.
        """
        if self.period is not None:
            return self.period
        heard = np.eye(self.num_agents, dtype=bool)
        for round in range(DRAWS):
            heard = _passed_on(self.at(round), heard)
            if heard.all():
                return round + 1
        raise UserError(
            f"schedule: {DRAWS} rounds of {self.name} do not connect all {self.num_agents} agents; give it more links."
        )

    @cached_property
    def sigma_2_per_round(self) -> float:
        """The share of the disagreement that a round leaves in the long run; comparable with the sigma_2 of one graph.

        With a period it is the period's sigma_2 to the power of 1 / period. Without, it is the root of the second
        eigenvalue of the mean of W^T W over the first 100 rounds (Boyd, Ghosh, Prabhakar and Shah, "Randomized gossip
        algorithms", IEEE Transactions on Information Theory 2006).
        """
        if self.period is not None:
            return self.sigma_2 ** (1 / self.period) if self.exact_after is None else 0.0
        weights = [self.at(round).weights for round in range(SAMPLE)]
        return math.sqrt(second_singular_value(np.mean([W.T @ W for W in weights], axis=0)))

    def window(self, round: int, exchanges: int) -> Graph:
        """The graph of several exchanges in a row, from `round` on; for one exchange the graph of the round itself."""
        graphs = [self.at(round + hop) for hop in range(exchanges)]
        return graphs[0] if exchanges == 1 else compose(graphs)


def _heard(graphs: Sequence[Graph]) -> NDArray[np.bool_]:
    """(N, N) whether agent i has heard of agent j after the exchanges on `graphs`, first to last."""
    heard = graphs[0].weights > 0
    for graph in graphs[1:]:
        heard = _passed_on(graph, heard)
    return heard


def _passed_on(graph: Graph, heard: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`heard` (N, N) after one more exchange.

    Not from the weights, since the product of many small ones could underflow to 0, and in float32, since numpy
    multiplies booleans a hundred times slower.
    """
    return (graph.weights > 0).astype(np.float32) @ heard.astype(np.float32) > 0


def as_schedule(graph: Graph | Schedule) -> Schedule:
    """A graph as the schedule that repeats it; a schedule as it is."""
    return graph if isinstance(graph, Schedule) else Schedule.constant(graph)


def compose(graphs: Sequence[Graph]) -> Graph:
    """Several exchanges as one: weights `W[m-1] @ ... @ W[0]`, and the graphs as `hops`.

    Sending messages along the hops and mixing at each hop (or forwarding them whole) gives the same as one exchange
    with the composed weights. A product that is the average but for rounding is replaced by the exact average, so that
    its rows are equal bit by bit, like those of `complete`.
    """
    product = np.eye(graphs[0].num_agents)
    for graph in graphs:
        product = graph.weights @ product
    if is_average(product):
        product = np.full_like(product, 1 / len(product))
    name = " * ".join(dict.fromkeys(graph.name for graph in graphs))
    return Graph(product, name, require_symmetric=False, connected=False, hops=tuple(graphs))
