"""`decaf tune`: searches of the toy task, stopped at any time and gone on with, without a look at the test set."""

import csv
import json

import pytest
import torch

from command import SMALL, TOY, decaf, line_of
from decaf_lora import UserError, tune
from decaf_lora import config as configs
from decaf_lora.config import RunConfig
from decaf_lora.runs import checkpoint
from decaf_lora.runs.build import build_run
from decaf_lora.runs.events import Interrupted, Subscriber
from decaf_lora.runs.folder import run as run_folder
from decaf_lora.tune.axes import read_axes

SEALED = TOY.replace("make_toy", "make_sealed")
RATES = {"training.learning_rate": [0.001, 0.03, 0.3]}


def small(task=SEALED, **more) -> RunConfig:
    values = {
        "task": {"name": task},
        "lora": {"lora_alpha": 4},
        "training": {"steps": 2, "batch_size": 4, "agents_per_pass": 3},
        "agents": 3,
        "partition": "iid",
        "rounds": 6,
        "checkpoint_every": 1,
    }
    return configs.build(RunConfig, {**values, **more})


def searched(out, **more):
    """The search that most tests make: three rates at 1 round, the best at 3 of its 6 rounds."""
    return tune.search(small(), RATES, out, share_of_rounds=0.5, **more)


def result(out):
    """All that a search leaves and that must not depend on when it was stopped."""
    tensors = {p.name: checkpoint.load_latest(p / "checkpoints")[0] for p in sorted((out / "runs").iterdir())}
    return (out / "trials.csv").read_text(), (out / "best.yaml").read_text(), tensors


def same(one, two):
    equal = all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(one[2].values(), two[2].values(), strict=True)
    )
    return one[:2] == two[:2] and one[2].keys() == two[2].keys() and equal


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A search that is never stopped, and what it has found."""
    out = tmp_path_factory.mktemp("whole") / "tune"
    return out, searched(out)


def test_the_best_of_those_that_were_trained_to_the_end(whole):
    _, found = whole
    assert found.plan.rungs == (1, 3)
    trained = {row.trial: row for row in found.trials if row.rounds == 3}
    assert found.score == max(row.score for row in trained.values())
    assert [row.state for row in found.trials].count("best") == 1
    assert found.values == next(row.values for row in found.trials if row.state == "best")
    # Every score is what a run of the trial's own, made whole, has after this round.
    for row in found.trials:
        base = {**small().model_dump(), "validation_share": 0.2, "evaluate_every": 1}
        base["training"]["learning_rate"] = row.values["training.learning_rate"]
        with build_run(configs.build(RunConfig, base)) as run:
            scores = {r.round: sum(r.scores) / 3 for r, _ in zip(run.train(), range(4), strict=False)}
        for round_, of_seeds in row.scores.items():
            assert of_seeds[0] == scores[round_]


def test_what_it_writes(whole):
    out, found = whole
    told = json.loads((out / "trials.json").read_text())
    assert told["best"] == found.values
    assert (told["score_name"], told["rungs"], told["validation_share"]) == ("held-out accuracy", [1, 3], 0.2)
    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert len(rows) == sum(len(row.scores) for row in found.trials)
    for row in rows:
        trial = told["trials"][int(row["trial"]) - 1]
        assert float(row["score"]) == trial["scores"][row["rounds"]][row["seed"]]
        assert float(row["training.learning_rate"]) == trial["values"]["training.learning_rate"]


def test_the_best_configuration_runs_as_it_is_on_all_examples(whole, tmp_path):
    out, found = whole
    best = configs.load(RunConfig, out / "best.yaml")
    assert best == found.best
    wanted = small().training.model_copy(update={"learning_rate": found.values["training.learning_rate"]})
    assert best == small().model_copy(update={"training": wanted})
    toy = best.model_copy(update={"task": best.task.model_copy(update={"name": TOY})})  # whose test set may be seen
    with build_run(toy) as run:
        assert len(run.partition.examples) == 120
        assert run.task.num_test == 30
    row, _ = run_folder(toy, tmp_path / "run")
    assert row.mean_score is not None


class Killed(BaseException):
    """As abrupt as a signal that cannot be caught: no checkpoint is written."""


def kill_at(moment):
    """A `Watch` of which the record number `moment` of the whole search is never written down further."""
    seen = [0]

    class Dying(Subscriber):
        def record(self, record):
            seen[0] += 1
            if seen[0] == moment:
                raise Killed

    return lambda name: Dying()


def test_a_search_that_is_killed_at_any_round_goes_on_bit_equal(whole, tmp_path):
    expected = result(whole[0])
    moment = 0
    while True:
        moment += 1
        out = tmp_path / str(moment)
        try:
            searched(out, watch=kill_at(moment))
            break  # there are no more rounds
        except Killed:
            pass
        searched(out, resume=True)
        assert same(result(out), expected), f"killed at record {moment}"
    assert moment > 8


def test_a_search_that_is_stopped_at_a_rung_goes_on_bit_equal(whole, tmp_path):
    """And a finished one that goes on trains nothing."""
    out = tmp_path / "tune"

    def stop(line):
        raise Killed

    while True:
        try:
            searched(out, resume=out.exists(), tell=stop)
            break
        except Killed:
            assert not (out / "best.yaml").exists()
    assert same(result(out), result(whole[0]))
    before = {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()}
    again = searched(out, resume=True, watch=kill_at(1))
    assert again.values == whole[1].values
    assert {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()} == before


def test_two_at_a_time_find_the_same(whole, tmp_path):
    searched(tmp_path / "tune", jobs=2)
    assert same(result(tmp_path / "tune"), result(whole[0]))


def test_a_signal_stops_it_with_the_way_to_go_on(tmp_path, capsys, monkeypatch):
    from decaf_lora.runs import folder

    record = folder.Folder.record

    def and_stop(self, made):
        record(self, made)
        self._run.stop()

    monkeypatch.setattr(folder.Folder, "record", and_stop)
    with pytest.raises(Interrupted):
        searched(tmp_path / "a")
    arguments = ["tune", "digits", *SMALL, "--over", "lr", 0.001, 0.1, "--out", tmp_path / "b"]
    assert decaf(*arguments, "--jobs", 1) == 130
    *_, line = capsys.readouterr().err.splitlines()
    assert line.endswith(f"Go on with: decaf tune --resume {tmp_path / 'b'} --task {TOY}")
    monkeypatch.undo()
    assert decaf("tune", "--resume", tmp_path / "b", "--task", TOY, "--jobs", 1, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["best"]["training.learning_rate"] in {row["values"]["training.learning_rate"] for row in told["trials"]}
    assert told["config"] == str(tmp_path / "b" / "best.yaml")


def test_several_axes_and_seeds(tmp_path):
    over = {"training.learning_rate": ["1e-2", "0.1"], "algorithm.name": ["decaf", "dlora"]}
    found = tune.search(small(), over, tmp_path / "tune", seeds=(1, 2), extensions=0, rungs=1, share_of_rounds=0.2)
    assert len(found.trials) == 4
    for row in found.trials:
        (of_seeds,) = row.scores.values()
        assert sorted(of_seeds) == [1, 2]
        assert row.score == pytest.approx(sum(of_seeds.values()) / 2)
        assert row.std == pytest.approx(abs(of_seeds[1] - of_seeds[2]) / 2**0.5)
    assert found.best.seed == 0  # the run's own
    assert found.best.algorithm.name == found.values["algorithm.name"]


def test_lower_may_be_better(tmp_path):
    distance = TOY.replace("make_toy", "make_distance")
    found = tune.search(small(distance, rounds=2), {"lr": [0.001, 0.1]}, tmp_path / "tune", rungs=1, extensions=0)
    scores = {row.values["training.learning_rate"]: row.score for row in found.trials}
    assert found.score == min(scores.values()) == scores[0.1] < scores[0.001]


def test_a_trial_that_diverges_loses(tmp_path, capsys):
    sgd = {"optimizer": "sgd", "steps": 2, "batch_size": 4, "agents_per_pass": 3}
    out = tmp_path / "tune"
    found = tune.search(small(training=sgd), {"lr": [0.01, 1e9]}, out, extensions=0)
    states = {row.values["training.learning_rate"]: (row.state, row.score) for row in found.trials}
    assert states[1e9] == ("diverged", None)
    assert found.values["training.learning_rate"] == 0.01
    assert "not finite" in json.loads((out / "trials.json").read_text())["trials"][1]["diverged"]
    # All of them: the record is there, and the exit code says so.
    path = tmp_path / "lost.yaml"
    path.write_text(configs.dump(small(training=sgd)))
    line = line_of(capsys, "tune", path, "--over", "lr", "1e9", "1e10", "--jobs", 1, "--out", tmp_path / "lost")
    assert line.startswith("decaf: tune: all 2 trials have diverged, the first, learning_rate 1e+09: training: the ")
    assert [t["state"] for t in json.loads((tmp_path / "lost/trials.json").read_text())["trials"]] == ["diverged"] * 2
    assert not (tmp_path / "lost" / "best.yaml").exists()


def test_a_value_at_the_end_is_said(tmp_path):
    with pytest.warns(UserWarning, match="learning_rate 0.001 is at the end of what was tried"):
        tune.search(small(rounds=1), {"lr": [0.001, 0.0001]}, tmp_path / "tune", extensions=0)


OVER = ("--over", "training.learning_rate", "1e-3", "1e-2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "over: name a field and its values, as in --over training.learning_rate 1e-3 3e-3 1e-2."),
        (("--over",), "over: name a field and its values"),
        (("--over", "lr", "1e-3"), "over: training.learning_rate needs at least two values"),
        (("--over", "lr", "1e-3", "0.001"), "over: training.learning_rate has 0.001 twice"),
        (("--over", "lr", "1e-3", "-1"), "training.learning_rate: must be above 0, or auto"),
        (("--over", "lr", "1e-3", "fast"), "training.learning_rate: "),
        (("--over", "lr", "1e-3", "auto"), "over: training.learning_rate auto is no value to try"),
        ((*OVER, "--over", "lr", "1", "2"), "over: training.learning_rate is given twice"),
        ((*OVER, *OVER), "over: training.learning_rate is given twice"),
        (
            ("--over", "training.learning_rat", "1", "2"),
            "over: training.learning_rat is no field. Did you mean training",
        ),
        (("--over", "learningrate", "1", "2"), "over: learningrate is no field."),
        (("--over", "rounds", "1", "2"), "over: rounds cannot be searched: trials are compared at equal rounds."),
        (("--over", "seed", "1", "2"), "over: seed cannot be searched: a seed is no choice to make; --seeds"),
        (("--over", "partition", "iid", "by-class"), "over: partition cannot be searched: it changes more than how"),
        (("--over", "task.max_train", "10", "20"), "over: task.max_train cannot be searched"),
        ((*OVER, "--seeds", "1", "1"), "seeds: one is there twice"),
        ((*OVER, "--keep", "1"), "keep: input should be greater than or equal to 2 (got 1)."),
        ((*OVER, "--rungs", "0"), "rungs: input should be greater than or equal to 1 (got 0)."),
        ((*OVER, "--extensions", "-1"), "extensions: input should be greater than or equal to 0 (got -1)."),
        ((*OVER, "--jobs", "-1"), "jobs: must be 0 (one a core) or more."),
        ((*OVER, "--validation_share", "1"), "validation_share: "),
        (("--over", "lora.r", "1", "2", "--lr", "auto"), "training.learning_rate: auto; search it, too"),
        ((*OVER, "--agents", "120"), "validation_share: every agent has a single example"),
        ((*OVER, "--graph", "torus:7x7"), "graph: "),
        (("--resume", *OVER), "resume: name the folder of the search"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = line_of(capsys, "tune", "digits", *SMALL, "--jobs", 1, *arguments)
    assert line.startswith(f"decaf: {said}")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_hold_something_else(capsys, tmp_path):
    arguments = ("tune", "digits", *SMALL, "--rounds", 1, *OVER, "--jobs", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "is not empty" in line_of(capsys, *arguments, "--out", tmp_path / "full")
    assert "holds no search" in line_of(capsys, *arguments, "--out", tmp_path / "full", "--resume")
    assert "holds no search" in line_of(capsys, "tune", "--resume", tmp_path / "nothing")
    assert decaf(*arguments, "--out", tmp_path / "t") == 0
    capsys.readouterr()
    assert "already holds a search" in line_of(capsys, *arguments, "--out", tmp_path / "t")
    line = line_of(capsys, *arguments, "--out", tmp_path / "t", "--resume", "--keep", 2)
    assert line.startswith(
        f"decaf: resume: the search in {tmp_path / 't'} is another one; differing fields: keep: 3 -> 2."
    )
    assert "to let it run, name it again" in line_of(capsys, "tune", "--resume", tmp_path / "t")
    line = line_of(capsys, "tune", "--resume", tmp_path / "t", "--task", TOY, "--seeds", 3)
    assert "resume: seeds: the search in" in line
    (tmp_path / "t" / "tune.yaml").write_text("base: 3\n")
    assert line_of(capsys, "tune", "--resume", tmp_path / "t", "--task", TOY).startswith("decaf: base: ")


def test_a_value_is_what_the_configuration_makes_of_it():
    config = small()
    axes = read_axes(config, {"lr": ["1e-3", "3e-3"], "lora.r": ["2", 4], "graph": ["ring", "torus:1x3"]})
    assert axes == {"training.learning_rate": (0.001, 0.003), "lora.r": (2, 4), "graph": ("ring", "torus:1x3")}
    assert read_axes(config, {"algorithm.tracking": ["true", "null"]}) == {"algorithm.tracking": (True, None)}
    with pytest.raises(UserError, match="1000 trials"):
        read_axes(config, {f: list(range(1, 40)) for f in ("lora.r", "lora.lora_alpha")})


def test_the_help_says_how(capsys):
    with pytest.raises(SystemExit):
        decaf("tune", "--help")
    assert "usage: decaf tune RECIPE|FILE.yaml" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        decaf("tune", "digits", "--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "--over" in printed
    assert "A field and the values to try" in printed
