"""How do several processes share one run? Each calls `run_split`; the main process writes the folder."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decaf_lora import config as configs
from decaf_lora.config import RunConfig
from decaf_lora.records import SummaryRow
from decaf_lora.runs import baselines, identity
from decaf_lora.runs.build import build_run
from decaf_lora.runs.events import Interrupted, Watch, follow, nobody
from decaf_lora.runs.folder import Folder, check_folder, conclude, due, started
from decaf_lora.runs.signals import stopping

if TYPE_CHECKING:
    from decaf_lora.engines import Processes
    from decaf_lora.run import Run


def run_split(
    config: RunConfig,
    out: Path,
    processes: Processes,
    *,
    wire: str = "exact",
    resume: bool = False,
    take_over: bool = False,
    unique: bool = False,
    watch: Watch = nobody,
) -> tuple[SummaryRow, Path] | None:
    """Like `folder.run`, with the agents split over several processes. Every process calls this.

    The main process alone reads and writes the folder. After a restart by the launcher the run goes on by itself.

    Args:
        config: what to run; equal in all processes.
        out: the folder of the run.
        processes: the processes that the launcher has started.
        wire: number format of messages between processes: "exact" or "bfloat16".
        resume: go on from the newest checkpoint.
        take_over: the former owner of the folder, on another machine, is gone.
        unique: if `out` exists, take the first of `out`-2, `out`-3, ... that does not.
        watch: gives, for the folder's name, another subscriber; only in the main process.

    Returns:
        In the main process the row of the summary and the run's folder, in the others None.

    Raises:
        UserError: in all processes if one of them meets a mistake, or is lost.
        Interrupted: after Ctrl-C or another signal that asks to stop.
    """
    baselines.check(config, simulated=False)
    options: dict[str, Any] = {"wire": wire, "take_over": take_over, "watch": watch}
    finished = _run_split(config, out, processes, resume=resume, unique=unique, **options)
    for kind in config.baseline:
        # Every process does what the main process, which sees the folder, has found.
        path = Path(processes.share("baseline", None if finished is None else str(finished[1]))[0])
        begun = (baselines.is_due(path, kind, config.rounds), started(path / kind))
        due_, resume = processes.share("due", begun)[0]
        if not due_:
            continue
        try:
            _run_split(baselines.configuration(config, kind), path / kind, processes, resume=resume, **options)
        except Interrupted as stop:
            raise Interrupted(path, stop.round) from None
    if finished is not None and config.baseline:
        finished = (conclude(finished[1]), finished[1])
    return finished


def _run_split(
    config: RunConfig,
    out: Path,
    processes: Processes,
    *,
    wire: str,
    resume: bool,
    take_over: bool,
    watch: Watch,
    unique: bool = False,
) -> tuple[SummaryRow, Path] | None:
    """`run_split` without baselines."""
    import torch

    from decaf_lora import __version__
    from decaf_lora.engines import Torchrun

    device = processes.device.partition(":")[0]
    setting = {"decaf-lora": __version__, "torch": torch.__version__, "wire": wire, "backend": processes.backend}
    processes.agree({**configs.flat(config), "device": device, **setting}, "config")
    resume = processes.share("resume", resume or (processes.launch.restarts > 0 and started(out)))[0]
    with processes.together():
        if processes.is_main and not unique:
            check_folder(config, out, resume)
        made = build_run(config, functools.partial(Torchrun, processes=processes, wire=wire), processes.device)
    with contextlib.closing(made):
        processes.agree(identity.sources(made), "data")
        if not processes.is_main:
            with processes.together():  # the main process opens the folder
                pass
            values = processes.share("checkpoint", None)[0]
            if values is not None:
                made.restore({}, values)
            _follow(config, out, made)
            return None
        folder = Folder(out, config=config, resume=resume, take_over=take_over, unique=unique)
        with contextlib.ExitStack() as stack:
            with processes.together():
                stack.enter_context(folder)
                point = folder.point(config.rounds)
            processes.share("checkpoint", None if point is None else point[1])
            folder.restore(made, point)
            with stopping(made.stop, launched=True):
                for _ in follow(made, folder, watch(folder.path.name), facts=identity.facts_of(made, config)):
                    pass
        if folder.row is None:
            raise Interrupted(folder.path, made.round + 1)
        return folder.row, folder.path


def _follow(config: RunConfig, out: Path, run: Run) -> None:
    """Trains in a process that writes nothing: takes part in the snapshots that the main process's `Folder` makes."""
    with stopping(run.stop, launched=True):
        for record in run.train():
            if due(config.checkpoint_every, record.round, config.rounds):
                run.snapshot()
        run.snapshot()
    if run.round < config.rounds:
        raise Interrupted(out, run.round + 1)
