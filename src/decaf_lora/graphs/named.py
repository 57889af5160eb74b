"""The graphs that have a name, of any number of agents."""

import math
import random

import networkx as nx
import numpy as np

from decaf_lora.errors import UserError
from decaf_lora.randomness import derive_seed, numpy_generator

from .checks import check_count, check_probability, misfit, steps_from_agent_0
from .graph import Graph
from .weights import from_networkx, metropolis

DRAWS = 1000  # the most draws of a random graph until one is connected


def ring(n: int) -> Graph:
    """Each agent averages itself and its two neighbours, 1/3 each; one agent has weight 1, two have 1/2 each."""
    check_count(n)
    return from_networkx(nx.cycle_graph(n), "ring")


def complete(n: int) -> Graph:
    """Every agent linked to every other one, all weights 1/n: the exact average in one exchange."""
    check_count(n)
    return from_networkx(nx.complete_graph(n), "complete")


def star(n: int) -> Graph:
    """Agent 0 linked to all the others."""
    check_count(n)
    return from_networkx(nx.star_graph(n - 1), "star")


def line(n: int) -> Graph:
    """Agents in a chain: 0 - 1 - ... - n-1."""
    check_count(n)
    return from_networkx(nx.path_graph(n), "line")


def torus(rows: int, cols: int) -> Graph:
    """A grid whose borders are joined; agent `row * cols + column`. One row is a ring, no edge is doubled."""
    check_count(min(rows, cols))
    return from_networkx(nx.grid_2d_graph(rows, cols, periodic=True), f"torus:{rows}x{cols}")


def bipartite_hubs(n: int = 10, hubs: int = 2) -> Graph:
    """The bipartite graph of the DeCAF paper (arXiv 2505.21382): n - hubs leaves, each linked to all hubs.

    The hubs are the last agents and are not linked with each other. 8 leaves and 2 hubs take the published weights:
    0.11 on every edge, 0.78 of a leaf on itself, 0.12 of a hub on itself. These are Metropolis weights (1/9 on an edge)
    rounded to two digits, so all other sizes take Metropolis weights.

    Args:
        n: number of agents.
        hubs: how many of them are hubs.

    Raises:
        UserError: there is no hub, or no leaf.
    """
    check_count(n)
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
    check_count(n)

    def fits(m: int) -> bool:
        return m & (m - 1) == 0

    if not fits(n):
        raise misfit("hypercube", n, "it needs a power of 2", fits)
    agents = np.arange(n)
    differing = agents[:, None] ^ agents
    return metropolis((differing & (differing - 1) == 0) & (differing > 0), "hypercube")


def erdos_renyi(n: int, p: float, seed: int) -> Graph:
    """Every pair linked with probability `p`; drawn again until all agents are connected.

    Raises:
        UserError: `p` is not in (0, 1], or none of 1000 draws was connected.
    """
    check_count(n)
    check_probability(p, "edge")
    generator = numpy_generator(seed, "graph", "erdos-renyi")
    for _ in range(DRAWS):
        upper = np.triu(generator.random((n, n)) < p, k=1)
        links = upper | upper.T
        if (steps_from_agent_0(links) >= 0).all():
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
    check_count(n)
    if degree < min(2, n - 1):
        raise UserError(f"graph: degree {degree} cannot connect {n} agents; use at least {min(2, n - 1)}.")
    if degree >= n:
        raise UserError(
            f"graph: {n} agents cannot have {degree} neighbours each; use a degree of at most {n - 1}, "
            f"or at least {degree + 1} agents."
        )
    if n * degree % 2:
        raise misfit(f"random-regular:{degree}", n, "agents x degree must be even", lambda m: m > degree and m % 2 == 0)
    generator = random.Random(derive_seed(seed, "graph", "random-regular"))
    for _ in range(DRAWS):
        # A dense graph is drawn as the complement of a sparse one: networkx rarely succeeds in drawing a dense one.
        dense = 2 * degree >= n
        links = nx.random_regular_graph(n - 1 - degree if dense else degree, n, seed=generator)
        links = nx.complement(links) if dense else links
        if nx.is_connected(links):
            return from_networkx(links, f"random-regular:{degree}")
    raise UserError(f"graph: none of {DRAWS} random {degree}-regular graphs was connected; raise the degree.")
