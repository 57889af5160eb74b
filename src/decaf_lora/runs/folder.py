"""How does a run become a finished folder? `Folder` hears of the run and writes it down.

A run's folder holds config.yaml, environment.json, run.json, records.jsonl, checkpoints/, summary.json and report.html.
A run can be interrupted at any time, and goes on with `resume`. A folder belongs to one run at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from decaf_lora import config as configs
from decaf_lora.config import RunConfig
from decaf_lora.errors import TrainingError, UserError, remedy
from decaf_lora.records import (
    Record,
    RecordWriter,
    SummaryRow,
    environment,
    read_facts,
    replace_text,
    summarise,
    whole_rounds,
    write_json,
)
from decaf_lora.runs import baselines, checkpoint, identity
from decaf_lora.runs.build import build_run
from decaf_lora.runs.events import Interrupted, Subscriber, Watch, follow, nobody
from decaf_lora.runs.lock import LOCK, OWNER, FolderLock
from decaf_lora.runs.signals import stopping

if TYPE_CHECKING:
    from decaf_lora.run import Run

CHOICE = "learning_rate"
"""The folder, in that of a run or comparison, of the search for a learning rate that was made before it."""
Point = tuple[dict[str, Any], dict[str, Any]]
"""Tensors and values of a checkpoint."""


def run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    take_over: bool = False,
    unique: bool = False,
    watch: Watch = nobody,
) -> tuple[SummaryRow, Path]:
    """Runs `config` and writes its folder, or goes on with the run in that folder.

    Args:
        config: what to run.
        out: the folder of the run, new or empty; with `resume` one that holds a run of this configuration.
        resume: go on from the newest checkpoint.
        take_over: the former owner of the folder, on another machine, is gone.
        unique: if `out` exists, take the first of `out`-2, `out`-3, ... that does not.
        watch: gives, for the folder's name, another subscriber of the run.

    Returns:
        The row of the run's summary, and the folder that it was written to.

    Raises:
        UserError: a mistake, found before anything is written; or the folder is in use.
        Interrupted: after Ctrl-C or another signal that asks to stop.
    """
    baselines.check(config)
    options = {"resume": resume, "take_over": take_over, "unique": unique}
    row, path = _run(config, out, watch=watch, **options)
    for kind in config.baseline:
        if baselines.is_due(path, kind, config.rounds):
            try:
                _run(
                    baselines.configuration(config, kind),
                    path / kind,
                    resume=started(path / kind),
                    take_over=take_over,
                    watch=watch,
                )
            except Interrupted as stop:
                raise Interrupted(path, stop.round) from None
            except TrainingError as error:
                mark_diverged(path / kind, error)
                warnings.warn(f"baseline: {kind} diverged ({error}); there is nothing to compare with.", stacklevel=2)
    return (conclude(path), path) if config.baseline else (row, path)


def _run(
    config: RunConfig, out: Path, *, resume: bool, take_over: bool, watch: Watch, unique: bool = False
) -> tuple[SummaryRow, Path]:
    """`run` without baselines."""
    if not unique:
        check_folder(config, out, resume)
    made = build_run(config)
    with contextlib.closing(made):
        folder = Folder(out, config=config, resume=resume, take_over=take_over, unique=unique)
        with folder, stopping(made.stop):
            for _ in follow(made, folder, watch(folder.path.name), facts=identity.facts_of(made, config)):
                pass
        if folder.row is None:
            raise Interrupted(folder.path, made.round + 1)
    return folder.row, folder.path


class Folder(Subscriber):
    """A run on disk: records, checkpoints, summary and report, and the way back to the newest checkpoint.

        for record in runs.follow(run, runs.Folder("runs/mine")):
            print(record.round, record.averaged_score)

    `runs.Folder("runs/mine", resume=True)` then goes on where that loop was left, in another process too.

    Args:
        path: the folder, new or empty unless `resume`.
        resume: go on from the newest checkpoint in the folder, from the beginning if there is none.
        checkpoint_every: number of rounds from one checkpoint to the next; the configuration's takes its place.
        config: the configuration that the run was made from, if it was made from one; `resume` compares it.
        take_over: the former owner of the folder, on another machine, is gone.
        unique: if `path` exists, take the first of `path`-2, `path`-3, ... that does not.

    Raises:
        UserError: raised when the run starts. The folder is in use or holds something else, or its content does not
            belong to this run or cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resume: bool = False,
        checkpoint_every: int = 10,
        config: RunConfig | None = None,
        take_over: bool = False,
        unique: bool = False,
    ) -> None:
        self.path, self.resume, self.config = Path(path), resume, config
        self.checkpoint_every = checkpoint_every if config is None else config.checkpoint_every
        self.row: SummaryRow | None = None
        """The row of the summary, once the run has finished."""
        self._take_over, self._unique = take_over, unique
        self._lock: FolderLock | None = None
        self._run: Run | None = None
        self._sources: dict[str, Any] = {}
        self._writer: RecordWriter | None = None
        self._point: Point | None = None
        self._sought = False

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def open(self) -> None:
        """Makes the folder and locks it for this run; does nothing if this object has locked it already."""
        if self._lock is not None:
            return
        with disk(self.path):
            if self._unique:
                self.path = new_folder(self.path)
            else:
                self.path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self.path)
            lock.acquire(self._take_over)
        self._lock = lock
        try:
            check_folder(self.config, self.path, self.resume)  # another run may have written since the first check
        except BaseException:
            self._release()
            raise

    def point(self, rounds: int) -> Point | None:
        """The newest checkpoint that the run can go on from; None: it starts from the beginning.

        Args:
            rounds: number of rounds that the run is to have.

        Raises:
            UserError: there are checkpoints, but none can be used.
        """
        if self._sought or not self.resume:
            return self._point
        self._sought = True
        records, then = whole_rounds(self.path / "records.jsonl")
        last = records[-1].round if records else -1

        def refuse(path: Path) -> str | None:
            round_, step = checkpoint.moment_of(path)
            if round_ > rounds:
                return f"{path} is beyond the last round, {rounds}"
            if (round_ or step) and round_ > last:
                return f"{then}, but {path} relies on all records up to its round"
            return None

        self._point = checkpoint.load_latest(self.path / "checkpoints", refuse)
        if self._point is None:
            text = f"resume: {self.path} has no checkpoint yet; the run starts from the beginning."
            warnings.warn(text, stacklevel=2)
        return self._point

    def restore(self, run: Run, point: Point | None) -> None:
        """Brings the run to a checkpoint of this folder. Every process of the run calls this.

        Args:
            run: a new run.
            point: from `point`; None: the run stays at its beginning.

        Raises:
            UserError: data, model or code are no longer what they were, or the checkpoint does not fit this run.
        """
        self._run, self._sources = run, identity.sources(run)
        if point is None:
            return
        tensors, values = point
        if changed := identity.changes(values.get("sources", {}), self._sources):
            raise UserError(
                f"resume: what the run in {self.path} was made from has changed; {'; '.join(changed)}. "
                "Bring it back as it was, or choose another --out."
            )
        if self.config is not None:
            identity.refuse_changed_code(values.get("code", {}), self.config)
        versions = identity.changes(values.get("versions", {}), _versions())
        try:
            run.restore(tensors, values)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"resume: the checkpoint of round {values.get('round')} in {self.path} does not fit this run "
                f"({type(error).__name__}: {error}); it was written by another version or changed since."
            ) from error
        if versions:
            warnings.warn(
                f"resume: other versions than at the checkpoint; {'; '.join(versions)}. The last bits may differ.",
                stacklevel=2,
            )

    # What a subscriber hears

    def attach(self, run: Run) -> None:
        """Locks the folder, and brings the run to its newest checkpoint."""
        self.open()
        if self._run is None:
            self.restore(run, self.point(run.rounds))

    def start(self, facts: Mapping[str, Any]) -> None:
        """Writes the files that do not change from round to round."""
        run = self._run
        assert run is not None
        with disk(self.path):
            resumed = self._point is not None and bool(run.round or run.step_in_round)
            self._write_facts(run, facts, resumed)
            # A run stopped before its first step starts again, with the record of the start.
            self._writer = RecordWriter(self.path / "records.jsonl", run.round if resumed else None)

    def record(self, record: Record) -> None:
        """Writes the record, and a checkpoint if one is due."""
        assert self._writer is not None
        assert self._run is not None
        with disk(self.path):
            self._writer.write(record)
        if due(self.checkpoint_every, record.round, self._run.rounds):
            self._save()

    def close(self, error: BaseException | None) -> None:
        """Saves a checkpoint unless the run has failed; writes summary and report of a run that has finished."""
        try:
            if self._writer is None or self._run is None:
                return
            try:
                if error is None:
                    self._save()
            finally:
                self._writer.close()
            if error is None and self._run.round >= self._run.rounds:
                self._finish()
        finally:
            self._release()

    def _save(self) -> None:
        assert self._run is not None
        assert self._writer is not None
        tensors, values = self._run.snapshot()
        code = {} if self.config is None else identity.code_hashes(self.config)
        more = {"versions": _versions(), "sources": self._sources, "code": code}
        with disk(self.path):
            self._writer.sync()
        checkpoint.save(self.path / "checkpoints", tensors, {**values, **more})

    def _write_facts(self, run: Run, facts: Mapping[str, Any], resumed: bool) -> None:
        path, saved = self.path, _read_json(self.path / "run.json")
        before = (saved or {}).get("rounds")
        training = run.training
        if resumed and before not in (None, run.rounds) and (training.schedule != "constant" or training.warmup):
            warnings.warn(
                f"resume: rounds: {before} -> {run.rounds}; training.schedule {training.schedule} is over all rounds, "
                f"so the first {run.round} were trained at other learning rates than in a run of {run.rounds}.",
                stacklevel=2,
            )
        if run.round < run.rounds:
            (path / "summary.json").unlink(missing_ok=True)  # of fewer rounds
        if self.config is not None and not (resumed and _same(self.config, path / "config.yaml")):
            replace_text(path / "config.yaml", configs.dump(self.config))
        if not resumed or _read_json(path / "environment.json") is None:
            write_json(path / "environment.json", environment(str(run.trainer.device)))
        if not resumed or saved is None or saved.get("rounds") != run.rounds:
            write_json(path / "run.json", {"format": checkpoint.FORMAT, **facts})

    def _finish(self) -> None:
        self.row = conclude(self.path)

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()


def conclude(path: Path) -> SummaryRow:
    """Writes summary.json and report.html of the run in `path`, with its baselines, and returns the summary's row."""
    from decaf_lora.report import write_report

    with disk(path):
        row = summarise(path)
        write_json(path / "summary.json", [row])
        write_report(path)
    return row


def mark_diverged(path: Path, error: TrainingError) -> SummaryRow:
    """Notes that the run in `path` has diverged, and concludes it: it has a result, and is not repeated."""
    with disk(path):
        write_json(path / "run.json", read_facts(path) | {"diverged": str(error)})
    return conclude(path)


def due(every: int, round_: int, rounds: int) -> bool:
    """Whether a checkpoint is written after this round. After the last round, `close` writes one."""
    return round_ > 0 and round_ % every == 0 and round_ < rounds


def new_folder(path: Path) -> Path:
    """Makes `path` or, if it exists, the first of `path`-2, `path`-3, ... that does not."""
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError


def _versions() -> dict[str, str]:
    import torch

    from decaf_lora import __version__

    return {"decaf-lora": __version__, "torch": torch.__version__}


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing, unreadable, or holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _same(config: RunConfig, path: Path) -> bool:
    return not configs.differences(configs.load(type(config), path), config)


def started(out: Path) -> bool:
    """Whether the folder holds a run."""
    return (out / "config.yaml").exists() or (out / "run.json").exists()


def check_folder(config: RunConfig | None, out: Path, resume: bool) -> None:
    """Checks that a run may use a folder. Writes nothing.

    Args:
        config: the configuration of the run; None if it was not made from one.
        out: the folder.
        resume: whether to go on with the run in the folder.

    Raises:
        UserError: the folder holds something else; or a run without `resume`; or with `resume` no run, or a run of
            another configuration (only its rounds and baselines may grow).
    """
    with disk(out):
        exists = out.exists()
    if exists and not out.is_dir():
        raise UserError(f"out: {out} is a file; give a folder.")
    if not started(out):
        left = [p.name for p in out.iterdir() if not p.name.startswith((LOCK, OWNER))] if out.exists() else []
        if CHOICE in left and (out / CHOICE / "config.yaml").exists():
            left.remove(CHOICE)
        torn = [name for name in left if name.startswith("config.yaml") and name.endswith(".tmp")]
        if resume and (not torn or torn != left):
            raise UserError(f"resume: {out} holds no run (no config.yaml); leave out --resume to start one there.")
        if torn != left:
            raise UserError(f"out: {out} is not empty; choose another folder.")
        return  # empty, or left by a run that died before its first file was whole
    if not resume:
        raise UserError(f"out: {out} already holds a run; pass --resume to go on with it, or choose another folder.")
    _check_format(out)
    if config is None:
        return
    if not (out / "config.yaml").exists():
        raise UserError(f"resume: {out} lacks config.yaml; bring it back, or choose another --out.")
    saved = configs.load(type(config), out / "config.yaml")
    if config.rounds > saved.rounds:
        saved = saved.model_copy(update={"rounds": config.rounds})
    if set(config.baseline) > set(saved.baseline):
        saved = saved.model_copy(update={"baseline": config.baseline})
    different = configs.differences(saved, config)
    if different:
        raise UserError(
            f"resume: the run in {out} has another config; differing fields: {'; '.join(different)}. "
            "Give the same values (only rounds and baseline may grow), or choose another --out."
        )


def _check_format(out: Path) -> None:
    saved = _read_json(out / "run.json")
    if saved is not None and saved.get("format") != checkpoint.FORMAT:
        raise UserError(
            f"resume: {out / 'run.json'} has format {saved.get('format', 'none')}, this program goes on with "
            f"{checkpoint.FORMAT} only; use the program that began the run."
        )


@contextlib.contextmanager
def disk(out: Path) -> Iterator[None]:
    """Turns an error of the file system inside into a UserError that says what is kept."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"out: cannot write in {out} ({error.strerror or error}); {remedy(error)} or choose another --out. "
            "What is already there is kept; go on with --resume."
        ) from error
