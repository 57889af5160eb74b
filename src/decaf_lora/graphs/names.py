"""Which graph does a name of the command line mean?"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx

from decaf_lora.errors import UserError
from decaf_lora.kinds import Kind, Table, call

from .arrays import from_array
from .base_k import base
from .checks import check_count, misfit
from .files import FILES, read
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
from .over_time import failing, one_peer_exponential, one_peer_hypercube, random_edges, random_matching
from .schedule import Schedule
from .weights import from_networkx

MOST = 100_000
"""Agents that a graph may have."""


def _two(spec: str, argument: str, separator: str, example: str) -> tuple[int, int]:
    """The two sizes of "2x5" or "8+2"."""
    first, _, second = argument.lower().partition(separator)
    if not (first.isdecimal() and second.isdecimal()):
        raise UserError(f"graph: {spec}:{argument} is not readable; write it as {example}.")
    sizes = int(first), int(second)
    if (sizes[0] * sizes[1] if separator == "x" else sum(sizes)) > MOST:
        raise UserError(f"graph: {spec}:{argument} has more than {MOST} agents.")
    return sizes


def _fit(graph: Graph | Schedule, n: int, other: Callable[[], Graph | Schedule] | None = None) -> Graph | Schedule:
    """`graph` if it has `n` agents.

    Raises UserError otherwise. `other` makes a graph of the same kind with `n` agents, whose name becomes the remedy.
    If `other` raises, its error says which sizes there are.
    """
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
        raise misfit("torus", n, "it needs at least 2 rows", lambda m: m > 1 and rows_of(m) > 1)
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


_BUILT_IN = {
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


def _own(function: Callable[..., Any], name: str) -> Kind:
    """A function of the user's as a kind; it may ask for `num_agents` and `seed`."""

    def build(n: int, argument: str, seed: int) -> Graph | Schedule:
        made = call(function, name, argument, "graph", {"num_agents": n, "seed": seed})
        if isinstance(made, nx.Graph):
            made = from_networkx(made, name)
        elif not isinstance(made, Graph | Schedule):
            made = from_array(made, name)
        if made.num_agents != n:
            raise UserError(
                f"graph: {name} returned {made.num_agents} agents but the run has {n}; take the parameter num_agents, "
                f"or use {made.num_agents} agents."
            )
        return made

    return Kind(build, "a function of your own", "mine.py:two_rings")


KINDS: Table[Kind] = Table("graph", "decaf_lora.graphs", _BUILT_IN, _own)
"""The graphs by name. `build` takes (num_agents, argument, seed); argument: the text after the colon, or ""."""


def parse(spec: str, num_agents: int, seed: int) -> Graph | Schedule:
    """The graph that a command line or a recipe names.

    Args:
        spec: a name of `KINDS`, with its argument after a colon ("ring", "torus:2x5", "erdos-renyi:0.4"; "_"
            reads as "-"); a function of one's own ("mine.py:two_rings"), see `kinds`; or a file, see
            `files.read`. "failing:0.1:" goes before any of them.
        num_agents: N; what the name or the file says must agree.
        seed: of random graphs.

    Raises:
        UserError: the name is unknown, unreadable, or does not fit N; or a random schedule does not connect all
            agents in 1000 rounds.
    """
    check_count(num_agents)
    spec = spec.strip()
    if KINDS.written(spec.partition(":")[0].strip()) != "failing" and spec.lower().endswith(FILES):
        return _fit(read(Path(spec)), num_agents)
    if spec.lower() == "server":
        raise UserError(
            "graph: a server is no graph but a kind of algorithm (fedavg, fedprox, fedadam, scaffold, flexlora); for "
            "the others use star, whose centre trains too, or complete."
        )
    _, kind, argument = KINDS.find(spec, f" Or give a file: {', '.join(FILES)}.")
    made = kind.build(num_agents, argument, seed)
    if isinstance(made, Schedule) and made.period is None:
        _ = made.pace  # raises where it never connects everybody
    return made
