"""Studies of methods under conditions: which runs are done, which learning rate is a method's best? A shared helper.

A run is (method, condition, learning rate, seed, whether it is scored on held-out examples). Finished runs are lines of
a file, so a study may be stopped at any time and goes on. A cell, that is a method under a condition, counts at the
rate that is best there for the first seed on held-out training examples; then it has all seeds on all examples.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
RATES = (0.01, 0.02, 0.04)
HELD_OUT = 0.2
"""Share of every agent's training examples that a search scores on."""
MOST_MORE = 3
"""Rates by which a range may grow."""
BEGIN, END = "<!-- made by the benchmark with --page -->", "<!-- end -->"

Key = tuple[str, str, float, int, bool]
Row = dict[str, Any]


@dataclass
class Study:
    """The finished runs in a file.

    Args:
        out: the file.
        one: makes a run; returns its row, with `key` and `mean`.
        faster: method -> factor of its first learning rates.
        run: whether to run what is missing.
    """

    out: Path
    one: Callable[[Key], Row]
    faster: Mapping[str, float] = field(default_factory=dict)
    run: bool = False

    def __post_init__(self) -> None:
        lines = self.out.read_text().splitlines() if self.out.exists() else []
        self.done = {tuple(row["key"]): row for row in map(json.loads, filter(None, lines))}

    def row(self, key: Key) -> Row | None:
        """The row of a run; None if it is missing."""
        if key not in self.done and self.run:
            row = self.one(key)
            with self.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.done[key] = row
            print(*key, f"{row['mean']:.3f}  {row['cpu_seconds']} s", flush=True)
        return self.done.get(key)

    def best_rate(self, method: str, condition: str) -> float | None:
        """The best learning rate on held-out examples; the range grows while that is an end. None: runs are missing."""
        rates = [float(f"{rate * self.faster.get(method, 1):.6g}") for rate in RATES]
        while True:
            rows = [self.row((method, condition, rate, SEEDS[0], True)) for rate in rates]
            if any(row is None for row in rows):
                return None
            scores = [row["mean"] for row in rows if row is not None]
            best = scores.index(max(scores))
            if 0 < best < len(rates) - 1 or len(rates) >= len(RATES) + MOST_MORE:
                return rates[best]
            more = float(f"{rates[best] * (2 if best else 0.5):.6g}")
            rates = [*rates, more] if best else [more, *rates]

    def cell(self, method: str, condition: str) -> tuple[float, list[Row]] | None:
        """The best rate, and the rows of all seeds there; None: runs are missing."""
        rate = self.best_rate(method, condition)
        if rate is None:
            return None
        rows = [self.row((method, condition, rate, seed, False)) for seed in SEEDS]
        return None if any(row is None for row in rows) else (rate, [row for row in rows if row is not None])


def tables(study: Study, methods: Sequence[str], conditions: Sequence[str]) -> str:
    """Markdown: scores, and what each condition costs against the first, paired by seed; – where runs are missing."""
    scores = [f"| method | {' | '.join(conditions)} |", "|---" * (len(conditions) + 1) + "|"]
    costs = [f"| method | {' | '.join(conditions[1:])} |", "|---" * len(conditions) + "|"]
    for method in methods:
        cells = [study.cell(method, condition) for condition in conditions]
        scores.append(f"| {method} | {' | '.join(map(_score, cells))} |")
        costs.append(f"| {method} | {' | '.join(_cost(cells[0], cell) for cell in cells[1:])} |")
    return "\n".join(scores) + f"\n\nPoints lost against `{conditions[0]}`, mean (each seed):\n\n" + "\n".join(costs)


def _score(cell: tuple[float, list[Row]] | None) -> str:
    if cell is None:
        return "–"
    means = [row["mean"] for row in cell[1]]
    return f"{statistics.fmean(means):.3f} ± {statistics.stdev(means):.3f} ({cell[0]:g})"


def _cost(first: tuple[float, list[Row]] | None, cell: tuple[float, list[Row]] | None) -> str:
    if first is None or cell is None:
        return "–"
    apart = [100 * (one["mean"] - other["mean"]) for one, other in zip(first[1], cell[1], strict=True)]
    return f"{statistics.fmean(apart):+.1f} ({', '.join(f'{points:+.1f}' for points in apart)})"


def main(
    text: str, out: Path, page: Path, one: Callable[[Key], Row], order: Sequence[tuple[str, str]], **more: Any
) -> None:
    """The command of a study.

    Args:
        text: its description.
        out: the file of finished runs.
        page: the page whose part between `BEGIN` and `END` the tables take.
        one: as of `Study`.
        order: (method, condition) of the cells, the most important first.
        more: `faster` of `Study`.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="file of finished runs")
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--page", action="store_true", help="write the tables into the page")
    arguments = parser.parse_args()
    if not (arguments.table or arguments.page):
        study = Study(arguments.out, one, run=True, **more)
        for cell in order:
            study.cell(*cell)
    methods, conditions = (list(dict.fromkeys(cell[place] for cell in order)) for place in (0, 1))
    made = tables(Study(arguments.out, one, **more), methods, conditions)
    if not arguments.page:
        print(made)
        return
    front, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{front}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}")
