"""How does a run become one row, and runs that differ only by seed one?

One row a run (`SummaryRow`), one row for the runs that differ only by seed (`Aggregate`). The spread over agents is
the population's (they are all there are), that over seeds the sample's (n - 1).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import pydantic

from decaf_lora.errors import UserError
from decaf_lora.records.record import Record, first_complaint, read_facts, read_records


@dataclass(frozen=True)
class SummaryRow:
    """One run in one line: the scores are those of the last evaluated round, None of a run that diverged."""

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
    """Why its training could not go on to the last round."""
    lower_is_better: bool = False
    start_score: float | None = None
    """Mean over agents before training."""
    majority_score: float | None = None
    """Of always giving the most frequent class, where there are classes."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds: no `std` of one seed, nothing if a run lacks the value."""

    mean: float | None
    std: float | None = None
    missing: str = "n/a"
    """What people read in place of a mean that is not known."""


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


METRICS = ("mean_score", "worst_score", "std_score", "averaged_score", "bytes_sent", "seconds")
REFERENCES = {"start_score": "start", "majority_score": "majority class"}
"""Scores of a run's task that took no training -> what people read."""
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
    """The row of the run in `run_dir`, from its run.json and records.jsonl."""
    return summary_row(read_facts(run_dir), read_records(run_dir / "records.jsonl"))


def summary_row(facts: Mapping[str, Any], records: Sequence[Record]) -> SummaryRow:
    """The row of a run. One agent without a finite score leaves the mean unknown."""
    diverged = facts.get("diverged")
    last = None if diverged else next((record for record in reversed(records) if record.scores), None)
    scores = (last.scores if last else None) or []
    mean = None if last is None else mean_score(last)
    finite = [] if mean is None else [score for score in scores if score is not None]
    start = next((mean_score(record) for record in records if record.round == 0), None)
    lower_is_better = bool(facts.get("lower_is_better", False))
    return SummaryRow(
        algorithm=facts["algorithm"],
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
    )


def mean_score(record: Record) -> float | None:
    """Mean over agents of an evaluated round: None if a score is missing or not finite, and if it was not evaluated."""
    finite = [score for score in record.scores or () if score is not None and math.isfinite(score)]
    return fmean(finite) if len(finite) == len(record.scores or ()) > 0 else None


def aggregate(rows: Iterable[SummaryRow]) -> list[Aggregate]:
    """Mean and standard deviation over the seeds of each (algorithm, graph, partition).

    Those under one graph and partition stand together, the algorithms in the order of their first appearance.
    A seed counts once: of two rows for it the later one.
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
    spreads |= {metric: _spread([getattr(run, metric) for run in runs], "n/a") for metric in REFERENCES}
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
