"""How does `learning_rate: auto` get its number? By a short search in the run's own folder, before the run.

A fresh run searches in OUT/learning_rate; a comparison searches for each algorithm by itself, on its first graph,
partition and seed. The trials take about as many rounds as one run. The choice stands in the config.yaml of the run or
comparison, so that a resumed one keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from decaf_lora import algorithms
from decaf_lora import config as configs
from decaf_lora.config import CompareConfig, RunConfig
from decaf_lora.errors import UserError
from decaf_lora.records import replace_text, write_json
from decaf_lora.runs.compare import cells
from decaf_lora.runs.events import Interrupted, Watch, nobody
from decaf_lora.runs.folder import CHOICE, check_folder, disk
from decaf_lora.tune.searching import SETTINGS, SHARE, Found, search

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""The first rates; where the best is at an end, up to three more beyond it."""
SHARE_OF_ROUNDS = 1 / 3
"""The longest trials take this share of the rounds, the others a third of that."""

Config = TypeVar("Config", bound=RunConfig)


def with_learning_rate(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    take_over: bool = False,
    jobs: int = 1,
    watch: Watch = nobody,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Config, bool]:
    """The configuration with a number where its learning rate is `auto`; chosen now, or taken from the folder.

    Args:
        config: of a run or a comparison.
        out: its folder, new or empty; with `resume` one that holds it, or the beginning of the search.
        resume: go on with what is there.
        take_over: the former owner of the folder, on another machine, is gone.
        jobs: number of trials at a time.
        watch: gives the subscriber of each trial.
        tell: called with the line that says what was chosen.

    Returns:
        The configuration, and whether the run itself is one to go on with (it is not, if only the search had begun).

    Raises:
        UserError: as `search`; or the folder holds something else.
        Interrupted: after Ctrl-C or another signal that asks to stop.
    """
    if config.training.learning_rate != "auto":
        return config, resume
    started = (out / "config.yaml").exists()
    if resume and started:
        return _kept(config, out), True
    begun = (out / CHOICE / "config.yaml").exists()
    if begun and not resume:
        raise UserError(f"out: {out} already holds a run; pass --resume to go on with it, or choose another folder.")
    check_folder(config, out, resume and not begun)
    if begun:
        saved = configs.load(type(config), out / CHOICE / "config.yaml")
        if different := configs.differences(saved, config):
            raise UserError(
                f"resume: the run in {out} has another config; differing fields: {'; '.join(different)}. "
                "Give the same values, or choose another --out."
            )
    todo = _todo(config)
    if not begun:
        with disk(out):
            (out / CHOICE).mkdir(parents=True, exist_ok=True)
            replace_text(out / CHOICE / "config.yaml", configs.dump(config))
    rates: dict[str, float] = {}
    for name, one in todo.items():
        folder = out / CHOICE / name.replace("/", "_").replace(":", "-")
        try:
            found = search(
                one,
                {"training.learning_rate": RATES},
                folder,
                share_of_rounds=SHARE_OF_ROUNDS,
                jobs=jobs,
                resume=(folder / SETTINGS).exists(),
                take_over=take_over,
                watch=watch,
            )
        except Interrupted as stop:
            raise Interrupted(out, stop.round) from None
        rates[name] = float(found.values["training.learning_rate"])
        tell(_line(found, name, one, rates[name]))
    with disk(out):
        write_json(out / CHOICE / "chosen.json", rates)
    if isinstance(config, CompareConfig):
        return config.model_copy(update={"learning_rates": {**config.learning_rates, **rates}}), False
    (rate,) = rates.values()
    return _with_rate(config, rate), False


def _todo(config: RunConfig) -> dict[str, RunConfig]:
    """Algorithm -> the run that its rate is searched with."""
    if not isinstance(config, CompareConfig):
        return {algorithms.spelled(config.algorithm.name): config}
    found: dict[str, RunConfig] = {}
    for cell in cells(config):
        if cell.config.training.learning_rate == "auto":
            found.setdefault(cell.config.algorithm.name, cell.config)
    return found


def _kept(config: Config, out: Path) -> Config:
    """`config` with the rates that the run or comparison in the folder has."""
    saved = configs.load(type(config), out / "config.yaml")
    if isinstance(saved, CompareConfig):
        assert isinstance(config, CompareConfig)
        return config.model_copy(update={"learning_rates": {**saved.learning_rates, **config.learning_rates}})
    if saved.training.learning_rate == "auto" or not (out / CHOICE).is_dir():
        raise UserError(
            f"resume: training.learning_rate: the run in {out} was begun with {saved.training.learning_rate}, not with "
            "auto; leave auto out."
        )
    return _with_rate(config, saved.training.learning_rate)


def _with_rate(config: Config, rate: float) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"learning_rate": rate})})


def _line(found: Found, name: str, config: RunConfig, rate: float) -> str:
    count, share = len(found.trials), f"{100 * (config.validation_share or SHARE):.0f} %"
    name_of_score = found.score_name.removeprefix("held-out ")
    return (
        f"learning rate of {name}: {rate:g}, the best of {count} on {share} of the training examples, held out "
        f"({name_of_score} {found.score:.3f} after {found.plan.rungs[-1]} of {config.rounds} rounds; {config.graph}, "
        f"{config.partition}, seed {config.seed})"
    )
