"""How do runs reach the trackers that people look at? Each is a subscriber; both write to this machine alone.

TensorBoard's files lie in `tensorboard/` beside the run's folder, one folder a run, so that `tensorboard --logdir
runs/tensorboard` shows all. trackio keeps its own database. A run that goes on repeats no round: TensorBoard drops the
rounds after the checkpoint, and trackio is told only those that it does not have.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import math
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decaf_lora.errors import UserError
from decaf_lora.records import Record, mean_score, row_name
from decaf_lora.runs.events import Subscriber, Watch, all_of, nobody

TRACKERS = ("tensorboard", "trackio")
"""Names that `--log` takes."""
_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID", "TRACKIO_WEBHOOK_URL")


def watch(names: Sequence[str], out: Path, *, resume: bool = False) -> Watch:
    """The `Watch` of the trackers `names`.

    Args:
        names: of `TRACKERS`.
        out: the folder of the run or comparison.
        resume: whether the run goes on.

    Raises:
        UserError: a tracker is not installed, or would send what it is told to another machine.
    """
    made: list[Watch] = []
    for name in dict.fromkeys(names):
        if importlib.util.find_spec(name) is None:
            raise UserError(f'log: {name} is not installed; pip install "decaf-lora[{name}]", or leave it out.')
        if name == "tensorboard":
            made.append(_tensorboard(out))
        else:
            made.append(_trackio(out, resume))
    return all_of(*made) if made else nobody


def places(names: Sequence[str], out: Path) -> list[str]:
    """For each tracker a line that says how to look at what it was told."""
    lines = {
        "tensorboard": f"tensorboard: tensorboard --logdir {out.parent / 'tensorboard'}",
        "trackio": f"trackio: trackio show --project {_project(out)}",
    }
    return [lines[name] for name in dict.fromkeys(names)]


def values(record: Record) -> dict[str, float]:
    """What trackers are told of a round: name -> number; what was not measured is left out."""
    losses = [loss for loss in record.losses or () if loss is not None]
    scores = [score for score in record.scores or () if score is not None]
    found = {
        "score/mean": mean_score(record),
        "score/lowest": min(scores, default=None),
        "score/highest": max(scores, default=None),
        "score/averaged model": record.averaged_score,
        "loss/mean": sum(losses) / len(losses) if losses else None,
        "agents/consensus distance": record.consensus_distance,
        "agents/interference": record.interference,
        "agents/truncation tail": record.tail,
        "cost/bytes sent": record.bytes_sent,
        "cost/seconds": sum(record.seconds.values()),
        "learning rate": record.learning_rate,
    }
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def told(facts: Mapping[str, Any]) -> dict[str, str | int | float]:
    """The facts of a run that are one value each, under the names that tables use."""
    found = {name: value for name, value in facts.items() if isinstance(value, str | int | float)}
    return {
        **found,
        "algorithm": row_name(facts),
        "graph": facts["graph"]["name"],
        "partition": facts["partition"]["name"],
    }


class _Tracker(Subscriber):
    """A tracker that fails costs the run nothing: it says so once, and is told no more."""

    name = ""

    def __init__(self) -> None:
        self._failed = False

    @contextlib.contextmanager
    def _guarded(self) -> Any:
        try:
            # Trackers print; standard output is for results.
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:
            self._failed = True
            text = " ".join(str(error).split())[:200]
            warnings.warn(f"log: {self.name} failed ({text}); the run goes on without it.", stacklevel=3)

    def start(self, facts: Mapping[str, Any]) -> None:
        with self._guarded():
            self._start(told(facts))

    def record(self, record: Record) -> None:
        if not self._failed:
            with self._guarded():
                self._record(record)

    def close(self, error: BaseException | None) -> None:
        if not self._failed:
            with self._guarded():
                self._close()

    def _start(self, facts: dict[str, str | int | float]) -> None: ...

    def _record(self, record: Record) -> None: ...

    def _close(self) -> None: ...


def _tensorboard(out: Path) -> Watch:
    from torch.utils.tensorboard import SummaryWriter

    class TensorBoard(_Tracker):
        name = "tensorboard"

        def __init__(self, run: str) -> None:
            super().__init__()
            # The folder's name, perhaps with a number, is that of a single run; others lie below it.
            is_single = re.fullmatch(rf"{re.escape(out.name)}(-\d+)?", run) is not None
            self._folder = out.parent / "tensorboard" / (run if is_single else f"{out.name}/{run}")
            self._writer: SummaryWriter | None = None
            self._facts: dict[str, str | int | float] = {}

        def _start(self, facts: dict[str, str | int | float]) -> None:
            self._facts = facts

        def _record(self, record: Record) -> None:
            if self._writer is None:  # not before: a run that goes on starts at a later round
                self._writer = SummaryWriter(str(self._folder), purge_step=record.round)
                rows = "\n".join(f"| {name} | {value} |" for name, value in self._facts.items())
                self._writer.add_text("run", f"| fact | value |\n| --- | --- |\n{rows}", record.round)
            for name, value in values(record).items():
                self._writer.add_scalar(name, value, record.round)
            self._writer.flush()

        def _close(self) -> None:
            if self._writer is not None:
                self._writer.close()

    return TensorBoard


def _project(out: Path) -> str:
    return out.name


def _trackio(out: Path, resume: bool) -> Watch:
    for variable in _REMOTE:
        if os.environ.get(variable):
            raise UserError(
                f"log: {variable} is set, so trackio would send the run's numbers elsewhere; unset it: --log is local."
            )
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    class Trackio(_Tracker):
        name = "trackio"

        def __init__(self, run: str) -> None:
            super().__init__()
            self._name = run
            # trackio has one current run; in a context of its own each run of a comparison is the current one.
            self._context = contextvars.Context()
            self._known = -1

        def _start(self, facts: dict[str, str | int | float]) -> None:
            options: dict[str, Any] = {"resume": "allow" if resume else "never", "embed": False}
            options |= {"auto_log_gpu": False, "auto_log_cpu": False}
            if resume:
                self._known = self._last_round()
            self._context.run(trackio.init, project=_project(out), name=self._name, config=dict(facts), **options)

        def _last_round(self) -> int:
            """The last round that an earlier start of the run has logged; -1: none."""
            steps = [entry.get("step") for entry in SQLiteStorage.get_logs(_project(out), self._name)]
            return max((int(step) for step in steps if step is not None), default=-1)

        def _record(self, record: Record) -> None:
            if record.round > self._known:
                self._context.run(trackio.log, values(record), step=record.round)

        def _close(self) -> None:
            self._context.run(trackio.finish)

    return Trackio
