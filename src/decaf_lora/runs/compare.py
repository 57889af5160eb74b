"""How do several runs become one comparison? Each run has a folder; several run at a time; a report covers all.

A comparison's folder holds config.yaml, the folder of each run, summary.json, tables and report.html.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from decaf_lora import config as configs
from decaf_lora.config import CompareConfig, RunConfig
from decaf_lora.errors import TrainingError, UserError, unknown
from decaf_lora.records import (
    BASELINES,
    SummaryRow,
    read_facts,
    read_records,
    read_summary,
    replace_text,
    with_baselines,
    write_json,
)
from decaf_lora.runs import settings
from decaf_lora.runs.events import Interrupted, Subscriber, Watch, nobody
from decaf_lora.runs.folder import Folder, check_folder, disk, mark_diverged, run
from decaf_lora.runs.several import several
from decaf_lora.runs.signals import stopping


def default_jobs(device: str) -> int:
    """How many runs go on at a time by default: one on a GPU, which one model may fill; otherwise one for each core."""
    import torch

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return 1 if on_gpu else os.cpu_count() or 1


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: the name of its folder, its configuration, and the graphs whose rows it fills."""

    name: str
    config: RunConfig
    graphs: tuple[str, ...]


def cells(config: CompareConfig) -> list[Cell]:
    """The runs of a comparison: graphs x partitions x seeds x algorithms.

    An algorithm that does not use the graph (local, centralized, fedavg) runs once for all graphs. A value that is
    given twice runs once, with a warning.

    Raises:
        UserError: two runs would share a folder.
    """
    from decaf_lora import algorithms

    out: list[Cell] = []
    graphs = _once("graphs", config.graphs or (config.graph,))
    partitions = _once("partitions", config.partitions or (config.partition,))
    keys = _once("algorithms", map(algorithms.spelled, config.algorithms))
    keys += tuple(name for kind in config.baseline if (name := BASELINES[kind]) not in keys)
    algorithms.check_together(keys)
    for graph, partition, seed, key in itertools.product(graphs, partitions, _once("seeds", config.seeds), keys):
        options = algorithms.accepted(key, config.algorithm.options())
        shared = len(graphs) > 1 and algorithms.make(key, **options).topology != "graph"
        if shared and graph != graphs[0]:
            continue
        values = {k: getattr(config, k) for k in RunConfig.model_fields}
        learning_rate = config.learning_rates.get(key, config.training.learning_rate)
        if config.baseline_learning_rate and key in (BASELINES[kind] for kind in config.baseline):
            learning_rate = config.baseline_learning_rate
        values |= {
            "graph": graph,
            "partition": partition,
            "seed": seed,
            "algorithm": {"name": key, **options},
            "training": config.training.model_copy(update={"learning_rate": learning_rate}),
            "baseline": (),  # the comparison has them as runs of their own
            "baseline_learning_rate": None,
            "setting": None,
        }
        parts = [key, partition, f"seed{seed}"] if shared else [key, graph, partition, f"seed{seed}"]
        folder = "-".join(parts).replace("/", "_").replace(":", "-")
        out.append(Cell(folder, RunConfig.model_validate(values), graphs if shared else (graph,)))
    _check_rates(config, keys)
    for name, fields in settings.overrides(config).items():
        out += _cells_of(config, name, fields, graphs, partitions)
    _refuse_shared_folders(out)
    return sorted(out, key=lambda cell: (graphs.index(cell.graphs[0]), partitions.index(cell.config.partition)))


def _cells_of(
    config: CompareConfig, name: str, fields: dict[str, Any], graphs: tuple[str, ...], partitions: tuple[str, ...]
) -> list[Cell]:
    """The runs of a named setting. One with a graph that no other row has runs once for all graphs, and says it."""
    own = fields.get("graph")
    named = name if own is None or own in graphs else f"{name} ({own})"
    found = []
    for graph, partition, seed in itertools.product(
        graphs if own is None else (own,), partitions, _once("seeds", config.seeds)
    ):
        run = settings.applied(config, named, fields, graph=graph, partition=partition, seed=seed)
        parts = [name, partition, f"seed{seed}"] if own is not None else [name, graph, partition, f"seed{seed}"]
        folder = "-".join(parts).replace("/", "_").replace(":", "-")
        found.append(Cell(folder, run, (graph,) if graph in graphs else graphs))
    return found


def _check_rates(config: CompareConfig, keys: Iterable[str]) -> None:
    """Raises UserError for a learning rate of an algorithm that does not exist: it would have no effect."""
    from decaf_lora import algorithms

    known = {*algorithms.KINDS, *keys}
    for name in config.learning_rates:
        if name not in known:
            raise unknown("learning_rates", name, known)


def _once(field: str, given: Iterable[Any]) -> tuple[Any, ...]:
    """The given values without repetitions, with a warning that names `field` and the repeated ones."""
    values = tuple(given)
    once = tuple(dict.fromkeys(values))
    if len(once) < len(values):
        twice = ", ".join(str(v) for v in once if values.count(v) > 1)
        warnings.warn(f"{field}: {twice} is given more than once; it runs once.", stacklevel=3)
    return once


def _refuse_shared_folders(todo: list[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in todo:
        if len(cell.name.encode()) > 255:
            raise UserError(f"graphs: the name of a run's folder would be too long ({cell.name}); use shorter paths.")
        other = seen.setdefault(cell.name.casefold(), cell)  # some file systems do not tell cases apart
        if other is not cell:
            ours, theirs = configs.flat(cell.config), configs.flat(other.config)
            field = next(k for k in ("setting", "algorithm.name", "graph", "partition", "seed") if ours[k] != theirs[k])
            raise UserError(
                f"{field}: {theirs[field]!r} and {ours[field]!r} would share the folder {cell.name}; give them names "
                "that differ in more than / : _ - and case."
            )


def compare(
    config: CompareConfig,
    out: Path,
    *,
    resume: bool = False,
    take_over: bool = False,
    unique: bool = False,
    jobs: int = 1,
    watch: Watch = nobody,
) -> tuple[list[SummaryRow], Path]:
    """Runs all runs of a comparison, and writes summary.json, tables and the report over all.

    A run that stands for several graphs has a row under each. A run whose training diverges has a row that says so,
    without scores. The other runs go on then, and also when the process of a run is killed.

    Args:
        config: what to compare.
        out: the folder, new or empty; with `resume` one that holds this comparison.
        resume: go on with the runs that have not finished.
        take_over: the former owner of the folder, on another machine, is gone.
        unique: if `out` exists, take the first of `out`-2, `out`-3, ... that does not.
        jobs: number of runs at a time, each in its own process; 1: one after another in this process.
        watch: gives the subscriber of each run, by the run's name.

    Returns:
        The rows of the summary, and the folder that was written.

    Raises:
        UserError: a mistake in any run, found before anything is written; or a run was lost.
        Interrupted: after Ctrl-C or another signal that asks to stop.
    """
    todo = cells(config)
    if not unique:
        check_folder(config, out, resume)
    finished = {cell.name: row for cell in todo if resume and (row := _finished(cell, out)) is not None}
    left = [cell for cell in todo if cell.name not in finished]
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(several(_run_cell, jobs if len(left) > 1 else 1, watch))
        stack.enter_context(stopping(runner.stop))
        runner.check(left)
        if runner.stopped:
            raise Interrupted(out, 0)
        folder = Folder(out, config=config, resume=resume, take_over=take_over, unique=unique)
        out = stack.enter_context(folder).path
        with disk(out):
            (out / "summary.json").unlink(missing_ok=True)
            replace_text(out / "config.yaml", configs.dump(config))
        for cell in todo:
            if cell.name in finished:
                _tell_of_finished(watch(cell.name), out / cell.name)
        rows = finished | runner.run(left, out)
        if runner.stopped:
            raise Interrupted(out, 0)
        _refuse_lost(runner.lost, len(todo))
        return _conclude(todo, rows, out), out


def _finished(cell: Cell, out: Path) -> SummaryRow | None:
    """The row of a run that has finished all its rounds, or diverged."""
    directory = out / cell.name
    if not (directory / "summary.json").exists():
        return None
    if configs.load(RunConfig, directory / "config.yaml").rounds < cell.config.rounds:
        return None
    (row, *_) = read_summary(directory / "summary.json")
    return row


def _tell_of_finished(subscriber: Subscriber, directory: Path) -> None:
    subscriber.start(read_facts(directory))
    for record in read_records(directory / "records.jsonl"):
        subscriber.record(record)
    subscriber.close(None)


def _conclude(todo: list[Cell], rows: Mapping[str, SummaryRow], out: Path) -> list[SummaryRow]:
    """Writes summary, tables and report over all runs; returns the rows in their order."""
    from decaf_lora.records import tables
    from decaf_lora.report import write_report

    graphs = dict.fromkeys(graph for cell in todo for graph in cell.graphs)
    ordered = [replace(rows[cell.name], graph=graph) for graph in graphs for cell in todo if graph in cell.graphs]
    ordered = with_baselines(ordered)
    with disk(out):
        write_json(out / "summary.json", [asdict(row) for row in ordered])
        for name, text in tables(ordered).items():
            replace_text(out / name, text)
        write_report(out)
    return ordered


def _refuse_lost(lost: Mapping[str, str], count: int) -> None:
    if lost:
        name, how = next(iter(lost.items()))
        runs = "1 of {} runs was lost," if len(lost) == 1 else f"{len(lost)} of {{}} runs were lost, the first is"
        raise UserError(
            f"compare: {runs.format(count)} {name}: {how}. The others have finished; go on with --resume, perhaps "
            "with fewer --jobs."
        )


def _run_cell(cell: Cell, out: Path, watch: Watch) -> SummaryRow:
    directory = out / cell.name
    try:
        return run(cell.config, directory, resume=(directory / "config.yaml").exists(), watch=watch)[0]
    except Interrupted as stop:
        raise Interrupted(out, stop.round) from None
    except TrainingError as error:  # divergence is a result: the other runs go on
        return mark_diverged(directory, error)
