"""A score means the same everywhere: what a constant answer scores, the worst agent, and the mean on the screen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from command import TOY
from decaf_lora import TrainingConfig, algorithms, graphs, partition
from decaf_lora.records import mean_score
from decaf_lora.run import Run
from decaf_lora.tasks.scores import ClassScore
from toy import Toy


@pytest.mark.parametrize("metric", ["accuracy", "f1", "macro-f1"])
@pytest.mark.parametrize("train", [[0, 0, 1], [1, 0, 1, 1], [0, 1]])
def test_the_majority_class_against_scikit_learn(metric: str, train: list[int]) -> None:
    test = np.array([0, 1, 1, 1, 0])
    constant = np.full(len(test), np.bincount(train).argmax())
    expected = {
        "accuracy": accuracy_score(test, constant),
        "f1": f1_score(test, constant),
        "macro-f1": f1_score(test, constant, average="macro", zero_division=0),
    }
    score = ClassScore(metric, ["no", "yes"])
    assert score.majority(np.array(train), torch.from_numpy(test)) == pytest.approx(expected[metric])


def test_a_class_that_only_the_test_set_has(digits_task: object) -> None:
    score = ClassScore("accuracy", ["a", "b", "c"])
    assert score.majority(np.array([1, 1, 0]), torch.tensor([2, 2, 1, 2])) == pytest.approx(0.25)
    counts = np.bincount(digits_task.labels)  # type: ignore[attr-defined]
    found = digits_task.majority_score()  # type: ignore[attr-defined]
    labels = digits_task.test_batch(np.arange(397))["labels"]  # type: ignore[attr-defined]
    assert found == pytest.approx(float((labels == counts.argmax()).double().mean()))


def test_a_score_that_is_a_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the task to the table: the worst agent is the highest, and what got lower was learnt."""
    from decaf_lora.cli import main

    task = TOY.replace("make_toy", "make_distance")
    run = ["run", "digits", "--task", task, "--agents", "3", "--rounds", "3", "--lr", "0.1"]
    more = ["--partition", "dirichlet:0.3", "--algorithm", "local", "--training.agents_per_pass", "3"]
    assert main([*run, *more, "--out", str(tmp_path / "r")]) == 0
    last = json.loads((tmp_path / "r" / "records.jsonl").read_text().splitlines()[-1])
    [row] = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert row["worst_score"] == max(last["scores"]) > min(last["scores"])
    assert row["lower_is_better"]
    assert row["mean_score"] < row["start_score"]
    assert "nothing useful" not in capsys.readouterr().out


def test_the_mean_on_the_screen_is_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A score that is not finite leaves the mean unknown on both; it was left out of one of them."""
    run = Run(
        Toy(), algorithms.local(), graphs.ring(3), partition.iid(Toy().labels, 3, seed=0), TrainingConfig(), rounds=1
    )
    *_, record = run.train()
    run.close()
    assert mean_score(record) == pytest.approx(np.mean(record.scores))
    assert mean_score(type(record)(**{**record.__dict__, "scores": [*record.scores[:-1], None]})) is None
