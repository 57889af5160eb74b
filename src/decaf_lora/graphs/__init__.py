"""Who listens to whom, with which weight, in which round?

A `Graph` is a mixing matrix `weights (N, N)`: in one exchange agent i replaces x_i by `sum_j weights[i, j] x_j`. The
matrix is checked when the graph is made, and everything else (neighbours, edges, messages) is read from it. A
`Schedule` gives the graph of every round. `compose` makes one graph of several exchanges in a row.

Unless a constructor says otherwise its weights are Metropolis-Hastings weights,
`1 / (1 + max(degree_i, degree_j))` on every edge and the remainder on oneself: symmetric and doubly
stochastic on any undirected graph (Xiao, Boyd and Kim, "Distributed average consensus with
least-mean-square deviation", JPDC 2007). `parse` reads the names of the command line, `KINDS` lists them.
"""

from .arrays import from_array
from .base_k import base
from .drawing import describe, draw
from .files import FILES
from .graph import Graph
from .named import (
    bipartite_hubs,
    complete,
    complete_bipartite,
    erdos_renyi,
    hypercube,
    line,
    random_regular,
    ring,
    star,
    torus,
)
from .names import KINDS, parse
from .over_time import failing, one_peer_exponential, one_peer_hypercube, random_edges, random_matching
from .schedule import Schedule, as_schedule, compose
from .weights import from_matrix, from_networkx, metropolis

__all__ = [
    "FILES",
    "KINDS",
    "Graph",
    "Schedule",
    "as_schedule",
    "base",
    "bipartite_hubs",
    "complete",
    "complete_bipartite",
    "compose",
    "describe",
    "draw",
    "erdos_renyi",
    "failing",
    "from_array",
    "from_matrix",
    "from_networkx",
    "hypercube",
    "line",
    "metropolis",
    "one_peer_exponential",
    "one_peer_hypercube",
    "parse",
    "random_edges",
    "random_matching",
    "random_regular",
    "ring",
    "star",
    "torus",
]
