"""How are the rows of a comparison shown? As a table for the terminal, in Markdown, CSV and LaTeX."""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.table import Table

from decaf_lora.records.noise import RANKED, winners
from decaf_lora.records.summary import METRICS, OWN, REFERENCES, Aggregate, Spread, SummaryRow, aggregate

COLUMNS = (
    "algorithm",
    "graph",
    "partition",
    "seeds",
    "mean score",
    "worst agent",
    "std over agents",
    "averaged model",
    "sent per agent",
    "time (s)",
)
"""The headings of a table of results."""


def columns(rows: Iterable[Aggregate]) -> tuple[str, ...]:
    """The titles of the columns for `rows`: `COLUMNS`, and where agents were scored on data like their own, that."""
    return (*COLUMNS[:8], "on own data", *COLUMNS[8:]) if _have_own(rows) else COLUMNS


def _have_own(rows: Iterable[Aggregate]) -> bool:
    return any(row.own_score.mean is not None for row in rows)


def cells(row: Aggregate, own: bool = False) -> list[str]:
    """`row` as text for people, one cell for each column of `COLUMNS`; with `own` also for that of own data."""
    scores = [number(getattr(row, metric), ".3f") for metric in (*METRICS[:4], *([OWN] if own else []))]
    sent = human_bytes(row.bytes_sent) if row.bytes_sent.mean else "–"
    seconds = number(row.seconds, ".0f" if (row.seconds.mean or 0) >= 100 else ".1f")
    return [row.algorithm, row.graph, row.partition, str(row.seeds), *scores, sent, seconds]


def lines(rows: Iterable[Aggregate]) -> list[list[str]]:
    """The rows as text, one cell for each of `columns`. References follow the rows of each graph and partition.

    A reference is a score to compare with: that of the start of training, and that of always giving the most frequent
    class of the training data.
    """
    rows, found = list(rows), []
    own = _have_own(rows)
    for _, group in itertools.groupby(rows, key=lambda row: (row.graph, row.partition)):
        members = list(group)
        found += [cells(row, own) for row in members] + references(members, own)
    return found


def references(rows: Sequence[Aggregate], own: bool = False) -> list[list[str]]:
    """The references of `rows`, which are all of one graph and partition, as lines of text; `own` as for `cells`."""
    found, empty = [], len(COLUMNS) - 5 + own
    for metric, title in REFERENCES.items():
        known = [row for row in rows if getattr(row, metric).mean is not None]
        # Agents that pool their data may start from another model than those that do not.
        known = [row for row in known if row.algorithm != "centralized"] or known
        by_value = {number(getattr(row, metric), ".3f"): row for row in reversed(known)}
        for value, row in reversed(by_value.items()):
            name = title if len(by_value) == 1 else f"{title} of {row.algorithm}"
            found.append([name, row.graph, row.partition, str(row.seeds), value, *["–"] * empty])
    return found


def number(spread: Spread, form: str) -> str:
    if spread.mean is None:
        return spread.missing
    return f"{spread.mean:{form}}" + ("" if spread.std is None else f" ± {spread.std:{form}}")


def human_bytes(spread: Spread) -> str:
    """Bytes in decimal units, e.g. `1.23 MB`; with the standard deviation if it is above 0.5 % of the mean."""
    if spread.mean is None:
        return "n/a"
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(int(math.log10(max(float(f"{spread.mean:.3g}"), 1)) // 3), len(units) - 1)
    mean, std = f"{spread.mean / 1000**power:.3g}", f"{(spread.std or 0) / 1000**power:.2g}"
    visible = spread.std is not None and spread.std > 0.005 * spread.mean
    return f"{mean} ± {std} {units[power]}" if visible else f"{mean} {units[power]}"


def table(rows: Iterable[SummaryRow]) -> Table:
    """The aggregated rows as a table of at most 80 columns of text; what all runs share goes to its title."""
    members = aggregate(rows)
    texts = lines(members)
    shared = [k for k in (1, 2, 3) if texts and len({line[k] for line in texts}) == 1]
    facts = [_literal(texts[0][k]) for k in shared if k != 3]
    if 3 in shared:
        facts.append("1 seed" if texts[0][3] == "1" else f"{texts[0][3]} seeds (mean ± standard deviation)")
    result = Table(
        title=", ".join(facts),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )
    for k, column in enumerate(columns(members)):
        if k not in shared:
            justify: Literal["left", "right"] = "left" if k < 3 else "right"
            result.add_column(column.replace(" ", "\n"), justify=justify, no_wrap=k > 0)  # only names may wrap
    for line in texts:
        line[-1] = line[-1].split(" ")[0]
        shown = [text.replace(" ± ", "±") for k, text in enumerate(line) if k not in shared]
        result.add_row(*map(_literal, shown))
    return result


def _literal(text: str) -> str:
    return text.replace("[", r"\[")


def to_markdown(rows: Iterable[SummaryRow]) -> str:
    """The aggregated rows as a GitHub table."""
    members = aggregate(rows)
    return markdown([columns(members), *lines(members)], texts=3)


def markdown(lines: Iterable[Sequence[str]], texts: int) -> str:
    """A GitHub table of a header and its lines; the first `texts` columns hold text, the others numbers."""
    header, *body = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *body))


def to_csv(rows: Iterable[SummaryRow]) -> str:
    """The aggregated rows as CSV: full precision, and a column `<metric>_std` after each metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    members = aggregate(rows)
    metrics = [*METRICS, *REFERENCES, *([OWN] if _have_own(members) else [])]
    names = [name for metric in metrics for name in (metric, f"{metric}_std")]
    writer.writerow(["algorithm", "graph", "partition", "seeds", *names])
    for row in members:
        spreads: list[Spread] = [getattr(row, metric) for metric in metrics]
        numbers = [number for spread in spreads for number in (spread.mean, spread.std)]
        writer.writerow([row.algorithm, row.graph, row.partition, row.seeds, *numbers])
    return text.getvalue()


LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "–": "--",
        **{character: "\\" + character for character in "&%$#_{}"},
    }
)


def to_latex(rows: Iterable[SummaryRow]) -> str:
    r"""The aggregated rows as a tabular; it needs \usepackage{booktabs}.

    A score is bold if it is better than all others by more than the noise of the seeds.
    """
    rows = list(rows)
    bold, members = winners(rows), aggregate(rows)
    titles = columns(members)
    places = {title: titles.index(name) for title, name in RANKED.items() if name in titles}
    body = []
    for line in lines(members):
        cells = [cell.translate(LATEX) for cell in line]
        for metric, column in places.items():
            if (line[0], line[1], line[2], metric) in bold:
                cells[column] = rf"\textbf{{{cells[column]}}}"
        body.append(" & ".join(cells) + r" \\")
    head = " & ".join(titles) + r" \\"
    text = [
        rf"\begin{{tabular}}{{lll{'r' * (len(titles) - 3)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
    ]
    return "\n".join([*text, r"\end{tabular}", ""])
