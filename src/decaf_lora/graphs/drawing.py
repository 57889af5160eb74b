"""How does a graph look, in numbers and as a picture?"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from .graph import Graph
from .schedule import SAMPLE, Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def describe(graph: Graph | Schedule) -> dict[str, Any]:
    """A graph or schedule in JSON's types; what `decaf graph --json` prints.

    A schedule has its `period` (None: random), the number of rounds until the average is exact (`exact_after`; None:
    never in a period), the `sigma_2` of a whole period and its mean over a round, and the mean number of messages a
    round (of a random schedule: over its first 100 rounds).
    """
    names = {"names": list(graph.names)} if graph.names else {}
    if isinstance(graph, Schedule):
        rounds = [describe(graph.at(round)) for round in range(graph.period or 0)]
        sigma_2 = graph.sigma_2 if graph.period else None
        messages = [graph.at(round).messages_per_round for round in range(graph.period or SAMPLE)]
        return {
            "name": graph.name,
            "num_agents": graph.num_agents,
            **names,
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
        **names,
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
    # Not pyplot, which would change the current figure and the backend of the caller.
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
    # Nodes are as large as they can be without touching.
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
        label = graph.names[node] if graph.names and node != "server" else str(node)
        fitting = diameter * min(0.44, 1.56 / len(label))
        size = max(fitting, 7) if graph.names else fitting  # a long name stays readable and may leave its node
        axes.text(x, y, label, ha="center", va="center_baseline", fontsize=size, zorder=3)


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
