"""How does a configuration become a finished folder?

A run's folder holds config.yaml, environment.json, run.json, records.jsonl, checkpoints/, summary.json and
report.html. A run can be interrupted at any time and goes on with `resume`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decaf_lora import config as configs
from decaf_lora.config import RunConfig
from decaf_lora.errors import UserError
from decaf_lora.records import (
    RecordWriter,
    SummaryRow,
    environment,
    mean_score,
    replace_text,
    summarise,
    write_json,
)
from decaf_lora.runs.build import build_run
from decaf_lora.runs.events import Event, Interrupted, Watch, nobody
from decaf_lora.runs.signals import stopping


def run(config: RunConfig, out: Path, *, resume: bool = False, watch: Watch = nobody) -> SummaryRow:
    """Runs `config` into the folder `out`, or goes on there with `resume`; returns its summary row.

    Raises UserError for any mistake before anything is written, Interrupted after Ctrl-C.
    """
    check_folder(config, out, resume)
    engine = build_run(config)
    with contextlib.closing(engine):
        found = newest(out) if resume else None
        if found is not None:
            engine.restore(*found)
        return write(config, out, engine, found is not None, watch)


def started(out: Path) -> bool:
    return (out / "config.yaml").exists()


def newest(out: Path) -> tuple[Any, dict[str, Any]] | None:
    """The newest checkpoint of the run in `out`, if it has one."""
    from decaf_lora.runs import checkpoint

    return checkpoint.load_latest(out / "checkpoints") if (out / "records.jsonl").exists() else None


def due(config: RunConfig, round_: int) -> bool:
    return round_ > 0 and round_ % config.checkpoint_every == 0 and round_ < config.rounds


def write(config: RunConfig, out: Path, engine: Any, resumed: bool, watch: Watch, launched: bool = False) -> SummaryRow:
    """Trains, and writes the folder of the run."""
    from decaf_lora.report import write_report
    from decaf_lora.runs import checkpoint

    with disk(out):
        out.mkdir(parents=True, exist_ok=True)
        if not resumed or not (out / "run.json").exists():
            replace_text(out / "config.yaml", configs.dump(config))
            write_json(out / "environment.json", environment(str(engine.trainer.device)))
            write_json(out / "run.json", _facts(config, engine))
        # A run stopped before its first step starts again, with the record of the start.
        last = engine.round if resumed and (engine.round or engine.step_in_round) else None
        score: float | None = None
        with RecordWriter(out / "records.jsonl", last) as writer, stopping(engine.stop, launched):

            def on_step(round_: int, done: int, steps: int, losses: Any) -> None:
                fraction = (round_ - 1 + done / steps) / config.rounds
                watch(Event(out.name, round_, config.rounds, fraction, float(losses.mean()) / done, score))

            engine.on_step = on_step
            watch(Event(out.name, engine.round + 1, config.rounds, engine.round / config.rounds, None, None))
            for record in engine.train():
                writer.write(record)
                score = mean_score(record) if record.scores else score
                if due(config, record.round):
                    checkpoint.save(out / "checkpoints", *engine.snapshot())
            checkpoint.save(out / "checkpoints", *engine.snapshot())
        if engine.round < config.rounds:
            raise Interrupted(out, engine.round + 1)
        row = summarise(out)
        write_json(out / "summary.json", [row])
        write_report(out)
        watch(Event(out.name, config.rounds, config.rounds, 1.0, None, row.mean_score))
    return row


def _facts(config: RunConfig, engine: Any) -> dict[str, Any]:
    """What run.json says: the static facts of a run that its report needs."""
    from decaf_lora import graphs

    # The graph that was asked for, also of algorithms that do not use it: a comparison shows one.
    schedule = graphs.as_schedule(graphs.parse(config.graph, config.agents, config.seed))
    partition = engine.partition
    if partition.names:
        schedule = schedule.arranged(partition.names)
    names = getattr(engine.task, "classes", None)
    classes = [names[c] if names else str(c) for c in partition.classes]
    return {
        "algorithm": engine.algorithm.name,
        "graph": {
            "name": config.graph,
            "weights": schedule.at(0).weights.tolist(),
            "sigma_2": None if schedule.period is None else schedule.sigma_2,
        },
        "partition": {
            "name": config.partition,
            "label_table": partition.label_table().tolist(),
            "classes": classes,
        },
        "agents": config.agents,
        "names": list(partition.names),
        "ranks": []
        if engine.attached.uniform
        else [max(s.rank for s in engine.attached.sites_of(i).values()) for i in range(config.agents)],
        "rounds": config.rounds,
        "seed": config.seed,
        "task": engine.task.name,
        "score_name": engine.task.score_name,
        "lower_is_better": engine.task.lower_is_better,
        "majority_score": engine.task.majority_score(),
        "uses_graph": engine.algorithm.topology == "graph",
        "agents_per_pass": engine.trainer.agents_per_pass,
    }


def check_folder(config: RunConfig, out: Path, resume: bool) -> None:
    """Refuses a folder that is in use, or to go on with a run of another configuration."""
    kind = type(config)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; give a folder.")
    saved = out / "config.yaml"
    if not saved.exists():
        if resume:
            raise UserError(f"resume: {out} holds no run (no config.yaml); leave out --resume to start one there.")
        if out.exists() and any(out.iterdir()):
            raise UserError(f"out: {out} is not empty; choose another folder.")
        return
    if not resume:
        raise UserError(f"out: {out} already holds a run; pass --resume to go on with it, or choose another folder.")
    different = configs.differences(configs.load(kind, saved), config)
    if different:
        raise UserError(
            f"resume: the run in {out} has another config; differing fields: {'; '.join(different)}. "
            "Give the same values, or choose another --out."
        )


@contextlib.contextmanager
def disk(out: Path) -> Iterator[None]:
    """An error of the file system as one line that says what is kept."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"out: cannot write in {out} ({error.strerror or error}); free space or choose another --out. "
            "What is already there is kept; go on with --resume."
        ) from error
