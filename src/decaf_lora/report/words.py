"""What does the page say in words and numbers? Its title, what was run, the tables, where it ran."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from decaf_lora import records
from decaf_lora.records import SummaryRow
from decaf_lora.report.reading import RunRecords, by_setting
from decaf_lora.report.style import called


def title(runs: Sequence[RunRecords]) -> str:
    algorithms = dict.fromkeys(run.algorithm for run in runs)
    own = [name for name in algorithms if name not in records.BASELINES.values()]
    subject = called((own or list(algorithms))[0], 60)
    if len(own) > 1 or (not own and len(algorithms) > 1):
        subject = f"{len(algorithms)} algorithms"
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
        "Model": _distinct(_model(run.facts) for run in runs),
        "Data": _distinct(_data(run.facts) for run in runs),
        "Algorithms" if len(runs) > 1 else "Algorithm": _distinct(called(run.algorithm, 60) for run in runs),
        "Agents": _distinct(run.facts.get("agents") for run in peers),
        "Attackers": _distinct(run.facts.get("attackers") for run in peers),
        "Privacy": _distinct(run.facts.get("privacy") for run in peers),
        "Rank": _distinct(run.facts.get("rank") for run in peers if not run.facts.get("ranks")),
        "Ranks": _distinct(", ".join(map(str, ranks)) for run in peers if (ranks := run.facts.get("ranks"))),
        "Rounds": _distinct(run.facts.get("rounds") for run in runs),
        "Local steps of a round": _distinct(_steps(run.facts) for run in peers),
        "Learning rate": _rates(runs),
        "Graph": _distinct(_graph_name(run) for run in bound),
        "Partition": _distinct(run.partition for run in peers),
        "Seeds" if len(runs) > 1 else "Seed": _distinct(run.seed for run in runs),
        "Score": _distinct(run.facts.get("score_name") for run in runs),
        "Chance level": _distinct(
            f"{chance:.3f} (majority class)" for run in runs if (chance := run.facts.get("majority_score")) is not None
        ),
    }
    return {name: value for name, value in facts.items() if value}


def _model(facts: Mapping[str, Any]) -> str | None:
    """The model and its size, `MiniLM (22.7 million parameters)`."""
    name, size = facts.get("model"), facts.get("parameters")
    if name is None:
        return None
    units = ((1e9, " billion"), (1e6, " million"), (1e3, " thousand"), (1, ""))
    scale, unit = next((s, u) for s, u in units if (size or 0) >= s or s == 1)
    return name if not size else f"{name} ({size / scale:.3g}{unit} parameters)"


def _data(facts: Mapping[str, Any]) -> str | None:
    """The data and how many examples there are, `messages.csv (800 to train, 200 to test)`."""
    if facts.get("num_train") is None:
        return facts.get("data")
    sizes = f"{facts['num_train']:,} to train, {facts.get('num_test') or 0:,} to test"
    return f"{facts['data']} ({sizes})" if facts.get("data") else sizes


def _steps(facts: Mapping[str, Any]) -> str | None:
    if facts.get("steps") is None:
        return None
    most = "up to " if facts.get("epochs") else ""
    return f"{most}{facts['steps']}, batch {facts.get('batch_size')}, {facts.get('optimizer')}"


def _rates(runs: Sequence[RunRecords]) -> str:
    """The learning rate, or that of each algorithm where they differ."""
    rates = {called(run.algorithm): run.facts.get("learning_rate") for run in runs}
    known = {name: f"{rate:g}" for name, rate in rates.items() if rate is not None}
    return _distinct(known.values()) if len(set(known.values())) < 2 else ", ".join(map(" ".join, known.items()))


def _graph_name(run: RunRecords) -> str:
    sigma = run.facts["graph"].get("sigma_2")
    return run.graph + ("" if sigma is None else f" (σ₂ = {sigma:.3f})")


def rows_of(runs: Sequence[RunRecords]) -> list[SummaryRow]:
    """A row for each run under each of its settings, with names for people, and the scores of the baselines."""
    found = []
    for (graph, partition), members in by_setting(runs).items():
        rows = [records.summary_row(run.facts, run.records) for run in members]
        rows = records.with_baselines([replace(row, graph=graph, partition=partition) for row in rows])
        found += [replace(row, algorithm=called(row.algorithm, 60)) for row in rows]
    return found


MOST_ANSWERS = 2
"""Sentences about single algorithms on top of the page; with more, only the leaders of the settings have one."""


def verdict(runs: Sequence[RunRecords]) -> list[str]:
    """What came out, in sentences: whether training together has helped, and which algorithm leads."""
    rows = rows_of(runs)
    answers = records.answers(rows)
    if len(answers) > MOST_ANSWERS:
        leaders = {(leader.name, *setting) for setting, leader in records.standings(rows).items()}
        answers = [answer for answer in answers if (answer.algorithm, answer.graph, answer.partition) in leaders]
    ranking = records.verdicts(rows)
    where: dict[str, list[str]] = {}  # a run may stand under several settings
    for answer in answers:
        where.setdefault(answer.sentence(), []).append(f"{answer.graph}, {answer.partition}")
    several = len({(row.graph, row.partition) for row in rows}) > 1
    told = [f"{'; '.join(settings)} – {sentence}" if several else sentence for sentence, settings in where.items()]
    lone = len({row.algorithm for row in rows} - set(records.BASELINES.values())) == 1
    return [*told, *records.nothing_learnt(rows)] if lone else [*ranking, *told, *records.nothing_learnt(rows)]


def summary_table(runs: Sequence[RunRecords]) -> dict[str, Any]:
    """The summary table for the template: the rows of each section, and which cells are highlighted as the best.

    A cell is highlighted if its score is better than all others of its setting by more than the noise of the seeds.
    The centralized baseline is never highlighted, since it sees all the data.
    """
    everything = rows_of(runs)
    algorithms = list(dict.fromkeys(called(run.algorithm, 60) for run in runs))
    columns = records.columns(records.aggregate(everything))
    own = len(columns) > len(records.COLUMNS)
    ranked = {columns.index(title): metric for metric, title in records.RANKED.items() if title in columns}
    best = records.winners(everything)
    groups = []
    for setting in by_setting(runs):
        summary = [row for row in everything if (row.graph, row.partition) == setting]
        members = sorted(records.aggregate(summary), key=lambda row: algorithms.index(row.algorithm))
        lines = [
            [
                (text, (row.algorithm, *setting, ranked.get(column, "")) in best)
                for column, text in enumerate(records.cells(row, own))
            ]
            for row in members
        ]
        lines += [[(text, False) for text in line] for line in records.references(members, own)]
        # The title says what graph and partition (columns 1 and 2) are.
        groups.append((" · ".join(setting), [line[:1] + line[3:] for line in lines]))
    several_seeds = any(row.seeds > 1 for row in records.aggregate(everything))
    notes = ["± is the standard deviation over seeds."] if several_seeds else []
    if best:
        notes.append("Highlighted: better than every other that does not pool the data, by more than noise.")
    elif records.standings(everything):
        notes.append("No score is highlighted: no lead is more than the noise of the seeds.")
    notes.append("Scores are those of the last evaluated round.")
    return {
        "columns": columns[:1] + columns[3:],
        "groups": groups,
        "pivots": [_pivot(everything, metric) for metric in records.shown(everything)] if len(groups) > 1 else [],
        "note": " ".join(notes),
        "differences": _differences(everything),
    }


def _differences(rows: Sequence[SummaryRow]) -> list[list[str]]:
    """A header and the differences to the leaders; [] if there is nothing to compare."""
    lines = records.differences(rows)
    several = len({tuple(line[1:3]) for line in lines}) > 1
    shown = [list(records.DIFFERENCES), *lines] if lines else []
    return shown if several else [[line[0], *line[3:]] for line in shown]


def _pivot(rows: Sequence[SummaryRow], metric: str) -> dict[str, Any]:
    """The table of one score by algorithm and setting for the template, with the winner of each column highlighted."""
    pivot = records.pivot(rows, metric)
    best = records.winners(rows)
    return {
        "title": records.SHOWN[metric].capitalize(),
        "graphs": pivot.graphs,
        "partitions": [partition for _, partition in pivot.settings],
        "labels": [" · ".join(setting) for setting in pivot.settings],
        "lines": [
            (
                name,
                [
                    (text, (name, *setting, metric) in best)
                    for text, setting in zip(pivot.cells(name), pivot.settings, strict=True)
                ],
            )
            for name in pivot.lines
        ],
    }


def environments(runs: Sequence[RunRecords]) -> dict[str, str]:
    """The environments of the runs as one table; a value that differs between runs is listed in every form."""
    keys = dict.fromkeys(key for run in runs for key in run.environment)
    table = {key: _distinct(run.environment.get(key) for run in runs) for key in keys if key != "started"}
    started = sorted(str(run.environment["started"]) for run in runs if run.environment.get("started"))
    if started:
        table["started"] = started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"
    return table
