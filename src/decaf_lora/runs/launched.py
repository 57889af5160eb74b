"""How do several processes share one run? Each calls `run_split`; the main process writes the folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decaf_lora import config as configs
from decaf_lora.config import RunConfig
from decaf_lora.records import SummaryRow
from decaf_lora.runs.build import build_run
from decaf_lora.runs.events import Interrupted, Watch, nobody
from decaf_lora.runs.folder import check_folder, due, newest, started, write
from decaf_lora.runs.signals import stopping

if TYPE_CHECKING:
    from decaf_lora.engines import Processes


def run_split(
    config: RunConfig,
    out: Path,
    processes: Processes,
    *,
    wire: str = "exact",
    resume: bool = False,
    watch: Watch = nobody,
) -> SummaryRow | None:
    """The same with the agents split over `processes`, all of which call this; the row is the main one's.

    The main process alone reads and writes `out`. After a restart by the launcher the run goes on by itself.

    Raises UserError in all processes if one of them meets a mistake, or is lost; Interrupted after Ctrl-C.
    """
    import torch

    from decaf_lora import __version__
    from decaf_lora.engines import Torchrun

    device = processes.device.partition(":")[0]
    setting = {"decaf-lora": __version__, "torch": torch.__version__, "wire": wire, "backend": processes.backend}
    processes.agree({**configs.flat(config), "device": device, **setting}, "config")
    resume = processes.share("resume", resume or (processes.launch.restarts > 0 and started(out)))[0]
    with processes.together():
        if processes.is_main:
            check_folder(config, out, resume)
        engine = build_run(config, functools.partial(Torchrun, processes=processes, wire=wire), processes.device)
    with contextlib.closing(engine):
        processes.agree(_data_seen(engine), "data")
        found = newest(out) if resume and processes.is_main else None
        values = processes.share("checkpoint", None if found is None else found[1])[0]
        if values is not None:
            engine.restore({} if found is None else found[0], values)
        if processes.is_main:
            return write(config, out, engine, values is not None, watch, launched=True)
        _follow(config, out, engine)
        return None


def _data_seen(engine: Any) -> dict[str, Any]:
    """What all processes must have read alike: each reads model and data from its own machine."""
    labels = hashlib.blake2b(str(engine.task.labels.tolist()).encode(), digest_size=8).hexdigest()
    facts = {
        "labels (hash)": labels,
        "training examples": len(engine.task.labels),
        "test examples": engine.task.num_test,
    }
    return {**facts, "adapted layers": len(engine.attached.sites)}


def _follow(config: RunConfig, out: Path, engine: Any) -> None:
    """What `_write` does, in a process that writes nothing."""
    with stopping(engine.stop, launched=True):
        for record in engine.train():
            if due(config, record.round):
                engine.snapshot()
        engine.snapshot()
    if engine.round < config.rounds:
        raise Interrupted(out, engine.round + 1)
