"""How do any number of agents with few neighbours a round average exactly? The Base-(k+1) graph."""

import itertools
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from decaf_lora.errors import UserError

from .checks import check_count
from .graph import Graph
from .schedule import Schedule


def base(n: int, k: int) -> Schedule:
    """The Base-(k+1) graph: any n agents, at most k neighbours a round, the exact average in few rounds.

    Of three constructions the one with the fewest rounds is taken, with b = k + 1:

    - hyper-hypercube, if n is a product of factors up to b: the agents fill a grid with these sides, and each round
      averages along one axis.
    - simple, for any other n: the base-b digits of n = a_1 b^p_1 + a_2 b^p_2 + ... (falling powers) split the agents
      into parts, part l with a_l blocks of b^p_l agents. First every part averages itself. Then, part after part, each
      agent of a later part takes the weight b^p_l / (agents of part l and all later parts) from one agent in each
      block of part l; no two take from the same agent. After that the mean of the later agents is that of all. At
      last every block averages itself again.
    - split, for n = p q where q has no factor up to b: p groups of q agents run the simple graph side by side; then
      the agents at equal places of the groups run the hyper-hypercube.

    Args:
        n: number of agents.
        k: the most neighbours of an agent in a round, at least 1.

    Raises:
        UserError: n or k is below 1.

    Source: Takezawa, Sato, Bao, Niwa and Yamada, "Beyond Exponential Graph", NeurIPS 2023, arXiv 2305.11420, where the
    graph takes at most 2 log_b(n) + 2 rounds.
    """
    check_count(n)
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
"""The links of a round: (agent, other agent, weight)."""


def _hyper_hypercube(agents: Sequence[int], k: int) -> list[_Round] | None:
    """Rounds that average `agents` exactly, in groups of at most k + 1; None if their number has a larger prime."""
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
    parts: list[list[Sequence[int]]] = []  # the blocks of every part
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
    """Rounds of disjoint sets of agents, run side by side."""
    return [list(itertools.chain(*links)) for links in itertools.zip_longest(*strands, fillvalue=[])]


@cache
def _sides(n: int, largest: int) -> tuple[int, ...] | None:
    """The fewest factors, each from 2 to `largest`, whose product is n; None if there are no such factors."""
    if n == 1:
        return ()
    found = [
        (side, *rest)
        for side in range(min(n, largest), 1, -1)
        if n % side == 0 and (rest := _sides(n // side, largest)) is not None
    ]
    return min(found, key=len, default=None)
