"""The examples run as written, but for their length, and show what they say they show."""

import importlib.util
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_library(example, capsys):
    scores = example("library").main(["--rounds", "1", "--agents", "3"])
    assert {len(row) for row in scores.values()} == {3}
    assert len(scores) == 4
    assert "sigma_2 = 0.000" in capsys.readouterr().out  # a ring of three is the complete graph


def test_own_algorithm_sends_one_factor_at_a_time(example, capsys):
    records = example("own_algorithm").main(["--rounds", "4", "--agents", "2"])
    start, *sent = (record.bytes_sent for record in records)
    assert start == 0
    assert sent[0] == sent[1] > 0  # B
    assert sent[2] == sent[3] > 0  # A
    assert "round   4: mean" in capsys.readouterr().out


def test_merge(example, capsys, tmp_path):
    scores = example("merge").main(["--to", str(tmp_path)])
    assert scores["merged"] > max(scores["alice"], scores["bob"], scores["carol"])
    assert re.search(r"The cut to one rank lost [0-9.]+% of the update", capsys.readouterr().out)
    assert (tmp_path / "merged" / "adapter_model.safetensors").exists()


def test_trainer_on_a_folder(example, tmp_path, capsys):
    rows = "".join(f"{word} {place},{word}\n" for word in ("card", "cash", "rate", "top") for place in "abcd")
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text(f"text,category\n{rows}")
    trainer, given = example("trainer"), ["--data", str(tmp_path), "--steps", "2", "--every", "1", "--shots", "2"]
    scores = trainer.main([*given, "--validate"])
    assert {len(both) for both in scores.values()} == {2}
    assert "accuracy on all 4 classes, of 8 test examples" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        trainer.main(["--data", str(tmp_path / "nowhere")])


def test_own_data_ends_in_a_verdict_and_predictions(example, tmp_path, capsys):
    row = example("own_data").main(["--rounds", "2", "--out", str(tmp_path)])
    assert row["mean_score"] >= row["worst_score"]
    assert re.search(r"accuracy [0-9.]+ together, [0-9.]+ alone \(start", capsys.readouterr().out)
    assert len((tmp_path / "predictions" / "predictions.csv").read_text().splitlines()) == 61
    with pytest.raises(SystemExit):
        example("own_data").main(["--table", "visits.csv"])


def test_federation(example, tmp_path, capsys):
    scores = example("federation").main(["--rounds", "2", "--out", str(tmp_path / "federation")])
    assert {name: len(three) for name, three in scores.items()} == {"alice": 3, "bob": 3, "carol": 3}
    assert (tmp_path / "federation" / "carol" / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert "alice$ decaf federation status fed.yaml --name alice" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        example("federation").main(["--out", str(tmp_path / "federation")])


def test_the_notebook_runs(tmp_path):
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert.preprocessors")
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # what a machine printed is no source
    for cell in notebook.cells:
        cell.source = cell.source.replace("AGENTS, ROUNDS = 10, 10", "AGENTS, ROUNDS = 10, 1")
    nbconvert.ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_every_example_is_a_page_long_and_says_how_it_is_run():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 170, path.name
        assert f"python examples/{path.name}" in text.partition('"""\n')[0], path.name
