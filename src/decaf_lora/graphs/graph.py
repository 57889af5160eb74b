"""Who listens to whom, with which weight? One exchange as a mixing matrix."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decaf_lora.errors import UserError, listed

from .checks import (
    check_columns,
    check_consensus,
    check_names,
    check_rows,
    check_symmetric,
    second_singular_value,
)


@dataclass(frozen=True, eq=False)
class Graph:
    """A mixing matrix, checked when it is made.

    Attributes:
        weights: (N, N) float64, read-only; `weights[i, j]` is the weight that agent i gives to agent j.
        name: what tables and figures call the graph; of built-in kinds the name that `parse` reads.
        require_symmetric: False accepts a directed matrix, which must still be doubly stochastic.
        connected: False accepts a matrix that does not connect all agents, for one round of a schedule.
        is_server: whether the matrix is the average that a server makes; see `Graph.server`.
        hops: the graphs that `compose` joined, first to last; () for a single exchange.
        names: (N,) what the agents are called, all different; () if they only have numbers.

    Raises:
        UserError: names the row, column or agents at fault and the remedy.
    """

    weights: NDArray[np.float64]
    name: str = "matrix"
    require_symmetric: bool = True
    connected: bool = True
    is_server: bool = False
    hops: tuple["Graph", ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        weights = np.array(self.weights, dtype=np.float64)  # a copy, so that the caller's array stays writeable
        weights.flags.writeable = False
        object.__setattr__(self, "weights", weights)
        check_rows(weights)
        check_names(self.names, len(weights))
        if self.is_server:
            if (differs := np.flatnonzero((weights != weights[0]).any(axis=1))).size:
                raise UserError(
                    f"graph: row {differs[0]} of a server's weights differs from row 0; all agents receive "
                    "the same average: use Graph.server(counts)."
                )
            return
        check_columns(weights)
        if self.require_symmetric:
            check_symmetric(weights)
        if self.connected:
            check_consensus(weights > 0, "graph", "; pass connected=False for one round of a schedule", self.names)

    @classmethod
    def server(cls, counts: Sequence[float] | NDArray[Any]) -> "Graph":
        """The average of a server (FedAvg, McMahan et al. 2017): every row is `counts / counts.sum()`.

        Only the rows sum to 1, not the columns. An agent without examples receives the average and adds nothing to it.

        Args:
            counts: (N,) number of examples of each agent, 0 or more and not all 0.

        Raises:
            UserError: the counts have another shape, are negative or not finite, or are all 0.
        """
        sizes = np.asarray(counts, dtype=np.float64)
        if sizes.ndim != 1 or sizes.size == 0:
            raise UserError(f"graph: counts has shape {sizes.shape}, not (N,); give one count an agent.")
        if (bad := np.flatnonzero(~(np.isfinite(sizes) & (sizes >= 0)))).size:
            raise UserError(f"graph: the count of agent {bad[0]} is {sizes[bad[0]]:g}; give its number of examples.")
        if sizes.sum() == 0:
            raise UserError("graph: every count is 0; at least one agent must hold examples.")
        return cls(np.tile(sizes / sizes.sum(), (sizes.size, 1)), name="server", is_server=True)

    @property
    def num_agents(self) -> int:
        """N."""
        return len(self.weights)

    def arranged(self, names: Sequence[str]) -> "Graph":
        """The same graph with its agents in the order of `names`. A graph without names takes these names.

        Raises:
            UserError: the graph has other names.
        """
        if not self.names:
            return replace(self, names=tuple(names))
        if sorted(names) != sorted(self.names):
            strange = sorted(set(self.names) ^ set(names))
            raise UserError(
                f"graph: the agents of {self.name} are {listed(self.names, 10)} but those of the run "
                f"{listed(names, 10)}; {listed(strange, 10)} are not in both. Name them alike."
            )
        order = [self.names.index(name) for name in names]
        return replace(self, weights=self.weights[np.ix_(order, order)], names=tuple(names))

    def senders(self, agent: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The agents that `agent` averages over, itself included: the non-zero entries of its row.

        Returns:
            The senders (m,) ascending and their weights (m,), which sum to 1.
        """
        indices = np.flatnonzero(self.weights[agent])
        return indices, self.weights[agent, indices]

    def rows(self) -> list[list[tuple[int, float]]]:
        """For every agent the (sender, weight) pairs that it averages over, itself included."""
        senders = map(self.senders, range(self.num_agents))
        return [list(zip(who.tolist(), weights.tolist(), strict=True)) for who, weights in senders]

    def neighbours(self, agent: int) -> list[int]:
        """The other agents that `agent` listens to, ascending."""
        return [int(sender) for sender in self.senders(agent)[0] if sender != agent]

    def degree(self, agent: int) -> int:
        """How many other agents `agent` listens to."""
        return int(self.degrees[agent])

    @cached_property
    def degrees(self) -> NDArray[np.int64]:
        """(N,) how many other agents each agent listens to; read-only."""
        degrees = self._links.sum(axis=1)
        degrees.flags.writeable = False
        return degrees

    @property
    def edges(self) -> list[tuple[int, int]]:
        """The pairs (i, j), i < j, of which at least one listens to the other, ascending."""
        return [(int(i), int(j)) for i, j in np.argwhere(np.triu(self._links | self._links.T))]

    @property
    def messages_per_round(self) -> int:
        """Number of directed messages in an exchange; an agent sends none to itself.

        On a server graph there are 2 N messages (N up to the server, N down), not the N (N - 1) of the matrix.
        """
        return 2 * self.num_agents if self.is_server else int(self._links.sum())

    @cached_property
    def sigma_2(self) -> float:
        """The second largest singular value: the largest share of the disagreement that an exchange can leave."""
        return second_singular_value(self.weights)

    @property
    def spectral_gap(self) -> float:
        """1 - sigma_2: the larger, the faster the agents agree."""
        return 1 - self.sigma_2

    @property
    def _links(self) -> NDArray[np.bool_]:
        return (self.weights > 0) & ~np.eye(self.num_agents, dtype=bool)
