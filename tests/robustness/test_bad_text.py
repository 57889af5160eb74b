"""Texts: what is no text is refused, columns have any names, the end of an answer is learnt, templates may fail."""

import re
import shutil

import pytest
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from decaf_lora.errors import UserError
from decaf_lora.tasks.sequences import encode_prompts, parts_of
from inputs import ROWS, SMALL, decaf, lines, make, model, table

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return lambda family: model(family, folder)


def causal(models, path, family="llama", **options):
    return make("causal-lm", model=models(family), data=path, test_share=0.3, **options)


# What is no text


@pytest.mark.parametrize(
    ("column", "value"),
    [("answer", {"text": ["no"], "start": [3]}), ("answer", ["no"]), ("question", [{"role": "user", "content": "x"}])],
)
def test_dicts_and_lists_are_no_text(column, value, models, tmp_path):
    rows = [{"question": t, "answer": k} | {column: value} for t, k in ROWS]
    path = lines(tmp_path / "a.jsonl", rows)
    field = {"question": "prompt_column", "answer": "answer_column"}[column]
    with pytest.raises(UserError, match=rf"task\.{field}: column '{column}' holds .*, not text; write what the model"):
        causal(models, path, prompt_column="question", answer_column="answer")
    if column == "question":
        with pytest.raises(UserError, match=r"task\.templates: column 'question' holds .*, not text"):
            causal(models, path, templates=("ask {question}",), answer_column="answer")


def test_times_bytes_and_numbers_of_classes_are_no_text(models, tmp_path):
    import datetime

    odd = {
        "time": (Value("timestamp[s]"), datetime.datetime(2026, 1, 1)),
        "bytes": (Value("binary"), b"x"),
        "class": (ClassLabel(names=["no", "yes"]), 1),
    }
    for name, (feature, value) in odd.items():
        features = Features({"question": Value("string"), "answer": feature})
        path = tmp_path / f"{name}.parquet"
        rows = {"question": [t for t, _ in ROWS], "answer": [value] * len(ROWS)}
        Dataset.from_dict(rows, features=features).to_parquet(path)
        with pytest.raises(UserError, match=r"task\.answer_column: column 'answer' holds .*, not text; write"):
            causal(models, path, prompt_column="question", answer_column="answer")


def test_numbers_and_truth_values_may_be_answers(models, tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"q": t, "a": i % 2 == 0, "n": i % 3} for i, (t, _) in enumerate(ROWS)])
    for column in ("a", "n"):
        assert causal(models, path, "qwen2", prompt_column="q", answer_column=column).num_test == 11


# Columns of any name


@pytest.mark.parametrize("name", ["data.question", "Question:", "0", "is it!", "input[0]", "{q}", "a b", "é", "self"])
def test_a_prompt_column_may_have_any_name(name, models, tmp_path):
    task = causal(models, lines(tmp_path / "a.jsonl", [{name: t, "answer": k} for t, k in ROWS]), prompt_column=name,
                  answer_column="answer")  # fmt: skip
    plain = causal(models, lines(tmp_path / "b.jsonl", [{"q": t, "answer": k} for t, k in ROWS]), prompt_column="q",
                   answer_column="answer")  # fmt: skip
    for i in range(len(task.labels)):
        assert task._train.tokens[i].tolist() == plain._train.tokens[i].tolist()


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("{a}", [("", "a")]),
        ("x {data.q} y {is it!} z", [("x ", "data.q"), (" y ", "is it!"), (" z", "")]),
        ("{{x}} {a:b}", [("{x} ", "a:b")]),
        ("{a}{b}", [("", "a"), ("", "b")]),
        ("no column", [("no column", "")]),
        ("", []),
    ],
)
def test_a_template_is_text_and_columns(template, parts):
    assert parts_of(template) == parts


@pytest.mark.parametrize("template", ["{", "}", "a {b", "a} b", "{a}}", "{{a}", "{}", "x {} y"])
def test_a_broken_template_is_named(template):
    with pytest.raises(UserError, match=r"task\.templates: .* (has a single|needs \{column\})"):
        parts_of(template)


@given(st.text(), st.text())
@settings(max_examples=50, deadline=None)
def test_what_rows_hold_is_never_a_template(before, value):
    template = before.replace("{", "{{").replace("}", "}}") + "{a}"
    (text, column), *more = parts_of(template)
    assert (text + value, column, more) == (before + value, "a", [])


# Chat templates


def chatting(models, tmp_path, template, family="llama"):
    folder = tmp_path / "model"
    shutil.copytree(models(family), folder)
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    tok.chat_template = template
    tok.save_pretrained(folder)
    return folder


TURNS = "{% for m in messages %}{{ m.role + ' : ' + m.content + END }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
QUESTIONS = [{"question": t, "answer": k} for t, k in ROWS]


@pytest.mark.parametrize(("end", "count"), [("' '", 1), ("' </s>'", 1), ("' </s> . '", 1), ("''", 1)])
def test_the_end_of_a_turn_is_a_target(end, count, models, tmp_path):
    folder = chatting(models, tmp_path, TURNS.replace("END", end))
    path = lines(tmp_path / "a.jsonl", QUESTIONS)
    options = {"data": path, "test_share": 0.3, "prompt_column": "question", "answer_column": "answer"}
    task = make("causal-lm", model=folder, chat_template=True, **options)
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    for i in range(len(task.labels)):
        ids, start = task._train.tokens[i], task._train.starts[i]
        targets = ids[start:].tolist()
        assert tok.decode(targets).split()[0] in ("yes", "no")
        assert targets.count(tok.eos_token_id) == count
        assert tok.eos_token_id not in ids[:start].tolist() or "</s>" in end


def test_a_chat_without_any_end_is_refused(models, tmp_path):
    folder = chatting(models, tmp_path, TURNS.replace("END", "' '"))
    tok = tiny.tokenizer("llama", pad="<pad>", eos=None, limit=64)
    tok.chat_template = TURNS.replace("END", "' '")
    tok.save_pretrained(folder)
    with pytest.raises(UserError, match=r"task\.chat_template: a turn of the assistant has no end"):
        make("causal-lm", model=folder, data=lines(tmp_path / "a.jsonl", QUESTIONS), test_share=0.3,
             prompt_column="question", answer_column="answer", chat_template=True)  # fmt: skip


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('System role required') }}",
        "{% for m in messages %}{{ m.content }",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.nothing.more }}",
        "{% include 'other' %}",
    ],
)
def test_a_template_that_fails_is_one_line(template, models, tmp_path, capsys):
    folder = chatting(models, tmp_path, template)
    path = lines(tmp_path / "a.jsonl", QUESTIONS)
    options = "--task causal-lm --task.test_share 0.3 --task.prompt_column question --task.answer_column answer"
    options = [*SMALL, *options.split(), "--task.chat_template", "--task.model", folder, "--task.data", path]
    code, found = decaf(capsys, "run", "digits", *options, "--out", tmp_path / "run")
    assert code == 2
    assert len(found) == 1
    assert found[0].startswith("decaf: task.chat_template: the tokenizer's template fails")
    assert not (tmp_path / "run").exists()


# Tokenizers without offsets


class Slow:
    """A tokenizer that does not say where in the text a token lies."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        assert not kwargs.get("return_offsets_mapping"), "only fast tokenizers have offsets"
        return self.tokenizer(*args, **kwargs)


@pytest.mark.parametrize("family", ["words", "bytes"])
def test_targets_begin_where_offsets_say_also_without_offsets(family):
    tok = tiny.tokenizer("llama", limit=64) if family == "words" else tiny.qwen_tokenizer()
    batch = {"q": [f"question : {t} ?" for t, _ in ROWS] + ["", "yes"], "a": [k for _, k in ROWS] + ["no", "true ."]}
    for parts in ([("", "q")], [("the ", "q"), (" answer :", "")]):
        fast, slow = (encode_prompts(batch, t, parts, "a", False, 64) for t in (tok, Slow(tok)))
        assert fast == slow


def test_a_tokenizer_in_plain_python(models, tmp_path):
    config = transformers.LlamaConfig(**tiny.LLAMA | {"vocab_size": 400, "max_position_embeddings": 128})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "m")
    path = lines(tmp_path / "a.jsonl", [{"question": t, "answer": k, "label": k} for t, k in ROWS])
    options = {"model": tmp_path / "m", "data": path, "test_share": 0.3, "prompt_column": "question"}
    task = make("causal-lm", answer_column="answer", **options)
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for i in range(len(task.labels)):
        ids, start = task._train.tokens[i], task._train.starts[i]
        assert tok.decode(ids[:start]).startswith("the ")
        assert tok.decode(ids[start:]).strip() in ("no</s>", "yes</s>")
    assert make("causal-lm", answers=("no", "yes"), **options).num_test == 11


# Empty texts


def test_texts_without_a_token_are_named(models, tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "" if i % 2 else t, "label": k} for i, (t, k) in enumerate(ROWS * 2)])
    expected = (
        r"task\.text_column: the tokenizer makes no token of \d+ of \d+ train examples \(first: line 2 of a\.jsonl\)"
    )
    with pytest.raises(UserError, match=expected), pytest.warns(UserWarning, match="no padding token"):
        make("sequence-classification", model=models("gpt2"), data=path, test_share=0.3)
    assert make("sequence-classification", model=models("bert"), data=path, test_share=0.3).num_test  # it adds tokens


def test_texts_without_a_target_are_left_out_and_counted(models, tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "" if i % 3 == 0 else t} for i, (t, _) in enumerate(ROWS)])
    with pytest.warns(
        UserWarning, match=r"task\.text_column: \d+ of \d+ (train|test) texts have no token to predict"
    ) as seen:
        task = causal(models, path, "gpt2")
    counts = [int(n) for w in seen for n in re.findall(r"text_column: (\d+) of", str(w.message))]
    assert sum(counts) == 12
    assert len(task.labels) + task.num_test == 24
    with pytest.raises(UserError, match=r"task\.text_column: none of the 25 train texts has a token to predict"):
        causal(models, lines(tmp_path / "b.jsonl", [{"text": ""} for _ in ROWS]), "gpt2")


def test_a_template_of_images_has_its_braces_once(models, tmp_path):
    for template in ("a photo", "{} {}", "{", "}", "{}}", "{name}"):
        with pytest.raises(UserError, match=r"task\.templates: .* needs \{\} once"):
            make("image-text", model=models("clip"), data=tmp_path, templates=(template,))
    assert table(tmp_path / "a.csv").exists()


# One column, two fields


@pytest.mark.parametrize(
    ("kind", "options", "field", "other"),
    [
        ("sequence-classification", {"text_pair_column": "text"}, "text_pair_column", "text_column"),
        ("sequence-classification", {"text_pair_column": "label"}, "label_column", "text_pair_column"),
        ("sequence-classification", {"label_column": "text"}, "label_column", "text_column"),
        ("causal-lm", {"prompt_column": "text", "answer_column": "text"}, "answer_column", "prompt_column"),
        ("causal-lm", {"templates": ("{text} {label}",), "answer_column": "label"}, "answer_column", "templates"),
        ("causal-lm", {"templates": ("{text} {label}",), "answers": ("no", "yes")}, "label_column", "templates"),
    ],
)
def test_a_column_has_one_field(kind, options, field, other, models, tmp_path):
    """A model that reads the label or the answer is right in all examples, and has learnt nothing."""
    family = "bert" if kind == "sequence-classification" else "llama"
    with pytest.raises(UserError, match=rf"task\.{field}: column '\w+' is that of task\.{other} already"):
        make(kind, model=models(family), data=table(tmp_path / "a.csv"), test_share=0.3, **options)


def test_a_label_that_only_splits_the_data_may_be_the_answer(models, tmp_path):
    task = causal(models, table(tmp_path / "a.csv"), prompt_column="text", answer_column="label", label_column="label")
    assert task.classes == ["no", "yes"]
