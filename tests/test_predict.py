"""`decaf predict`: its scores are those of the run, whoever's model and whatever the task; and what it writes."""

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from decaf_lora.adapters import merge
from decaf_lora.cli import main
from decaf_lora.config import TaskConfig
from decaf_lora.predict.described import Described
from decaf_lora.predict.rows import UNKNOWN, numbered
from decaf_lora.predict.written import cell, confusion, per_class
from decaf_lora.records import read_records
from decaf_lora.runs.export import export
from inputs import ROWS, album, decaf, lines, model, table

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("datasets_cache")]

FEW = "--agents 2 --rounds 2 --training.steps 3 --training.batch_size 4 --training.agents_per_pass 2 --partition iid"
FEW = [
    *FEW.split(),
    *["--graph", "complete", "--training.learning_rate", "0.05", "--checkpoint_every", "1", "--device", "cpu"],
]
KINDS = ("texts", "pairs", "answers", "instruction", "images")


def _data(kind, folder):
    """(folder of the data, the test file, options of the task)"""
    if kind == "images":
        album(folder / "album", count=5)
        return folder / "album", folder / "album" / "test", ["--task.name", "image-text"]
    header, rows = ("text", "label"), ROWS
    if kind == "pairs":
        header, rows = ("text", "other", "label"), [(text, "it is big", label) for text, label in ROWS]
    for split, some in (("train", rows[:24]), ("test", rows[24:])):
        table(folder / "tables" / f"{split}.csv", some, header)
    options = {
        "texts": ["--task.name", "sequence-classification", "--task.metric", "macro-f1"],
        "pairs": ["--task.name", "sequence-classification", "--task.text_pair_column", "other"],
        "answers": [
            "--task.name",
            "causal-lm",
            "--task.templates",
            "question : {text} ?",
            "--task.answers",
            "no",
            "yes",
        ],
        "instruction": ["--task.name", "causal-lm", "--task.prompt_column", "text", "--task.answer_column", "label"],
    }
    return folder / "tables", folder / "tables" / "test.csv", options[kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Kind -> a finished run of it, its test data and records; made when first asked for."""
    models, made = tmp_path_factory.mktemp("models"), {}
    families = {"texts": "bert", "pairs": "bert", "answers": "llama", "instruction": "llama", "images": "clip"}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            data, test, options = _data(kind, folder)
            base = ["--task.data", str(data), "--task.model", str(model(families[kind], models))]
            out = folder / "run"
            assert main(["run", "digits", *options, *base, *FEW, "--out", str(out)]) == 0
            *_, last = read_records(out / "records.jsonl")
            made[kind] = SimpleNamespace(out=out, test=test, last=last, folder=folder)
        return made[kind]

    return of


def predicted(to):
    with (to / "predictions.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((to / "scores.json").read_text(encoding="utf-8"))


def go(run, to, *more, source=None, data=None):
    assert main(["predict", str(source or run.out), "--data", str(data or run.test), "--to", str(to), *more]) == 0
    return predicted(to)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_run(kind, runs, tmp_path):
    run = runs(kind)
    rows, found = go(run, tmp_path / "averaged")
    score = "log-likelihood per token" if kind == "instruction" else "score"
    assert found[score] == pytest.approx(run.last.averaged_score, abs=1e-6)
    assert found["labelled"] == found["examples"] == len(rows)
    for agent in range(2):
        _, found = go(run, tmp_path / str(agent), "--agent", str(agent))
        assert found[score] == pytest.approx(run.last.scores[agent], abs=1e-6)
        # From what `decaf export` writes: the same predictions.
        export(run.out, agent, tmp_path / f"adapter-{agent}")
        again, _ = go(run, tmp_path / f"again-{agent}", source=tmp_path / f"adapter-{agent}")
        assert again == predicted(tmp_path / str(agent))[0]


@pytest.mark.parametrize("kind", ["texts", "answers"])
def test_a_merged_model_and_merged_adapters_predict_too(kind, runs, tmp_path):
    run = runs(kind)
    for agent in range(2):
        export(run.out, agent, tmp_path / f"adapter-{agent}")
    merge([tmp_path / "adapter-0", tmp_path / "adapter-1"], tmp_path / "merged")
    rows, _ = go(run, tmp_path / "a", source=tmp_path / "merged")
    truth, _ = go(run, tmp_path / "b")  # the averaged model: products of one rank, cut to it
    assert [row["row"] for row in rows] == [row["row"] for row in truth]
    export(run.out, 1, tmp_path / "whole", merge=True)
    rows, _ = go(run, tmp_path / "c", source=tmp_path / "whole")
    truth, _ = go(run, tmp_path / "d", "--agent", "1")
    assert [row["predicted"] for row in rows] == [row["predicted"] for row in truth]
    np.testing.assert_allclose(*[[float(r["probability"]) for r in side] for side in (rows, truth)], atol=1e-4)


def test_rows_are_in_the_order_of_the_file_and_labels_are_optional(runs, tmp_path):
    run = runs("texts")
    texts = ["the cat is good", "the big old dog ran on the mat under the tree", "the", "it is red"]
    data = table(tmp_path / "new.csv", [(text,) for text in texts], ("text",))
    rows, found = go(run, tmp_path / "a", data=data)
    assert [row["text"] for row in rows] == texts
    assert [row["row"] for row in rows] == ["1", "2", "3", "4"]
    assert {row["label"] for row in rows} == {""}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    assert "score" not in found
    assert sum(found["predicted"].values()) == 4
    # The same text gets the same answer alone, whatever it was padded with; some rows may have labels.
    one = table(tmp_path / "one.csv", [(texts[1], "no"), (texts[3], "")])
    again, found = go(run, tmp_path / "b", data=one)
    assert [row["predicted"] for row in again] == [rows[1]["predicted"], rows[3]["predicted"]]
    assert float(again[0]["probability"]) == pytest.approx(float(rows[1]["probability"]), abs=1e-5)
    assert found["labelled"] == 1
    assert [row["label"] for row in again] == ["no", ""]


def test_images_without_classes_are_predicted_by_path(runs, tmp_path):
    run = runs("images")
    album(tmp_path / "some", count=2)
    for name in ("a.png", "b.png"):
        (tmp_path / "new").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "some" / "test" / "dog" / "dog0.png", tmp_path / "new" / name)
    rows, found = go(run, tmp_path / "out", data=tmp_path / "new")
    assert [row["path"] for row in rows] == ["a.png", "b.png"]
    assert found["labelled"] == 0
    assert len({row["probability"] for row in rows}) == 1


def test_a_language_model_writes_its_answers(runs, tmp_path):
    run = runs("instruction")
    data = lines(tmp_path / "new.jsonl", [{"text": "the cat is good"}, {"text": "the dog is big"}])
    rows, found = go(run, tmp_path / "out", "--most-tokens", "3", data=data)
    assert [row["text"] for row in rows] == ["the cat is good", "the dog is big"]
    assert all(len(row["predicted"].split()) <= 3 and 0 < float(row["probability"]) <= 1 for row in rows)
    assert found == {**found, "examples": 2, "labelled": 0}


def test_all_that_prepares_an_example_is_described():
    """A field of the task that changes what the model reads must reach the prediction."""
    reading = {"data", "data_seed", "delimiter", "encoding", "file_column", "max_test", "max_train", "quoting"}
    reading |= {"subset", "test_share", "test_split", "train_split", "skip_bad"}
    speed = {"eval_batch_size", "gradient_checkpointing", "image_cache", "num_workers"}
    training = {"packing"}  # refused: of plain texts alone
    names = {"name", "model", "own", "label_column", "prompt_column", "classes"}  # written as templates, labels
    carried = {"text_column", "text_pair_column", "image_column", "answer_column", "templates", "answers", "metric"}
    carried |= {"length_normalized", "chat_template", "max_length", "positive", "dtype", "quantization", "pixel_range"}
    assert set(TaskConfig.model_fields) == reading | speed | training | names | carried
    task = {"use": "image-text", "model": "m", "labels": ["a", "b"], "templates": ["a {}"], "score_name": "F1 (a)"}
    task |= {"image_column": "scan", "pixel_range": [0, 4095], "dtype": "bfloat16", "quantized": True}
    config = Described(Path(), task, {}, True).config("here")
    assert (config.image_column, config.pixel_range, config.metric, config.positive) == ("scan", (0, 4095), "f1", "a")
    assert (config.dtype, config.quantization, config.classes) == ("bfloat16", "4bit", ("a", "b"))
    task = {"use": "answers", "model": "m", "labels": ["a", "b"], "templates": ["{x}?"], "answers": ["A", "B"]}
    task |= {"length_normalized": False, "chat_template": True, "max_length": 9, "score_name": "macro-F1"}
    config = Described(Path(), task, {}, True).config("here")
    assert (config.answers, config.length_normalized, config.chat_template) == (("A", "B"), False, True)
    assert (config.max_length, config.metric, config.templates) == (9, "macro-f1", ("{x}?",))


# What is written


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\tx", "\rx"])
def test_no_cell_is_a_formula(text):
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "good", "-1", "+2.5", "a=b", "'=x'", "-1e3"])
def test_other_cells_stay(text):
    assert cell(text) == text


def test_texts_come_back_from_the_table_as_they_were(runs, tmp_path):
    texts = ['the "cat", is\ngood', "=the cat", "größer cat 猫", "the;cat"]
    data = lines(tmp_path / "new.jsonl", [{"text": text} for text in texts])
    rows, _ = go(runs("texts"), tmp_path / "out", data=data)
    assert [row["text"] for row in rows] == [texts[0], "'" + texts[1], *texts[2:]]
    assert (tmp_path / "out" / "predictions.csv").read_bytes().startswith(b"\xef\xbb\xbf")


def test_the_table_of_classes_is_that_of_scikit_learn():
    draw = np.random.default_rng(0)
    true, told = draw.integers(0, 3, 50), draw.integers(0, 3, 50)
    matrix = confusion(true, told, 3)
    np.testing.assert_array_equal(matrix, confusion_matrix(true, told))
    truth = precision_recall_fscore_support(true, told)
    for i, values in enumerate(per_class(matrix, ("a", "b", "c")).values()):
        np.testing.assert_allclose(list(values.values()), [column[i] for column in truth])
    # A class that never occurs and is never predicted has no precision.
    empty = per_class(confusion(np.array([0]), np.array([0]), 2), ("a", "b"))["b"]
    assert empty == {"precision": None, "recall": None, "f1": None, "support": 0}


@pytest.mark.parametrize(
    ("values", "classes", "found"),
    [
        (["b", "a", None, " "], ("a", "b"), [1, 0, UNKNOWN, UNKNOWN]),
        ([1, 0, 1.0], ("neg", "pos"), [1, 0, 1]),  # numbers of classes with names
        ([1, 2], ("1", "2"), [0, 1]),  # names that are numbers
        ([2, 2], ("1", "2", "3"), [1, 1]),  # also where only some occur
        ([True, False], ("False", "True"), [1, 0]),
        ([True, False], ("no", "yes"), [1, 0]),
        (["0", "1"], ("no", "yes"), [0, 1]),
    ],
)
def test_labels_mean_classes(values, classes, found):
    assert numbered(values, classes, "label").tolist() == found


# Mistakes are one line, and leave nothing behind


def test_mistakes_are_named(runs, tmp_path, capsys):
    run, images = runs("texts"), runs("images")
    strange = table(tmp_path / "strange.csv", [("the cat", "perhaps")])
    other = table(tmp_path / "other.csv", [("the cat",)], ("words",))
    gap = table(tmp_path / "gap.csv", [("the cat", "no"), ("", "no")])
    plain = tmp_path / "plain"
    export(run.out, 0, plain)
    (plain / "decaf_lora.json").unlink()
    exported = tmp_path / "exported"
    export(run.out, 0, exported)
    to = tmp_path / "out"
    for words, source, data, more in (
        ("label_column: 1 of 1 labels in column 'label' are no classes of the model", run.out, strange, []),
        ("text_column: 'text' is not known. .*words", run.out, other, []),
        ("text_column: 1 of 2 test examples have nothing in column 'text'", run.out, gap, []),
        ("label_column: 'lable' is not known. Did you mean 'label'", run.out, run.test, ["--label-column", "lable"]),
        ("data: .*nowhere.csv does not exist", run.out, tmp_path / "nowhere.csv", []),
        ("model: .*nothing is no folder", tmp_path / "nothing", run.test, []),
        ("model: .*tables holds no run", run.folder / "tables", run.test, []),
        ("model: .*plain has no decaf_lora.json", plain, run.test, []),
        ("agent: .*exported holds one model", exported, run.test, ["--agent", "0"]),
        ("agent: all is no single model", run.out, run.test, ["--agent", "all"]),
        ("agent: ", run.out, run.test, ["--agent", "7"]),
        ("to: .* is not an empty folder", run.out, run.test, ["--to", str(run.out)]),
        ("split: 'dev' is not known", run.out, run.test.parent, ["--split", "dev"]),
        ("most_tokens: must be at least 1", run.out, run.test, ["--most-tokens", "0"]),
        ("image_column: 'image' is not known", images.out, run.test, []),
    ):
        code, said = decaf(capsys, "predict", source, "--data", data, "--to", to, *more)
        assert code == 2, words
        (line,) = [line for line in said if not line.startswith("decaf: warning")]
        assert re.search(f"decaf: {words}", line), line
        assert not to.exists()


def test_what_cannot_be_predicted_is_said(runs, tmp_path, capsys):
    out = tmp_path / "digits"
    assert main(["run", "digits", *FEW, "--out", str(out)]) == 0
    code, said = decaf(capsys, "predict", out, "--data", tmp_path, "--to", tmp_path / "to")
    assert code == 2
    assert any("decaf: model: the task digits is not one whose examples can be read" in line for line in said)
