"""Did a run learn anything? Its final score against the start, and against always giving the most frequent class."""

from collections.abc import Iterable

from decaf_lora.records.summary import REFERENCES, Aggregate, SummaryRow, aggregate

TRY = (
    "a higher training.learning_rate (ten times), more rounds or training.steps, a larger lora.r; look at the labels "
    "and at an example as the model sees it"
)


def nothing_learnt(rows: Iterable[SummaryRow]) -> list[str]:
    """Lines about algorithms whose final mean score is no better than a reference, by graph, partition and reason."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in aggregate(rows):
        if reason := _reason(row):
            groups.setdefault((row.graph, row.partition, reason), []).append(row.algorithm)
    return [
        f"nothing useful was learnt by {', '.join(names)} ({graph}, {partition}): the final score is not better than "
        f"{reason}. Try {TRY}."
        for (graph, partition, reason), names in groups.items()
    ]


def _reason(row: Aggregate) -> str:
    """The references that the final score is not better than, in words; "" if it is better than all."""
    final = row.mean_score.mean
    if final is None:
        return ""
    not_beaten = []
    for metric, title in REFERENCES.items():
        reference = getattr(row, metric).mean
        if reference is not None and (final >= reference if row.lower_is_better else final <= reference):
            not_beaten.append(f"{'the ' if metric == 'start_score' else 'always giving the '}{title} ({reference:.3f})")
    return " and ".join(not_beaten)
