"""Labels: an order is matched by name, and whatever could be meant in two ways is refused with both."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value

import tiny
from decaf_lora.errors import UserError
from inputs import ROWS, SMALL, album, decaf, lines, load, make, model, table

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return lambda family: model(family, folder)


def numbered(path, labels, names):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = {"text": [f"t{i}" for i in range(len(labels))], "label": labels}
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


# Classes in another order


def test_classes_of_folders_may_come_in_another_order_and_stay_what_they_are(models, tmp_path):
    task = make("image-text", model=models("clip"), data=album(tmp_path / "a"), classes=("dog", "cat"))
    assert task.classes == ["dog", "cat"]
    assert [task.classes[i] for i in task.labels] == ["cat"] * 4 + ["dog"] * 4


@pytest.mark.parametrize(
    ("labels", "names", "classes", "expected"),
    [
        ([0, 1, 2, 0, 1, 2], ["a", "b", "c"], ("c", "a", "b"), ["a", "b", "c"] * 2),
        ([0, 1, 2, 0, 1, 2], ["a", "b", "c"], ("x", "y", "z"), ["x", "y", "z"] * 2),  # new names, in the data's order
        ([0, 1, 2, 0, 1, 2], ["a", "b", "c"], ("a", "new", "c"), ["a", "new", "c"] * 2),
        ([3, 1, 2, 3, 1, 2], None, ("3", "2", "1"), ["3", "1", "2"] * 2),  # numbers by their digits
        ([1, 0, 1, 0, 1, 0], None, ("1", "0"), ["1", "0"] * 3),
        ([True, False] * 3, None, ("true", "false"), ["true", "false"] * 3),
        (["b", "a"] * 3, None, ("b", "a"), ["b", "a"] * 3),
    ],
)
def test_an_order_is_matched_by_name(labels, names, classes, expected, tmp_path):
    path = tmp_path / "train.parquet"
    if names:
        numbered(path, labels, names)
    else:
        Dataset.from_dict({"text": [f"t{i}" for i in range(len(labels))], "label": labels}).to_parquet(path)
    found = load(path, train_split="train", test_split="train", classes=classes)
    assert found.classes == list(classes)
    assert [found.classes[i] for i in found.labels] == expected


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        ([0, 1, 2, 0, 1, 2], ["a", "b", "c"], ("b", "x", "c")),
        ([0, 1, 2, 0, 1, 2], ["a", "b", "c"], ("x", "y", "a")),
        ([1, 2, 3, 1, 2, 3], None, ("1", "2", "3", "4")),  # 1 would be called 2
    ],
)
def test_names_at_other_places_are_refused_with_both_readings(labels, names, classes, tmp_path):
    path = tmp_path / "train.parquet"
    if names:
        numbered(path, labels, names)
    else:
        Dataset.from_dict({"text": [f"t{i}" for i in range(len(labels))], "label": labels}).to_parquet(path)
    with pytest.raises(UserError, match=r"task\.classes: '.' is class \d in the data but class \d in task\.classes"):
        load(path, test_split="train", classes=classes)


def test_a_name_given_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"task\.classes: 'no' is there twice"):
        load(table(tmp_path / "a.csv"), classes=("no", "no", "yes"))


@pytest.mark.parametrize("answers", [("yes", "no"), ("Yes ", "other")])
def test_answers_that_name_other_classes_are_refused(answers, models, tmp_path):
    with pytest.raises(UserError, match=r"is given for the class 'no'. The order of the classes is no, yes"):
        make(
            "causal-lm", model=models("llama"), data=table(tmp_path / "a.csv"), test_share=0.3, prompt_column="text",
            answers=answers,
        )  # fmt: skip
    task = make(
        "causal-lm", model=models("llama"), data=table(tmp_path / "a.csv"), test_share=0.3, prompt_column="text",
        answers=("yes", "no"), classes=("yes", "no"),
    )  # fmt: skip
    assert task.classes == ["yes", "no"]


# A checkpoint's own classes


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A classifier of three classes, and texts with what it answers."""
    folder = tmp_path_factory.mktemp("nli")
    names = ["contradiction", "neutral", "entailment"]
    known = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = transformers.BertForSequenceClassification(transformers.BertConfig(**tiny.SMALL, num_labels=3, **known))
        for parameter in net.eval().parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.6)
    tok = tiny.tokenizer()
    texts = [
        f"the {a} is {w} {v}" for a in ("cat", "dog", "bird", "film") for w in ("good", "old") for v in ("yes", "no")
    ]
    with torch.no_grad():
        logits = lambda: net(**tok(texts, padding=True, return_tensors="pt")).logits  # noqa: E731
        net.classifier.bias.data -= logits().median(0).values
        told = logits().argmax(-1).tolist()
    assert set(told) == {0, 1, 2}
    net.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder, texts, [names[i] for i in told], names


def first_score(task):
    batch = task.test_batch(np.arange(task.num_test))
    with torch.no_grad():
        return float(task.score(task.statistics(batch, 1))[0])


@pytest.mark.parametrize("case", ["words", "other case", "named numbers", "plain numbers"])
def test_the_classes_of_a_checkpoint_keep_its_order(case, fine_tuned, tmp_path):
    folder, texts, told, names = fine_tuned
    if case == "words":
        path = table(tmp_path / "a.csv", list(zip(texts, told, strict=True)))
    elif case == "other case":
        path = table(tmp_path / "a.csv", [(text, label.upper()) for text, label in zip(texts, told, strict=True)])
    elif case == "named numbers":
        path, order = tmp_path / "a.parquet", sorted(names)
        numbered(path, [order.index(label) for label in told], order)
        rows = Dataset.from_parquet(str(path)).remove_columns("text").add_column("text", texts)
        rows.to_parquet(path)
    else:
        path = table(tmp_path / "a.csv", [(text, names.index(label)) for text, label in zip(texts, told, strict=True)])
    task = make("sequence-classification", model=folder, data=path, test_share=0.4)
    assert [name.lower() for name in task.classes] == names
    assert first_score(task) == 1.0


def test_another_order_than_the_checkpoints_is_refused(fine_tuned, tmp_path):
    folder, texts, told, names = fine_tuned
    path = table(tmp_path / "a.csv", list(zip(texts, told, strict=True)))
    options = {"model": folder, "data": path, "test_share": 0.4}
    assert first_score(make("sequence-classification", **options, classes=tuple(names))) == 1.0
    with pytest.raises(UserError, match="the checkpoint's head has these classes in the order contradiction, neutral"):
        make("sequence-classification", **options, classes=tuple(sorted(names)))


def test_a_head_of_other_classes_is_told(fine_tuned, tmp_path):
    folder, texts, told, names = fine_tuned
    two = table(tmp_path / "two.csv", [(t, "no" if i % 2 else "yes") for i, t in enumerate(texts)])
    with pytest.warns(
        UserWarning, match=r"its head is for 3 classes \(contradiction, .*\), the data have 2; a new head"
    ):
        make("sequence-classification", model=folder, data=two, test_share=0.4)
    three = table(tmp_path / "three.csv", [(t, "abc"[names.index(k)]) for t, k in zip(texts, told, strict=True)])
    with pytest.warns(UserWarning, match="trained for other classes and starts as it is: contradiction for a, neutral"):
        make("sequence-classification", model=folder, data=three, test_share=0.4)


# One class, labels alike, labels that are none


def test_one_class_is_refused(models, tmp_path, capsys):
    path = table(tmp_path / "a.csv", [(t, "yes") for t, _ in ROWS])
    options = ["--task.model", models("bert"), "--task.data", path, "--task.test_share", 0.3, "--out", tmp_path / "r"]
    code, found = decaf(capsys, "run", "digits", *SMALL, "--task", "sequence-classification", *options)
    assert code == 2
    assert found == [
        "decaf: task.label_column: all 25 training examples have the label 'yes'; there is nothing to tell apart. "
        "Choose another column or other examples."
    ]
    assert not (tmp_path / "r").exists()


def test_one_class_is_refused_by_every_classification(models, tmp_path):
    path = table(tmp_path / "a.csv", [(t, "yes") for t, _ in ROWS])
    with pytest.raises(UserError, match="nothing to tell apart"):
        make(
            "causal-lm", model=models("llama"), data=path, test_share=0.3, prompt_column="text", answers=("yes",),
        )  # fmt: skip
    numbered(tmp_path / "slice.parquet", [0] * 6 + [1] * 6, ["a", "b"])  # a sorted set, and the beginning of it
    with pytest.raises(UserError, match="all 6 training examples have the label 'a'"):
        make(
            "sequence-classification", model=models("bert"), data=tmp_path / "slice.parquet", train_split="train[:6]",
            test_split="train[6:]",
        )  # fmt: skip
    with pytest.raises(UserError, match=r"all images in .* lie in one folder, 'cat'"):
        make("image-text", model=models("clip"), data=album(tmp_path / "one", classes=("cat",)))


def test_labels_that_differ_in_blanks_or_case_are_told(tmp_path):
    rows = [("a", "Cardiologia"), ("b", "Cardiologia "), ("c", "cardiologia"), ("d", "other")] * 4
    with pytest.warns(UserWarning, match=r"differ only in blanks or case .* 'Cardiologia' \(4\), 'Cardiologia ' \(4\)"):
        found = load(table(tmp_path / "a.csv", rows))
    assert len(found.classes) == 4
    accents = [("a", "caf\u00e9"), ("b", "cafe\u0301"), ("c", "tea")] * 4
    with pytest.warns(UserWarning, match="differ only in blanks or case"):
        load(table(tmp_path / "b.csv", accents))


def test_a_label_unseen_in_training_is_named_with_its_twin(tmp_path):
    table(tmp_path / "d" / "train.csv", ROWS)
    table(tmp_path / "d" / "test.csv", [("x", "no"), ("y", "Yes ")])
    with pytest.raises(
        UserError, match=r"unseen in training: 'Yes ' \(1\).*'Yes ' and 'yes' differ only in blanks or case"
    ):
        load(tmp_path / "d", test_split="test")


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("inf", r"holds .*float.*, which are no classes \(first: inf, line 5 of a\.csv\)"),
        ("nan", r"1 of 36 train examples have no label .* \(first: line 5 of a\.csv\)"),
        ("NA", r"1 examples have 'NA' in column 'label', where all others have a number \(first: line 5 of a\.csv\)"),
        ("0.5", r"holds .*float.*, which are no classes \(first: 0.5, line 5 of a\.csv\)"),
        ("", r"1 of 36 train examples have no label .* \(first: line 5 of a\.csv\)"),
        ("  ", r"1 of 36 train examples have no label"),
    ],
)
def test_a_label_that_is_none_is_found_in_its_line(odd, message, tmp_path):
    path = table(tmp_path / "a.csv", [(text, odd if i == 3 else i % 2) for i, (text, _) in enumerate(ROWS)])
    with pytest.raises(UserError, match=message):
        load(path)


def test_words_that_other_programs_take_for_nothing_are_classes_and_texts(tmp_path):
    path = table(
        tmp_path / "a.csv", [("null" if i == 2 else t, {"no": "None", "yes": "NA"}[k]) for i, (t, k) in enumerate(ROWS)]
    )
    found = load(path)
    assert found.classes == ["NA", "None"]
    assert "null" in [*found.train["text"], *found.test["text"]]


def test_codes_keep_their_zeros(tmp_path):
    found = load(table(tmp_path / "a.csv", [(t, "007" if k == "no" else "010") for t, k in ROWS]))
    assert found.classes == ["007", "010"]


# The same data


def test_the_facts_of_a_task_change_with_its_data(models, tmp_path):
    path = tmp_path / "a.csv"

    def facts(rows=ROWS, **options):
        table(path, rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make("sequence-classification", model=models("bert"), data=path, test_share=0.3, **options).facts()

    first = facts()
    assert (first["num_train"], first["num_test"], first["classes"]) == (25, 11, ["no", "yes"])
    assert facts() == first
    assert facts(classes=("no", "yes")) == first
    changed = [
        facts([(t, {"no": "yes", "yes": "no"}[k]) for t, k in ROWS]),
        facts([(t, {"no": "yes", "yes": "absolutely"}[k]) for t, k in ROWS]),
        facts([("a " + t if i == 7 else t, k) for i, (t, k) in enumerate(ROWS)]),
        facts(ROWS[::-1]),
        facts([*ROWS, ("a cat", "aaa"), ("a cat", "aaa")]),
        facts(classes=("yes", "no")),
    ]
    contents = {f["content"] for f in (first, *changed)}
    assert len(contents) == 1 + len(changed)


def test_the_facts_of_images_are_those_of_their_bytes(models, tmp_path):
    root = album(tmp_path / "a")
    task = lambda: make("image-text", model=models("clip"), data=root)  # noqa: E731
    first = task().facts()
    assert task().facts() == first
    one = root / "test" / "dog" / "dog3.png"
    one.write_bytes((root / "test" / "cat" / "cat0.png").read_bytes())
    assert task().facts()["content"] != first["content"]


def test_lines_of_json_with_labels_of_two_kinds_are_refused(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": t, "label": k if i else 3} for i, (t, k) in enumerate(ROWS)])
    with pytest.raises(
        UserError, match=r"column 'label' of .* several kinds: a number \(line 1 of a\.jsonl\), text \(line 2"
    ):
        load(path)
