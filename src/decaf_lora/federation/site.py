"""What is an agent made of? What its site sets, its run, and a run on its own data alone to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from decaf_lora import partition
from decaf_lora.config import AlgorithmConfig, RunConfig
from decaf_lora.engines.mesh.engine import Mesh
from decaf_lora.engines.mesh.outcome import Limits
from decaf_lora.federation.file import Signed
from decaf_lora.run import Run
from decaf_lora.runs.build import build_run
from decaf_lora.runs.signals import stopping
from decaf_lora.tasks.base import Task


@dataclass(frozen=True)
class Site:
    """What a site sets when it starts its agent."""

    federation: Path
    name: str
    out: Path
    """Folder of the run."""
    told: str | None = None
    """Fingerprint of the organiser's key; needed the first time."""
    key: Path | None = None
    """File of the agent's key; None: NAME.key beside the federation file."""
    local: Mapping[str, Any] = field(default_factory=dict)
    """What the site sets for itself, fields of `terms.Local`."""
    bind: str | None = None
    """HOST:PORT to listen on; None: the port that the file names, on all addresses."""
    share: bool = False
    """Whether to hold only this agent's share of the data under `partition`, if all sites have the same file."""
    alone: bool = True
    """Whether to train on the site's data alone first, to compare."""


def make_engine(signed: Signed, number: int, config: RunConfig) -> Mesh:
    """The engine of agent `number`, not yet connected."""
    limits, steps = signed.limits, config.gossip_steps
    assert isinstance(steps, int)
    given = Limits(give_up=limits.give_up, linger=limits.give_up)
    return Mesh(
        number,
        signed.schedule(),
        config.rounds,
        gossip_steps=steps,
        names=[member.name for member in signed.agents],
        limits=given if limits.patience is None else replace(given, patience=limits.patience),
        own_pace=limits.patience is None,
    )


def make_run(signed: Signed, number: int, config: RunConfig, share: bool, engine: Mesh) -> Run:
    """The run of agent `number` on `engine`; `share` as of `Site`."""

    def split(task: Task) -> partition.Own:
        names = tuple(member.name for member in signed.agents)
        return partition.Own(number, len(names), _examples(task, number, config, share), task.labels, names=names)

    run: Run = build_run(config, lambda _: engine, graph=signed.schedule(), split=split)
    return run


def train_alone(
    signed: Signed, number: int, config: RunConfig, share: bool, told: Callable[[int], None]
) -> float | None:
    """The score of agent `number` after as many rounds on its own data alone, with the batches of the federation.

    Args:
        told: called with the number of each round.

    Raises:
        KeyboardInterrupt: it was asked to stop.
    """
    changes = {"algorithm": AlgorithmConfig(name="local"), "gossip_steps": 1, "evaluate_every": config.rounds}
    config = config.model_copy(update=changes)
    score: float | None = None
    run = make_run(signed, number, config, share, make_engine(signed, number, config))
    with run, stopping(run.stop):
        for record in run.train():
            told(record.round)
            score = record.scores[0] if record.scores else score
        if run.round < run.rounds:
            raise KeyboardInterrupt
    return score


def _examples(task: Task, number: int, config: RunConfig, share: bool) -> Any:
    """Indices of this agent's examples: all on this machine or, with `share`, its part of them."""
    if not share:
        return np.arange(len(task.labels))
    return partition.parse(config.partition, task.labels, config.agents, config.seed, task.column).shard(number)
