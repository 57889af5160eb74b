"""Did it help me? A run's baselines against runs that train the same, kills in their middle, and the sentence."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import ranks
from command import SMALL, TOY, decaf, line_of
from decaf_lora.cli import main
from decaf_lora.config import RunConfig, build
from decaf_lora.errors import TrainingError, UserError
from decaf_lora.records import Answer, SummaryRow, answers, read_records, read_summary
from decaf_lora.runs.events import Interrupted, Subscriber
from decaf_lora.runs.folder import run
from decaf_lora.statistics import Difference

QUICK = [*SMALL, "--partition", "dirichlet:0.5", "--seed", "3"]


def row_of(folder: Path) -> SummaryRow:
    [row] = read_summary(folder / "summary.json")
    return row


def final_scores(folder: Path) -> list[float]:
    return next(r.scores for r in reversed(read_records(folder / "records.jsonl")) if r.scores)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with both baselines, and runs that train the same."""
    out = tmp_path_factory.mktemp("baseline")
    assert decaf("run", "digits", *QUICK, "--baseline", "alone", "pooled", "--out", out / "run") == 0
    for name in ("local", "centralized"):
        assert decaf("run", "digits", *QUICK, "--algorithm", name, "--out", out / name) == 0
    return out


class TestRun:
    def test_alone_is_local_training_from_the_same_start(self, folder):
        row = row_of(folder / "run")
        assert row.scores == final_scores(folder / "run")
        assert row.alone_scores == final_scores(folder / "local")
        assert row.pooled_score == row_of(folder / "centralized").mean_score
        start, alone = (
            read_records(path / "records.jsonl")[0].scores for path in (folder / "run", folder / "run/alone")
        )
        assert start == alone

    def test_the_run_ends_in_one_sentence(self, folder, capsys):
        capsys.readouterr()
        assert decaf("run", "--resume", folder / "run", "--task", TOY) == 0
        said = capsys.readouterr().out
        row = row_of(folder / "run")
        [line] = [line for line in said.splitlines() if line.startswith("decaf: accuracy ")]
        together, alone = sum(row.scores) / 3, sum(row.alone_scores) / 3
        assert f"accuracy {together:.3f} together, {alone:.3f} alone (start {row.start_score:.3f}, pooled data " in line
        better = sum(ours > own for ours, own in zip(row.scores, row.alone_scores, strict=True))
        assert f"; {better} of 3 agents are better off than alone" in line
        assert line.endswith(f"worst has {min(row.scores):.3f} together, {min(row.alone_scores):.3f} alone.")

    def test_a_finished_baseline_is_not_trained_again(self, folder):
        heard = []

        class Heard(Subscriber):
            def __init__(self, name):
                self.name = name

            def step(self, progress):
                heard.append(self.name)

        config = build(RunConfig, yaml.safe_load((folder / "run" / "config.yaml").read_text()))
        before = row_of(folder / "run")
        row, _ = run(config, folder / "run", resume=True, watch=Heard)
        assert heard == []
        assert row == before
        row, _ = run(config.model_copy(update={"rounds": 5}), folder / "run", resume=True, watch=Heard)
        assert heard == ["run", "run", "alone", "alone", "pooled", "pooled"]
        assert len(read_records(folder / "run" / "alone" / "records.jsonl")) == 6

    def test_the_report_opens_with_the_answer(self, folder):
        page = (folder / "run" / "report.html").read_text()
        [answer] = answers([row_of(folder / "run")])
        sentence = answer.sentence().replace("decaf: ", "DeCAF: ", 1)
        assert sentence in page
        assert page.index(sentence) < page.index("<table")


class Kill(Subscriber):
    """Dies like a killed process in a step of the baseline."""

    def __init__(self, name, rounds):
        self.name, self.rounds = name, rounds

    def step(self, progress):
        if self.name == "alone" and progress.round == self.rounds:
            raise SystemExit(9)


@pytest.mark.parametrize("round_", [1, 3])
def test_killed_in_the_baseline_and_resumed(tmp_path, round_):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert decaf("run", "digits", *QUICK, "--baseline", "--out", whole) == 0
    config = build(RunConfig, yaml.safe_load((whole / "config.yaml").read_text()))
    assert config.baseline == ("alone",)
    with pytest.raises(SystemExit):
        run(config, torn, watch=lambda name: Kill(name, round_))
    assert (torn / "alone" / "config.yaml").exists()
    assert len(read_records(torn / "alone" / "records.jsonl")) == round_
    assert row_of(torn).scores == row_of(whole).scores, "the run's own result is safe"
    row, _ = run(config, torn, resume=True)
    assert row.alone_scores == row_of(whole).alone_scores
    assert row.scores == row_of(whole).scores


def test_a_stop_in_the_baseline_names_the_run(tmp_path):
    assert decaf("run", "digits", *QUICK, "--out", tmp_path / "other") == 0
    config = build(RunConfig, yaml.safe_load((tmp_path / "other" / "config.yaml").read_text()) | {"baseline": "alone"})

    class Stop(Subscriber):
        def __init__(self, name):
            self.is_baseline = name == "alone"

        def attach(self, run):
            if self.is_baseline:
                run.stop()

    with pytest.raises(Interrupted) as stopped:
        run(config, tmp_path / "run", watch=Stop)
    assert stopped.value.directory == tmp_path / "run"


def test_a_baseline_can_be_added_to_a_finished_run(tmp_path):
    out = tmp_path / "run"
    assert decaf("run", "digits", *QUICK, "--out", out) == 0
    assert row_of(out).alone_scores is None
    assert decaf("run", "--resume", out, "--task", TOY, "--baseline") == 0
    assert len(row_of(out).alone_scores) == 3


def test_a_baseline_has_a_learning_rate_of_its_own(tmp_path):
    config = [*QUICK, "--baseline", "--baseline_learning_rate", "0.2"]
    assert decaf("run", "digits", *config, "--out", tmp_path / "run") == 0
    rates = [read_records(tmp_path / path / "records.jsonl")[0].learning_rate for path in ("run", "run/alone")]
    assert rates == [0.02, 0.2]
    assert decaf("run", "digits", *QUICK, "--algorithm", "local", "--lr", "0.2", "--out", tmp_path / "l") == 0
    assert row_of(tmp_path / "run").alone_scores == final_scores(tmp_path / "l")


@pytest.mark.filterwarnings("ignore:baseline")
def test_a_baseline_that_diverges_leaves_the_run_its_result(tmp_path, capsys):
    class Diverge(Subscriber):
        def __init__(self, name):
            self.is_baseline = name == "alone"

        def step(self, progress):
            if self.is_baseline:
                raise TrainingError("the loss is not finite")

    assert decaf("run", "digits", *QUICK, "--out", tmp_path / "other") == 0
    config = build(
        RunConfig, yaml.safe_load((tmp_path / "other" / "config.yaml").read_text()) | {"baseline": ["alone"]}
    )
    row, _ = run(config, tmp_path / "run", watch=Diverge)
    assert row.mean_score == row_of(tmp_path / "other").mean_score
    assert row.alone_scores is None
    assert row_of(tmp_path / "run" / "alone").diverged == "the loss is not finite"
    assert answers([row]) == []


def test_split_over_processes(tmp_path):
    arguments = ["run", "digits", *QUICK, "--baseline", "--training.agents-per-pass", "1"]
    assert decaf(*arguments, "--out", tmp_path / "one") == 0
    ended = ranks.start(
        tmp_path / "logs", 2, main, [*arguments, "--engine", "torchrun", "--out", str(tmp_path / "two")]
    )
    assert ended.codes == {0: 0, 1: 0}, ended.output
    assert row_of(tmp_path / "two").alone_scores == row_of(tmp_path / "one").alone_scores
    ended = ranks.start(
        tmp_path / "logs2",
        2,
        main,
        ["run", "digits", *QUICK, "--baseline", "pooled", "--engine", "torchrun", "--out", str(tmp_path / "three")],
    )
    assert ended.codes == {0: 2, 1: 2}
    assert any("baseline: pooled brings everybody's data to one place" in line for line in ended.lines)


def test_a_comparison_takes_them_as_runs_of_its_own(tmp_path, capsys):
    out = tmp_path / "cmp"
    base = [*QUICK, "--rounds", "2", "--algorithms", "decaf", "dlora", "--seeds", "0", "1", "--jobs", "1"]
    assert decaf("compare", "digits", *base, "--baseline", "--baseline_learning_rate", "0.3", "--out", out) == 0
    said = capsys.readouterr().out
    rows = read_summary(out / "summary.json")
    assert [(row.algorithm, row.seed) for row in rows] == [(a, s) for s in (0, 1) for a in ("decaf", "dlora", "local")]
    local = {row.seed: row for row in rows if row.algorithm == "local"}
    assert all(row.alone_scores == local[row.seed].scores for row in rows)
    assert not list(out.glob("*/alone"))
    assert read_records(out / "local-ring-dirichlet-0.5-seed0" / "records.jsonl")[0].learning_rate == 0.3
    assert [line.split(":")[0] for line in said.splitlines() if " alone (start " in line] == ["decaf", "dlora"]
    assert all("95 % interval" in line for line in said.splitlines() if " alone (start " in line)


def test_a_run_with_a_name_keeps_its_baseline(tmp_path, capsys):
    out = tmp_path / "run"
    assert decaf("run", "digits", *QUICK, "--baseline", "--setting", "our ring", "--out", out) == 0
    assert row_of(out).algorithm == "our ring"
    assert "our ring: accuracy " in capsys.readouterr().out
    line = line_of(capsys, "run", "digits", *QUICK, "--setting", "Centralized", "--out", tmp_path / "r")
    assert "setting: an algorithm is called Centralized; give the run a name of its own" in line


class TestMistakes:
    def test_of_itself(self, tmp_path, capsys):
        line = line_of(capsys, "run", "digits", *QUICK, "--algorithm", "local", "--baseline", "--out", tmp_path / "r")
        assert "baseline: local is the baseline 'alone' itself; leave it out" in line
        assert not (tmp_path / "r").exists()

    @pytest.mark.parametrize("given", [True, 3, ["together"], "yes", {"alone": 1}])
    def test_values_that_mean_nothing(self, given):
        with pytest.raises(UserError, match=r"^(config: )?baseline"):
            build(RunConfig, {"baseline": given})

    def test_a_rate_of_nothing(self):
        with pytest.raises(UserError, match="baseline_learning_rate: "):
            build(RunConfig, {"baseline_learning_rate": 0})

    def test_something_else_in_its_folder(self, tmp_path, capsys):
        assert decaf("run", "digits", *QUICK, "--out", tmp_path / "r") == 0
        (tmp_path / "r" / "alone").mkdir()
        (tmp_path / "r" / "alone" / "letter.txt").write_text("dear all")
        line = line_of(capsys, "run", "--resume", tmp_path / "r", "--task", TOY, "--baseline")
        assert "alone is not empty" in line
        assert row_of(tmp_path / "r").scores


def row(scores, alone, **more) -> SummaryRow:
    names = {"algorithm": "decaf", "graph": "ring", "partition": "iid", "seed": 0, "bytes_sent": 0.0, "seconds": 0.0}
    unused = dict.fromkeys(("mean_score", "worst_score", "std_score", "averaged_score"))
    return SummaryRow(**{**names, **unused, "score_name": "accuracy", "scores": scores, "alone_scores": alone, **more})


class TestAnswer:
    def test_in_words(self):
        [answer] = answers(
            [row([0.8, 0.7, 0.5], [0.4, 0.75, 0.5], start_score=0.1, majority_score=0.25, pooled_score=0.9)]
        )
        assert answer.sentence() == (
            "decaf: accuracy 0.667 together, 0.550 alone (start 0.100, majority class 0.250, pooled data 0.900); "
            "1 of 3 agents are better off than alone, 1 worse off, 1 as well off, and the worst has 0.500 together, "
            "0.400 alone."
        )
        assert answer.helped

    def test_one_agent(self):
        [answer] = answers([row([0.5], [0.6])])
        assert "; 0 of 1 agents is better off than alone, 1 worse off" in answer.sentence()
        assert answer.helped is False

    def test_of_a_loss_less_is_better(self):
        [answer] = answers([row([2.0, 1.0], [3.0, 0.5], lower_is_better=True)])
        assert (answer.better, answer.worse) == (1, 1)
        assert answer.gains == (1.0, -0.5)
        assert answer.helped
        assert "worst has 2.000 together, 3.000 alone" in answer.sentence()

    def test_over_seeds(self):
        pairs = [([0.8, 0.6], [0.4, 0.5]), ([0.9, 0.7], [0.3, 0.2]), ([0.7, 0.5], [0.5, 0.4])]
        [answer] = answers([row(*pair, seed=seed) for seed, pair in enumerate(pairs)])
        differences = [sum(ours) / 2 - sum(own) / 2 for ours, own in pairs]
        interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert answer.difference.mean == pytest.approx(sum(differences) / 3)
        assert (answer.difference.low, answer.difference.high) == pytest.approx(tuple(interval))
        assert "6 of 6 agents over 3 seeds are better off" in answer.sentence()
        assert "(95 % interval " in answer.sentence()
        assert ", which may be noise)" in answer.sentence()
        assert answer.helped is None

    @pytest.mark.parametrize(
        "unknown",
        [
            row(None, [0.5]),
            row([0.5], None),
            row([0.5, None], [0.5, 0.4]),
            row([0.5, 0.4], [0.5, math.nan]),
            row([0.5], [0.5, 0.4]),
            row([0.5], [0.4], diverged="the loss is not finite"),
            row([0.5], [0.4], algorithm="local"),
            row([0.5], [0.4], algorithm="centralized"),
        ],
    )
    def test_there_is_none_where_agents_cannot_be_compared(self, unknown):
        assert answers([unknown]) == []

    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
    def test_every_agent_counts_once(self, pairs):
        [answer] = answers([row([ours for ours, _ in pairs], [own for _, own in pairs])])
        [reverse] = answers([row([own for _, own in pairs], [ours for ours, _ in pairs])])
        assert answer.better == reverse.worse
        assert answer.better + answer.worse <= len(pairs)
        assert isinstance(answer, Answer)
        assert isinstance(answer.difference, Difference)

    def test_rows_of_earlier_summaries_are_read(self, tmp_path):
        old = json.loads(json.dumps(replace(row([0.5], [0.4])).__dict__))
        for field in ("score_name", "scores", "alone_scores", "pooled_score"):
            del old[field]
        (tmp_path / "summary.json").write_text(json.dumps([old]))
        assert answers(read_summary(tmp_path / "summary.json")) == []
