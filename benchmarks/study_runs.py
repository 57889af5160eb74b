"""What is left of a study, and what have its runs said? What the long studies share: they go on wherever they stopped.

A study is a list of cells, the most useful first. A cell is a configuration whose learning rate, and sometimes another
field, is still to be found. Its runs are, in this order:

1. the search: `decaf_lora.tune.halving` names the values to try, one after another, with seed 0; every trial trains to
   its end on four fifths of each agent's examples and is scored on the rest, never on the test set;
2. the two best values with seed 1 as well, since the best rate of one seed is often the last before training fails;
3. the better of these two in the mean, on all training examples, with every seed, scored on the test set.

Every finished run is one line of the record file, written at once: a kill loses the run under way and nothing else.
Which run is next follows from the lines alone. A line is found by what the run was, so a changed plan leaves lines that
nobody reads, and never a wrong table.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decaf_lora.config import RunConfig
from decaf_lora.errors import TrainingError, UserError
from decaf_lora.tune.halving import LOST, Merit, Plan, Point, Standing, standing

RATE, EPSILON = "training.learning_rate", "training.eps"
SEEDS = (0, 1, 2)
CHOOSERS, EXTENSIONS = (0, 1), 4
SHARE = 0.2
"""Of every agent's training examples, held out by the search."""
TYPICAL = 1.5
"""Trials of a search beyond the first values, until cells that are finished say better."""


@dataclass(frozen=True)
class Cell:
    """A place in a study's tables.

    Attributes:
        name: where it stands, such as ("banking77", "dirichlet", "decaf", "ring").
        base: which of the study's base configurations it changes.
        values: dotted field -> value that differs from the base.
        axes: dotted field -> the first values of the search, ascending.
        seeds: of the runs on the test set.
        own: whether the search scores an agent on the examples that it has given itself, as personal models ask for.
        choosers: seeds of the search: all values with the first, the two best with the others.
        extensions: values that the search may add beyond the first ones of a field.
        most: dotted field -> the largest value that the search may add.
    """

    name: tuple[str, ...]
    base: str
    values: Mapping[str, Any]
    axes: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...] = SEEDS
    own: bool = False
    choosers: tuple[int, ...] = CHOOSERS
    extensions: int = EXTENSIONS
    most: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run of a cell."""

    cell: Cell
    point: Point
    """Dotted field -> the value that is tried, or was chosen."""
    seed: int
    held_out: bool
    """Whether it is scored on held-out training examples."""

    @property
    def key(self) -> str:
        """What the run was, for the records; cells of equal settings share runs."""
        cell = self.cell
        values = {**cell.values, **self.point}
        return json.dumps([cell.base, values, self.seed, self.held_out, self.held_out and cell.own], sort_keys=True)


Row = dict[str, Any]
NOT_YET = "not run yet"


class Records:
    """The finished runs in a file.

    Args:
        path: of the file, JSON lines. A torn last line, which a kill may leave, is not read, and goes with the next
            line that is written: who only reads leaves the file to the process that writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        *lines, torn = text.split("\n")
        self._whole = "".join(f"{line}\n" for line in lines) if torn else None
        self.rows: dict[str, Row] = {row["key"]: row for row in map(json.loads, lines)}

    def add(self, row: Row) -> None:
        """Writes a line, and waits until the disk has it."""
        if self._whole is not None:
            self.path.write_text(self._whole, encoding="utf-8")
            self._whole = None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["key"]] = row

    def of(self, job: Job) -> Row | None:
        """The row of a run; None if it is still to be made."""
        return self.rows.get(job.key)

    def seconds(self, base: str, assumed: float) -> float:
        """Mean processor seconds of the runs of a base configuration."""
        known = [row["cpu_seconds"] for row in self.rows.values() if row["base"] == base]
        return statistics.fmean(known) if known else assumed


def searched(cell: Cell, records: Records) -> Standing:
    """Where the search of a cell stands with the first seed."""
    plan = Plan(cell.axes, (1,), extensions=cell.extensions)
    scores: dict[tuple[int, int], Merit] = {}
    while True:
        now = standing(plan, scores, lambda point: all(point.get(name, 0) <= most for name, most in cell.most.items()))
        found = {
            pair: _merit([row])
            for pair in now.wanted
            if (row := records.of(Job(cell, now.points[pair[0]], cell.choosers[0], True))) is not None
        }
        if not found:
            return now
        scores |= found


def following(cell: Cell, records: Records) -> list[Job]:
    """The next runs of a cell, which do not wait for one another; [] at its end, or if all its trials diverged."""
    now = searched(cell, records)
    if now.wanted:
        return [Job(cell, now.points[place], cell.choosers[0], True) for place, _ in now.wanted]
    if now.best is None:
        return []
    second = [Job(cell, point, seed, True) for seed in cell.choosers[1:] for point in _finalists(cell, now, records)]
    missing = [job for job in second if records.of(job) is None]
    return missing or [job for job in finals(cell, records) if records.of(job) is None]


def chosen(cell: Cell, records: Records) -> Point | None:
    """The values that the search of a cell has found; None before its end, and if every finalist has diverged."""
    now = searched(cell, records)
    if now.wanted or now.best is None:
        return None
    merits: list[tuple[Merit, Point]] = []
    for point in _finalists(cell, now, records):
        rows = [records.of(Job(cell, point, seed, True)) for seed in cell.choosers]
        if any(row is None for row in rows):
            return None
        merits.append((_merit([row for row in rows if row is not None]), point))
    best, point = max(merits, key=lambda pair: pair[0])
    return None if best == LOST else point


def finals(cell: Cell, records: Records) -> list[Job]:
    """The runs on the test set, one a seed; [] before the end of the search."""
    point = chosen(cell, records)
    return [] if point is None else [Job(cell, point, seed, False) for seed in cell.seeds]


def results(cell: Cell, records: Records) -> list[Row]:
    """The rows of a finished cell, one a seed; [] if runs are missing."""
    rows = [records.of(job) for job in finals(cell, records)]
    return [row for row in rows if row is not None] if rows and all(rows) else []


def runs_left(cell: Cell, records: Records) -> float:
    """About how many runs a cell still needs."""
    if not following(cell, records):
        return 0
    now = searched(cell, records)
    if not now.wanted:
        second = len(_finalists(cell, now, records)) * (len(cell.choosers) - 1)
        done = sum(
            records.of(Job(cell, point, seed, True)) is not None
            for point in _finalists(cell, now, records)
            for seed in cell.choosers[1:]
        )
        return second - done + sum(records.of(job) is None for job in finals(cell, records) or _assumed(cell))
    tried = sum(records.of(Job(cell, point, cell.choosers[0], True)) is not None for point in now.points)
    expected = math.prod(map(len, cell.axes.values())) + min(TYPICAL, cell.extensions)
    return max(1, expected - tried) + 2 * (len(cell.choosers) - 1) + len(cell.seeds)


def _assumed(cell: Cell) -> list[Job]:
    """Runs on the test set at values that are not known yet."""
    return [Job(cell, {}, seed, False) for seed in cell.seeds]


def _finalists(cell: Cell, now: Standing, records: Records) -> list[Point]:
    """The two best values with the first seed; without those that have diverged."""
    ranked = [
        (_merit([row]), point)
        for point in now.points
        if (row := records.of(Job(cell, point, cell.choosers[0], True))) is not None
    ]
    ranked.sort(key=lambda pair: pair[0], reverse=True)
    return [point for merit, point in ranked[:2] if merit != LOST]


def _merit(rows: Sequence[Row]) -> Merit:
    """By what values are compared, as `decaf_lora.tune` does: the mean score and, of equal ones, the lower loss."""
    if any(row["score"] is None for row in rows):
        return LOST
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    return statistics.fmean(row["score"] for row in rows), -statistics.fmean(losses) if losses else -math.inf


def configured(job: Job, base: RunConfig) -> RunConfig:
    """The configuration of a run."""
    from decaf_lora.tune.axes import with_values

    values: dict[str, Any] = {**job.cell.values, **job.point, "seed": job.seed}
    if job.held_out:
        values |= {"validation_share": SHARE, "test": "both" if job.cell.own else "all"}
    rounds = values.get("rounds", base.rounds)
    return with_values(base, {**values, "evaluate_every": rounds, "measure_every": rounds})


def made(job: Job, base: RunConfig) -> Row:
    """Makes a run; returns its row. A run that diverges is a row without a score."""
    from decaf_lora.records.machine import environment
    from decaf_lora.runs.build import build_run

    started, why, records = time.process_time(), None, []
    run = build_run(configured(job, base))
    try:
        for record in run.train():
            records.append(record)
    except TrainingError as error:
        why = str(error)
    finally:
        run.close()
    device = run.trainer.device
    last = records[-1]
    scores, own = (None if why else last.scores), (None if why else last.own_scores)
    score = own if job.held_out and job.cell.own else scores
    losses = [loss for loss in last.losses or () if loss is not None]
    return {
        "cell": "/".join(job.cell.name),
        "base": job.cell.base,
        "values": {**job.cell.values, **job.point},
        "seed": job.seed,
        "held_out": job.held_out,
        "score": _mean(score),
        "worst": None if _mean(scores) is None else min(scores or ()),
        "own": _mean(own),
        "averaged": None if why else last.averaged_score,
        "loss": None if why else _mean(losses),
        "bytes": sum(record.bytes_sent for record in records),
        "cpu_seconds": round(time.process_time() - started, 2),
        **({} if device.type == "cpu" else {"device": environment(str(device))["device"]}),
        **({"diverged": why} if why else {}),
        "key": job.key,
    }


def _mean(values: Sequence[float | None] | None) -> float | None:
    """The mean; None without values, or if one is missing or not finite."""
    if not values or any(value is None or not math.isfinite(value) for value in values):
        return None
    return statistics.fmean(value for value in values if value is not None)


def shown(rows: Sequence[Row] | None, column: str = "score") -> str:
    """Mean and standard deviation over the seeds, without the zero before the point."""
    if rows is None:
        return NOT_YET
    values = [row[column] for row in rows]
    if any(value is None for value in values):
        return f"{sum(value is None for value in values)} of {len(values)} diverged"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}".replace("0.", ".")


def row_name(method: str, place: str) -> str:
    """What a table calls a method on a graph, with a server, or alone."""
    return f"{method}, {place}" if place in ("ring", "exact") else method


@dataclass(frozen=True)
class Study:
    """What a study is to `main`.

    Attributes:
        text: the script's own words, for --help.
        records: the file of its records, beside the script.
        cells: all cells, the most useful first.
        bases: name of a base configuration -> (folder of the data sets -> the configuration).
        assumed: name of a base configuration -> processor seconds of a run, before any is recorded.
        tables: records -> the tables, as Markdown.
        page: the page that shows the tables, between the lines `<!-- NAME -->` and `<!-- /NAME -->`.
        mark: NAME.
    """

    text: str
    records: Path
    cells: Sequence[Cell]
    bases: Mapping[str, Callable[[Path], RunConfig]]
    assumed: Mapping[str, float]
    tables: Callable[[Records], str]
    page: Path | None = None
    mark: str = ""
    made: Callable[[Job, RunConfig], Row] = field(default=made)


def status(study: Study, records: Records, cells: Iterable[Cell]) -> list[str]:
    """What is left, as lines: each group of cells with its runs and processor hours, and the sum."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for cell in cells:
        group = groups.setdefault(cell.name[:2], [0, 0, 0, 0])
        left = runs_left(cell, records)
        hours = left * records.seconds(cell.base, study.assumed[cell.base]) / 3600
        for place, more in enumerate((1, left == 0, left, hours)):
            group[place] += more
    lines = [
        f"{' '.join(name)}: {done:.0f} of {count:.0f} cells done, about {left:.0f} runs left, {hours:.1f} hours"
        for name, (count, done, left, hours) in groups.items()
    ]
    spent = sum(row["cpu_seconds"] for row in records.rows.values()) / 3600
    hours = sum(group[3] for group in groups.values())
    return [*lines, f"in all: {spent:.1f} processor hours spent, about {hours:.1f} left"]


def written(page: str, mark: str, tables: str) -> str:
    """The text of a page with the tables in their place."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise SystemExit(f"The page needs the lines {begin} and {end} once each; put them where the tables belong.")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{tables.strip()}\n{end}{rest.partition(end)[2]}"


def main(study: Study, arguments: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, or says what is left, or shows the tables."""
    parser = argparse.ArgumentParser(description=study.text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets; needed to run")
    parser.add_argument("--out", type=Path, default=study.records, help="file of finished runs (JSON lines)")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there")
    parser.add_argument("--write", action="store_true", help="put the tables into their page")
    parser.add_argument("--status", action="store_true", help="print what is left, with an estimate of hours")
    parser.add_argument("--only", default="", help="cells whose name, such as banking77/dirichlet, begins so")
    parser.add_argument("--share", default="1/1", help="2/3: the second third of the cells, one in three")
    parser.add_argument("--hours", type=float, default=math.inf, help="start no further run after so many")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    given = parser.parse_args(arguments)
    part, of = map(int, given.share.split("/"))
    if not 1 <= part <= of:
        parser.error(f"--share: {given.share} is not one of 1/{of} to {of}/{of}.")
    records = Records(given.out)
    cells = [cell for cell in study.cells if "/".join(cell.name).startswith(given.only)][part - 1 :: of]
    if given.status:
        print("\n".join(status(study, records, cells)))
    if given.table:
        print(study.tables(records))
    if given.write:
        if study.page is None:
            parser.error("--write: this study has no page.")
        page = study.page.read_text(encoding="utf-8")
        study.page.write_text(written(page, study.mark, study.tables(records)), encoding="utf-8")
    if not (given.status or given.table or given.write):
        if given.data is None:
            parser.error("--data: give the folder of the data sets, or --table or --status.")
        run(study, records, cells, given.data.resolve(), given.hours, given.jobs)


def run(
    study: Study, records: Records, cells: Sequence[Cell], data: Path, hours: float = math.inf, jobs: int = 1
) -> None:
    """Makes the runs of the cells, the first cells first; each run in one thread."""
    started, left = time.monotonic(), list(cells)

    def wanted() -> Iterator[Job]:
        """Runs to begin with now, those that are under way included."""
        for cell in list(left):
            if time.monotonic() - started > hours * 3600:
                return
            if not (ready := following(cell, records)):
                left.remove(cell)  # it is finished
            yield from ready

    def finished(job: Job, answer: Row | str) -> None:
        if isinstance(answer, str):
            if job.cell in left:  # else another of its runs has said it
                print(f"{'/'.join(job.cell.name)}: left out, {answer}", flush=True)
                left.remove(job.cell)
            return
        records.add(answer)
        score = "diverged" if answer["score"] is None else f"{answer['score']:.3f}"
        point = " ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in job.point.items())
        what = f"{answer['cell']}  {'search' if job.held_out else 'test'}  {point}  seed {job.seed}"
        print(f"{what}: {score}  {answer['cpu_seconds']:.0f} s", flush=True)

    if jobs == 1:
        bases: dict[str, RunConfig] = {}
        while (job := next(wanted(), None)) is not None:
            finished(job, answered(study, bases, job, data))
        return
    name = Path(sys.modules["__main__"].__file__ or "").stem
    running: dict[Future[Row | str], Job] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        while True:
            busy = {job.key for job in running.values()}
            new = (job for job in wanted() if job.key not in busy)
            for job in itertools.islice(new, jobs - len(running)):
                busy.add(job.key)
                running[pool.submit(in_worker, name, job, data)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finished(running.pop(future), future.result())


def answered(study: Study, bases: dict[str, RunConfig], job: Job, data: Path) -> Row | str:
    """The row of a run; or why its cell is left out. `bases` keeps what a process has made already."""
    import torch

    torch.set_num_threads(1)
    if job.cell.base not in bases:
        bases[job.cell.base] = study.bases[job.cell.base](data)
    try:
        return study.made(job, bases[job.cell.base])
    except UserError as error:
        return str(error)


_BASES: dict[str, RunConfig] = {}
"""Of a process of the pool, which makes runs of one study alone."""


def in_worker(script: str, job: Job, data: Path) -> Row | str:
    """`answered` in a process of the pool; a study cannot be sent there, so it is taken from its script."""
    return answered(importlib.import_module(script).STUDY, _BASES, job, data)
