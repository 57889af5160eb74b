"""Comparisons: what is given twice, names that clash, a mistake in one run of many, rounds that grow."""

import json
import shutil

import pytest

from command import SMALL, TOY, decaf, line_of, lines_of
from decaf_lora.config import CompareConfig
from decaf_lora.errors import UserError
from decaf_lora.runs.compare import cells

COMPARE = ("compare", "digits", *SMALL, "--seeds", "0", "--algorithms", "local", "dlora")


def config(**values) -> CompareConfig:
    return CompareConfig.model_validate({"task": {"name": TOY}, "agents": 4, "seeds": (0,), **values})


def test_a_seed_or_an_algorithm_given_twice_runs_once(tmp_path, capsys):
    arguments = ("compare", "digits", *SMALL, "--seeds", 0, 0, "--algorithms", "dlora-fa", "dlora_fa", "local")
    lines = lines_of(capsys, *arguments, "--jobs", 2, "--out", tmp_path / "cmp", code=0)
    assert lines == [
        "decaf: warning: algorithms: dlora_fa is given more than once; it runs once.",
        "decaf: warning: seeds: 0 is given more than once; it runs once.",
    ]
    rows = json.loads((tmp_path / "cmp/summary.json").read_text())
    assert [(row["algorithm"], row["seed"]) for row in rows] == [("dlora_fa", 0), ("local", 0)]
    assert "| 1 |" in (tmp_path / "cmp/table.md").read_text()  # one seed


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"graphs": ("torus:2x2", "torus-2x2")}, "graph: 'torus:2x2' and 'torus-2x2'"),
        ({"graphs": ("a/W.npy", "a_w.npy")}, "graph: 'a/W.npy' and 'a_w.npy'"),
        ({"partitions": ("shots:4/iid", "shots-4_iid")}, "partition: 'shots:4/iid' and 'shots-4_iid'"),
    ],
)
def test_runs_that_would_share_a_folder_are_refused(values, field):
    with pytest.raises(UserError, match="would share the folder") as caught:
        cells(config(algorithms=("dlora",), **values))
    assert str(caught.value).startswith(field)


def test_a_name_that_no_file_system_takes(tmp_path):
    with pytest.raises(UserError, match="the name of a run's folder would be too long"):
        cells(config(algorithms=("dlora",), graphs=("x" * 300 + ".npy",)))


MISTAKES = {
    "--graphs ring torus:2x5": "has 10 agents but the run has 3",
    "--partitions iid shots:1000": "fewer than 1000 shots",
    "--algorithms local dlora decav": "Did you mean 'decaf'",
    "--lora.target_modules first thrid": "lora.target_modules: thrid matches no linear layer",
    "--lora.ranks 1 2": "lora.ranks: 2 given for 3 agents",
}


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("options", list(MISTAKES))
def test_a_mistake_in_one_run_is_found_before_anything_is_written(options, jobs, tmp_path, capsys):
    out = tmp_path / "cmp"
    said = line_of(capsys, *COMPARE, *options.split(), "--jobs", jobs, "--out", out)
    assert MISTAKES[options] in said
    assert not out.exists()


def test_rounds_grow_and_finished_runs_go_on(tmp_path, capsys):
    out, constant = tmp_path / "cmp", ("--training.schedule", "constant")
    assert decaf(*COMPARE, *constant, "--jobs", 1, "--out", out) == 0
    first = json.loads((out / "summary.json").read_text())
    shutil.rmtree(out / "local-ring-iid-seed0")  # as if it had not begun
    said = lines_of(capsys, "compare", "--resume", out, "--task", TOY, "--jobs", 1, code=0)
    assert said == []
    again = json.loads((out / "summary.json").read_text())
    assert [row["mean_score"] for row in again] == [row["mean_score"] for row in first]
    assert lines_of(capsys, "compare", "--resume", out, "--task", TOY, "--rounds", 6, "--jobs", 1, code=0) == []
    for name in ("local", "dlora"):
        assert (out / f"{name}-ring-iid-seed0/records.jsonl").read_text().count("\n") == 7
    assert f"go on with it by `decaf compare --resume {out}`" in line_of(capsys, "run", "--resume", out)
    said = line_of(capsys, "compare", "--resume", out, "--task", TOY, "--rounds", 5)
    assert "differing fields: rounds: 6 -> 5" in said
