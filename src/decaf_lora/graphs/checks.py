"""Which mixing matrices lead to agreement? The checks that all graphs share, and the errors they raise."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from decaf_lora.errors import UserError, listed

TOLERANCE = 1e-9  # error allowed in row sums, column sums and symmetry
EXACT = 1e-12  # a product of mixing matrices whose entries are this near to 1/N counts as the exact average


def check_count(n: int) -> None:
    if n < 1:
        raise UserError(f"graph: {n} agents cannot form a graph; use at least 1.")


def check_probability(p: float, of: str) -> None:
    if not 0 < p <= 1:
        raise UserError(f"graph: the {of} probability is {p:g}; it must be above 0 and at most 1.")


def check_rows(weights: NDArray[np.float64]) -> None:
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise UserError(
            f"graph: the weights have shape {weights.shape}, not (N, N); give every agent a row and a column."
        )
    check_count(len(weights))
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


def check_names(names: Sequence[str], n: int) -> None:
    if names and len(names) != n:
        raise UserError(f"graph: {len(names)} names for {n} agents; give every agent one.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"graph: two agents are called {twice!r}; give every agent a name of its own.")


def check_columns(weights: NDArray[np.float64]) -> None:
    sums = weights.sum(axis=0)
    if (columns := np.flatnonzero(np.abs(sums - 1) > TOLERANCE)).size:
        column = columns[0]
        raise UserError(
            f"graph: column {column} of the weights sums to {sums[column]:.12g}, not 1, so agent {column} "
            "would count differently from the others in the average; make the matrix symmetric, or use "
            "Graph.server(counts) for a server's weighted average."
        )


def check_symmetric(weights: NDArray[np.float64]) -> None:
    pairs = np.argwhere(np.abs(weights - weights.T) > TOLERANCE)
    if pairs.size:
        i, j = pairs[0]
        raise UserError(
            f"graph: row {i}, column {j} of the weights is {weights[i, j]:.12g} but row {j}, column {i} is "
            f"{weights[j, i]:.12g}; make them equal, or pass require_symmetric=False for a directed graph."
        )


def steps_from_agent_0(heard: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(N,) steps from agent 0 along `heard` (N, N), -1 where it cannot be reached."""
    distances = np.full(len(heard), -1)
    frontier = np.arange(len(heard)) == 0
    for step in itertools.count():
        distances[frontier] = step
        frontier = heard[frontier].any(axis=0) & (distances < 0)
        if not frontier.any():
            break
    return distances


def check_consensus(heard: NDArray[np.bool_], field: str, remedy: str, names: Sequence[str] = ()) -> None:
    """Checks that repeated mixing leads to agreement.

    One search from agent 0 is enough, also on a directed graph: with doubly stochastic weights as much flows out of a
    set of agents as into it.

    Args:
        heard: (N, N), where a doubly stochastic matrix is not 0.
        field: begins the error.
        remedy: ends the error.
        names: (N,) of the agents, for the error; () if they only have numbers.

    Raises:
        UserError: some agents cannot be reached, or models circulate and never blend.
    """
    distances = steps_from_agent_0(heard)
    if (lost := np.flatnonzero(distances < 0)).size:
        called = names or [str(agent) for agent in range(len(heard))]
        agents = listed([called[agent] for agent in lost.tolist()], 10)
        agents = f"agent {agents}" if lost.size == 1 else f"agents {agents}"
        raise UserError(f"{field}: {agents} cannot be reached from agent {called[0]}; link them{remedy}.")
    # If all cycles share a divisor above 1, models circulate and never blend, as with two agents that swap.
    rows, columns = np.nonzero(heard)
    divisor = int(np.gcd.reduce(distances[rows] + 1 - distances[columns]))
    if divisor > 1:
        raise UserError(
            f"{field}: models go round in turns of {divisor} and the agents never agree; give at least one "
            f"agent a weight on itself{remedy}."
        )


def second_singular_value(weights: NDArray[np.float64]) -> float:
    return float(np.linalg.svd(weights, compute_uv=False)[1]) if len(weights) > 1 else 0.0


def is_average(weights: NDArray[np.float64]) -> bool:
    return bool(np.abs(weights - 1 / len(weights)).max() <= EXACT)


def misfit(kind: str, n: int, why: str, fits: Callable[[int], bool]) -> UserError:
    """The error for a kind of graph that n agents cannot form, with the nearest numbers of agents that can.

    Args:
        kind: name of the graph.
        n: number of agents.
        why: the reason.
        fits: whether so many agents can form such a graph.
    """
    below = next(((m,) for m in range(n - 1, 0, -1) if fits(m)), ())
    above = next(m for m in itertools.count(n + 1) if fits(m))
    sizes = " or ".join(map(str, (*below, above)))
    return UserError(f"graph: {n} agents cannot form a {kind} ({why}); use {sizes} agents.")
