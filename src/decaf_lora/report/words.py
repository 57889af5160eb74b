"""What does the page say in words and numbers? Its title, what was run, the tables, where it ran."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from decaf_lora import records
from decaf_lora.records import Aggregate, SummaryRow
from decaf_lora.report.reading import RunRecords, by_setting

Key = TypeVar("Key")


def title(runs: Sequence[RunRecords]) -> str:
    algorithms = {run.algorithm for run in runs}
    subject = runs[0].algorithm if len(algorithms) == 1 else f"{len(algorithms)} algorithms"
    tasks = _distinct(run.facts.get("task") for run in runs)
    return f"{subject} on {tasks}" if tasks else subject


def _distinct(values: Iterable[object]) -> str:
    """The distinct values, in order of appearance, as one text; None is left out."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def facts_shown(runs: Sequence[RunRecords]) -> dict[str, str]:
    """Name -> a few words on what was run."""
    peers = [run for run in runs if run.algorithm != "centralized"] or runs
    bound = [run for run in peers if run.uses_graph] or peers
    facts = {
        "Task": _distinct(run.facts.get("task") for run in runs),
        "Algorithms" if len(runs) > 1 else "Algorithm": _distinct(run.algorithm for run in runs),
        "Agents": _distinct(run.facts.get("agents") for run in peers),
        "Ranks": _distinct(", ".join(map(str, ranks)) for run in peers if (ranks := run.facts.get("ranks"))),
        "Rounds": _distinct(run.facts.get("rounds") for run in runs),
        "Graph": _distinct(_graph_name(run) for run in bound),
        "Partition": _distinct(run.partition for run in peers),
        "Seeds" if len(runs) > 1 else "Seed": _distinct(run.seed for run in runs),
        "Score": _distinct(run.facts.get("score_name") for run in runs),
    }
    return {name: value for name, value in facts.items() if value}


def _graph_name(run: RunRecords) -> str:
    sigma = run.facts["graph"].get("sigma_2")
    return run.graph + ("" if sigma is None else f" (σ₂ = {sigma:.3f})")


def summary_table(runs: Sequence[RunRecords]) -> dict[str, Any]:
    """The summary table for the template: the rows of each section, and which cells are highlighted as the best.

    The centralized baseline is never highlighted, since it sees all the data.
    """
    algorithms = list(dict.fromkeys(run.algorithm for run in runs))
    summaries = {}
    for setting, of_setting in by_setting(runs).items():
        rows = [records.summary_row(run.facts, run.records) for run in of_setting]
        summaries[setting] = [replace(row, graph=setting[0], partition=setting[1]) for row in rows]
    everything: list[SummaryRow] = [row for summary in summaries.values() for row in summary]
    columns = records.columns(records.aggregate(everything))
    own = len(columns) > len(records.COLUMNS)
    groups = []
    for setting, summary in summaries.items():
        members = sorted(records.aggregate(summary), key=lambda row: algorithms.index(row.algorithm))
        best = _best([row for row in members if row.algorithm != "centralized"])
        lines = [
            [(text, (id(row), column) in best) for column, text in enumerate(records.cells(row, own))]
            for row in members
        ]
        lines += [[(text, False) for text in line] for line in records.references(members, own)]
        # The title says what graph and partition (columns 1 and 2) are.
        groups.append((" · ".join(setting), [line[:1] + line[3:] for line in lines]))
    several_seeds = any(row.seeds > 1 for row in records.aggregate(everything))
    notes = ["± is the standard deviation over seeds."] if several_seeds else []
    if any(best for _, lines in groups for line in lines for _, best in line):
        notes.append("Highlighted: the best that does not pool the data.")
    notes.append("Scores are those of the last evaluated round.")
    return {
        "columns": columns[:1] + columns[3:],
        "groups": groups,
        "pivots": [_pivot(everything, metric) for metric in records.shown(everything)] if len(groups) > 1 else [],
        "note": " ".join(notes),
        "warnings": records.nothing_learnt(everything),
    }


def _pivot(rows: Sequence[SummaryRow], metric: str) -> dict[str, Any]:
    """The table of one score by algorithm and setting for the template, with the best of each column highlighted."""
    pivot = records.pivot(rows, metric)
    lines = {algorithm: pivot.cells(algorithm) for algorithm in pivot.lines}
    lower_is_better = any(row.lower_is_better for row in rows)
    best: set[tuple[str, int]] = set()
    for column in range(len(pivot.settings)):
        spreads = {name: of_all[column] for name, of_all in pivot.lines.items() if name != "centralized"}
        means = {name: round(s.mean, 3) for name, s in spreads.items() if s is not None and s.mean is not None}
        best |= {(name, column) for name in _winners(means, lower_is_better)}
    return {
        "title": records.SHOWN[metric].capitalize(),
        "graphs": pivot.graphs,
        "partitions": [partition for _, partition in pivot.settings],
        "lines": [(name, [(text, (name, k) in best) for k, text in enumerate(of)]) for name, of in lines.items()],
    }


def _best(rows: Iterable[Aggregate]) -> set[tuple[int, int]]:
    """(id of the row, column) of the best scores; scores that are equal to three decimals, as shown, tie."""
    rows = list(rows)
    lower_is_better = any(row.lower_is_better for row in rows)
    best: set[tuple[int, int]] = set()
    for metric, column in (("mean_score", 4), ("worst_score", 5), ("averaged_score", 7)):
        means = {id(row): round(mean, 3) for row in rows if (mean := getattr(row, metric).mean) is not None}
        best |= {(row, column) for row in _winners(means, lower_is_better)}
    return best


def _winners(means: Mapping[Key, float], lower_is_better: bool) -> list[Key]:
    """The keys with the best mean; none if there are fewer than two to compare."""
    if len(means) < 2:
        return []
    best = (min if lower_is_better else max)(means.values())
    return [name for name, mean in means.items() if mean == best]


def environments(runs: Sequence[RunRecords]) -> dict[str, str]:
    """The environments of the runs as one table; a value that differs between runs is listed in every form."""
    keys = dict.fromkeys(key for run in runs for key in run.environment)
    table = {key: _distinct(run.environment.get(key) for run in runs) for key in keys if key != "started"}
    started = sorted(str(run.environment["started"]) for run in runs if run.environment.get("started"))
    if started:
        table["started"] = started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"
    return table
