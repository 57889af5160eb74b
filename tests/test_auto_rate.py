"""`learning_rate: auto`: the number is chosen before the run, told in a line, and kept."""

import json

import pytest

from command import SMALL, TOY, decaf, line_of
from decaf_lora import UserError
from decaf_lora import config as configs
from decaf_lora.config import CompareConfig, RunConfig, TrainingConfig
from decaf_lora.optimizers import learning_rate
from decaf_lora.tune import auto

SHORT = ("--rounds", "2", "--jobs", "1")


@pytest.fixture(autouse=True)
def few_rates(monkeypatch):
    """Two rates, to save time."""
    monkeypatch.setattr(auto, "RATES", (0.001, 0.1))


def test_a_run_chooses_tells_and_keeps_its_rate(capsys, tmp_path):
    out = tmp_path / "run"
    arguments = ("run", "digits", *SMALL, *SHORT, "--lr", "auto", "--out", out)
    assert decaf(*arguments) == 0
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("learning rate of decaf: ")]
    rate = configs.load(RunConfig, out / "config.yaml").training.learning_rate
    assert line.startswith(f"learning rate of decaf: {rate:g}, the best of ")
    assert "20 % of the training examples, held out" in line
    assert json.loads((out / "learning_rate" / "chosen.json").read_text()) == {"decaf": rate}
    trials = json.loads((out / "learning_rate" / "decaf" / "trials.json").read_text())
    assert trials["best"] == {"training.learning_rate": rate}
    first = json.loads((out / "records.jsonl").read_text().splitlines()[0])
    assert first["learning_rate"] == rate
    assert "is not empty" not in said
    # Again, with the same words and with the folder alone: nothing is searched.
    assert decaf(*arguments, "--resume") == 0
    assert "learning rate of" not in capsys.readouterr().err
    assert decaf("run", "--resume", out, "--task", TOY) == 0
    assert "already holds a run" in line_of(capsys, *arguments)
    # A run that was begun with a number does not go on as one with auto.
    plain = tmp_path / "plain"
    assert decaf("run", "digits", *SMALL, "--rounds", "2", "--lr", "0.01", "--out", plain) == 0
    line = line_of(capsys, "run", "digits", *SMALL, *SHORT, "--lr", "auto", "--out", plain, "--resume")
    assert "training.learning_rate: the run in" in line


def test_a_stop_within_the_search_goes_on(capsys, tmp_path, monkeypatch):
    from decaf_lora.runs import folder

    record = folder.Folder.record

    def and_stop(self, made):
        record(self, made)
        self._run.stop()

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(folder.Folder, "record", and_stop)
        assert decaf("run", "digits", *SMALL, *SHORT, "--lr", "auto", "--out", out) == 130
    *_, line = capsys.readouterr().err.splitlines()
    assert line.endswith(f"Go on with: decaf run --resume {out} --task {TOY}")
    assert "already holds a run" in line_of(capsys, "run", "digits", *SMALL, *SHORT, "--lr", "auto", "--out", out)
    other = ("--lr", "auto", "--out", out, "--resume", "--seed", 1)
    assert "seed: 0 -> 1" in line_of(capsys, "run", "digits", *SMALL, *SHORT, *other)
    assert decaf("run", "--resume", out, "--task", TOY, "--jobs", 1) == 0
    assert (out / "summary.json").exists()
    whole = tmp_path / "whole"
    assert decaf("run", "digits", *SMALL, *SHORT, "--lr", "auto", "--out", whole) == 0
    assert (whole / "config.yaml").read_text() == (out / "config.yaml").read_text()


def test_every_algorithm_of_a_comparison_has_a_rate_of_its_own(capsys, tmp_path):
    base = {
        "task": {"name": TOY},
        "lora": {"lora_alpha": 4},
        "training": {"steps": 2, "batch_size": 4, "agents_per_pass": 3, "learning_rate": "auto"},
        "agents": 3,
        "partition": "iid",
        "rounds": 1,
        "algorithms": ["local", "dlora", "fedavg"],
        "learning_rates": {"fedavg": 0.05},
        "seeds": [0],
    }
    path, out = tmp_path / "c.yaml", tmp_path / "cmp"
    path.write_text(configs.dump(configs.build(CompareConfig, base)))
    assert decaf("compare", path, "--jobs", 1, "--out", out) == 0
    said = capsys.readouterr().err
    saved = configs.load(CompareConfig, out / "config.yaml")
    assert set(saved.learning_rates) == {"local", "dlora", "fedavg"}
    assert saved.learning_rates["fedavg"] == 0.05
    for name in ("local", "dlora"):
        rate = saved.learning_rates[name]
        assert f"learning rate of {name}: {rate:g}, the best of" in said
        cell = configs.load(RunConfig, out / f"{name}-ring-iid-seed0" / "config.yaml")
        assert cell.training.learning_rate == rate
    assert "learning rate of fedavg" not in said
    assert decaf("compare", path, "--jobs", 1, "--out", out, "--resume") == 0
    assert "learning rate of" not in capsys.readouterr().err


def test_where_it_cannot_be_chosen_it_is_refused_by_name(capsys, tmp_path):
    from decaf_lora.federation.terms import terms_of
    from decaf_lora.runs.build import build_run

    training = TrainingConfig(learning_rate="auto")
    for refuse in (
        lambda: build_run(RunConfig(training=training)),
        lambda: learning_rate(training, 0.5),
        lambda: terms_of(RunConfig(training=training)),
    ):
        with pytest.raises(UserError, match="learning_rate: auto"):
            refuse()
    with pytest.raises(UserError, match="validation_share: a federation"):
        terms_of(RunConfig(validation_share=0.2))
    for wrong in ("0", "-0.1", "fast"):
        line = line_of(capsys, "run", "digits", "--lr", wrong, "--out", tmp_path / "run")
        assert "learning_rate" in line.replace("-rate", "_rate")
        assert "constrained" not in line


def test_a_plan_counts_a_run_with_some_rate(capsys):
    assert decaf("plan", "digits", "--lr", "auto", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert any("to choose one by itself" in line for line in told["assumptions"])
