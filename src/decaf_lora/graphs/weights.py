"""Which weights does a user's own graph get?"""

from collections.abc import Sequence

import networkx as nx
import numpy as np
from numpy.typing import ArrayLike

from decaf_lora.errors import UserError

from .checks import TOLERANCE, check_count
from .graph import Graph

ROUNDING = 1e-6  # errors of row sums below this are rounding (float32, printed digits), which `from_matrix` mends


def metropolis(
    adjacency: ArrayLike, name: str = "metropolis", *, connected: bool = True, names: Sequence[str] = ()
) -> Graph:
    """Metropolis-Hastings weights on an undirected graph.

    Args:
        adjacency: (N, N) symmetric, non-zero where two agents are linked; the diagonal is ignored.
        name: what tables and figures call the graph.
        connected: False accepts a graph that does not connect all agents, for one round of a schedule.
        names: (N,) what the agents are called; () if they only have numbers.

    Raises:
        UserError: the adjacency is not square or not symmetric, or does not connect all agents.
    """
    links = np.asarray(adjacency) != 0
    if links.ndim != 2 or links.shape[0] != links.shape[1]:
        raise UserError(f"graph: the adjacency has shape {links.shape}, not (N, N).")
    if (links != links.T).any():
        i, j = np.argwhere(links & ~links.T)[0]
        if len(names) == len(links):
            i, j = names[i], names[j]
        raise UserError(f"graph: agent {i} is linked to agent {j} but {j} not to {i}; make the adjacency symmetric.")
    links = links & ~np.eye(len(links), dtype=bool)
    degrees = links.sum(axis=1)
    weights = links / (1 + np.maximum.outer(degrees, degrees))
    own = 1 - weights.sum(axis=1)
    # An agent whose neighbours have no more links than itself gets its own weight without rounding. So the rows of a
    # complete graph are equal bit by bit, and one computation serves all its agents.
    highest = np.where(links, degrees, 0).max(axis=1, initial=0)
    np.fill_diagonal(weights, np.where(highest <= degrees, 1 / (1 + degrees), own))
    return Graph(weights, name, connected=connected, names=tuple(names))


def from_networkx(graph: nx.Graph, name: str = "networkx") -> Graph:
    """Metropolis weights on any undirected networkx graph.

    The agents are the nodes in sorted order, or in the order in which they were added if they cannot be sorted. If all
    nodes are strings, they name the agents. Self-loops and edge weights are ignored.

    Raises:
        UserError: the graph is directed, empty or not connected.
    """
    if graph.is_directed():
        raise UserError("graph: the networkx graph is directed; pass graph.to_undirected().")
    check_count(graph.number_of_nodes())
    try:
        nodes = sorted(graph.nodes)
    except TypeError:
        nodes = list(graph.nodes)
    names = nodes if all(isinstance(node, str) for node in nodes) else []
    return metropolis(nx.to_numpy_array(graph, nodes, weight=None), name, names=names)


def from_matrix(
    weights: ArrayLike,
    name: str = "matrix",
    *,
    require_symmetric: bool = True,
    connected: bool = True,
    names: Sequence[str] = (),
) -> Graph:
    """The graph of a user's own mixing matrix.

    A symmetric matrix whose row sums differ from 1 by rounding only (by less than 1e-6: float32, or printed digits) is
    mended on its diagonal. Any other matrix must pass the checks of `Graph` as it is.

    Args:
        weights: (N, N).
        name: what tables and figures call the graph.
        require_symmetric: as in `Graph`.
        connected: as in `Graph`.
        names: as in `Graph`.

    Raises:
        UserError: the matrix does not hold numbers, or fails a check of `Graph`.
    """
    try:
        matrix = np.array(weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"graph: the weights are not a matrix of numbers ({error}).") from error
    # A comparison with NaN is False, so entries that are not finite are left for `Graph` to refuse.
    if matrix.ndim == 2 and np.array_equal(matrix, matrix.T):
        missing = np.abs(matrix.sum(axis=1) - 1).max(initial=0)
        if TOLERANCE < missing < ROUNDING:
            np.fill_diagonal(matrix, 0)
            matrix /= max(1.0, matrix.sum(axis=1).max())  # leaves no diagonal below 0
            np.fill_diagonal(matrix, np.maximum(1 - matrix.sum(axis=1), 0))
    return Graph(matrix, name, require_symmetric=require_symmetric, connected=connected, names=tuple(names))
