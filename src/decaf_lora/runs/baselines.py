"""What is a run compared with, to see whether training together has helped? Runs alone, and on pooled data.

A baseline is a run of its own, in a folder of the run's folder, with the run's steps, start and test set. So it can be
interrupted and goes on like any run.
"""

from __future__ import annotations

from pathlib import Path

from decaf_lora.algorithms import KINDS
from decaf_lora.config import RunConfig, load
from decaf_lora.errors import UserError
from decaf_lora.records import BASELINES, read_summary


def check(config: RunConfig, simulated: bool = True) -> None:
    """Raises UserError for a baseline that the run cannot have, or a name by which it would be taken for another.

    Args:
        config: of the run.
        simulated: whether one process sees the data of all agents.
    """
    if config.setting is not None and KINDS.written(config.setting) in KINDS:
        raise UserError(f"setting: an algorithm is called {config.setting}; give the run a name of its own.")
    if config.baseline and config.attackers.kind is not None:
        raise UserError("baseline: it compares every agent, and attackers are not scored; leave one of the two out.")
    for kind in config.baseline:
        if config.algorithm.name == BASELINES[kind]:
            raise UserError(f"baseline: {config.algorithm.name} is the baseline {kind!r} itself; leave it out.")
    if "pooled" in config.baseline and not simulated:
        raise UserError(
            "baseline: pooled brings everybody's data to one place, so it is for simulation only; use alone."
        )


def configuration(config: RunConfig, kind: str) -> RunConfig:
    """The configuration of the baseline `kind` of a run: the run's own, but for algorithm and learning rate."""
    rate = config.baseline_learning_rate or config.training.learning_rate
    values = {name: getattr(config, name) for name in RunConfig.model_fields}
    values |= {
        "algorithm": {"name": BASELINES[kind]},
        "training": config.training.model_copy(update={"learning_rate": rate}),
        "baseline": (),
        "baseline_learning_rate": None,
        "setting": None,
    }
    return RunConfig.model_validate(values)


def is_due(path: Path, kind: str, rounds: int) -> bool:
    """Whether the baseline `kind` of the run in `path` has still to be trained, or trained further."""
    folder = path / kind
    if not (folder / "summary.json").exists():
        return True
    saved = load(RunConfig, folder / "config.yaml")
    [row] = read_summary(folder / "summary.json")
    return saved.rounds < rounds and row.diverged is None
