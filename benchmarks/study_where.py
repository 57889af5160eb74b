"""Where does what win? A controlled sweep on banking77 and clinc150, for docs/methods.md.

    python benchmarks/study_where.py --data DIR     # makes what is missing; may be killed at any time
    python benchmarks/study_where.py --status       # what is left, in runs and processor hours
    python benchmarks/study_where.py --table        # the tables of what is there
    python benchmarks/study_where.py --write        # puts them into docs/methods.md

DIR as for results_minilm.py. On tasks of 4 and 6 classes DeCAF was ahead of DLoRA and an exact average with tracking
level with FedAvg; on banking77 it is the other way round. Which factor decides? One at a time, around two settings of
MiniLM with about 600 examples, Dirichlet(0.1) and 40 rounds of 3 steps: 6 classes, and all 77:

    classes       4, 6, 20 and all, about 600 examples in all; both data sets
    optimizer     AdamW's beta_2 .99 instead of .999; gradients clipped to a norm of 2
    length        10 and 120 rounds
    rank, alpha   1 and 1; 16 and 16; 4 and 32
    examples      10 and 30 a class (6 classes), 30 a class (77 classes)
    head          6 classes under a head of 77, so that the head's share of the trained numbers is that of 77 classes
    head's rate   16 times the adapters' (found here: it moves the differences more than all else)
    rate          the search has the held-out score of every rate that was tried

The classes that are kept are drawn by seed 0 among those with 100 examples or more. What decides is read off two
differences, DeCAF - DLoRA on the ring, and exact tracking - FedAvg. Each cell at its own best rate (study_runs.py says
how; the best rate of one seed alone was the last before training failed: DeCAF with 150 classes had .304 held out with
seed 0 and .084 on the test questions), two seeds. Local and pooled training are left out: study_methods.py has them.

Estimate: 7.5 runs a cell, about 12 s of one core each (10 rounds 5 s, 120 rounds 30 s): about 3 hours.
"""

from __future__ import annotations

import csv
import functools
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import study_methods
import study_runs
from decaf_lora.config import RunConfig
from study_runs import NOT_YET, RATE, Cell, Job, Records, Row, Study, results, searched, shown

HERE = Path(__file__).parent
CACHE = Path(tempfile.gettempdir()) / "decaf-study-where"
SEEDS = (0, 1)
METHODS: dict[tuple[str, str], dict[str, Any]] = {
    ("decaf", "ring"): {"algorithm.name": "decaf", "graph": "ring"},
    ("dlora", "ring"): {"algorithm.name": "dlora", "graph": "ring"},
    ("decaf_tracked", "exact"): {"algorithm.name": "decaf_tracked", "graph": "base:5", "gossip_steps": "period"},
    ("fedavg", "server"): {"algorithm.name": "fedavg"},
    ("decaf_tracked", "ring"): {"algorithm.name": "decaf_tracked", "graph": "ring"},
}
TESTS = {4: 120, 6: 180, 20: 200, 77: 231, 150: 300}
"""Classes -> test questions."""
SHOTS = {4: 100, 6: 100, 20: 30, 77: 10, 150: 5}
"""Classes -> examples a class over all agents: about 600 in all."""
WIDE = "6 classes, head of 77"


def _bases() -> dict[str, tuple[str, int]]:
    """Name of a base -> its data set and number of classes."""
    return {f"{name}-{k}": (name, k) for name, most in (("banking77", 77), ("clinc150", 150)) for k in (4, 6, 20, most)}


BASES = _bases()


def _settings() -> dict[tuple[str, str], tuple[str, dict[str, Any]]]:
    """(factor, setting) -> base and what differs from it."""
    found: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for name, (data, classes) in BASES.items():
        found["classes", f"{data}, {classes} classes"] = (name, {})
    for told, more in (("beta_2 .99", {"training.betas": (0.9, 0.99)}), ("clip_norm 2", {"training.clip_norm": 2.0})):
        for k in (6, 77):
            found["optimizer", f"{k} classes, {told}"] = (f"banking77-{k}", dict(more))
    for rounds in (10, 120):
        for k in (6, 77):
            found["length", f"{k} classes, {rounds} rounds"] = (f"banking77-{k}", {"rounds": rounds})
    for rank, alpha in ((1, 1), (16, 16), (4, 32)):
        for k in (6, 77):
            values = {"lora.r": rank, "lora.lora_alpha": alpha}
            found["rank, alpha", f"{k} classes, rank {rank}, alpha {alpha}"] = (f"banking77-{k}", values)
    for k, shots in ((6, 10), (6, 30), (77, 30)):
        values = {"partition": f"shots:{shots}/dirichlet:0.1"}
        # A handful of banking77's classes have fewer than 30.
        values = {"partition": f"up-to:{shots}/dirichlet:0.1"} if k == 77 else values
        found["examples", f"{k} classes, {shots} a class"] = (f"banking77-{k}", values)
    found["head", WIDE] = ("banking77-wide", {})
    for k in (6, 77):
        values = {"training.head_rate_ratio": 16}
        found["head's rate", f"{k} classes, the head's rate 16 times the adapters'"] = (f"banking77-{k}", values)
    return found


SETTINGS = _settings()


def cell(factor: str, setting: str, method: str, place: str) -> Cell:
    """The cell of a method in a setting."""
    base_name, values = SETTINGS[factor, setting]
    values = {**METHODS[method, place], **values}
    axes = {RATE: (0.01, 0.02)}
    return Cell(("where", factor, setting, method, place), base_name, values, axes, SEEDS)


def cells() -> list[Cell]:
    """All cells; the tracked ring is compared over the classes and the optimizer's settings alone."""
    return [
        cell(factor, setting, method, place)
        for factor, setting in SETTINGS
        for method, place in METHODS
        if (method, place) != ("decaf_tracked", "ring") or factor in ("classes", "optimizer", "head's rate")
    ]


# --- tables -------------------------------------------------------------------------------------------------------


def tables(records: Records) -> str:
    """What every method reaches in every setting, and the held-out score by rate."""
    heads = " | ".join(f"{method}, {place}" if place != "server" else method for method, place in METHODS)
    lines = [
        f"| factor | setting | {heads} | DeCAF - DLoRA | exact - FedAvg |",
        "| --- | --- |" + " ---: |" * (len(METHODS) + 2),
    ]
    for factor, setting in SETTINGS:
        rows = {key: results(cell(factor, setting, *key), records) for key in METHODS}
        made = {one.name for one in cells()}
        shown_cells = [shown(rows[key] or None) if ("where", factor, setting, *key) in made else "–" for key in METHODS]
        ring = _minus(rows["decaf", "ring"], rows["dlora", "ring"])
        exact = _minus(rows["decaf_tracked", "exact"], rows["fedavg", "server"])
        lines.append(f"| {factor} | {setting} | {' | '.join(shown_cells)} | {ring} | {exact} |")
    return "\n".join(lines) + "\n\n" + by_rate(records)


def _minus(ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    if not ours or not theirs or any(row["score"] is None for row in [*ours, *theirs]):
        return NOT_YET if not ours or not theirs else "diverged"
    means = [statistics.fmean(row["score"] for row in rows) for rows in (ours, theirs)]
    return f"{means[0] - means[1]:+.3f}"


def by_rate(records: Records) -> str:
    """Held-out score with seed 0 at every rate that a search has tried."""
    lines = ["**By rate** (held-out examples, seed 0)", "", "| setting | method | rate: score |", "| --- | --- | --- |"]
    for k in (6, 77):
        for method, place in METHODS:
            one = cell("classes", f"banking77, {k} classes", method, place)
            points = sorted(searched(one, records).points, key=lambda point: point[RATE])
            rows = [(point[RATE], records.of(Job(one, point, 0, True))) for point in points]
            scores = [f"{rate:g}: {_score(row)}" for rate, row in rows if row is not None]
            lines.append(f"| {k} classes | {method}, {place} | {', '.join(scores) or NOT_YET} |")
    return "\n".join(lines)


def _score(row: Row) -> str:
    return "diverged" if row["score"] is None else f"{row['score']:.3f}".replace("0.", ".")


# --- bases --------------------------------------------------------------------------------------------------------


def base(name: str, data: Path, cache: Path = CACHE) -> RunConfig:
    """The run on a data set that is cut to some classes; `banking77-wide`: 6 classes under a head of 77."""
    set_name, classes = BASES["banking77-6" if name == "banking77-wide" else name]
    whole = study_methods.base(set_name, data)
    folder, kept = _cut(whole, classes, cache / f"{set_name}-{classes}")
    task = {"data": str(folder), "max_test": TESTS[classes], "label_column": "label"}
    if name == "banking77-wide":
        others = sorted(
            set(_rows(Path(whole.task.data or ""), "train", whole.task.label_column or "label")[1]) - {*kept}
        )
        task["classes"] = (*sorted(kept), *others)
    values = whole.model_dump() | {"partition": f"shots:{SHOTS[classes]}/dirichlet:0.1", "test": "all"}
    return RunConfig.model_validate({**values, "task": {**values["task"], **task}})


def _cut(whole: RunConfig, classes: int, folder: Path) -> tuple[Path, list[str]]:
    """The folder of the data set with so many of its classes, and the classes."""
    source, column = Path(whole.task.data or ""), whole.task.label_column or "label"
    counts = Counter(_rows(source, "train", column)[1])
    frequent = sorted(name for name, count in counts.items() if count >= 100)
    draw = np.random.default_rng(0).permutation(len(frequent))[:classes]
    kept = sorted(counts) if classes == len(counts) else [frequent[i] for i in draw]
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        pairs = [pair for pair in zip(*_rows(source, split, column), strict=True) if pair[1] in kept]
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder, kept


def _rows(folder: Path, split: str, column: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a split, from CSV or JSON lines."""
    if (file := folder / f"{split}.csv").exists():
        with file.open(encoding="utf-8", newline="") as opened:
            rows: list[dict[str, str]] = list(csv.DictReader(opened))
    else:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [row[column] for row in rows]


STUDY = Study(
    text=__doc__ or "",
    records=HERE / "results_study_where.jsonl",
    cells=cells(),
    bases={name: functools.partial(base, name) for name in (*BASES, "banking77-wide")},
    assumed=dict.fromkeys((*BASES, "banking77-wide"), 18),
    tables=tables,
    page=HERE.parent / "docs" / "methods.md",
    mark="study_where",
)


if __name__ == "__main__":
    study_runs.main(STUDY)
