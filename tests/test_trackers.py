"""What trackers are told, read back with their own readers: every round once, also after a resume."""

import contextlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

from command import SMALL, decaf, line_of
from decaf_lora.records import Record, mean_score, read_records
from decaf_lora.runs import trackers
from decaf_lora.runs.events import Subscriber, all_of

FACTS = {"algorithm": "decaf", "graph": {"name": "ring"}, "partition": {"name": "iid"}, "seed": 0, "rounds": 4}


def scalars(folder):
    """Name -> (step, value) of every event, as TensorBoard shows them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder))
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def record(round_, **more):
    return Record(round=round_, bytes_sent=8.0, learning_rate=0.1, seconds={"train": 1.5}, **more)


class TestTensorBoard:
    def test_is_told_what_the_records_say(self, tmp_path, capsys):
        pytest.importorskip("tensorboard")
        out = tmp_path / "mine"
        assert decaf("run", "digits", *SMALL, "--log", "tensorboard", "--json", "--out", out) == 0
        said = capsys.readouterr()
        assert len(json.loads(said.out)) == 1, "standard output is for results"
        assert f"tensorboard: tensorboard --logdir {tmp_path / 'tensorboard'}" in said.err.replace("\n", "")
        found, records = scalars(tmp_path / "tensorboard" / "mine"), read_records(out / "records.jsonl")
        assert [step for step, _ in found["learning rate"]] == [0, 1, 2, 3, 4]
        evaluated = [(r.round, mean_score(r)) for r in records if r.scores]
        assert [(step, pytest.approx(value)) for step, value in found["score/mean"]] == evaluated
        assert [value for _, value in found["agents/consensus distance"]] == pytest.approx(
            [r.consensus_distance for r in records]
        )
        assert len(found["loss/mean"]) == 4

    def test_every_round_once_after_a_crash(self, tmp_path):
        pytest.importorskip("tensorboard")
        out = tmp_path / "mine"
        watch = trackers.watch(["tensorboard"], out)
        first, again = watch("mine"), trackers.watch(["tensorboard"], out, resume=True)("mine")
        first.start(FACTS)
        for round_ in range(4):
            first.record(record(round_, averaged_score=round_ / 10))
        again.start(FACTS)  # from the checkpoint of round 2; the first was never closed
        for round_ in (2, 3, 4):
            again.record(record(round_, averaged_score=round_ / 10))
        again.close(None)
        found = scalars(tmp_path / "tensorboard" / "mine")
        assert [step for step, _ in found["score/averaged model"]] == [0, 1, 2, 3, 4]

    def test_runs_of_a_comparison_lie_apart(self, tmp_path):
        pytest.importorskip("tensorboard")
        arguments = [*SMALL, "--rounds", "1", "--algorithms", "local", "decaf", "--seeds", "0", "--jobs", "1"]
        assert decaf("compare", "digits", *arguments, "--log", "tensorboard", "--out", tmp_path / "decaf") == 0
        folders = sorted(path.name for path in (tmp_path / "tensorboard" / "decaf").iterdir())
        assert folders == ["decaf-ring-iid-seed0", "local-ring-iid-seed0"]
        assert all(scalars(tmp_path / "tensorboard" / "decaf" / name)["score/mean"] for name in folders)


def test_the_example_of_the_guide_runs(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    page = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example.replace("rounds=30", "rounds=1"), {})
    assert [step for step, _ in scalars(tmp_path / "runs" / "tensorboard" / "notebook")["score/mean"]] == [0, 1]


class TestTrackio:
    def test_is_told_every_round_once(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
        pytest.importorskip("trackio", reason="trackio asks for an older pillow than constraints.txt has")
        from trackio import utils
        from trackio.sqlite_storage import SQLiteStorage

        if str(utils.TRACKIO_DIR) != str(tmp_path / "trackio"):
            pytest.skip("another test has imported trackio with another folder")
        out = tmp_path / "mine"
        first, other = (trackers.watch(["trackio"], out)(name) for name in ("one", "two"))
        for subscriber in (first, other):  # two at a time, as in a comparison
            subscriber.start(FACTS)
        for round_ in range(3):
            first.record(record(round_, averaged_score=round_ / 10))
            other.record(record(round_, averaged_score=0.5))
        first.close(None)
        other.close(None)
        again = trackers.watch(["trackio"], out, resume=True)("one")
        again.start(FACTS)
        for round_ in (2, 3):
            again.record(record(round_, averaged_score=round_ / 10))
        again.close(None)
        assert capsys.readouterr().out == ""
        logs = SQLiteStorage.get_logs("mine", "one")
        assert [(entry["step"], entry["score/averaged model"]) for entry in logs] == [
            (0, 0),
            (1, 0.1),
            (2, 0.2),
            (3, 0.3),
        ]
        assert [entry["score/averaged model"] for entry in SQLiteStorage.get_logs("mine", "two")] == [0.5] * 3
        assert SQLiteStorage.get_run_config("mine", "one")["graph"] == "ring"

    @pytest.mark.parametrize("variable", ["TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL"])
    def test_nothing_leaves_the_machine(self, variable, monkeypatch, tmp_path):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        monkeypatch.setenv(variable, "somebody/else")
        with pytest.raises(Exception, match=f"log: {variable} is set, so trackio would send"):
            trackers.watch(["trackio"], tmp_path / "r")


class TestMistakes:
    def test_a_tracker_that_is_not_installed(self, tmp_path, capsys, monkeypatch):
        found = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trackio" else found(name))
        line = line_of(capsys, "run", "digits", *SMALL, "--log", "trackio", "--out", tmp_path / "r")
        assert 'log: trackio is not installed; pip install "decaf-lora[trackio]", or leave it out.' in line
        assert not (tmp_path / "r").exists()

    def test_a_tracker_that_does_not_exist(self, tmp_path, capsys):
        assert "log" in line_of(capsys, "run", "digits", *SMALL, "--log", "mlflow", "--out", tmp_path / "r")

    def test_one_that_fails_costs_the_run_nothing(self, tmp_path, capsys):
        pytest.importorskip("tensorboard")
        (tmp_path / "tensorboard").write_text("a file in the way")
        out = tmp_path / "r"
        assert decaf("run", "digits", *SMALL, "--log", "tensorboard", "--out", out) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("log: tensorboard failed (") == 1
        assert "the run goes on without it" in said
        assert (out / "summary.json").exists()


def test_all_of_several_are_told_and_closed():
    heard = []

    class Ear(Subscriber):
        def __init__(self, name):
            self.name = name

        def start(self, facts):
            heard.append((self.name, "start"))

        def record(self, record):
            heard.append((self.name, record.round))

        def close(self, error):
            heard.append((self.name, "close"))
            if self.name == "b":
                raise OSError("gone")

    both = all_of(lambda name: Ear("a"), lambda name: Ear("b"))("run")
    both.start({})
    both.record(record(3))
    with contextlib.suppress(OSError):
        both.close(None)
    assert heard == [("a", "start"), ("b", "start"), ("a", 3), ("b", 3), ("b", "close"), ("a", "close")]
