"""Records survive interruption, summaries equal what a hand computes, tables say the same in every format."""

import csv
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from decaf_lora import records
from decaf_lora.errors import UserError
from decaf_lora.records import (
    Record,
    RecordWriter,
    Spread,
    SummaryRow,
    aggregate,
    machine,
    read_records,
    summarise,
    to_csv,
    to_latex,
    to_markdown,
    write_json,
)


def record(round: int, **values: object) -> Record:
    seconds = {"train": 1.0, "exchange": 0.25}
    return Record(**{"round": round, "bytes_sent": 100.0, "learning_rate": 0.1, "seconds": seconds, **values})


def row(algorithm: str = "decaf", seed: int = 0, **values: object) -> SummaryRow:
    base = SummaryRow(algorithm, "ring", "iid", seed, 0.8, 0.7, 0.05, 0.9, 1.5e6, 12.0)
    return replace(base, **values)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


class TestRecords:
    def test_what_is_written_is_read(self, path: Path) -> None:
        written = [
            record(0, scores=[0.1, 0.2], averaged_score=0.15),
            record(1, losses=[1 / 3, 2e-300], consensus_distance=0.5, interference=0.0, tail=1e-9),
        ]
        with RecordWriter(path) as writer:
            for one in written:
                writer.write(one)
        assert read_records(path) == written

    def test_every_line_is_there_before_the_next_round(self, path: Path) -> None:
        writer = RecordWriter(path)
        writer.write(record(0))
        assert len(read_records(path)) == 1
        writer.close()

    def test_what_is_not_finite_becomes_null(self, path: Path) -> None:
        with RecordWriter(path) as writer:
            writer.write(record(0, losses=[math.nan, 1.0], scores=[math.inf], tail=-math.inf))
        data = json.loads(path.read_text(), parse_constant=pytest.fail)
        assert (data["losses"], data["scores"], data["tail"]) == ([None, 1.0], [None], None)
        assert read_records(path)[0].losses == [None, 1.0]

    def test_fields_of_round_zero_may_be_absent(self, path: Path) -> None:
        path.write_text('{"round": 0, "bytes_sent": 0, "learning_rate": 0.1, "seconds": {}}\n')
        assert read_records(path)[0].losses is None

    def test_an_agent_of_a_mesh_leaves_rounds_out(self, tmp_path):
        """It goes on with all of its records; where it did not leave them out itself, a round that lacks is an end."""
        path = tmp_path / "records.jsonl"
        late = [record(0), record(1, weights={"1": 0.5}), record(5, weights={"1": 0.5}), record(6, weights={})]
        path.write_text("".join(json.dumps(vars(r)) + "\n" for r in late))
        assert records.whole_rounds(path) == (late, f"{path} ends with round 6")
        with RecordWriter(path, last_round=5) as writer:
            writer.write(record(6, weights={"2": 0.5}))
        assert [r.round for r in read_records(path)] == [0, 1, 5, 6]
        path.write_text("".join(json.dumps(vars(r)) + "\n" for r in (record(0), record(2), record(3))))
        assert records.whole_rounds(path) == ([record(0)], f"{path} lacks round 1")
        again = [late[0], late[1], late[2], late[1]]
        path.write_text("".join(json.dumps(vars(r)) + "\n" for r in again))
        assert records.whole_rounds(path) == (late[:3], f"{path} lacks round 6")

    @pytest.mark.parametrize("torn", [b'{"round": 2, "los', b"{", b'{"round": 2, "caf\xc3'])
    def test_a_torn_last_line_is_left_out(self, path: Path, torn: bytes) -> None:
        with RecordWriter(path) as writer:
            writer.write(record(0))
            writer.write(record(1))
        with path.open("ab") as file:
            file.write(torn)
        assert [one.round for one in read_records(path)] == [0, 1]

    @pytest.mark.parametrize(
        ("line", "says"), [("{", "JSON"), ("", "JSON"), ("[]", "object"), ('{"round": 1}', "bytes_sent")]
    )
    def test_any_other_broken_line_is_named(self, path: Path, line: str, says: str) -> None:
        good = json.dumps({"round": 0, "bytes_sent": 0, "learning_rate": 0.1, "seconds": {}})
        path.write_text(f"{good}\n{line}\n{good}\n")
        with pytest.raises(UserError, match=says) as caught:
            read_records(path)
        assert f"{path}, line 2" in str(caught.value)

    def test_a_missing_file_is_named(self, path: Path) -> None:
        with pytest.raises(UserError, match=r"records\.jsonl"):
            read_records(path)

    @pytest.mark.parametrize("torn", ["", '{"round": 4, "sco'])
    def test_a_resumed_run_equals_an_uninterrupted_one(self, path: Path, torn: str) -> None:
        rounds = [record(number, losses=[0.1 * number, math.nan]) for number in range(6)]
        with RecordWriter(path) as writer:
            for one in rounds:
                writer.write(one)
        whole = path.read_bytes()
        # Killed in round 4, checkpoint of round 2.
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]) + torn.encode())
        with RecordWriter(path, last_round=2) as writer:
            assert [one.round for one in read_records(path)] == [0, 1, 2]
            for one in rounds[3:]:
                writer.write(one)
        assert path.read_bytes() == whole

    def test_a_new_run_starts_afresh(self, path: Path) -> None:
        path.write_text("what an earlier run left\n")
        RecordWriter(path).close()
        assert path.read_bytes() == b""


class TestWriteJson:
    def test_arrays_dataclasses_and_nan(self, tmp_path: Path) -> None:
        target = tmp_path / "x.json"
        value = {"a": np.array([[1, 2]]), "b": np.float32(0.5), "c": (math.nan, None, "t"), 3: Spread(1.0)}
        write_json(target, value)
        expected = {"a": [[1, 2]], "b": 0.5, "c": [None, None, "t"], "3": {"mean": 1.0, "std": None, "missing": "n/a"}}
        assert json.loads(target.read_text()) == expected

    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path) -> None:
        target = tmp_path / "x.json"
        write_json(target, [1])
        with pytest.raises(TypeError):
            write_json(target, [object()])
        assert json.loads(target.read_text()) == [1]
        assert list(tmp_path.iterdir()) == [target]


FACTS = {"algorithm": "dlora", "graph": {"name": "ring"}, "partition": {"name": "iid"}, "seed": 7}


class TestSummary:
    def make(self, directory: Path, *lines: Record) -> Path:
        write_json(directory / "run.json", FACTS)
        with RecordWriter(directory / "records.jsonl") as writer:
            for line in lines:
                writer.write(line)
        return directory

    def test_by_hand(self, tmp_path: Path) -> None:
        evaluated = record(1, scores=[0.5, 0.7, 0.9], averaged_score=0.8)
        run = self.make(tmp_path, record(0, scores=[0.0] * 3, bytes_sent=0.0), evaluated, record(2))
        found = summarise(run)
        assert found == SummaryRow(
            algorithm="dlora",
            graph="ring",
            partition="iid",
            seed=7,
            mean_score=pytest.approx(0.7),
            worst_score=0.5,
            std_score=pytest.approx(math.sqrt(0.08 / 3)),  # of the agents, who are all there are
            averaged_score=0.8,
            bytes_sent=200.0,
            seconds=3.75,
            start_score=0.0,
            scores=[0.5, 0.7, 0.9],
        )
        write_json(run / "summary.json", [found])
        assert records.read_summary(run / "summary.json") == [found]

    def test_the_worst_agent_of_a_loss_has_the_highest(self, tmp_path: Path) -> None:
        run = self.make(tmp_path, record(0, scores=[0.5, 0.7, 0.9]))
        write_json(run / "run.json", FACTS | {"lower_is_better": True})
        assert summarise(run).worst_score == 0.9
        assert aggregate([summarise(run)])[0].lower_is_better

    def test_one_agent_without_a_score_leaves_the_mean_unknown(self, tmp_path: Path) -> None:
        found = summarise(self.make(tmp_path, record(0, scores=[0.9, math.nan], averaged_score=0.4)))
        assert (found.mean_score, found.worst_score, found.std_score) == (None, None, None)
        assert found.averaged_score == 0.4

    @pytest.mark.parametrize("lines", [(), (record(0), record(1))])
    def test_a_run_never_evaluated(self, tmp_path: Path, lines: tuple[Record, ...]) -> None:
        found = summarise(self.make(tmp_path, *lines))
        assert (found.mean_score, found.averaged_score) == (None, None)
        assert found.bytes_sent == 100.0 * len(lines)

    def test_facts_that_lack_a_field(self, tmp_path: Path) -> None:
        write_json(tmp_path / "run.json", {"algorithm": "dlora", "seed": 0})
        with pytest.raises(UserError, match="graph, partition"):
            summarise(tmp_path)

    @pytest.mark.parametrize("text", [None, "[{}]", "{"])
    def test_a_summary_that_is_none(self, tmp_path: Path, text: str | None) -> None:
        target = tmp_path / "summary.json"
        if text is not None:
            target.write_text(text)
        with pytest.raises(UserError, match=r"summary\.json"):
            records.read_summary(target)


class TestAggregate:
    def test_mean_and_deviation_over_seeds(self) -> None:
        [found] = aggregate([row(seed=seed, mean_score=score) for seed, score in enumerate((0.1, 0.2, 0.6))])
        assert found.seeds == 3
        assert found.mean_score.mean == pytest.approx(0.3)
        assert found.mean_score.std == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))

    def test_one_seed_has_no_deviation(self) -> None:
        assert aggregate([row()])[0].mean_score == Spread(0.8, None)

    def test_a_seed_counts_once(self) -> None:
        [found] = aggregate([row(mean_score=0.1), row(mean_score=0.3)])
        assert (found.seeds, found.mean_score) == (1, Spread(0.3, None))

    def test_a_missing_score_is_not_averaged_away(self) -> None:
        [found] = aggregate([row(seed=0, mean_score=None), row(seed=1, mean_score=0.9)])
        assert found.mean_score == Spread(None, None)
        assert found.worst_score.mean == pytest.approx(0.7)

    def test_algorithms_in_order_of_appearance_under_each_setting(self) -> None:
        rows = [
            row("local", graph="ring"),
            row("decaf", graph="complete"),
            row("decaf", graph="ring"),
            row("local", graph="complete"),
        ]
        found = [(one.graph, one.algorithm) for one in aggregate(rows)]
        assert found == [("ring", "local"), ("ring", "decaf"), ("complete", "local"), ("complete", "decaf")]

    def test_nothing(self) -> None:
        assert aggregate([]) == []


ROWS = [
    row("my_algorithm", 0, mean_score=0.8),
    row("my_algorithm", 1, mean_score=0.9),
    row("local", 0, bytes_sent=0.0, averaged_score=None, partition="a|b[bold]"),
]


class TestNothingLearnt:
    def test_names_what_is_not_beaten_and_what_to_try(self) -> None:
        rows = [
            row("decaf", mean_score=0.5, start_score=0.1, majority_score=0.4),
            row("local", mean_score=0.4, start_score=0.1, majority_score=0.4),
            row("dlora", mean_score=0.1, start_score=0.1, majority_score=0.4),
            row("fedavg", mean_score=0.05, start_score=0.1, majority_score=0.4),
            row("centralized", mean_score=None, start_score=0.1, majority_score=0.4),
        ]
        one, two = records.nothing_learnt(rows)
        assert "by local (ring, iid)" in one
        assert "not better than always giving the majority class (0.400)." in one
        assert "by dlora, fedavg (ring, iid)" in two
        assert "the start (0.100) and always giving the majority class (0.400)" in two
        assert all("training.learning_rate" in line and "\n" not in line for line in (one, two))

    def test_of_a_loss(self) -> None:
        rows = [row(name, mean_score=s, start_score=2.0, lower_is_better=True) for name, s in (("a", 1.5), ("b", 2.5))]
        [line] = records.nothing_learnt(rows)
        assert "by b (ring, iid)" in line

    def test_without_anything_to_compare_with(self) -> None:
        assert records.nothing_learnt([row()]) == []

    @pytest.mark.parametrize(
        ("scores", "mean"),
        [([0.25, 0.75], 0.5), ([0.25, None], None), ([0.25, math.nan], None), ([], None), (None, None)],
    )
    def test_the_mean_is_that_of_the_table(self, scores: list[float | None] | None, mean: float | None) -> None:
        one = record(3, scores=scores)
        assert records.mean_score(one) == mean
        assert records.summary_row(FACTS, [one]).mean_score == mean


class TestReferences:
    ROWS = (
        row("decaf", 0, start_score=0.1, majority_score=0.2),
        row("decaf", 1, start_score=0.1, majority_score=0.3),
        row("centralized", 0, start_score=0.15, majority_score=0.2),
        row("decaf", 0, graph="complete", start_score=0.1),
    )

    def test_stand_below_the_algorithms_of_their_setting(self) -> None:
        found = [(line[0], line[1], line[3], line[4]) for line in records.lines(aggregate(self.ROWS))]
        assert found == [
            ("decaf", "ring", "2", "0.800 ± 0.000"),
            ("centralized", "ring", "1", "0.800"),
            ("start", "ring", "2", "0.100 ± 0.000"),
            ("majority class", "ring", "2", "0.250 ± 0.071"),
            ("decaf", "complete", "1", "0.800"),
            ("start", "complete", "1", "0.100"),
        ]

    def test_are_in_every_table(self) -> None:
        assert "| majority class | ring | iid | 2 | 0.250 ± 0.071 | – |" in to_markdown(self.ROWS)
        assert r"majority class & ring & iid & 2 & 0.250 $\pm$ 0.071 & --" in to_latex(self.ROWS)
        found = list(csv.DictReader(io.StringIO(to_csv(self.ROWS))))
        assert [float(line["start_score"]) for line in found] == [0.1, 0.15, 0.1]
        assert [line["majority_score"] for line in found] == ["0.25", "0.2", ""]
        console = Console(file=io.StringIO(), width=80)
        console.print(records.table(self.ROWS[:2]))
        shown = console.file.getvalue()
        assert "majority" in shown
        assert "start" in shown
        assert "…" not in shown

    def test_starts_that_differ_are_told_apart(self) -> None:
        rows = [row("decaf", start_score=0.1), row("dlora", start_score=0.4)]
        assert [line[0] for line in records.references(aggregate(rows))] == ["start of decaf", "start of dlora"]


class TestTables:
    def test_markdown(self) -> None:
        assert to_markdown(ROWS).splitlines() == [
            "| algorithm | graph | partition | seeds | mean score | worst agent | std over agents "
            "| averaged model | sent per agent | time (s) |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            "| my_algorithm | ring | iid | 2 | 0.850 ± 0.071 | 0.700 ± 0.000 | 0.050 ± 0.000 "
            "| 0.900 ± 0.000 | 1.5 MB | 12.0 ± 0.0 |",
            r"| local | ring | a\|b[bold] | 1 | 0.800 | 0.700 | 0.050 | n/a | – | 12.0 |",
        ]

    def test_csv_keeps_every_digit(self) -> None:
        found = list(csv.DictReader(io.StringIO(to_csv(ROWS))))
        assert float(found[0]["mean_score"]) == (0.8 + 0.9) / 2
        assert float(found[0]["mean_score_std"]) == pytest.approx(0.1 / math.sqrt(2), rel=1e-12)
        assert (found[1]["averaged_score"], found[1]["mean_score_std"], found[1]["bytes_sent"]) == (
            "",
            "",
            "0.0",
        )
        assert found[1]["partition"] == "a|b[bold]"

    def test_latex_is_escaped(self) -> None:
        text = to_latex([*ROWS, row("a&b%~^\\{")])
        assert r"my\_algorithm & ring & iid & 2 & 0.850 $\pm$ 0.071" in text
        assert r"a\&b\%\textasciitilde{}\textasciicircum{}\textbackslash{}\{" in text
        assert " & -- & 12.0 \\\\" in text
        assert text.startswith("\\begin{tabular}{lllrrrrrrr}\n\\toprule\n")

    def test_terminal(self) -> None:
        console = Console(file=io.StringIO(), width=120)
        console.print(records.table(ROWS))
        text = console.file.getvalue()
        assert "0.850±0.071" in text
        demo = [
            records.SummaryRow("centralized", "ring", "dirichlet:0.1", s, 0.9 - s / 9, 0.1, 0.2, 0.5, 2345678.0, 9.1)
            for s in (0, 1)
        ]
        narrow = Console(file=io.StringIO(), width=80)
        narrow.print(records.table(demo))
        shown = narrow.file.getvalue()
        assert "…" not in shown  # nothing is cut off at 80 columns
        assert "ring, dirichlet:0.1, 2 seeds" in shown
        assert "a|b[bold]" in text  # shown, not read as markup

    def test_one_setting_needs_no_table_of_settings(self) -> None:
        assert set(records.tables(ROWS[:2])) == {"table.md", "table.csv", "table.tex"}

    def test_several_methods_have_a_table_of_differences(self) -> None:
        texts = records.tables([row("a", 0), row("b", 0)])
        assert {"differences.md", "differences.csv", "differences.tex"} < set(texts)

    def test_the_layout_of_papers(self) -> None:
        """Algorithms x (graph x partition), the columns graph by graph whatever the order of the rows."""
        rows = [
            row("local", 0, graph="ring", partition="iid", mean_score=0.5),
            row("local", 0, graph="complete", partition="iid", mean_score=0.5),
            row("d_c", 0, graph="ring", partition="iid", mean_score=0.6),
            row("d_c", 1, graph="ring", partition="iid", mean_score=0.8),
            row("d_c", 0, graph="complete", partition="iid", mean_score=None),
            row("d_c", 0, graph="ring", partition="non-iid", mean_score=0.25),
        ]
        found = records.pivot(rows)
        assert found.settings == [("ring", "iid"), ("ring", "non-iid"), ("complete", "iid")]
        assert found.graphs == [("ring", 2), ("complete", 1)]
        texts = records.tables(rows)
        assert texts["scores.md"].splitlines()[:6] == [
            "Mean score over agents",
            "",
            "| algorithm | ring, iid | ring, non-iid | complete, iid |",
            "| --- | ---: | ---: | ---: |",
            "| local | 0.500 | – | 0.500 |",
            "| d_c | 0.700 ± 0.141 | 0.250 | n/a |",
        ]
        assert texts["scores.tex"].splitlines()[1:10] == [
            r"\begin{tabular}{lrrr}",
            r"\toprule",
            r" & \multicolumn{2}{c}{ring} & \multicolumn{1}{c}{complete} \\",
            r"\cmidrule(lr){2-3} \cmidrule(lr){4-4}",
            r" & iid & non-iid & iid \\",
            r"\midrule",
            r"local & 0.500 & -- & 0.500 \\",
            r"d\_c & 0.700 $\pm$ 0.141 & 0.250 & n/a \\",
            r"\bottomrule",
        ]
        lines = list(csv.reader(io.StringIO(texts["scores.csv"])))
        assert [line[0] for line in lines] == ["metric", *["mean_score"] * 2, *["averaged_score"] * 2]
        assert lines[2][1:4] == ["d_c", str((0.6 + 0.8) / 2), lines[2][3]]
        assert float(lines[2][3]) == pytest.approx(0.2 / math.sqrt(2))
        assert lines[1][4:6] == ["", ""]

    @pytest.mark.parametrize(
        ("mean", "std", "text"),
        [
            (0.0, None, "0 B"),
            (999.0, None, "999 B"),
            (1000.0, None, "1 kB"),
            (1_234_567.0, 0.0, "1.23 MB"),
            (2e9, 1.5e8, "2 ± 0.15 GB"),
            (999_999.0, None, "1 MB"),
            (None, None, "n/a"),
        ],
    )
    def test_bytes_for_people(self, mean: float | None, std: float | None, text: str) -> None:
        assert records.human_bytes(Spread(mean, std)) == text


class TestEnvironment:
    def test_names_versions_and_hardware(self) -> None:
        found = records.environment()
        assert found["python"] == ".".join(map(str, sys.version_info[:3]))
        assert found["torch"].startswith("2.")
        assert found["device"] == "cpu"
        assert found["cpu_count"] >= 1
        assert found["processor"]
        json.dumps(found)

    def test_never_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*args: object, **kwargs: object) -> None:
            raise subprocess.TimeoutExpired("git", 10)

        monkeypatch.setattr(subprocess, "run", broken)
        monkeypatch.setattr(machine, "_processor", lambda: None)
        found = records.environment("cuda:99")
        assert found["commit"] is None
        assert found["device"] == "cuda:99"
        assert found["processor"]

    def test_commit_is_that_of_this_source_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def git(*arguments: str) -> str:
            identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
            command = ["git", "-C", str(tmp_path), *identity, *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

        source = tmp_path / "machine.py"
        source.write_text("x = 1\n")
        (tmp_path / "other.py").write_text("x = 1\n")
        git("init", "-q")
        git("add", "other.py")
        git("commit", "-qm", "m")
        monkeypatch.setattr(machine, "__file__", str(source))
        assert records.environment()["commit"] is None  # installed inside somebody else's checkout
        git("add", "machine.py")
        git("commit", "-qm", "m")
        assert records.environment()["commit"] == git("rev-parse", "HEAD")
        source.write_text("x = 2\n")
        assert records.environment()["commit"] == git("rev-parse", "HEAD") + "-dirty"
