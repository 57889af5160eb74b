"""`decaf run`, `compare`, `recipes`, `export`, `report`: runs, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from decaf_lora.cli.options import Output, check_options, configured, parsed, refuse_unused
from decaf_lora.cli.progress import display
from decaf_lora.config import CompareConfig, RunConfig
from decaf_lora.errors import UserError, unix_only
from decaf_lora.extras import need
from decaf_lora.runs.events import Interrupted, Watch, all_of, nobody

Config = TypeVar("Config", bound=RunConfig)


def run_command(args: list[str]) -> int:
    config, output, name = configured(RunConfig, "run", args, Output)
    need("report", "report")  # at the end, when it would be too late to say so
    from decaf_lora.runs.folder import run

    jobs = () if config.training.learning_rate == "auto" else ("jobs",)  # the trials of its search
    refuse_unused(output, *jobs, *(() if output.engine == "torchrun" else ("backend", "wire", "timeout")))
    if output.engine == "torchrun":
        return _run_split(config, output, name)
    refuse_launcher(output.out is not None)
    err = Console(stderr=True, highlight=False)
    where = _where(output, name)
    try:
        with _watching(1 + len(config.baseline), err, output, where["out"]) as watch:
            config, where = _settled(config, output, where, err)
            row, out = run(config, **where, watch=watch)
    except Interrupted as stop:
        return stopped(err, stop, config, "decaf run")
    _results([row], out, output.json)
    return 0


def _where(output: Output, name: str) -> dict[str, Any]:
    """The arguments of `run` and `compare` that say which folder to use, and how."""
    if output.resume and output.out is None:
        raise UserError("resume: name the folder of the run, as in `--resume runs/mine`.")
    out = output.out or Path("runs") / f"{name.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    return {"out": out, "resume": output.resume, "take_over": output.take_over, "unique": output.out is None}


@contextlib.contextmanager
def _watching(total: int, err: Console, output: Output, out: Path) -> Iterator[Watch]:
    """A context in which `total` runs are shown on the terminal, and told to trackers and the live page if asked to."""
    from decaf_lora.runs import trackers
    from decaf_lora.runs.live import serving

    if output.port and not output.live:
        raise UserError("port: it is that of the live page; give --live too.")
    with contextlib.ExitStack() as stack:
        watches = [trackers.watch(output.log, out, resume=output.resume)]
        if output.live:
            watch, address = stack.enter_context(serving(output.port))
            err.print(f"live: {address}", markup=False, soft_wrap=True)
            watches.append(watch)
        watches.append(stack.enter_context(display(total, err)))
        yield all_of(*watches)
    for line in trackers.places(output.log, out):
        err.print(line, markup=False, soft_wrap=True)


def _settled(config: Config, output: Output, where: dict[str, Any], err: Console) -> tuple[Config, dict[str, Any]]:
    """The configuration with a learning rate in place of `auto`, and `where` with what the search has changed."""
    if config.training.learning_rate != "auto":
        return config, where
    from decaf_lora.runs.compare import default_jobs
    from decaf_lora.runs.folder import new_folder
    from decaf_lora.tune.auto import with_learning_rate

    if where["unique"]:
        where |= {"out": new_folder(where["out"]), "unique": False}
    with display(1, err) if err.is_terminal else contextlib.nullcontext(nobody) as watch:
        config, resume = with_learning_rate(
            config,
            where["out"],
            resume=output.resume,
            take_over=output.take_over,
            jobs=output.jobs or default_jobs(config.device),
            watch=watch,
            tell=lambda line: err.print(line, markup=False, soft_wrap=True),
        )
    return config, {**where, "resume": resume}


def _run_split(config: RunConfig, output: Output, name: str) -> int:
    """`decaf run` in one of torchrun's processes. The main process prints."""
    unix_only("engine", "torchrun")
    from decaf_lora.engines import connect
    from decaf_lora.runs.launched import run_split

    err = Console(stderr=True, highlight=False)
    with connect(output.backend, config.device, output.timeout) as processes:
        with processes.together():
            if output.out is None and processes.launch.max_restarts:
                raise UserError("out: give a folder with --max-restarts, so that a restarted run finds its checkpoint.")
        where = _where(output, name)
        where["out"] = Path(processes.share("out", str(where["out"]))[0])
        try:
            with (
                display(1 + len(config.baseline), err) if processes.is_main else contextlib.nullcontext(nobody) as watch
            ):
                finished = run_split(config, processes=processes, wire=output.wire, **where, watch=watch)
        except Interrupted as stop:
            if not processes.is_main:
                return 130
            return stopped(err, stop, config, "torchrun ... -m decaf_lora run --engine torchrun")
    if finished is not None:
        row, out = finished
        _results([row], out, output.json)
    return 0


_LAUNCHERS = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK"),
    "srun": ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_SIZE", "PMI_RANK"),
    "a launcher": ("RANK", "WORLD_SIZE", "RANK"),
}
"""Launcher -> environment variables: one that it sets, the number of its processes, and this process's number."""


def refuse_launcher(has_out: bool) -> None:
    """Raises UserError in one of several processes of a launcher, each of which would simulate all agents.

    srun and mpirun also start independent runs. Those have an --out each, and are allowed.
    """
    for name, (mark, size, rank) in _LAUNCHERS.items():
        count = os.environ.get(size, "1")
        if mark not in os.environ or count == "1" or (has_out and name in ("srun", "mpirun", "mpiexec")):
            continue
        own = "" if name in ("torchrun", "a launcher") else "; runs that are to be apart need an --out each"
        error = UserError(
            f"engine: {name} has started {count} processes; `decaf run` shares them with --engine torchrun{own}."
        )
        error.quiet = os.environ.get(rank, "0") != "0"
        raise error


def compare_command(args: list[str]) -> int:
    config, output, name = configured(CompareConfig, "compare", args, Output)
    need("report", "report")
    from decaf_lora.runs.compare import cells, compare, default_jobs

    assert isinstance(config, CompareConfig)
    if output.engine != "simulate":
        raise UserError(
            "engine: compare simulates its runs, several at a time with --jobs; torchrun is for `decaf run`."
        )
    refuse_unused(output, "backend", "wire", "timeout")
    refuse_launcher(output.out is not None)
    jobs = output.jobs or default_jobs(config.device)
    err = Console(stderr=True, highlight=False)
    with warnings.catch_warnings():  # `compare` shows these warnings
        warnings.simplefilter("ignore")
        count = len(cells(config))
    where = _where(output, name)
    try:
        with _watching(count, err, output, where["out"]) as watch:
            settled, where = _settled(config, output, where, err)
            rows, out = compare(settled, **where, jobs=jobs, watch=watch)
    except Interrupted as stop:
        return stopped(err, stop, config, "decaf compare")
    _results(rows, out, output.json)
    _refuse_diverged(rows)
    return 0


def _results(rows: list[Any], out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    from decaf_lora.records import answers, nothing_learnt, table, verdicts

    console = Console(highlight=False)
    console.print(table(rows))
    for line in [*nothing_learnt(rows), *verdicts(rows), *(answer.sentence() for answer in answers(rows))]:
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"report: {out / 'report.html'}", markup=False, soft_wrap=True)


def _refuse_diverged(rows: list[Any]) -> None:
    """Raises UserError if runs have diverged, after all results are written: a script sees the exit code."""
    lost = {(row.algorithm, row.partition, row.seed, row.diverged): row for row in rows if row.diverged}
    if lost:
        row = next(iter(lost.values()))
        count = f"{len(lost)} runs have diverged, the first is" if len(lost) > 1 else "one run has diverged,"
        raise UserError(f"{count} {row.algorithm}, {row.graph}, {row.partition}, seed {row.seed}: {row.diverged}")


def stopped(err: Console, stop: Interrupted, config: RunConfig, command: str) -> int:
    """Says how to go on with a run that was stopped; returns the exit code."""
    from decaf_lora.runs.identity import own_code

    where = f" in round {stop.round}" if stop.round else ""
    again = "".join(f" --{field.removesuffix('.name')} {value}" for value, field in own_code(config).items())
    text = f"everything so far is kept. Go on with: {command} --resume {stop.directory}{again}"
    said = f"stopped{where}; {text}" if stop.directory.exists() else "stopped before anything was written."
    with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
        err.print(f"decaf: {said}", markup=False, soft_wrap=True)
    return 130


def recipes_command(args: list[str]) -> int:
    from decaf_lora import recipes

    def list_recipes(json: bool = False) -> bool:
        """Lists the recipes for `decaf run` and `decaf compare`.

        Args:
            json: print JSON.
        """
        return json

    check_options(args, ["json", "help"])
    if parsed(list_recipes, "decaf recipes", args):
        print(json.dumps(recipes.describe(), indent=2))
        return 0
    table = Table.grid(padding=(0, 3))
    for name, summary in recipes.describe().items():
        table.add_row(f"  {name}", summary)
    Console(highlight=False).print(table)
    return 0


def export_command(args: list[str]) -> int:
    def export(run: Positional[Path], to: Path, agent: str = "averaged", merge: bool = False) -> tuple[Any, ...]:
        """Writes one agent's adapter, the averaged model, or all agents' adapters, as PEFT directories.

        Args:
            run: folder of the run.
            to: folder to write, new or empty.
            agent: number or name of the agent, `averaged`, or `all`, each to a folder agent-K of its own.
            merge: write the whole model with the adapter folded in.
        """
        return run, to, agent, merge

    check_options(args, ["to", "agent", "merge", "no-merge", "help"])
    run, to, agent, merge = parsed(export, "decaf export", args)
    from decaf_lora.runs.export import export as write_export

    written = write_export(run, agent, to, merge=merge)
    what = "model" if merge else "adapter"
    whose = f"agent {agent}" if agent != "averaged" else agent
    print(f"{what} of {whose} in {to}" if agent != "all" else f"{what}s of {len(written)} agents in {to}/agent-K")
    return 0


def merge_command(args: list[str]) -> int:
    def merge(
        adapters: Positional[tuple[Path, ...]],
        to: Path,
        weights: tuple[float, ...] = (),
        rank: int | None = None,
        base: str | None = None,
    ) -> tuple[Any, ...]:
        """Averages PEFT adapters of one base model, of any ranks, without data and without the model.

        Args:
            adapters: folders of the adapters.
            to: folder to write, new or empty.
            weights: weight of each adapter in the average, such as its number of examples. Unset: equal weights.
            rank: rank of the merged adapter. Unset: the largest rank of the adapters.
            base: the base model, by name or folder: the full model is written too, to the folder `model` in `to`.
        """
        return adapters, to, weights, rank, base

    check_options(args, ["to", "weights", "rank", "base", "help"])
    adapters, to, weights, rank, base = parsed(merge, "decaf merge", args)
    from decaf_lora.adapters import merge as write_merged
    from decaf_lora.adapters.merging import describe

    merged = write_merged(adapters, to, weights=weights or None, rank=rank, base=base)
    print(f"{describe(merged, len(adapters))}; in {to}")
    return 0


def report_command(args: list[str]) -> int:
    def report(
        run: Positional[Path], figures: Path | None = None, format: Literal["png", "pdf", "svg"] | None = None
    ) -> tuple[Path, Path | None, str | None]:
        """Writes report.html of a run or a comparison again.

        Args:
            run: folder of the run or comparison.
            figures: folder to write every figure to, as a file of its own.
            format: of these files: png, or pdf and svg, which can be enlarged. Unset: png.
        """
        return run, figures, format

    check_options(args, ["figures", "format", "help"])
    run, figures, kind = parsed(report, "decaf report", args)
    from decaf_lora.report import write_figures, write_report

    if kind is not None and figures is None:
        raise UserError("format: it is that of the files of --figures; name their folder, as in --figures DIR.")
    print(write_report(run))
    if figures is not None:
        print(*write_figures(run, figures, f".{kind or 'png'}"), sep="\n")
    return 0
