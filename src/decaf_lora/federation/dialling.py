"""Which agent dials which? Every edge needs an end that can be dialled; otherwise a graph that works is proposed."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx

from decaf_lora.errors import UserError
from decaf_lora.graphs import Graph


def check_dialling(graph: Graph, names: Sequence[str], listens: Sequence[bool]) -> None:
    """Raises UserError if an edge links two agents that can both only dial; the message proposes edges that work.

    Args:
        graph: has an edge wherever two agents exchange at any time.
        names: of the agents, in the order of their numbers.
        listens: whether an agent can be dialled.
    """
    silent = [(i, j) for i, j in graph.edges if not listens[i] and not listens[j]]
    if not silent:
        return
    i, j = silent[0]
    more = f" (and {len(silent) - 1} more such edges)" if len(silent) > 1 else ""
    if not any(listens):
        remedy = (
            "One of them needs an address: a port of its firewall, or of any machine that forwards TCP to it; it then "
            "makes its request with --listen HOST:PORT."
        )
    else:
        edges = ",".join(f"{names[a]}-{names[b]}" for a, b in proposed(graph, listens))
        remedy = f"A graph that works: --graph {edges}"
    raise UserError(f"graph: {names[i]} and {names[j]} are linked and can both only dial{more}. {remedy}")


def proposed(graph: Graph, listens: Sequence[bool]) -> list[tuple[int, int]]:
    """Edges that connect all agents, each with an end that can be dialled, near those of `graph`.

    Edges of `graph` with an end that can be dialled stay. An agent that only dials gets, in place of each edge that is
    removed, an edge to an agent that can be dialled, those with the fewest edges first. So agents keep their number of
    neighbours where that is possible.
    """
    out = nx.Graph()
    out.add_nodes_from(range(len(listens)))
    out.add_edges_from((i, j) for i, j in graph.edges if listens[i] or listens[j])
    hubs = [agent for agent, can in enumerate(listens) if can]
    for agent, can in enumerate(listens):
        while not can and out.degree(agent) < graph.degree(agent):
            free = [hub for hub in hubs if not out.has_edge(agent, hub)]
            if not free:
                break
            out.add_edge(agent, min(free, key=lambda hub: (out.degree(hub), hub)))
    while not nx.is_connected(out):
        # A part without an agent that can be dialled is one that only dials, alone: the loop above has left none.
        first, second, *_ = (min(part, key=lambda a: (not listens[a], a)) for part in nx.connected_components(out))
        out.add_edge(first, second)
    return sorted((min(edge), max(edge)) for edge in out.edges)


def edges_of(text: str, names: Sequence[str]) -> list[tuple[int, int]] | None:
    """The edges, as pairs of numbers, that a text such as "alice-bob,bob-carol" names; None for another text.

    A name may have hyphens itself: an edge is split where both parts are names.
    """
    numbers = {name: number for number, name in enumerate(names)}
    edges = []
    for part in text.split(","):
        words = part.strip().split("-")
        cuts = [("-".join(words[:k]), "-".join(words[k:])) for k in range(1, len(words))]
        found = [(numbers[a], numbers[b]) for a, b in cuts if a in numbers and b in numbers]
        if len(found) != 1 or found[0][0] == found[0][1]:
            return None
        edges += found
    return edges
