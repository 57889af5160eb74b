"""How does a run become one row, and runs that differ only by seed one?

A `SummaryRow` is one run, an `Aggregate` all runs that differ only by seed. The standard deviation over agents is that
of a population (there are no other agents); over seeds it is that of a sample (n - 1).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import pydantic

from decaf_lora.errors import UserError
from decaf_lora.records.record import Record, first_complaint, read_facts, read_records


@dataclass(frozen=True)
class SummaryRow:
    """One run in one row. Scores are those of the last evaluated round; None for a run that diverged.

    `algorithm` is the name of the setting, if the run has one.
    """

    algorithm: str
    graph: str
    partition: str
    seed: int
    mean_score: float | None
    worst_score: float | None
    std_score: float | None
    averaged_score: float | None
    bytes_sent: float
    seconds: float
    diverged: str | None = None
    """Why training ended before the last round; None if it did not."""
    lower_is_better: bool = False
    start_score: float | None = None
    """Mean score over agents before training."""
    majority_score: float | None = None
    """Score of always giving the most frequent class; None without classes."""
    score_name: str = "score"
    scores: list[float | None] | None = None
    """Score of each agent's model."""
    alone_scores: list[float | None] | None = None
    """The same of agents that train on their own data alone, with as many steps; None if nobody trained them."""
    pooled_score: float | None = None
    """Score of a model trained on everybody's data; None if nobody trained it."""
    own_score: float | None = None
    """Mean over agents of `Record.own_scores`; None if they were not asked for."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds. One seed has no `std`; there is no mean if a run lacks the value."""

    mean: float | None
    std: float | None = None
    missing: str = "n/a"
    """Text to show in place of a mean that is not known."""


@dataclass(frozen=True)
class Aggregate:
    """The runs that differ only by seed."""

    algorithm: str
    graph: str
    partition: str
    seeds: int
    mean_score: Spread
    worst_score: Spread
    std_score: Spread
    averaged_score: Spread
    bytes_sent: Spread
    seconds: Spread
    lower_is_better: bool = False
    start_score: Spread = Spread(None)
    majority_score: Spread = Spread(None)
    own_score: Spread = Spread(None)


METRICS = ("mean_score", "worst_score", "std_score", "averaged_score", "bytes_sent", "seconds")
"""The columns of numbers of a summary, in the order of the tables."""
OWN = "own_score"
"""The metric that tables show only where it was asked for (`test`)."""
REFERENCES = {"start_score": "start", "majority_score": "majority class"}
"""Scores that need no training, to compare with -> what tables call them."""
BASELINES = {"alone": "local", "pooled": "centralized"}
"""Folder of a baseline inside the folder of its run -> the algorithm that makes it."""
_ROWS = pydantic.TypeAdapter(list[SummaryRow])


def read_summary(path: Path) -> list[SummaryRow]:
    """The rows of a summary.json."""
    try:
        return _ROWS.validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"summary: cannot read {path} ({error.strerror}). Has the run finished?") from error
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: not a summary ({first_complaint(error)}); write it again.") from error


def summarise(run_dir: Path) -> SummaryRow:
    """The row of the run in `run_dir`, from run.json and records.jsonl of the run and of its baselines."""
    folders = [run_dir, *(run_dir / kind for kind in BASELINES)]
    found = [folder for folder in folders if folder == run_dir or (folder / "run.json").exists()]
    rows = [summary_row(read_facts(folder), read_records(folder / "records.jsonl")) for folder in found]
    return with_baselines(rows)[0]


def with_baselines(rows: Sequence[SummaryRow]) -> list[SummaryRow]:
    """The rows, each with the scores of training alone and on pooled data: those of the rows of the same partition and
    seed that did just that."""
    alone = {(row.partition, row.seed): row.scores for row in rows if row.algorithm == BASELINES["alone"]}
    pooled = {(row.partition, row.seed): row.mean_score for row in rows if row.algorithm == BASELINES["pooled"]}
    return [
        replace(
            row, alone_scores=alone.get((row.partition, row.seed)), pooled_score=pooled.get((row.partition, row.seed))
        )
        for row in rows
    ]


def summary_row(facts: Mapping[str, Any], records: Sequence[Record]) -> SummaryRow:
    """The row of the run with these facts and records. An agent without a finite score leaves the mean unknown."""
    diverged = facts.get("diverged")
    last = None if diverged else next((record for record in reversed(records) if record.scores), None)
    scores = (last.scores if last else None) or []
    mean = None if last is None else mean_score(last)
    finite = [] if mean is None else [score for score in scores if score is not None]
    start = next((mean_score(record) for record in records if record.round == 0), None)
    lower_is_better = bool(facts.get("lower_is_better", False))
    return SummaryRow(
        algorithm=row_name(facts),
        graph=facts["graph"]["name"],
        partition=facts["partition"]["name"],
        seed=facts["seed"],
        mean_score=mean,
        worst_score=(max(finite) if lower_is_better else min(finite)) if finite else None,
        std_score=pstdev(finite) if finite else None,
        averaged_score=last.averaged_score if last else None,
        bytes_sent=math.fsum(record.bytes_sent for record in records),
        seconds=math.fsum(second for record in records for second in record.seconds.values()),
        diverged=diverged,
        lower_is_better=lower_is_better,
        start_score=start,
        majority_score=facts.get("majority_score"),
        score_name=str(facts.get("score_name") or "score"),
        scores=list(scores) or None,
        own_score=None if last is None else _mean(last.counted(last.own_scores)),
    )


def row_name(facts: Mapping[str, Any]) -> str:
    """What tables and figures call the run: its setting, if that has a name, else its algorithm."""
    return str(facts.get("setting") or facts["algorithm"])


def mean_score(record: Record) -> float | None:
    """Mean score over honest agents; None if the round was not evaluated, or a score is missing or not finite."""
    return _mean(record.counted(record.scores))


def _mean(scores: Sequence[float | None] | None) -> float | None:
    finite = [score for score in scores or () if score is not None and math.isfinite(score)]
    return fmean(finite) if len(finite) == len(scores or ()) > 0 else None


def aggregate(rows: Iterable[SummaryRow]) -> list[Aggregate]:
    """Mean and standard deviation over the seeds of each (algorithm, graph, partition).

    Rows of one graph and partition stand together, with algorithms in the order of their first appearance. A seed
    counts once: of two rows with one seed, the later.
    """
    runs: dict[tuple[str, str, str], dict[int, SummaryRow]] = {}
    for row in rows:
        runs.setdefault((row.graph, row.partition, row.algorithm), {})[row.seed] = row
    settings = list(dict.fromkeys(key[:2] for key in runs))
    algorithms = list(dict.fromkeys(key[2] for key in runs))
    order = sorted(runs, key=lambda key: (settings.index(key[:2]), algorithms.index(key[2])))
    return [_aggregate(list(runs[key].values())) for key in order]


def _aggregate(runs: Sequence[SummaryRow]) -> Aggregate:
    """The row of runs that differ only by seed."""
    missing = "diverged" if any(run.diverged for run in runs) else "n/a"
    spreads = {metric: _spread([getattr(run, metric) for run in runs], missing) for metric in METRICS}
    spreads |= {metric: _spread([getattr(run, metric) for run in runs], "n/a") for metric in (*REFERENCES, OWN)}
    first = runs[0]
    return Aggregate(
        first.algorithm,
        first.graph,
        first.partition,
        seeds=len(runs),
        **spreads,
        lower_is_better=first.lower_is_better,
    )


def _spread(values: Sequence[float | None], missing: str) -> Spread:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values):
        return Spread(None, missing=missing)
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None)
