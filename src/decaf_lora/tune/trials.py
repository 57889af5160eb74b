"""What is known of the trials? Their scores at the rungs, read from the folders of their runs; tables and files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.table import Table

from decaf_lora.config import RunConfig
from decaf_lora.records import mean_score, read_facts, replace_text, whole_rounds, write_json
from decaf_lora.runs import checkpoint
from decaf_lora.tune.axes import short, shown
from decaf_lora.tune.halving import LOST, Merit, Plan, Point, Standing


@dataclass(frozen=True)
class Trial:
    """A trial's run with one seed, to be trained up to a rung: a piece of work for a process.

    Attributes:
        name: of its folder.
        config: the whole run.
        until: the round after which it stops.
    """

    name: str
    config: RunConfig
    until: int


@dataclass(frozen=True)
class Outcome:
    """How a run stands at a rung.

    Attributes:
        score: mean over the agents, as the task counts it; None: it has diverged.
        loss: of the round's training, mean over the agents; None: unknown, as of a round without training.
        diverged: why it has no score.
    """

    score: float | None
    loss: float | None = None
    diverged: str | None = None


def outcome(directory: Path, round_: int) -> Outcome | None:
    """How the run in a folder stands after a round; None if it has not come so far."""
    if not (directory / "run.json").exists():
        return None
    record = next((r for r in whole_rounds(directory / "records.jsonl")[0] if r.round == round_), None)
    if record is not None:
        # A run that was killed between the record and its checkpoint has not come to its rung.
        if all(checkpoint.moment_of(path)[0] < round_ for path in checkpoint.all_of(directory / "checkpoints")):
            return None
        score, losses = mean_score(record), [loss for loss in record.losses or () if loss is not None]
        why = None if score is not None else f"its score after round {round_} is not finite"
        return Outcome(score, fmean(losses) if losses else None, why)
    why = read_facts(directory).get("diverged")
    return None if why is None else Outcome(None, diverged=str(why))


@dataclass(frozen=True)
class Row:
    """A trial, and how far it has come.

    Attributes:
        trial: its number, from 1.
        values: field -> value.
        state: best, trained to the end, stopped, diverged, or under way.
        rounds: how many it was trained.
        score: at its last rung, mean over agents and seeds; None: it has diverged, or has no score yet.
        std: standard deviation of the score over seeds; None for one seed.
        extends: whether it was added beyond the first values.
        diverged: why it has no score.
        scores: round of each rung -> seed -> mean score over the agents, None where it has diverged.
    """

    trial: int
    values: Point
    state: str
    rounds: int
    score: float | None
    std: float | None
    extends: bool
    diverged: str | None
    scores: dict[int, dict[int, float | None]]


Outcomes = dict[tuple[int, int], dict[int, Outcome]]
"""(number of a trial, number of a rung) -> seed -> outcome."""


def merit(of_seeds: Sequence[Outcome], lower_is_better: bool) -> Merit:
    """By what trials are compared: the mean score over the seeds and, of equal ones, the lower training loss."""
    scores = [one.score for one in of_seeds if one.score is not None]
    if len(scores) < len(of_seeds):
        return LOST
    losses = [one.loss for one in of_seeds if one.loss is not None]
    mean = fmean(scores)
    return -mean if lower_is_better else mean, -fmean(losses) if losses else -math.inf


def rows(plan: Plan, standing: Standing, outcomes: Outcomes, first: int) -> list[Row]:
    """All trials in order. `first` is the number of trials that the axes make by themselves."""
    found = []
    for trial, values in enumerate(standing.points):
        known = [k for k in range(len(plan.rungs)) if (trial, k) in outcomes]
        last = outcomes[trial, known[-1]] if known else {}
        scores = [one.score for one in last.values() if one.score is not None]
        why = next((one.diverged for one in last.values() if one.diverged), None)
        if trial == standing.best:
            state = "best"
        elif why is not None:
            state = "diverged"
        elif known and known[-1] == len(plan.rungs) - 1:
            state = "trained to the end"
        else:
            state = "under way" if any(trial == wanted for wanted, _ in standing.wanted) or not known else "stopped"
        found.append(
            Row(
                trial + 1,
                values,
                state,
                plan.rungs[known[-1]] if known else 0,
                fmean(scores) if scores and why is None else None,
                stdev(scores) if len(scores) > 1 and why is None else None,
                trial >= first,
                why,
                {plan.rungs[k]: {s: one.score for s, one in outcomes[trial, k].items()} for k in known},
            )
        )
    return found


def write_trials(out: Path, facts: dict[str, Any], trials: Sequence[Row]) -> None:
    """Writes trials.json and trials.csv: every trial, rung and seed."""
    write_json(out / "trials.json", {**facts, "trials": list(trials)})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = list(trials[0].values) if trials else []
    writer.writerow(["trial", *fields, "state", "extends", "rounds", "seed", "score"])
    for row in trials:
        for rounds, of_seeds in row.scores.items():
            for seed, score in of_seeds.items():
                told = "" if score is None else repr(score)
                writer.writerow([row.trial, *row.values.values(), row.state, row.extends, rounds, seed, told])
    replace_text(out / "trials.csv", text.getvalue())


def table(trials: Sequence[Row], score_name: str, rounds: int) -> Table:
    """The trials for the terminal, the best one first."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    fields = list(trials[0].values) if trials else []
    for field in fields:
        result.add_column(short(field))
    result.add_column("rounds", justify="right")
    result.add_column(score_name, justify="right")
    result.add_column("")
    for row in sorted(trials, key=lambda row: (row.state != "best", -row.rounds, row.trial)):
        score = "–" if row.score is None else f"{row.score:.3f}" + (f" ± {row.std:.3f}" if row.std is not None else "")
        note = row.state + (", added beyond the first values" if row.extends else "")
        values = [shown(value).replace("[", r"\[") for value in row.values.values()]
        style = "bold" if row.state == "best" else None
        result.add_row(*values, f"{row.rounds}/{rounds}", score, note, style=style)
    return result
