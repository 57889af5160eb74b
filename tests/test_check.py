"""`decaf check`: each thing in one line, right, odd or wrong, with numbers that are known from elsewhere."""

import json
import re

import numpy as np
import pytest
import yaml

import tiny
from command import TOY, decaf
from decaf_lora import check as checks
from decaf_lora import plan
from decaf_lora.check.cost import span
from decaf_lora.check.examples import chosen, shortened
from decaf_lora.config import RunConfig, build
from decaf_lora.runs.build import build_run

GOOD = "the old film was good , the new one was bad"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write("bert", tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture
def checked(model, tmp_path, capsys):
    """Checks a table; the exit code, and the findings by name."""

    def run(rows, code=0, **changes):
        (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
        task = {"name": "sequence-classification", "model": str(model), "data": str(tmp_path / "rows.csv")}
        task |= {"test_share": 0.25, **changes.pop("task", {})}
        values = {
            "task": task,
            "agents": 2,
            "rounds": 3,
            "partition": "iid",
            "lora": {"r": 2, "target_modules": ["query"]},
            "training": {"steps": 2, "batch_size": 4, "agents_per_pass": 1},
            **changes,
        }
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump(values))
        capsys.readouterr()
        assert decaf("check", path, "--json") == code
        out = capsys.readouterr()
        assert out.err == ""
        return {f["what"]: (f["verdict"], f["said"]) for f in json.loads(out.out)}

    return run


def rows(count=400, labels=("good", "bad")):
    """Different texts, of the classes in turn."""
    words = [w for w in tiny.WORDS if w.isalpha()]
    return [(f"{words[i % 37]} {words[i // 37]} {words[i % 31]}", labels[i % len(labels)]) for i in range(count)]


def test_all_is_right(checked):
    found = checked(rows())
    assert {verdict for verdict, _ in found.values()} == {"right"}, found
    assert found["data"][1] == "300 examples to learn from of 2 classes, 100 to score on (accuracy)."
    assert found["example 1"][1].startswith("'<s> ")
    assert found["example 1"][1].endswith("(5 tokens), label 'good'") or "label 'bad'" in found["example 1"][1]
    assert found["labels"][1] == "'bad' 150, 'good' 150."
    assert found["agents"][1] == "examples of each: agent 0 150 (of 2 classes), agent 1 150 (of 2 classes)."
    assert "(2 steps of " in found["cost"][1]
    assert " for 3 rounds" in found["cost"][1]


def test_the_line_for_a_person(model, tmp_path, capsys):
    assert decaf("check", "digits", "--task", TOY, "--agents", "3", "--partition", "iid") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("right  configuration: digits: decaf on the graph ring, 3 agents, 30 rounds; ")
    assert "right  example 1: x 12, y one number" in out  # a task of one's own that says nothing of its examples
    assert lines[-1] == "Nothing is wrong. 1 thing is odd: have a look whether that is meant. Next: `decaf run digits`."


def test_a_learning_rate_that_is_searched_for_costs_its_time(checked):
    found = checked(rows(), training={"learning_rate": "auto", "steps": 1, "batch_size": 4, "agents_per_pass": 1})
    assert found["one batch"][0] == "right"
    assert "the learning rate is searched for before" in found["cost"][1]


def test_what_is_odd(checked):
    given = [("the cat sat", "good")] * 60 + [("the dog sat", "bad")] * 4 + [("the dog sat", "good")] * 4
    found = checked([*given, *[(GOOD, "good")] * 8], task={"max_length": 6})
    odd = {what: said for what, (verdict, said) in found.items() if verdict == "odd"}
    assert re.fullmatch(r"truncated to 6 tokens: \d of 57 train, \d of 19 test examples[.]", odd["task.max_length"])
    assert odd["in both sets"].startswith("19 of 19 test examples are also to learn from")
    assert "training examples are there again with another label, such as '<s> the dog sat </s>'" in odd["two labels"]
    assert "('bad', 'good')" in odd["two labels"]
    assert odd["majority"].startswith("always answering the most frequent class scores 0.947")  # 18 of 19
    assert odd["few test examples"].startswith("a score over 19 examples is known to about 22 points")


def test_labels_that_differ_by_case_are_odd_and_so_is_an_agent_of_one_class(checked):
    found = checked(rows(400, ("good", "Good ", "bad", "bad")), partition="iid")
    assert found["task.label_column"][0] == "odd"
    assert "'Good ' (100), 'good' (100)" in found["task.label_column"][1]
    found = checked(rows(), partition="by-class")
    assert found["one class"][1].startswith("agent 0, agent 1 of 2 agents hold one class alone.")


def test_a_new_head_for_many_classes_that_learns_no_faster_than_the_adapters_is_odd(checked):
    six, three = ("a", "b", "c", "d", "e", "f"), ("a", "b", "c")
    assert checked(rows(labels=six))["one rate"] == (
        "odd",
        "classifier learns at the rate of the adapters. A new head for 6 classes wants more: training.head_rate_ratio "
        "16, or what decaf tune finds.",
    )
    assert "one rate" not in checked(rows(labels=three))
    training = {"steps": 1, "batch_size": 4, "agents_per_pass": 1, "head_rate_ratio": 16}
    assert "one rate" not in checked(rows(labels=six), training=training)


def test_few_examples(checked):
    found = checked(rows(12), training={"batch_size": 8, "steps": 1})
    assert found["few examples"][1].startswith("agent 0, agent 1 of 2 agents hold fewer examples than a batch has (8)")


@pytest.mark.parametrize(
    ("given", "changes", "what"),
    [
        (rows(8), {"agents": 20}, "partition"),
        ([("the cat", "good")] * 8, {}, "task.label_column: all 8 training examples have the label"),
        (rows(8), {"task": {"text_column": "txt"}}, "task.text_column: 'txt' is not known. Did you mean 'text'"),
        (rows(8), {"graph": "rin"}, "graph: 'rin' is not known. Did you mean 'ring'"),
        (rows(8), {"task": {"model": "/nowhere/model"}}, "task.model: /nowhere/model does not exist."),
        ([("the cat", "")] * 8, {}, "have no label"),
    ],
)
def test_what_is_wrong(checked, given, changes, what):
    """One line says what; what comes after it is left out."""
    if what.startswith("task.label_column: all"):
        changes = {"task": {"classes": ["good", "bad"]}}
        what = "task.label_column: all 6 training examples have the label 'good'"
    found = checked(given, code=2, **changes)
    assert list(found) == ["configuration", "loading"]
    assert found["loading"][0] == "wrong"
    assert what in found["loading"][1]


def test_a_loss_that_is_not_finite_is_wrong(checked, model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors = {k: t * float("inf") if "LayerNorm.weight" in k else t for k, t in tensors.items()}
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    found = checked(rows(40), code=2, task={"model": str(broken)})
    assert found["loading"] == (
        "wrong",
        "task: the loss is nan before any training; the weights of the model, or the first training examples, hold "
        "numbers that are not finite.",
    )


def test_mistakes_on_the_command_line(capsys, tmp_path):
    for arguments, what in [
        (["check", "digit"], "Did you mean 'digits'"),
        (["check", "digits", "--rounds", "0"], "rounds: "),
        (["check", "digits", "--spam", "1"], "unknown option"),
        (["check", str(tmp_path / "none.yaml")], "config: "),
    ]:
        assert decaf(*arguments) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert line.startswith("decaf: ")
        assert what in line


@pytest.mark.parametrize("algorithm", ["decaf", "decaf_tracked", "dlora_fa", "fedavg", "local"])
@pytest.mark.parametrize(
    ("graph", "options"), [("ring", {}), ("star", {"gossip_steps": 3}), ("one-peer-hypercube", {})]
)
def test_the_bytes_are_those_of_the_run(algorithm, graph, options):
    """Counted from the templates of the messages before, and by the run itself after."""
    if algorithm == "decaf_tracked" and graph == "one-peer-hypercube":
        options = {"gossip_steps": 2}
    values = {"task": {"name": TOY}, "agents": 4, "graph": graph, "partition": "iid", "rounds": 4, **options}
    config = build(RunConfig, {**values, "algorithm": {"name": algorithm}, "training": {"steps": 1, "batch_size": 2}})
    with build_run(config) as run:
        before = run.exchange.bytes_per_round(run.adapter)
        assert before * 4 == pytest.approx(sum(record.bytes_sent for record in run.train()))


def test_a_timed_step_leaves_the_adapters(tmp_path):
    config = build(RunConfig, {"task": {"name": TOY}, "agents": 2, "partition": "iid"})
    with build_run(config) as run:
        before = {k: t.clone() for k, t in run.adapter.tensors().items()}
        seconds, losses = plan.timed_step(run)
        assert seconds > 0
        assert losses.shape == (2,)
        assert all((before[k] == t).all() for k, t in run.adapter.tensors().items())


def test_examples_of_different_classes_are_chosen():
    labels = np.array([1, 1, 1, 0, 2, 0])
    assert chosen(labels, np.arange(6)) == [0, 3, 4]
    assert chosen(labels, np.array([0, 1, 2])) == [0, 1, 2]
    assert chosen(labels, np.array([3, 5])) == [3, 5]
    assert chosen(labels, np.array([2])) == [2]


def test_words():
    assert shortened("a  b\nc") == "a b c"
    assert len(shortened("x" * 1000)) == 400
    assert [span(s) for s in (0.0213, 9, 100, 600, 7500)] == ["0.021 s", "9 s", "100 s", "10 min", "2 h 5 min"]
    found = [checks.Finding("a", "wrong", ""), checks.Finding("b", "odd", "")]
    assert checks.summary(found, "Go.") == "1 thing is wrong: mend what the lines say, and check again."
    assert checks.summary([], "Go.") == "Nothing is wrong. Go."
