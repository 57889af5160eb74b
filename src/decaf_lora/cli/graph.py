"""`decaf graph`: a graph, its mixing matrix and its spectrum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from decaf_lora.cli.options import check_options, checked, parsed
from decaf_lora.errors import UserError

if TYPE_CHECKING:
    from decaf_lora.graphs import Graph


def graph_command(args: list[str]) -> int:
    from decaf_lora import graphs

    @checked
    def graph(
        kind: Positional[str] = "ring",
        agents: Annotated[int, arg(aliases=["-n"])] = 10,
        seed: Annotated[int, Field(ge=0)] = 0,
        save: Path | None = None,
        json: bool = False,
    ) -> tuple[str, int, int, Path | None, bool]:
        """Shows a graph: weights, sigma_2, edges, degrees; --save draws it.

        Args:
            kind: name of the graph, with its argument after a colon, a file, or a function of your own.
            agents: number of agents N.
            seed: seed of random graphs.
            save: file to draw the graph to (.png, .svg, .pdf).
            json: print JSON.
        """
        return kind, agents, seed, save, json

    if "-h" in args or "--help" in args:
        table = Table.grid(padding=(0, 3))
        for name, summary in graphs.KINDS.summaries():
            table.add_row(f"  {name}", summary)
        table.add_row("  FILE", f"your own graph or mixing matrix ({', '.join(graphs.FILES)}); docs/own-graph.md")
        table.add_row("  mine.py:two_rings", "your own function, with its options as mine.py:two_rings:bridges=3")
        console = Console(highlight=False)
        console.print("Graphs:")
        console.print(table)
        console.print()
    check_options(args, ["kind", "agents", "n", "seed", "save", "json", "help"])
    spec, agents, seed, save, as_json = parsed(graph, "decaf graph", args)
    made = graphs.parse(spec, agents, seed)
    facts = graphs.describe(made)
    if save is not None:
        try:
            graphs.draw(graphs.as_schedule(made).at(0), save)
        except (OSError, ValueError) as error:
            raise UserError(f"save: cannot draw to {save} ({error}).") from error
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    _show_graph(facts, graphs.as_schedule(made).at(0))
    if save is not None:
        print(f"drawn: {save}" + (" (round 0)" if "period" in facts else ""))
    return 0


def _show_graph(facts: dict[str, Any], graph: Graph) -> None:
    console = Console(highlight=False)
    n, weights = graph.num_agents, graph.weights
    names = graph.names or [str(agent) for agent in range(n)]
    title = "mixing matrix" + (" of round 0" if "period" in facts else "")
    table = Table(title=title, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("", justify="right", style="dim")
    for j in range(n):
        table.add_column(names[j], justify="right")
    for i in range(n):
        table.add_row(names[i], *("·" if w == 0 else f"{w:.3f}".removeprefix("0") for w in weights[i]))
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
        console.print(table)
    else:
        console.print(f"{title}: {n} x {n}, wider than this window; --json prints it")
    console.print()
    for key, value in facts.items():
        if key == "weights" or (key == "rounds" and not value):
            continue
        if key == "rounds":  # of a schedule
            for number, round_ in enumerate(value):
                line = f"round {number}: {round_['messages_per_round']} messages, {_pairs(round_['edges'], 30)}"
                console.print(line, markup=False, soft_wrap=True)
            continue
        name, shown = key.replace("_", " "), value
        periodic, over_time = facts.get("period") is not None, "period" in facts
        if over_time and not periodic and key in ("exact_after", "sigma_2", "spectral_gap"):
            continue  # of a period
        if key == "period":
            shown = f"{value} round{'s' * (value > 1)}" if periodic else "none, drawn anew every round"
        elif key == "exact_after":
            name = "exact average"
            shown = "never" if value is None else f"after {value} round{'s' * (value > 1)}"
        elif periodic and key in ("sigma_2", "spectral_gap"):
            name += " of the period"
        elif over_time and not periodic and key in ("sigma_2_per_round", "messages_per_round"):
            name += ", mean of 100 rounds"
        if isinstance(shown, float):
            shown = f"{0 if abs(shown) < 1e-12 else shown:.6g}"
        elif isinstance(shown, dict):
            shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        elif key == "names":
            shown = ", ".join(value)
        elif key == "edges":
            shown = f"{len(value)}: {_pairs(value, 60)}"
        console.print(f"{name}: {shown}", markup=False, soft_wrap=True)


def _pairs(edges: list[list[int]], most: int) -> str:
    return " ".join(f"{i}-{j}" for i, j in edges[:most]) + (" ..." if len(edges) > most else "")
