"""How is a search made on disk, and how does it go on after a stop? The folders of the trials are its memory.

DIR/tune.yaml says what is searched, DIR/runs/ has the folder of every trial and seed, trials.json and trials.csv have
every score, and best.yaml is the run to make. Nothing else is kept: what to do next follows from the scores that the
folders hold, so that a search goes on after a stop as if there had been none.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from decaf_lora import config as configs
from decaf_lora.config import RunConfig
from decaf_lora.errors import TrainingError, UserError
from decaf_lora.frozen import Frozen
from decaf_lora.records import read_facts, replace_text
from decaf_lora.runs.build import build_run
from decaf_lora.runs.events import Interrupted, Watch, follow, nobody
from decaf_lora.runs.folder import Folder, disk, mark_diverged, started
from decaf_lora.runs.identity import facts_of
from decaf_lora.runs.lock import LOCK, OWNER, FolderLock
from decaf_lora.runs.several import Runner, several
from decaf_lora.runs.signals import stopping
from decaf_lora.tune.axes import described, read_axes, short, shown, with_values
from decaf_lora.tune.halving import Merit, Plan, Point, Standing, open_ends, rungs, standing
from decaf_lora.tune.trials import Outcomes, Row, Trial, merit, outcome, rows, write_trials
from decaf_lora.validation import checked
from decaf_lora.yaml_file import read_yaml

SETTINGS, BEST = "tune.yaml", "best.yaml"
SHARE = 0.2
"""The share of every agent's examples that is held out, unless the configuration says another."""


class Settings(Frozen):
    """What a search is: equal settings, equal outcome."""

    base: RunConfig
    """The run that is tuned, with its `validation_share`."""
    over: dict[str, list[Any]]
    """Field -> its first values."""
    seeds: tuple[int, ...]
    """Every trial trains with each, and its score is the mean."""
    keep: int = Field(3, ge=2)
    """One of so many trials goes on at a rung."""
    rungs: int | None = Field(None, ge=1)
    """Number of rungs. Unset: as many as leave one trial in the last."""
    extensions: int = Field(3, ge=0, le=20)
    """How many values may be added to an axis whose best value is at an end."""
    share_of_rounds: float = Field(1.0, gt=0, le=1)
    """Share of the rounds that the trials of the last rung are trained for."""

    def plan(self) -> Plan:
        """The search as `halving` takes it."""
        axes = {field: tuple(values) for field, values in self.over.items()}
        count = 1
        for values in axes.values():
            count *= len(values)
        at = rungs(self.base.rounds, count, self.keep, self.rungs, self.share_of_rounds)
        return Plan(axes, at, self.keep, self.extensions)


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        best: the run to make: the configuration with the best values, on all training examples.
        values: field -> the best value.
        score: held-out score of the best trial, mean over agents and seeds.
        score_name: what the score is.
        trials: all trials.
        plan: what was searched.
        out: the folder.
    """

    best: RunConfig
    values: Point
    score: float
    score_name: str
    trials: list[Row]
    plan: Plan
    out: Path


def search(
    config: RunConfig,
    over: Mapping[str, Sequence[Any]],
    out: str | Path,
    *,
    seeds: Sequence[int] = (),
    jobs: int = 1,
    keep: int = 3,
    rungs: int | None = None,
    extensions: int = 3,
    share_of_rounds: float = 1.0,
    resume: bool = False,
    take_over: bool = False,
    watch: Watch = nobody,
    tell: Callable[[str], None] = lambda line: None,
) -> Found:
    """Finds good values of some fields of a run by successive halving, without its test set.

    Every trial is scored on training examples that are held out: `config.validation_share` of every agent's, or a
    fifth. Its learning rate follows the schedule of the whole run; at a rung it is stopped or goes on. A trial that
    diverges loses. The best trial is the one with the best score of those that were trained to the last rung.

    Args:
        config: the run to tune.
        over: dotted field -> values to try, such as {"training.learning_rate": [1e-3, 3e-3, 1e-2]}; all combinations.
        out: the folder, new or empty; with `resume` one that holds this search.
        seeds: every trial trains with each of these seeds; (): with that of `config`.
        jobs: number of runs at a time, each in its own process.
        keep: one of so many trials goes on at a rung.
        rungs: number of rungs; None: as many as leave one trial in the last. 1 trains every trial to the end.
        extensions: how many values may be added to an axis whose best value is the lowest or the highest.
        share_of_rounds: share of the rounds that the last rung takes.
        resume: go on with the search in the folder.
        take_over: the former owner of the folder, on another machine, is gone.
        watch: gives the subscriber of each run, by the run's name.
        tell: called with a line of text after every rung.

    Returns:
        What was found. It is written to best.yaml, trials.json and trials.csv in the folder.

    Raises:
        UserError: a mistake, found before anything is written; all trials have diverged; or a run was lost.
        Interrupted: after Ctrl-C or another signal that asks to stop.
    """
    settings = settings_of(
        config, over, seeds=seeds, keep=keep, rungs=rungs, extensions=extensions, share_of_rounds=share_of_rounds
    )
    return Search(settings, Path(out), tell).run(resume=resume, take_over=take_over, jobs=jobs, watch=watch)


def settings_of(config: RunConfig, over: Mapping[str, Sequence[Any]], seeds: Sequence[int], **more: Any) -> Settings:
    """The settings of a search, checked; UserError names what is wrong."""
    if config.training.learning_rate == "auto":
        number = configs.TrainingConfig().learning_rate  # in its place each trial has a number, or the axis gives it
        if not any(field in ("lr", "learning_rate", "training.learning_rate") for field in over):
            raise UserError("training.learning_rate: auto; search it, too: --over training.learning_rate 1e-3 1e-2.")
        config = config.model_copy(update={"training": config.training.model_copy(update={"learning_rate": number})})
    config = config.model_copy(update={"validation_share": config.validation_share or SHARE})
    axes = read_axes(config, over)
    if len(set(seeds)) < len(seeds):
        raise UserError("seeds: one is there twice; leave it out.")
    values = {"base": config, "over": {k: list(v) for k, v in axes.items()}, "seeds": tuple(seeds) or (config.seed,)}
    return checked(Settings, {**values, **more})


def read_settings(out: Path) -> Settings:
    """The settings of the search in a folder."""
    path = out / SETTINGS
    if not path.exists():
        raise UserError(f"resume: {out} holds no search (no {SETTINGS}); leave out --resume to start one there.")
    values = read_yaml(path, "resume")
    return checked(Settings, values if isinstance(values, dict) else {})


def check_out(out: Path, resume: bool) -> None:
    """Raises UserError if a search may not use the folder."""
    if (out / SETTINGS).exists():
        if not resume:
            raise UserError(f"out: {out} already holds a search; pass --resume to go on with it, or choose another.")
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; give a folder.")
    left = [p.name for p in out.iterdir() if not p.name.startswith((LOCK, OWNER))] if out.exists() else []
    torn = [name for name in left if name == f"{SETTINGS}.tmp"]
    if resume and (not torn or torn != left):
        raise UserError(f"resume: {out} holds no search (no {SETTINGS}); leave out --resume to start one there.")
    if torn != left:
        raise UserError(f"out: {out} is not empty; choose another folder.")


class Search:
    """A search in its folder.

    Args:
        settings: what is searched.
        out: the folder.
        tell: called with a line of text after every rung.
    """

    def __init__(self, settings: Settings, out: Path, tell: Callable[[str], None]) -> None:
        self.settings, self.out, self._tell = settings, out, tell
        self.plan = settings.plan()
        self.first = len(standing(self.plan, {}).points)
        self.outcomes: Outcomes = {}
        self._labels: dict[str, str] = {}
        """Name of a run's folder -> what is tried in it, in words."""
        self._facts: dict[str, Any] = {}
        """Name of the score, and whether lower is better, once a run has said it."""

    def run(self, *, resume: bool, take_over: bool, jobs: int, watch: Watch) -> Found:
        """Trains what is wanted until nothing is; see `search`."""
        check_out(self.out, resume)
        with contextlib.ExitStack() as stack:
            runner = stack.enter_context(several(train_to, jobs, self._watched(watch)))
            stack.enter_context(stopping(runner.stop))
            checked = False
            if not (self.out / SETTINGS).exists():
                runner.check(self._pieces(standing(self.plan, {})))
                checked = True
                if runner.stopped:
                    raise Interrupted(self.out, 0)
            with disk(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
                lock = FolderLock(self.out)
                lock.acquire(take_over)
            stack.callback(lock.release)
            self._settle(resume)
            while (now := self._standing()).wanted:
                pieces = self._pieces(now)
                if not checked:
                    runner.check(pieces)
                    checked = True
                if not runner.stopped:
                    self._train(runner, pieces)
                if runner.stopped:
                    raise Interrupted(self.out, 0)
                if runner.lost:
                    name, how = next(iter(runner.lost.items()))
                    raise UserError(
                        f"tune: the run {name} was lost, {how}. Go on with --resume, perhaps with fewer --jobs."
                    )
                self._told(now.wanted)
            return self._conclude()

    def _train(self, runner: Runner, pieces: list[Trial]) -> None:
        try:
            runner.run(pieces, self.out / "runs")
        except Interrupted as stop:
            raise Interrupted(self.out, stop.round) from None

    def _watched(self, watch: Watch) -> Watch:
        """`watch`, asked once for every run, by what is tried in it instead of by the name of its folder."""
        return functools.cache(lambda name: watch(self._labels[name]))

    def _settle(self, resume: bool) -> None:
        """Writes the settings, or compares them with those of the folder."""
        check_out(self.out, resume)  # another search may have written since the first check
        path = self.out / SETTINGS
        if path.exists():
            ours, saved = configs.flat(self.settings), configs.flat(read_settings(self.out))
            different = [f"{k}: {saved.get(k)!r} -> {ours.get(k)!r}" for k in {**saved, **ours}
                         if saved.get(k) != ours.get(k)]  # fmt: skip
            if different:
                raise UserError(
                    f"resume: the search in {self.out} is another one; differing fields: {'; '.join(different[:5])}. "
                    "Give the same values, or choose another --out."
                )
            return
        with disk(self.out):
            replace_text(path, configs.dump(self.settings))

    def _standing(self) -> Standing:
        """Where the search stands by what the folders of the runs hold."""
        while True:
            scores = {key: self._merit(*key) for key in self.outcomes}
            now = standing(self.plan, scores, self._valid)
            new = {key: found for key in now.wanted if (found := self._found(*key)) is not None}
            if not new:
                return now
            self.outcomes |= new

    def _merit(self, trial: int, rung: int) -> Merit:
        return merit(list(self.outcomes[trial, rung].values()), self._lower)

    def _found(self, trial: int, rung: int) -> dict[int, Any] | None:
        of_seeds = {}
        for seed in self.settings.seeds:
            directory = self.out / "runs" / name_of(trial, seed)
            one = outcome(directory, self.plan.rungs[rung])
            if one is None:
                return None
            if not self._facts:
                facts = read_facts(directory)
                self._facts = {k: facts.get(k) for k in ("score_name", "lower_is_better")}
            of_seeds[seed] = one
        return of_seeds

    @property
    def _lower(self) -> bool:
        return bool(self._facts.get("lower_is_better"))

    def _valid(self, point: Point) -> bool:
        try:
            with_values(self.settings.base, point)
        except UserError:
            return False
        return True

    def _pieces(self, now: Standing) -> list[Trial]:
        """The runs to train now: those of the wanted trials whose outcome is not known yet."""
        base, first = self.settings.base, self.plan.rungs[0]
        pieces = []
        for trial, rung in now.wanted:
            until, point = self.plan.rungs[rung], now.points[trial]
            for seed in self.settings.seeds:
                name = name_of(trial, seed)
                self._labels[name] = described(point) + (f", seed {seed}" if len(self.settings.seeds) > 1 else "")
                if outcome(self.out / "runs" / name, until) is None:
                    more = {"seed": seed, "evaluate_every": first, "measure_every": base.rounds}
                    pieces.append(Trial(name, with_values(base, point).model_copy(update=more), until))
        return pieces

    def _told(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Writes the record of the trials so far, and says how those that were just trained have done."""
        now = self._standing()
        self._write(now)
        known = [key for key in wanted if key in self.outcomes]
        if not known:
            return
        best = max(known, key=lambda key: self._merit(*key))
        (score, _), rounds = self._merit(*best), self.plan.rungs[best[1]]
        count = f"{len(known)} trials" if len(known) > 1 else described(now.points[best[0]])
        told = f"after {rounds} of {self.settings.base.rounds} rounds, {count}: "
        if score == -math.inf:
            told += "diverged"
        else:
            told += f"{-score if self._lower else score:.3f}"
            told += f" at best, {described(now.points[best[0]])}" if len(known) > 1 else ""
        self._tell(told)

    def _write(self, now: Standing) -> list[Row]:
        trials = rows(self.plan, now, self.outcomes, self.first)
        best = None if now.best is None else now.points[now.best]
        facts = {"best": best, **self._facts, "validation_share": self.settings.base.validation_share}
        with disk(self.out):
            write_trials(self.out, {**facts, "rungs": self.plan.rungs, "seeds": self.settings.seeds}, trials)
        return trials

    def _conclude(self) -> Found:
        now = self._standing()
        trials = self._write(now)
        if now.best is None:
            first = next(row for row in trials if row.diverged)
            raise UserError(
                f"tune: all {len(trials)} trials have diverged, the first, {described(first.values)}: {first.diverged}"
            )
        settings, values = self.settings, now.points[now.best]
        for field in open_ends(self.plan, now, self._valid):
            warnings.warn(
                f"tune: {short(field)} {shown(values[field])} is at the end of what was tried; better values may lie "
                "beyond it, so search on from there.",
                stacklevel=3,
            )
        score = trials[now.best].score
        assert score is not None
        equals = [row for row in trials if row.rounds == trials[now.best].rounds and row.score == score]
        if len(equals) > 1:
            warnings.warn(
                f"tune: {len(equals)} trials have the best score; the one with the lowest training loss is taken "
                f"({'; '.join(described(row.values) for row in equals[:5])}).",
                stacklevel=3,
            )
        best = with_values(settings.base, values).model_copy(update={"validation_share": None})
        with disk(self.out):
            replace_text(self.out / BEST, configs.dump(best))
        return Found(best, values, score, str(self._facts["score_name"]), trials, self.plan, self.out)


def name_of(trial: int, seed: int) -> str:
    """The folder of a trial's run with a seed."""
    return f"trial-{trial + 1}-seed{seed}"


def train_to(trial: Trial, out: Path, watch: Watch) -> None:
    """Trains a trial's run up to its rung, going on with what its folder holds.

    Args:
        trial: the run, and the round after which it stops.
        out: the folder of all runs.
        watch: gives the subscriber of the run, by its name.

    Raises:
        Interrupted: a signal asked to stop before the rung.
    """
    directory = out / trial.name
    run = build_run(trial.config)
    with contextlib.closing(run):
        folder = Folder(directory, config=trial.config, resume=started(directory))
        try:
            with folder, stopping(run.stop):
                records = follow(run, folder, watch(trial.name), facts=facts_of(run, trial.config))
                with contextlib.closing(records):  # leaving the loop saves a checkpoint
                    for record in records:
                        if record.round >= trial.until:
                            return
        except TrainingError as error:
            mark_diverged(directory, error)
            return
        raise Interrupted(out, run.round + 1)
