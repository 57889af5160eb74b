"""Who listens to whom, with which weight, in which round?

A `Graph` is a mixing matrix `weights (N, N)`: in one exchange agent i replaces x_i by
`sum_j weights[i, j] x_j`. It is checked when made, and everything else (neighbours, edges, messages) is
read from it. A `Schedule` gives the graph of every round, `compose` the graph of several exchanges in a row.

Unless a constructor says otherwise its weights are Metropolis-Hastings weights,
`1 / (1 + max(degree_i, degree_j))` on every edge and the remainder on oneself: symmetric and doubly
stochastic on any undirected graph (Xiao, Boyd and Kim, "Distributed average consensus with
least-mean-square deviation", JPDC 2007). `parse` reads the names of the command line, `KINDS` lists them.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import ParseError

import networkx as nx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import UserError, unknown
from .randomness import derive_seed, numpy_generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOLERANCE = 1e-9  # on row sums, column sums and symmetry
ROUNDING = 1e-6  # what a float32 or a printed matrix may miss; `from_matrix` mends it
DRAWS = 1000  # of a random graph, until one is connected; rounds of a random schedule, likewise
EXACT = 1e-12  # a product of mixing matrices this near to 1/N everywhere is the average
SAMPLE = 100  # rounds of a random schedule that `describe` counts messages over


@dataclass(frozen=True, eq=False)
class Graph:
    """A mixing matrix, checked when it is made.

    Attributes:
        weights: (N, N) float64, read-only; `weights[i, j]` is the weight agent i gives to agent j.
        name: what tables and figures call it; for built-in kinds the name `parse` reads.
        require_symmetric: False accepts a directed matrix, which must still be doubly stochastic.
        connected: False accepts a matrix that does not connect all agents: one round of a schedule.
        is_server: the average a server would make; see `Graph.server`.
        hops: the graphs that `compose` joined, first to last; () for a single exchange.

    Raises:
        UserError: names the row, column or agents at fault and the remedy.
    """

    weights: NDArray[np.float64]
    name: str = "matrix"
    require_symmetric: bool = True
    connected: bool = True
    is_server: bool = False
    hops: tuple["Graph", ...] = ()

    def __post_init__(self) -> None:
        weights = np.array(self.weights, dtype=np.float64)  # a copy: the caller's stays writeable
        weights.flags.writeable = False
        object.__setattr__(self, "weights", weights)
        _check_rows(weights)
        if self.is_server:
            if (differs := np.flatnonzero((weights != weights[0]).any(axis=1))).size:
                raise UserError(
                    f"graph: row {differs[0]} of a server's weights differs from row 0; all agents receive "
                    "the same average: use Graph.server(counts)."
                )
            return
        _check_columns(weights)
        if self.require_symmetric:
            _check_symmetric(weights)
        if self.connected:
            _check_consensus(weights > 0, "graph", "; pass connected=False for one round of a schedule")

    @classmethod
    def server(cls, counts: Sequence[float] | NDArray[Any]) -> "Graph":
        """The average of a server (FedAvg, McMahan et al. 2017): every row is `counts / counts.sum()`.

        Args:
            counts: (N,) examples of each agent, 0 or more and not all 0.

        Only the rows sum to 1. An agent without examples receives the average and adds nothing to it.
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

    def senders(self, agent: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Whom `agent` averages over: the non-zero entries of its row, itself included.

        Returns:
            The senders (m,) ascending and their weights (m,), which sum to 1.
        """
        indices = np.flatnonzero(self.weights[agent])
        return indices, self.weights[agent, indices]

    def neighbours(self, agent: int) -> list[int]:
        """The other agents that `agent` listens to, ascending."""
        return [int(sender) for sender in self.senders(agent)[0] if sender != agent]

    def degree(self, agent: int) -> int:
        """How many other agents `agent` listens to."""
        return int(self.degrees[agent])

    @property
    def degrees(self) -> NDArray[np.int64]:
        """(N,) how many other agents each agent listens to."""
        return self._links.sum(axis=1)

    @property
    def edges(self) -> list[tuple[int, int]]:
        """The pairs (i, j), i < j, of which at least one listens to the other, ascending."""
        return [(int(i), int(j)) for i, j in np.argwhere(np.triu(self._links | self._links.T))]

    @property
    def messages_per_round(self) -> int:
        """Directed messages an exchange takes; nobody sends to oneself.

        A server graph counts 2 N (N up to the server, N down), not the N (N - 1) of the matrix.
        """
        return 2 * self.num_agents if self.is_server else int(self._links.sum())

    @cached_property
    def sigma_2(self) -> float:
        """The second largest singular value: an exchange leaves at most this share of the disagreement."""
        return _sigma_2(self.weights)

    @property
    def spectral_gap(self) -> float:
        """1 - sigma_2: the larger, the faster the agents agree."""
        return 1 - self.sigma_2

    @property
    def _links(self) -> NDArray[np.bool_]:
        return (self.weights > 0) & ~np.eye(self.num_agents, dtype=bool)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The graph of every round.

    Attributes:
        name: what tables and figures call it.
        num_agents: N.
        graph_at: round -> Graph; a pure function, so that a resumed run sees the same graphs. Of a
            periodic schedule it is asked for rounds below `period` only.
        period: after how many rounds it starts again; None: never (a random schedule).

    Raises:
        UserError: a graph has another number of agents, or a period does not connect all agents. What has no
            period cannot be checked.
    """

    name: str
    num_agents: int
    graph_at: Callable[[int], Graph]
    period: int | None = None

    def __post_init__(self) -> None:
        _check_count(self.num_agents)
        if self.period is None:
            return
        if self.period < 1:
            raise UserError(f"schedule: the period is {self.period}; it must be at least 1 round.")
        graphs = [self.at(round) for round in range(self.period)]
        if any(graph.is_server for graph in graphs):
            return  # everybody receives everything in that round
        # Booleans, because the product of many small weights may underflow to 0.
        heard = np.eye(self.num_agents, dtype=bool)
        for graph in graphs:
            heard = (graph.weights > 0) @ heard
        _check_consensus(heard, "schedule", " in some round of the period")

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
        """(N, N) what a whole period does to the agents: `W[period - 1] @ ... @ W[0]`."""
        if self.period is None:
            raise UserError(f"schedule: {self.name} never starts again, so it has no weights of a period.")
        product = np.eye(self.num_agents)
        for round in range(self.period):
            product = self.at(round).weights @ product
        return product

    @cached_property
    def sigma_2(self) -> float:
        """The second largest singular value of a whole period: 0 where the period averages exactly."""
        return _sigma_2(self.weights_of_period())

    @cached_property
    def exact_after(self) -> int | None:
        """After how many rounds from the start of a period all agents hold the exact average; None: not in one."""
        product = np.eye(self.num_agents)
        for round in range(self.period or 0):
            product = self.at(round).weights @ product
            if _is_average(product):
                return round + 1
        return None

    @cached_property
    def pace(self) -> int:
        """Rounds until what every agent sends has reached all others: the period, or counted if there is none.

        Raises:
            UserError: a random schedule does not get there in 1000 rounds.
        """
        if self.period is not None:
            return self.period
        heard = np.eye(self.num_agents, dtype=bool)
        for round in range(DRAWS):
            heard = (self.at(round).weights > 0) @ heard
            if heard.all():
                return round + 1
        raise UserError(
            f"schedule: {DRAWS} rounds of {self.name} do not connect all {self.num_agents} agents; give it more links."
        )

    @cached_property
    def sigma_2_per_round(self) -> float:
        """What a round leaves of the disagreement in the long run, to compare with the sigma_2 of one graph.

        With a period: its sigma_2 to the power of 1 / period. Without: the root of the second eigenvalue of the
        mean of W^T W (Boyd, Ghosh, Prabhakar and Shah, "Randomized gossip algorithms", IEEE Transactions on
        Information Theory 2006), the mean taken over the first 100 rounds.
        """
        if self.period is not None:
            return self.sigma_2 ** (1 / self.period) if self.exact_after is None else 0.0
        weights = [self.at(round).weights for round in range(SAMPLE)]
        return math.sqrt(_sigma_2(np.mean([W.T @ W for W in weights], axis=0)))

    def window(self, round: int, exchanges: int) -> Graph:
        """The graph of `exchanges` in a row from `round` on; that of the round itself for 1."""
        graphs = [self.at(round + hop) for hop in range(exchanges)]
        return graphs[0] if exchanges == 1 else compose(graphs)


def as_schedule(graph: Graph | Schedule) -> Schedule:
    """A graph as the schedule that repeats it; a schedule as it is."""
    return graph if isinstance(graph, Schedule) else Schedule.constant(graph)


def compose(graphs: Sequence[Graph]) -> Graph:
    """Several exchanges as one: weights `W[m-1] @ ... @ W[0]`, and the graphs as `hops`.

    Sending a message along the hops and mixing at each (or forwarding it whole) gives what one exchange with
    the composed weights gives. A product that is the average but for rounding is made so exactly: its rows are
    then equal bit by bit, as those of `complete`.
    """
    product = np.eye(graphs[0].num_agents)
    for graph in graphs:
        product = graph.weights @ product
    if _is_average(product):
        product = np.full_like(product, 1 / len(product))
    name = " * ".join(dict.fromkeys(graph.name for graph in graphs))
    return Graph(product, name, require_symmetric=False, connected=False, hops=tuple(graphs))


# --- checks -------------------------------------------------------------------------------------------------


def _check_count(n: int) -> None:
    if n < 1:
        raise UserError(f"graph: {n} agents cannot form a graph; use at least 1.")


def _check_probability(p: float, of: str) -> None:
    if not 0 < p <= 1:
        raise UserError(f"graph: the {of} probability is {p:g}; it must be above 0 and at most 1.")


def _check_rows(weights: NDArray[np.float64]) -> None:
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise UserError(
            f"graph: the weights have shape {weights.shape}, not (N, N); give every agent a row and a column."
        )
    _check_count(len(weights))
    for bad, remedy in (
        (~np.isfinite(weights), "every weight must be a finite number"),
        (weights < 0, "weights are 0 or more, 0 where an agent does not listen to the other"),
    ):
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise UserError(f"graph: row {row}, column {column} of the weights is {weights[row, column]:g}; {remedy}.")
    sums = weights.sum(axis=1)
    if (rows := np.flatnonzero(np.abs(sums - 1) > TOLERANCE)).size:
        row = rows[0]
        raise UserError(
            f"graph: row {row} of the weights sums to {sums[row]:.12g}, not 1; change the agent's own weight "
            f"(row {row}, column {row}) by {1 - sums[row]:+.6g}, or let graphs.metropolis(adjacency) choose."
        )


def _check_columns(weights: NDArray[np.float64]) -> None:
    sums = weights.sum(axis=0)
    if (columns := np.flatnonzero(np.abs(sums - 1) > TOLERANCE)).size:
        column = columns[0]
        raise UserError(
            f"graph: column {column} of the weights sums to {sums[column]:.12g}, not 1, so agent {column} "
            "would count differently from the others in the average; make the matrix symmetric, or use "
            "Graph.server(counts) for a server's weighted average."
        )


def _check_symmetric(weights: NDArray[np.float64]) -> None:
    pairs = np.argwhere(np.abs(weights - weights.T) > TOLERANCE)
    if pairs.size:
        i, j = pairs[0]
        raise UserError(
            f"graph: row {i}, column {j} of the weights is {weights[i, j]:.12g} but row {j}, column {i} is "
            f"{weights[j, i]:.12g}; make them equal, or pass require_symmetric=False for a directed graph."
        )


def _distances(heard: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(N,) steps from agent 0 along `heard` (N, N), -1 where it cannot be reached."""
    distances = np.full(len(heard), -1)
    frontier = np.arange(len(heard)) == 0
    for step in itertools.count():
        distances[frontier] = step
        frontier = heard[frontier].any(axis=0) & (distances < 0)
        if not frontier.any():
            break
    return distances


def _check_consensus(heard: NDArray[np.bool_], field: str, remedy: str) -> None:
    """Whether repeating `heard` (N, N), the pattern of a doubly stochastic matrix, leads to agreement.

    One search from agent 0 is enough, directed or not: as much flows out of a set of agents as flows into it.
    """
    distances = _distances(heard)
    if (lost := np.flatnonzero(distances < 0)).size:
        names = ", ".join(map(str, lost[:10])) + (", ..." if lost.size > 10 else "")
        agents = f"agent {names}" if lost.size == 1 else f"agents {names}"
        raise UserError(f"{field}: {agents} cannot be reached from agent 0; link them{remedy}.")
    # All cycles share a divisor above 1: models circulate and never blend (two agents that swap, say).
    rows, columns = np.nonzero(heard)
    divisor = int(np.gcd.reduce(distances[rows] + 1 - distances[columns]))
    if divisor > 1:
        raise UserError(
            f"{field}: models go round in turns of {divisor} and the agents never agree; give at least one "
            f"agent a weight on itself{remedy}."
        )


def _sigma_2(weights: NDArray[np.float64]) -> float:
    return float(np.linalg.svd(weights, compute_uv=False)[1]) if len(weights) > 1 else 0.0


def _is_average(weights: NDArray[np.float64]) -> bool:
    return bool(np.abs(weights - 1 / len(weights)).max() <= EXACT)


def _misfit(kind: str, n: int, why: str, fits: Callable[[int], bool]) -> UserError:
    """The error for a kind of graph that `n` agents cannot form; names the nearest numbers that can."""
    below = next(((m,) for m in range(n - 1, 0, -1) if fits(m)), ())
    above = next(m for m in itertools.count(n + 1) if fits(m))
    sizes = " or ".join(map(str, (*below, above)))
    return UserError(f"graph: {n} agents cannot form a {kind} ({why}); use {sizes} agents.")


# --- any graph ----------------------------------------------------------------------------------------------


def metropolis(adjacency: ArrayLike, name: str = "metropolis", *, connected: bool = True) -> Graph:
    """Metropolis-Hastings weights on an undirected graph.

    Args:
        adjacency: (N, N) symmetric, non-zero where two agents are linked; the diagonal is ignored.
        connected: False accepts a graph that does not connect all agents: one round of a schedule.
    """
    links = np.asarray(adjacency) != 0
    if links.ndim != 2 or links.shape[0] != links.shape[1]:
        raise UserError(f"graph: the adjacency has shape {links.shape}, not (N, N).")
    if (links != links.T).any():
        i, j = np.argwhere(links & ~links.T)[0]
        raise UserError(f"graph: agent {i} is linked to agent {j} but {j} not to {i}; make the adjacency symmetric.")
    links = links & ~np.eye(len(links), dtype=bool)
    degrees = links.sum(axis=1)
    weights = links / (1 + np.maximum.outer(degrees, degrees))
    own = 1 - weights.sum(axis=1)
    # Exact where no neighbour has more links than oneself: the rows of a complete graph are then equal bit by
    # bit, and one computation serves all its agents.
    highest = np.where(links, degrees, 0).max(axis=1, initial=0)
    np.fill_diagonal(weights, np.where(highest <= degrees, 1 / (1 + degrees), own))
    return Graph(weights, name, connected=connected)


def from_networkx(graph: nx.Graph, name: str = "networkx") -> Graph:
    """Metropolis weights on any undirected networkx graph.

    Agents are its nodes in sorted order (in the order they were added where they do not sort). Self-loops and
    edge weights are ignored.
    """
    if graph.is_directed():
        raise UserError("graph: the networkx graph is directed; pass graph.to_undirected().")
    _check_count(graph.number_of_nodes())
    try:
        nodes = sorted(graph.nodes)
    except TypeError:
        nodes = list(graph.nodes)
    return metropolis(nx.to_numpy_array(graph, nodes, weight=None), name)


def from_matrix(
    weights: ArrayLike, name: str = "matrix", *, require_symmetric: bool = True, connected: bool = True
) -> Graph:
    """A user's own mixing matrix (N, N).

    A symmetric matrix that misses row sums of 1 by rounding only (below 1e-6: float32, or printed with few
    digits) is mended on its diagonal; anything else must pass the checks of `Graph` as it is.
    """
    try:
        matrix = np.array(weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"graph: the weights are not a matrix of numbers ({error}).") from error
    # A comparison with NaN is False: what is not finite is left for `Graph` to name.
    if matrix.ndim == 2 and np.array_equal(matrix, matrix.T):
        missing = np.abs(matrix.sum(axis=1) - 1).max(initial=0)
        if TOLERANCE < missing < ROUNDING:
            np.fill_diagonal(matrix, 0)
            matrix /= max(1.0, matrix.sum(axis=1).max())  # leaves no diagonal below 0
            np.fill_diagonal(matrix, np.maximum(1 - matrix.sum(axis=1), 0))
    return Graph(matrix, name, require_symmetric=require_symmetric, connected=connected)


# --- named graphs -------------------------------------------------------------------------------------------


def ring(n: int) -> Graph:
    """Each agent and its two neighbours, 1/3 each. [[1]] for n = 1, all 1/2 for n = 2."""
    _check_count(n)
    return from_networkx(nx.cycle_graph(n), "ring")


def complete(n: int) -> Graph:
    """Everybody linked to everybody, 1/n each: the exact average in one exchange."""
    _check_count(n)
    return from_networkx(nx.complete_graph(n), "complete")


def star(n: int) -> Graph:
    """Agent 0 linked to all the others."""
    _check_count(n)
    return from_networkx(nx.star_graph(n - 1), "star")


def line(n: int) -> Graph:
    """0 - 1 - ... - n-1."""
    _check_count(n)
    return from_networkx(nx.path_graph(n), "line")


def torus(rows: int, cols: int) -> Graph:
    """A grid whose borders are joined; agent `row * cols + column`. One row is a ring, no edge is doubled."""
    _check_count(min(rows, cols))
    return from_networkx(nx.grid_2d_graph(rows, cols, periodic=True), f"torus:{rows}x{cols}")


def bipartite_hubs(n: int = 10, hubs: int = 2) -> Graph:
    """The bipartite graph of the DeCAF paper (arXiv 2505.21382): n - hubs leaves, each linked to all hubs.

    The hubs are the last agents and not linked with each other. 8 + 2 takes the published weights: 0.11 an
    edge, leaf self 0.78, hub self 0.12. They are the Metropolis weight 1/9 in two digits, so all other sizes
    take Metropolis weights.
    """
    _check_count(n)
    if hubs < 1:
        raise UserError(f"graph: {hubs} hubs; a bipartite graph needs at least 1.")
    leaves = n - hubs
    if leaves < 1:
        raise UserError(
            f"graph: {n} agents cannot form a bipartite graph with {hubs} hubs (no leaf is left); "
            f"use at least {hubs + 1} agents."
        )
    name = f"bipartite:{leaves}+{hubs}"
    if (leaves, hubs) != (8, 2):
        return from_networkx(nx.complete_bipartite_graph(leaves, hubs), name)
    weights = np.diag([0.78] * leaves + [0.12] * hubs)
    weights[:leaves, leaves:] = weights[leaves:, :leaves] = 0.11
    return Graph(weights, name)


def complete_bipartite(a: int, b: int) -> Graph:
    """K_{a,b}: each of the first `a` agents linked to each of the last `b`."""
    if min(a, b) < 1:
        raise UserError(f"graph: complete-bipartite:{a}+{b} has an empty side; each needs at least 1 agent.")
    return from_networkx(nx.complete_bipartite_graph(a, b), f"complete-bipartite:{a}+{b}")


def hypercube(n: int) -> Graph:
    """n = 2^d agents, linked where their numbers differ in one bit."""
    _check_count(n)

    def fits(m: int) -> bool:
        return m & (m - 1) == 0

    if not fits(n):
        raise _misfit("hypercube", n, "it needs a power of 2", fits)
    agents = np.arange(n)
    differing = agents[:, None] ^ agents
    return metropolis((differing & (differing - 1) == 0) & (differing > 0), "hypercube")


def erdos_renyi(n: int, p: float, seed: int) -> Graph:
    """Every pair linked with probability `p`; drawn again until all agents are connected.

    Raises:
        UserError: `p` is not in (0, 1], or none of 1000 draws was connected.
    """
    _check_count(n)
    _check_probability(p, "edge")
    generator = numpy_generator(seed, "graph", "erdos-renyi")
    for _ in range(DRAWS):
        upper = np.triu(generator.random((n, n)) < p, k=1)
        links = upper | upper.T
        if (_distances(links) >= 0).all():
            return metropolis(links, f"erdos-renyi:{p:g}")
    raise UserError(
        f"graph: none of {DRAWS} draws with edge probability {p:g} connected all {n} agents; "
        f"raise it above ln(N) / N = {math.log(n) / n:.2g}."
    )


def random_regular(n: int, degree: int, seed: int) -> Graph:
    """Every agent linked to `degree` others at random; drawn again until all agents are connected.

    Raises:
        UserError: no connected graph with this degree exists (n x degree odd, degree >= n, or too low).
    """
    _check_count(n)
    if degree < min(2, n - 1):
        raise UserError(f"graph: degree {degree} cannot connect {n} agents; use at least {min(2, n - 1)}.")
    if degree >= n:
        raise UserError(
            f"graph: {n} agents cannot have {degree} neighbours each; use a degree of at most {n - 1}, "
            f"or at least {degree + 1} agents."
        )
    if n * degree % 2:
        raise _misfit(
            f"random-regular:{degree}", n, "agents x degree must be even", lambda m: m > degree and m % 2 == 0
        )
    generator = random.Random(derive_seed(seed, "graph", "random-regular"))
    for _ in range(DRAWS):
        # Dense ones as the complement of a sparse one: the pairing of networkx rarely succeeds on them.
        dense = 2 * degree >= n
        links = nx.random_regular_graph(n - 1 - degree if dense else degree, n, seed=generator)
        links = nx.complement(links) if dense else links
        if nx.is_connected(links):
            return from_networkx(links, f"random-regular:{degree}")
    raise UserError(f"graph: none of {DRAWS} random {degree}-regular graphs was connected; raise the degree.")


# --- graphs over time ---------------------------------------------------------------------------------------


def one_peer_exponential(n: int) -> Schedule:
    """In round t every agent averages with the one 2^t further round the circle: one message each way out.

    The weights are doubly stochastic but directed. A period of ceil(log2 n) rounds averages exactly if n is a
    power of 2 (Ying, Yuan, Chen, Hu, Pan and Yin, "Exponential Graph is Provably Efficient for Decentralized
    Deep Training", NeurIPS 2021, arXiv 2110.13363).
    """
    _check_count(n)
    eye = np.eye(n)
    hops = [2**t for t in range(max(1, math.ceil(math.log2(n))))]
    graphs = [
        Graph((eye + np.roll(eye, hop, axis=1)) / 2, f"+{hop}", require_symmetric=False, connected=False)
        for hop in hops
    ]
    return Schedule.cycle(graphs, "one-peer-exponential")


def one_peer_hypercube(n: int) -> Schedule:
    """n = 2^d agents; in round t those whose numbers differ in bit t average in pairs. d rounds are exact."""
    _check_count(n)
    if n & (n - 1):
        raise _misfit("one-peer-hypercube", n, "it needs a power of 2", lambda m: m & (m - 1) == 0)
    eye, agents = np.eye(n), np.arange(n)
    bits = range((n - 1).bit_length() or 1)
    graphs = [Graph((eye + eye[agents ^ (1 << bit) % n]) / 2, f"bit {bit}", connected=False) for bit in bits]
    return Schedule.cycle(graphs, "one-peer-hypercube")


def base(n: int, k: int) -> Schedule:
    """The Base-(k+1) graph: any n agents, at most k neighbours a round, the exact average in few rounds.

    With b = k + 1 (Takezawa, Sato, Bao, Niwa and Yamada, "Beyond Exponential Graph", NeurIPS 2023, arXiv
    2305.11420; theirs take at most 2 log_b(n) + 2 rounds):

    - hyper-hypercube: if n is a product of factors up to b, the agents fill a grid with these sides, and each
      round averages along one axis.
    - simple: else n = a_1 b^p_1 + a_2 b^p_2 + ... (base-b digits, falling) splits the agents into parts of as
      many blocks of b^p. Every part averages itself; then, part after part, all later agents take the weight
      b^p / (agents of this and all later parts) from one agent in each of its blocks, distinct ones, after
      which the later agents' mean is everybody's; and every block averages itself again.
    - or, if shorter, with n = p q and q without factors up to b: p groups do the simple one at a time, then
      p agents, one a group, the hyper-hypercube.
    """
    _check_count(n)
    if k < 1:
        raise UserError(f"graph: base:{k + 1} has no links; the base must be at least 2, for 1 neighbour a round.")
    agents = list(range(n))
    rounds = _simple_base(agents, k)
    q = n
    for factor in range(2, k + 2):
        while q % factor == 0:
            q //= factor
    if 1 < q < n:
        groups = [agents[start : start + q] for start in range(0, n, q)]
        split = _merge(_simple_base(group, k) for group in groups)
        split += _merge(_hyper_hypercube([group[place] for group in groups], k) or [] for place in range(q))
        rounds = min(rounds, split, key=len)
    graphs = []
    for number, links in enumerate(rounds or [[]]):
        weights = np.zeros((n, n))
        for i, j, weight in links:
            weights[i, j] = weights[j, i] = weight
        np.fill_diagonal(weights, np.maximum(1 - weights.sum(axis=1), 0))
        graphs.append(Graph(weights, f"round {number}", connected=False))
    return Schedule.cycle(graphs, f"base:{k + 1}")


_Round = list[tuple[int, int, float]]
"""The links of a round, (agent, agent, weight)."""


def _hyper_hypercube(agents: Sequence[int], k: int) -> list[_Round] | None:
    """Rounds that average `agents` exactly, in groups of at most k + 1; None where their number has a larger prime."""
    sides = _sides(len(agents), k + 1)
    if sides is None:
        return None
    grid = np.reshape(agents, sides)
    rounds = []
    for axis, side in enumerate(sides):
        groups = np.moveaxis(grid, axis, -1).reshape(-1, side).tolist()
        rounds.append([(i, j, 1 / side) for group in groups for i, j in itertools.combinations(group, 2)])
    return rounds


def _simple_base(agents: Sequence[int], k: int) -> list[_Round]:
    """Rounds of the simple Base-(k+1) graph on `agents`."""
    exact = _hyper_hypercube(agents, k)
    if exact is not None:
        return exact
    parts: list[list[Sequence[int]]] = []  # of blocks
    left = agents
    while left:
        size = 1
        while size * (k + 1) <= len(left):
            size *= k + 1
        end = len(left) // size * size
        parts.append([left[start : start + size] for start in range(0, end, size)])
        left = left[end:]
    own = [_hyper_hypercube([agent for block in part for agent in block], k) or [] for part in parts]
    start = max(map(len, own))
    strands = [*own]
    left = agents
    for stage, blocks in enumerate(parts[:-1]):
        total, size = len(left), len(blocks[0])
        left = left[len(blocks) * size :]
        take = [(agent, block[place], size / total) for place, agent in enumerate(left) for block in blocks]
        again = _merge(_hyper_hypercube(block, k) or [] for block in blocks)
        strands.append([[]] * (start + stage) + [take, *again])
    return _merge(strands)


def _merge(strands: Iterable[list[_Round]]) -> list[_Round]:
    """Rounds of disjoint agents, side by side."""
    return [list(itertools.chain(*links)) for links in itertools.zip_longest(*strands, fillvalue=[])]


@cache
def _sides(n: int, largest: int) -> tuple[int, ...] | None:
    """The fewest factors of n, each from 2 to `largest`; None if there are none."""
    if n == 1:
        return ()
    found = [
        (side, *rest)
        for side in range(min(n, largest), 1, -1)
        if n % side == 0 and (rest := _sides(n // side, largest)) is not None
    ]
    return min(found, key=len, default=None)


def random_matching(n: int, seed: int) -> Schedule:
    """Every round the agents average in pairs, matched anew at random; of an odd number one stays alone."""
    _check_count(n)

    def at(round: int) -> Graph:
        order = numpy_generator(seed, "graph", "random-matching", round).permutation(n)
        weights = np.eye(n)
        for i, j in zip(order[0::2], order[1::2], strict=False):
            weights[[i, i, j, j], [i, j, i, j]] = 0.5
        return Graph(weights, "random-matching", connected=False)

    return Schedule("random-matching", n, at)


def random_edges(n: int, p: float, seed: int) -> Schedule:
    """Every round each pair is linked with probability `p`, drawn anew (Erdos-Renyi), Metropolis weights."""
    _check_count(n)
    _check_probability(p, "edge")

    def at(round: int) -> Graph:
        upper = np.triu(numpy_generator(seed, "graph", "random-edges", round).random((n, n)) < p, k=1)
        return metropolis(upper | upper.T, "random-edges", connected=False)

    return Schedule(f"random-edges:{p:g}", n, at)


def failing(graph: Graph | Schedule, p: float, seed: int) -> Schedule:
    """`graph` with links that fail in a round with probability `p`: both ends give its weight to themselves.

    The weights stay symmetric and doubly stochastic. A directed graph cannot be mended so and is refused.
    """
    schedule = as_schedule(graph)
    n = schedule.num_agents
    if not 0 <= p < 1:
        raise UserError(f"graph: the failure probability is {p:g}; it must be at least 0 and below 1.")

    def at(round: int) -> Graph:
        weights = schedule.at(round).weights
        upper = np.triu(numpy_generator(seed, "graph", "failing", round).random((n, n)) < p, k=1)
        lost = np.where(upper | upper.T, weights, 0)
        return Graph(weights - lost + np.diag(lost.sum(axis=1)), "failing", connected=False)

    weights = [schedule.at(round).weights for round in range(schedule.period or 1)]
    if any((W != W.T).any() for W in weights):
        raise UserError(
            f"graph: {schedule.name} is directed, so a failed link would not leave it doubly stochastic; "
            "take a symmetric graph."
        )
    return Schedule(f"failing:{p:g}:{schedule.name}", n, at)


# --- the names of the command line --------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One name that `parse` reads.

    Attributes:
        build: (num_agents, argument, seed) -> the graph; the argument is the text after the colon, or "".
        summary: one line for `decaf graph --help`.
        example: the name with an argument; None: it takes none.
        required: whether the argument may be left out.
    """

    build: Callable[[int, str, int], Graph | Schedule]
    summary: str
    example: str | None = None
    required: bool = False


def _two(spec: str, argument: str, separator: str, example: str) -> tuple[int, int]:
    """The two sizes of "2x5" or "8+2"."""
    first, _, second = argument.lower().partition(separator)
    if not (first.isdecimal() and second.isdecimal()):
        raise UserError(f"graph: {spec}:{argument} is not readable; write it as {example}.")
    return int(first), int(second)


def _fit(graph: Graph | Schedule, n: int, other: Callable[[], Graph | Schedule] | None = None) -> Graph | Schedule:
    """`graph` if it has `n` agents; `other` makes the one of its kind that has, or raises what sizes there are."""
    if graph.num_agents == n:
        return graph
    sizes = f"graph: {graph.name} has {graph.num_agents} agents but the run has {n}"
    try:
        remedy = f", or {other().name} for {n}" if other is not None else ""
    except UserError as error:
        raise UserError(f"{sizes}, and {str(error).removeprefix('graph: ')}") from None
    raise UserError(f"{sizes}; use {graph.num_agents} agents{remedy}.")


def _number(spec: str, argument: str, convert: Callable[[str], Any], example: str) -> Any:
    try:
        return convert(argument)
    except ValueError:
        raise UserError(f"graph: {spec}:{argument} is not readable; write it as {example}.") from None


def _build_torus(n: int, argument: str, seed: int) -> Graph | Schedule:
    if argument:
        return _fit(torus(*_two("torus", argument, "x", "torus:2x5")), n, lambda: _build_torus(n, "", seed))

    def rows_of(m: int) -> int:
        return next(rows for rows in range(math.isqrt(m), 0, -1) if m % rows == 0)

    if n > 1 and rows_of(n) == 1:
        raise _misfit("torus", n, "it needs at least 2 rows", lambda m: m > 1 and rows_of(m) > 1)
    return torus(rows_of(n), n // rows_of(n))


def _build_bipartite(n: int, argument: str, seed: int) -> Graph | Schedule:
    if not argument:
        return bipartite_hubs(n)
    leaves, hubs = _two("bipartite", argument, "+", "bipartite:8+2")
    return _fit(bipartite_hubs(leaves + hubs, hubs), n, lambda: bipartite_hubs(n, hubs))


def _build_complete_bipartite(n: int, argument: str, seed: int) -> Graph | Schedule:
    if argument:
        sides = _two("complete-bipartite", argument, "+", "complete-bipartite:5+5")
        return _fit(complete_bipartite(*sides), n, lambda: _build_complete_bipartite(n, "", seed))
    if n < 2:
        raise UserError(f"graph: {n} agents cannot form a complete-bipartite graph; use at least 2.")
    return complete_bipartite((n + 1) // 2, n // 2)


def _build_erdos_renyi(n: int, argument: str, seed: int) -> Graph:
    return erdos_renyi(n, _number("erdos-renyi", argument, float, "erdos-renyi:0.4"), seed)


def _build_random_regular(n: int, argument: str, seed: int) -> Graph:
    return random_regular(n, _number("random-regular", argument, int, "random-regular:4"), seed)


def _build_base(n: int, argument: str, seed: int) -> Schedule:
    return base(n, _number("base", argument or "2", int, "base:3") - 1)


def _build_random_edges(n: int, argument: str, seed: int) -> Schedule:
    return random_edges(n, _number("random-edges", argument, float, "random-edges:0.2"), seed)


def _build_failing(n: int, argument: str, seed: int) -> Schedule:
    p, _, spec = argument.partition(":")
    return failing(parse(spec or "ring", n, seed), _number("failing", p, float, "failing:0.1:ring"), seed)


KINDS: dict[str, Kind] = {
    "ring": Kind(lambda n, argument, seed: ring(n), "two neighbours, 1/3 each"),
    "complete": Kind(lambda n, argument, seed: complete(n), "everybody with everybody, 1/N each"),
    "star": Kind(lambda n, argument, seed: star(n), "agent 0 with all the others"),
    "line": Kind(lambda n, argument, seed: line(n), "a chain of agents"),
    "torus": Kind(_build_torus, "a grid with joined borders, nearly square by default", "torus:2x5"),
    "bipartite": Kind(_build_bipartite, "leaves linked to 2 hubs, as the DeCAF paper's 8+2", "bipartite:8+2"),
    "complete-bipartite": Kind(
        _build_complete_bipartite,
        "two sides (halves by default) and all links between",
        "complete-bipartite:5+5",
    ),
    "hypercube": Kind(lambda n, argument, seed: hypercube(n), "numbers that differ in one bit; N = 2^d"),
    "erdos-renyi": Kind(
        _build_erdos_renyi, "each pair with this probability, drawn until connected", "erdos-renyi:0.4", True
    ),
    "random-regular": Kind(_build_random_regular, "this many random neighbours", "random-regular:4", True),
    "one-peer-exponential": Kind(
        lambda n, argument, seed: one_peer_exponential(n), "over time: the agent 2^t further; exact for N = 2^d"
    ),
    "one-peer-hypercube": Kind(
        lambda n, argument, seed: one_peer_hypercube(n), "over time: one bit a round, in pairs; N = 2^d, exact"
    ),
    "base": Kind(_build_base, "over time: Base-(k+1), k neighbours, any N, exact", "base:3"),
    "random-matching": Kind(lambda n, argument, seed: random_matching(n, seed), "over time: random pairs"),
    "random-edges": Kind(_build_random_edges, "over time: each pair with this probability", "random-edges:0.2", True),
    "failing": Kind(_build_failing, "any graph whose links fail with this probability", "failing:0.1:ring", True),
}

FILES = (".npy", ".csv", ".txt", ".edgelist", ".graphml")


def parse(spec: str, num_agents: int, seed: int) -> Graph | Schedule:
    """The graph that a command line or a recipe names.

    Args:
        spec: a name of `KINDS`, with its argument after a colon ("ring", "torus:2x5", "erdos-renyi:0.4"; "_"
            reads as "-"), or a file: a mixing matrix (.npy, .csv with commas, .txt with spaces) or an
            undirected graph that gets Metropolis weights (.edgelist, .graphml). A .npy of shape (T, N, N) is a
            schedule of T rounds. "failing:0.1:" goes before any of them.
        num_agents: N; what the name or the file says must agree.
        seed: of random graphs.

    Raises:
        UserError: the name is unknown, unreadable, or does not fit N; or a random schedule does not connect all
            agents in 1000 rounds.
    """
    _check_count(num_agents)
    spec = spec.strip()
    name, _, argument = (part.strip() for part in spec.partition(":"))
    name = name.lower().replace("_", "-")
    if name != "failing" and spec.lower().endswith(FILES):
        return _fit(_read(Path(spec)), num_agents)
    if name not in KINDS:
        error = unknown("graph", name, KINDS)
        raise UserError(f"{error} Or give a file: {', '.join(FILES)}.")
    kind = KINDS[name]
    if argument and kind.example is None:
        raise UserError(f"graph: {name} takes no argument; write {name} instead of {spec}.")
    if kind.required and not argument:
        raise UserError(f"graph: {name} needs an argument, for example {kind.example}.")
    made = kind.build(num_agents, argument, seed)
    if isinstance(made, Schedule) and made.period is None:
        _ = made.pace  # raises where it never connects everybody
    return made


def _rounds(matrices: NDArray[Any], name: str) -> Schedule:
    """The schedule of mixing matrices (T, N, N), directed ones among them, one a round."""
    graphs = []
    for number, matrix in enumerate(matrices):
        try:
            graph = from_matrix(matrix, f"round {number}", require_symmetric=False, connected=False)
        except UserError as error:
            raise UserError(f"graph: round {number} of {name}: {str(error).removeprefix('graph: ')}") from None
        graphs.append(graph)
    return Schedule.cycle(graphs, name)


def _read(path: Path) -> Graph | Schedule:
    """The graph in a file, or the schedule; the suffix says how it is written."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            matrix = np.load(path, allow_pickle=False)
            return _rounds(matrix, path.name) if matrix.ndim == 3 else from_matrix(matrix, path.name)
        if suffix in (".csv", ".txt"):
            delimiter = "," if suffix == ".csv" else None
            return from_matrix(np.loadtxt(path, delimiter=delimiter, ndmin=2), path.name)
        links = nx.read_graphml(path) if suffix == ".graphml" else nx.read_edgelist(path, data=False)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"graph: there is no file {path}.") from None
    except (OSError, EOFError, ValueError, ParseError, nx.NetworkXException) as error:
        raise UserError(f"graph: {path} cannot be read as {suffix}: {error}.") from error
    if all(str(node).isdecimal() for node in links):
        links = nx.relabel_nodes(links, {node: int(node) for node in links})  # so that 10 sorts after 9
    return from_networkx(links, path.name)


# --- to look at ---------------------------------------------------------------------------------------------


def describe(graph: Graph | Schedule) -> dict[str, Any]:
    """What `decaf graph --json` prints: numbers, strings, lists and dicts only.

    Of a schedule: the period (None: random), after how many of its rounds the average is exact (None: it is
    not), the sigma_2 of a whole period, what it amounts to a round, and the mean number of messages a round (of
    a random one over its first 100).
    """
    if isinstance(graph, Schedule):
        rounds = [describe(graph.at(round)) for round in range(graph.period or 0)]
        sigma_2 = graph.sigma_2 if graph.period else None
        messages = [graph.at(round).messages_per_round for round in range(graph.period or SAMPLE)]
        return {
            "name": graph.name,
            "num_agents": graph.num_agents,
            "period": graph.period,
            "exact_after": graph.exact_after,
            "sigma_2": sigma_2,
            "spectral_gap": None if sigma_2 is None else 1 - sigma_2,
            "sigma_2_per_round": graph.sigma_2_per_round,
            "messages_per_round": sum(messages) / len(messages),
            "rounds": rounds,
        }
    degrees = graph.degrees
    return {
        "name": graph.name,
        "num_agents": graph.num_agents,
        "sigma_2": graph.sigma_2,
        "spectral_gap": graph.spectral_gap,
        "edges": [list(edge) for edge in graph.edges],
        "degrees": {"min": int(degrees.min()), "mean": float(degrees.mean()), "max": int(degrees.max())},
        "messages_per_round": graph.messages_per_round,
        "weights": graph.weights.tolist(),
    }


def draw(graph: Graph, target: "str | Path | Axes") -> None:
    """Draw the agents, numbered, and their links: the heavier a link, the wider and darker.

    Args:
        target: a file (its suffix says which format), or matplotlib axes to draw into.
    """
    # No pyplot: a library must not touch the figures and the backend of its user.
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    if isinstance(target, str | Path):
        figure = Figure(figsize=(6, 6.4), layout="constrained")
        draw(graph, figure.add_subplot())
        figure.savefig(target, dpi=150)
        return

    picture = nx.Graph()
    picture.add_nodes_from(range(graph.num_agents))
    if graph.is_server:
        picture.add_weighted_edges_from((i, "server", graph.weights[0, i]) for i in range(graph.num_agents))
    else:
        pairs = graph.edges
        picture.add_weighted_edges_from((i, j, max(graph.weights[i, j], graph.weights[j, i])) for i, j in pairs)
    places = _layout(picture)
    points = np.array([places[node] for node in picture])
    points = points - (points.max(axis=0) + points.min(axis=0)) / 2
    points /= max(np.abs(points).max(), 1e-9)
    places = dict(zip(picture, points, strict=True))

    axes = target
    axes.set(aspect="equal", xlim=(-1.12, 1.12), ylim=(-1.12, 1.12))
    axes.set_axis_off()
    axes.set_title(f"{graph.name}, {graph.num_agents} agents, spectral gap {graph.spectral_gap:.3g}")
    extent = axes.get_window_extent()
    parent = axes.get_figure(root=True)
    assert parent is not None  # the axes are drawn into, so they are somewhere
    points_per_unit = min(extent.width, extent.height) / parent.dpi * 72 / 2.24
    # As large as nodes can be without touching.
    apart = np.linalg.norm(points[:, None] - points, axis=-1) + 9 * np.eye(len(points))
    diameter = float(np.clip(0.8 * apart.min() * points_per_unit, 5, 26))

    if picture.number_of_edges():
        weights = np.array([weight for _, _, weight in picture.edges.data("weight")])
        strength = weights / weights.max()
        fade = min(1.0, (100 / len(weights)) ** 0.4)  # many links would paint the disc black
        lines = [(places[i], places[j]) for i, j in picture.edges]
        widths = (0.4 + 2.0 * strength) * fade
        alphas = (0.25 + 0.6 * strength) * fade
        axes.add_collection(LineCollection(lines, linewidths=widths, alpha=alphas, colors="#345", zorder=1))
    axes.scatter(
        points[:, 0],
        points[:, 1],
        s=diameter**2,
        color="#dceaf7",
        edgecolors="#345",
        linewidths=0.8,
        zorder=2,
    )
    for node, (x, y) in places.items():
        size = diameter * (0.26 if node == "server" else 0.44)
        axes.text(x, y, str(node), ha="center", va="center_baseline", fontsize=size, zorder=3)


def _layout(picture: nx.Graph) -> dict[Any, NDArray[np.float64]]:
    """A place (2,) for every node, by the shape of the graph."""

    def circle(nodes: list[Any], gap: int = 0) -> dict[Any, NDArray[np.float64]]:  # clockwise from the top
        angles = 2 * np.pi * np.arange(len(nodes)) / (len(nodes) + gap)
        return dict(zip(nodes, np.stack([np.sin(angles), np.cos(angles)], axis=1), strict=True))

    nodes, num_edges = list(picture), picture.number_of_edges()
    degree = dict(picture.degree)
    lowest, highest = min(degree.values()), max(degree.values())
    if not nx.is_connected(picture) or lowest == len(nodes) - 1:
        return circle(nodes)
    centre = "server" if "server" in picture else max(nodes, key=degree.__getitem__)
    if highest > 2 and highest == num_edges == len(nodes) - 1:  # a star
        return {**circle([node for node in nodes if node != centre]), centre: np.zeros(2)}
    if highest <= 2:  # a ring, or a line as an open ring, from one end to the other
        start = min(nodes, key=degree.__getitem__)
        return circle(list(nx.dfs_preorder_nodes(picture, start)), gap=0 if lowest == 2 else 1 + len(nodes) // 15)
    if nx.is_bipartite(picture):
        sides = sorted(sorted(side) for side in nx.bipartite.sets(picture))
        if num_edges == len(sides[0]) * len(sides[1]):
            return {
                node: np.array([(2 * place + 1) / len(side) - 1, height])
                for side, height in zip(sides, (-0.8, 0.8), strict=True)
                for place, node in enumerate(side)
            }
    return nx.kamada_kawai_layout(picture, weight=None)
