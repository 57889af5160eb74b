"""`decaf init`: what it makes of people's files, that what it writes runs, and what it refuses."""

import re

import pytest
import yaml

from decaf_lora.config import RunConfig, build
from decaf_lora.errors import UserError
from decaf_lora.init import named_after, write
from decaf_lora.records import read_records
from decaf_lora.yaml_file import read_yaml
from inputs import ROWS, album, decaf, lines, model, table

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("datasets_cache")]

SITES = [(text, ("mayo", "charite", "ucl")[i % 3], label) for i, (text, label) in enumerate(ROWS)]
FEW = ["--rounds", "1", "--training.batch_size", "4", "--training.agents_per_pass", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def written(tmp_path, kind, data, **given):
    """The configuration that is written, and its text."""
    out = tmp_path / "my.yaml"
    out.unlink(missing_ok=True)
    write(kind, str(data), out, **given)
    return build(RunConfig, read_yaml(out, "recipe")), out.read_text(encoding="utf-8")


def _inputs(kind, folder):
    if kind == "images":
        return "images", "clip", album(folder / "pets", splits=("",), count=6)
    if kind == "split":
        return "images", "clip", album(folder / "pets", count=4)
    if kind == "answers":
        rows = [{"question": text, "answer": label} for text, label in ROWS]
        return "llm", "llama", lines(folder / "qa.jsonl", rows)
    if kind == "instruction":
        rows = [{"instruction": text, "input": "", "output": f"{text} {i} is {label}"} for i, (text, label) in
                enumerate(ROWS)]  # fmt: skip
        for row in rows:
            row["input"] = "it is red"
        return "llm", "llama", lines(folder / "tasks.jsonl", rows)
    if kind == "texts":
        path = folder / "stories.txt"
        path.write_text("\n\n".join(text for text, _ in ROWS))
        return "llm", "llama", path
    return "text", "bert", table(folder / "visits.csv", SITES, ("note", "clinic", "diagnosis"), delimiter=";")


@pytest.mark.parametrize("kind", ["table", "images", "split", "answers", "instruction", "texts"])
def test_what_is_written_runs_as_it_is(kind, models, tmp_path, capsys, monkeypatch):
    what, family, data = _inputs(kind, tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _ = decaf(capsys, "init", what, data.name, "--model", model(family, models))
    assert code == 0
    out = named_after(data.name)
    code, said = decaf(capsys, "run", out, *FEW, "--out", "run")
    assert code == 0, said
    records = read_records(tmp_path / "run" / "records.jsonl")
    assert [record.round for record in records] == [0, 1]


def test_a_table_with_sites(tmp_path):
    config, text = written(tmp_path, "text", _inputs("table", tmp_path)[2])
    task = config.task
    assert (task.text_column, task.label_column, task.test_share) == ("note", "diagnosis", 0.2)
    assert (config.partition, config.agents, config.graph) == ("column:clinic", 3, "complete")
    assert "each value of column 'clinic' is an agent: charite, mayo, ucl" in text
    assert "semicolons" in text  # what the reader found is said, too
    assert config.training.learning_rate == 5e-3
    assert config.training.head_rate_ratio == 16
    assert config.baseline == ("alone",)


def test_a_table_without_sites(tmp_path):
    config, _ = written(tmp_path, "text", table(tmp_path / "a.csv", ROWS * 6))
    assert (config.partition, config.agents) == ("iid", 4)
    assert config.training.batch_size == 4
    config, _ = written(tmp_path, "text", table(tmp_path / "b.csv", ROWS * 30))
    assert config.training.batch_size == 16


def test_a_column_of_sites_with_another_name(tmp_path):
    rows = [(text, label, "AB"[i % 2]) for i, (text, label) in enumerate(ROWS)]
    data = table(tmp_path / "a.csv", rows, ("text", "label", "Haus"))
    assert written(tmp_path, "text", data)[0].partition == "iid"
    config, _ = written(tmp_path, "text", data, site_column="Haus")
    assert (config.partition, config.agents) == ("column:Haus", 2)


def test_a_column_that_is_named_is_nothing_else(tmp_path):
    rows = [(text, label, "AB"[i % 2]) for i, (text, label) in enumerate(ROWS)]
    data = table(tmp_path / "a.csv", rows, ("note", "kind", "place"))
    config, _ = written(tmp_path, "text", data, site_column="place", text_column="note")
    assert (config.task.text_column, config.task.label_column) == ("note", "kind")
    assert (config.partition, config.agents) == ("column:place", 2)
    with pytest.raises(UserError, match=r"^site_column: 'kind' is also the label_column; a column has one use\.$"):
        written(tmp_path, "text", data, site_column="kind", label_column="kind")
    with pytest.raises(UserError, match=r"^text_column: 'kind' is also the label_column; a column has one use\.$"):
        written(tmp_path, "llm", data, text_column="kind", label_column="kind")


def test_folders_of_tables_have_their_own_test_set(tmp_path):
    for split in ("train", "test"):
        table(tmp_path / "data" / f"{split}.csv", ROWS)
    config, text = written(tmp_path, "text", tmp_path / "data")
    assert config.task.test_share is None
    assert "the test set is the split called test" in text


def test_the_label_is_found_by_its_name_or_by_what_it_holds(tmp_path):
    rows = [(i, text, "ab"[i % 2], label) for i, (text, label) in enumerate(ROWS)]
    config, _ = written(tmp_path, "text", table(tmp_path / "a.csv", rows, ("id", "words", "ward", "label")))
    assert config.task.label_column == "label"
    rows = [(i, f"{text} {i}", c) for i, text, c, _ in rows]
    config, _ = written(tmp_path, "text", table(tmp_path / "b.csv", rows, ("n", "w", "z")))
    assert (config.task.text_column, config.task.label_column) == ("w", "z")


def test_answers_are_scored_or_written(tmp_path):
    config, text = written(tmp_path, "llm", _inputs("answers", tmp_path)[2])
    assert (config.task.answers, config.task.prompt_column) == (("no", "yes"), "question")
    assert "with answer_column: answer the model writes answers instead" in text
    config, _ = written(tmp_path, "llm", _inputs("instruction", tmp_path)[2])
    assert config.task.answer_column == "output"
    assert config.task.templates == ("{instruction}\n{input}\n",)


def test_strange_names_and_values_stay_what_they_are(tmp_path):
    header = ("text: # note", "label\u2028é", "site")
    rows = [(text, ("no", "on: #1")[label == "yes"], "12"[i % 2]) for i, (text, label) in enumerate(ROWS)]
    path = table(tmp_path / "a b'c.csv", rows, header)
    config, text = written(tmp_path, "text", path, text_column=header[0])
    assert (config.task.data, config.task.text_column, config.task.label_column) == (str(path), *header[:2])
    assert yaml.safe_load(text)["task"]["label_column"] == header[1]


def test_nothing_is_overwritten(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = _inputs("table", tmp_path)[2]
    (tmp_path / "visits.yaml").write_text("mine")
    code, said = decaf(capsys, "init", "text", data)
    assert (code, (tmp_path / "visits.yaml").read_text()) == (2, "mine")
    assert said == ["decaf: out: visits.yaml exists already; remove it, or choose another with --out."]


@pytest.mark.parametrize(
    ("words", "kind", "header", "rows", "more"),
    [
        ("label_column: it could be a or b; say which, as in --label-column a", "text", ("text", "a", "b"), None, []),
        ("label_column: no column looks like a label", "text", ("text", "n"),
         [(f"the cat {i}", i) for i in range(9)], []),
        ("text_column: it could be one or two", "text", ("one", "two", "label"), None, []),
        ("label_column: 'lable' is not known. Did you mean 'label'", "text", ("text", "x", "label"), None,
         ["--label-column", "lable"]),
        ("label_column: 1 of 12 train examples have no label", "text", ("text", "label"),
         [*[("the cat", "ab"[i % 2]) for i in range(11)], ("the dog", "")], []),
        ("label_column: no column is called like an answer", "llm", ("one", "two", "three"), None, []),
        ("data: .* is not a table with paths of images", "images", ("text", "x", "label"), None, []),
        ("kind: 'texts' is not known; choose one of: text, images, llm", "texts", ("text", "x", "label"), None, []),
        ("out: .*my.txt does not end in .yaml", "text", ("text", "x", "label"), None, ["--out", "my.txt"]),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_asked_in_one_line(words, kind, header, rows, more, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if rows is None:
        rows = [(f"the {a} cat", "pq"[i % 2] + (" q of it all" if "two" in header else ""), "xy"[i % 2])
                for i, a in enumerate("abcdefgh")]  # fmt: skip
    data = table(tmp_path / "data.csv", rows, header)
    code, said = decaf(capsys, "init", kind, data, *more)
    assert code == 2
    (line,) = said
    assert re.search(f"^decaf: {words}", line), line
    assert not list(tmp_path.glob("*.yaml"))


def test_data_that_are_not_there(tmp_path, capsys):
    code, said = decaf(capsys, "init", "text", tmp_path / "no.csv", "--out", tmp_path / "x.yaml")
    assert code == 2
    assert "no.csv does not exist" in said[0]
    album(tmp_path / "flat", classes=("",), splits=("",))
    code, said = decaf(capsys, "init", "images", tmp_path / "flat", "--out", tmp_path / "x.yaml")
    assert code == 2
    assert "lie in no folder of a class" in said[-1]
