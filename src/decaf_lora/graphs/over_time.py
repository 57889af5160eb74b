"""The graphs that change from round to round."""

import math

import numpy as np

from decaf_lora.errors import UserError
from decaf_lora.randomness import numpy_generator

from .checks import check_count, check_probability, misfit
from .graph import Graph
from .schedule import Schedule, as_schedule
from .weights import metropolis


def one_peer_exponential(n: int) -> Schedule:
    """In round t every agent averages with the agent 2^t places further round the circle: it sends and receives one
    message.

    The weights are doubly stochastic but directed. A period of ceil(log2 n) rounds averages exactly if n is a
    power of 2 (Ying, Yuan, Chen, Hu, Pan and Yin, "Exponential Graph is Provably Efficient for Decentralized
    Deep Training", NeurIPS 2021, arXiv 2110.13363).
    """
    check_count(n)
    eye = np.eye(n)
    hops = [2**t for t in range(max(1, math.ceil(math.log2(n))))]
    graphs = [
        Graph((eye + np.roll(eye, hop, axis=1)) / 2, f"+{hop}", require_symmetric=False, connected=False)
        for hop in hops
    ]
    return Schedule.cycle(graphs, "one-peer-exponential")


def one_peer_hypercube(n: int) -> Schedule:
    """n = 2^d agents; in round t those whose numbers differ in bit t average in pairs: exact after d rounds."""
    check_count(n)
    if n & (n - 1):
        raise misfit("one-peer-hypercube", n, "it needs a power of 2", lambda m: m & (m - 1) == 0)
    eye, agents = np.eye(n), np.arange(n)
    bits = range((n - 1).bit_length() or 1)
    graphs = [Graph((eye + eye[agents ^ (1 << bit) % n]) / 2, f"bit {bit}", connected=False) for bit in bits]
    return Schedule.cycle(graphs, "one-peer-hypercube")


def random_matching(n: int, seed: int) -> Schedule:
    """Every round the agents average in pairs, matched anew at random; of an odd number of agents one rests."""
    check_count(n)

    def at(round: int) -> Graph:
        order = numpy_generator(seed, "graph", "random-matching", round).permutation(n)
        weights = np.eye(n)
        for i, j in zip(order[0::2], order[1::2], strict=False):
            weights[[i, i, j, j], [i, j, i, j]] = 0.5
        return Graph(weights, "random-matching", connected=False)

    return Schedule("random-matching", n, at)


def random_edges(n: int, p: float, seed: int) -> Schedule:
    """Every round each pair is linked with probability `p`, drawn anew (Erdos-Renyi), Metropolis weights."""
    check_count(n)
    check_probability(p, "edge")

    def at(round: int) -> Graph:
        upper = np.triu(numpy_generator(seed, "graph", "random-edges", round).random((n, n)) < p, k=1)
        return metropolis(upper | upper.T, "random-edges", connected=False)

    return Schedule(f"random-edges:{p:g}", n, at)


def failing(graph: Graph | Schedule, p: float, seed: int) -> Schedule:
    """A graph whose links fail, each in each round with probability p; both ends then give its weight to themselves.

    The weights stay symmetric and doubly stochastic. On a directed graph they would not.

    Args:
        graph: the graph or schedule without failures.
        p: in [0, 1).
        seed: of the draws.

    Raises:
        UserError: p is out of range, or the graph is directed.
    """
    schedule = as_schedule(graph)
    n = schedule.num_agents
    if not 0 <= p < 1:
        raise UserError(f"graph: the failure probability is {p:g}; it must be at least 0 and below 1.")

    def at(round: int) -> Graph:
        graph = schedule.at(round)
        weights = graph.weights
        upper = np.triu(numpy_generator(seed, "graph", "failing", round).random((n, n)) < p, k=1)
        lost = np.where(upper | upper.T, weights, 0)
        return Graph(weights - lost + np.diag(lost.sum(axis=1)), "failing", connected=False, names=graph.names)

    weights = [schedule.at(round).weights for round in range(schedule.period or 1)]
    if any((W != W.T).any() for W in weights):
        raise UserError(
            f"graph: {schedule.name} is directed, so a failed link would not leave it doubly stochastic; "
            "take a symmetric graph."
        )
    return Schedule(f"failing:{p:g}:{schedule.name}", n, at)
