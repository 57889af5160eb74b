"""How do the algorithms compare across settings? One score in the layout of papers: algorithms x settings."""

import csv
import io
import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from decaf_lora.records.formats import LATEX, markdown, number, to_csv, to_latex, to_markdown
from decaf_lora.records.noise import DIFFERENCES, differences, winners
from decaf_lora.records.summary import OWN, Spread, SummaryRow, aggregate

SHOWN = {
    "mean_score": "mean score over agents",
    "averaged_score": "score of the averaged model",
    OWN: "mean score of the agents on data of their own",
}
"""Metrics that are shown by setting -> title of their table."""


@dataclass(frozen=True)
class Pivot:
    """A table of one metric: a row for each algorithm, a column for each setting (graph by graph)."""

    metric: str
    settings: list[tuple[str, str]]  # (graph, partition)
    lines: dict[str, list[Spread | None]]  # algorithm -> one entry a setting, None if it did not run

    @property
    def graphs(self) -> list[tuple[str, int]]:
        """The graphs in the order of the columns, and how many columns each has."""
        return [(graph, len(list(group))) for graph, group in itertools.groupby(graph for graph, _ in self.settings)]

    def cells(self, algorithm: str) -> list[str]:
        """The row of an algorithm as text for people."""
        return ["–" if spread is None else number(spread, ".3f") for spread in self.lines[algorithm]]


def pivot(rows: Iterable[SummaryRow], metric: str = "mean_score") -> Pivot:
    """The table of `metric` by algorithm and setting: mean and standard deviation over seeds."""
    found = {(row.algorithm, row.graph, row.partition): getattr(row, metric) for row in aggregate(rows)}
    graphs = list(dict.fromkeys(key[1] for key in found))
    settings = sorted(dict.fromkeys(key[1:] for key in found), key=lambda setting: graphs.index(setting[0]))
    algorithms = dict.fromkeys(key[0] for key in found)
    return Pivot(metric, settings, {name: [found.get((name, *setting)) for setting in settings] for name in algorithms})


def shown(rows: Iterable[SummaryRow]) -> list[str]:
    """The metrics of `SHOWN` that `rows` have."""
    own = any(row.own_score is not None for row in rows)
    return [metric for metric in SHOWN if own or metric != OWN]


def tables(rows: Sequence[SummaryRow]) -> dict[str, str]:
    """File name -> text: the table of all metrics; the scores by setting if there are several; the differences to the
    best if there are several methods."""
    texts = {"table.md": to_markdown(rows), "table.csv": to_csv(rows), "table.tex": to_latex(rows)}
    pivots = [pivot(rows, metric) for metric in shown(rows)]
    if len(pivots[0].settings) > 1:
        texts |= {"scores.md": _pivots_to_markdown(pivots), "scores.csv": _pivots_to_csv(pivots)}
        bold = winners(rows)
        texts["scores.tex"] = "\n".join(_pivot_to_latex(table, bold) for table in pivots)
    if lines := differences(rows):
        texts |= {"differences.md": markdown([DIFFERENCES, *lines], texts=5), "differences.csv": _csv(lines)}
        texts["differences.tex"] = _differences_to_latex(lines)
    return texts


def _csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([DIFFERENCES, *lines])
    return text.getvalue()


def _differences_to_latex(lines: Sequence[Sequence[str]]) -> str:
    r"""The differences to the leaders as a tabular; it needs \usepackage{booktabs}."""
    head, *body = [[cell.translate(LATEX) for cell in line] for line in (DIFFERENCES, *lines)]
    columns = rf"\begin{{tabular}}{{{'l' * 5}{'r' * 5}l}}"
    rows = [" & ".join(line).replace("<", "$<$") + r" \\" for line in (head, *body)]
    return "\n".join([columns, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}", ""])


def _pivots_to_markdown(pivots: Iterable[Pivot]) -> str:
    parts = []
    for table in pivots:
        header = ["algorithm", *(f"{graph}, {partition}" for graph, partition in table.settings)]
        lines = [[name, *table.cells(name)] for name in table.lines]
        parts.append(f"{SHOWN[table.metric].capitalize()}\n\n{markdown([header, *lines], texts=1)}")
    return "\n".join(parts)


def _pivots_to_csv(pivots: Iterable[Pivot]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for index, table in enumerate(pivots):
        if index == 0:
            names = [f"{graph}, {partition}" for graph, partition in table.settings]
            writer.writerow(["metric", "algorithm", *(name + end for name in names for end in ("", " (std)"))])
        for algorithm, spreads in table.lines.items():
            numbers = [number for s in spreads for number in ((None, None) if s is None else (s.mean, s.std))]
            writer.writerow([table.metric, algorithm, *numbers])
    return text.getvalue()


def _pivot_to_latex(table: Pivot, bold: Collection[tuple[str, str, str, str]]) -> str:
    """A tabular with a line of graphs over a line of partitions; the scores in `bold` (`winners`) are bold."""
    groups, rules, column = [], [], 2
    for graph, width in table.graphs:
        groups.append(rf"\multicolumn{{{width}}}{{c}}{{{graph.translate(LATEX)}}}")
        rules.append(rf"\cmidrule(lr){{{column}-{column + width - 1}}}")
        column += width
    partitions = ["", *(partition.translate(LATEX) for _, partition in table.settings)]
    body = []
    for name in table.lines:
        cells = [cell.translate(LATEX) for cell in table.cells(name)]
        marks = [(name, *setting, table.metric) in bold for setting in table.settings]
        shown = [rf"\textbf{{{cell}}}" if marked else cell for cell, marked in zip(cells, marks, strict=True)]
        body.append([name.translate(LATEX), *shown])
    lines = [
        f"% {SHOWN[table.metric]}",
        rf"\begin{{tabular}}{{l{'r' * len(table.settings)}}}",
        r"\toprule",
        " & ".join(["", *groups]) + r" \\",
        " ".join(rules),
        " & ".join(partitions) + r" \\",
        r"\midrule",
        *(" & ".join(line) + r" \\" for line in body),
    ]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
