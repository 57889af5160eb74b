"""What does a person's file hold, and which run fits it? Texts, images, or prompts with answers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from decaf_lora import data as datasets_of
from decaf_lora.config import TaskConfig
from decaf_lora.data.folders import IMAGES
from decaf_lora.data.reading import read_split
from decaf_lora.errors import UserError, listed
from decaf_lora.init.columns import Column, columns_of, label_of, named, pick, site_of, text_of
from decaf_lora.validation import checked

MODELS = {
    "text": "sentence-transformers/all-MiniLM-L6-v2",
    "images": "openai/clip-vit-base-patch32",
    "llm": "HuggingFaceTB/SmolLM2-135M",
}
"""Kind of data -> a small model of the Hub that suits it."""

PROMPTS = ("instruction", "prompt", "question", "input", "query", "text")
ANSWERS = ("output", "response", "answer", "completion", "target", "reply")
_FEW_ANSWERS = 10


@dataclass
class Found:
    """What was found in a file."""

    task: dict[str, Any]
    """Fields of `TaskConfig`."""
    size: int
    """Examples in training."""
    partition: str = "iid"
    agents: int = 4
    assumed: list[str] = field(default_factory=list)
    """What was assumed, for people."""


class Asked:
    """What the user says besides the file."""

    def __init__(self, kind: str, data: str, model: str | None, **given: str | None) -> None:
        if kind not in MODELS:
            raise UserError(f"kind: {kind!r} is not known; choose one of: {', '.join(MODELS)}.")
        self.kind, self.data, self.model, self.given = kind, data, model, given
        self._uses: dict[str, str] = {}  # column -> the field that names it
        for use in ("label_column", "text_column", "site_column"):
            if (name := given.get(use)) is not None and name in self._uses:
                raise UserError(f"{use}: {name!r} is also the {self._uses[name]}; a column has one use.")
            if name is not None:
                self._uses[name] = use
        self.reading = {k: v for k in ("delimiter", "encoding", "subset") if (v := given.get(k)) is not None}

    def columns(self) -> tuple[list[Column], bool, list[str]]:
        """The columns of the training split, whether there is a test split, and what the reader told."""
        config = checked(TaskConfig, {"name": "causal-lm", "data": self.data, **self.reading})
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                table, has_test = read_split(config, [], "train"), True
                try:
                    read_split(config, [], "test")
                except UserError:
                    has_test = False
            except UserError as error:
                if not str(error).startswith("split:"):
                    raise
                table, has_test = read_split(config, []), False
                if Path(self.data).expanduser().is_dir():
                    raise UserError(f"data: {self.data} has no split called train; rename its files.") from error
        return columns_of(table), has_test, [str(warning.message) for warning in told]

    def free(self, columns: list[Column]) -> list[Column]:
        """Those that can be the label: the user has given them no other use."""
        return [column for column in columns if self._uses.get(column.name, "label_column") == "label_column"]


def find(asked: Asked) -> Found:
    """What the file holds, and a run that fits it.

    Raises:
        UserError: the file cannot be read, or it is not clear which column is what.
    """
    found = {"text": _text, "images": _images, "llm": _llm}[asked.kind](asked)
    found.task["model"] = asked.model or MODELS[asked.kind]
    if asked.model is None:
        found.assumed.append(f"the model is {found.task['model']}, a small one; --model names another")
    _check(found, asked)
    return found


def _text(asked: Asked) -> Found:
    columns, has_test, told = asked.columns()
    label = label_of(asked.free(columns), asked.given.get("label_column"))
    site = site_of(columns, [label.name], asked.given.get("site_column"))
    asked_text = asked.given.get("text_column")
    text = text_of(columns, asked_text, [label.name, *([site.name] if site else [])])
    task = {"name": "sequence-classification", "data": asked.data, **asked.reading, "text_column": text.name}
    found = Found(task | {"label_column": label.name}, len(label.values), assumed=told)
    found.assumed.append(f"the model reads column {text.name!r} and tells {label.name!r} ({label.distinct} classes)")
    _sites(found, site)
    _test(found, has_test)
    return found


def _llm(asked: Asked) -> Found:
    columns, has_test, told = asked.columns()
    task: dict[str, Any] = {"name": "causal-lm", "data": asked.data, **asked.reading}
    size = len(columns[0].values) if columns else 0
    found = Found(task, size, assumed=told)
    prompt, answer = asked.given.get("text_column"), asked.given.get("label_column")
    answers = named(columns, answer, "label_column") if answer else pick(columns, ANSWERS)
    if answers is None and len(columns) > 1:
        names = ", ".join(column.name for column in columns)
        raise UserError(f"label_column: no column is called like an answer ({names}); say which: --label-column NAME.")
    used = [answers.name] if answers else []
    if answers is None:
        text = text_of(columns, prompt, [])
        task["text_column"] = text.name
        found.assumed.append(f"the model learns the texts of column {text.name!r}")
    else:
        question = named(columns, prompt, "text_column") if prompt else pick(columns, PROMPTS)
        question = question or text_of(columns, None, used)
        more = pick([c for c in columns if c.name not in (question.name, answers.name)], ("input", "context"))
        used.append(question.name)
        task |= _prompt(question, more)
        _answers(found, answers, question, more)
    site = site_of(columns, used, asked.given.get("site_column"))
    _sites(found, site)
    _test(found, has_test)
    return found


def _prompt(question: Column, more: Column | None) -> dict[str, Any]:
    if more is None:
        return {"prompt_column": question.name}
    for column in (question, more):
        if set("{}") & set(column.name):
            raise UserError(f"text_column: the name {column.name!r} has braces; rename it in the file.")
    return {"templates": [f"{{{question.name}}}\n{{{more.name}}}\n"]}


def _answers(found: Found, answers: Column, question: Column, more: Column | None) -> None:
    prompt = f"{question.name!r}" + (f" and {more.name!r}" if more else "")
    few = answers.distinct <= _FEW_ANSWERS and answers.may_be_classes and len(answers.values) >= 5 * answers.distinct
    if few:
        names = sorted({str(value) for value in answers.values})
        found.task |= {"label_column": answers.name, "classes": names, "answers": names}
        found.assumed.append(
            f"column {answers.name!r} has {len(names)} answers ({listed(names)}), so the likeliest of them after "
            f"{prompt} is the prediction; with answer_column: {answers.name} the model writes answers instead"
        )
    else:
        found.task["answer_column"] = answers.name
        found.assumed.append(f"the model answers {prompt} with {answers.name!r}")


def _images(asked: Asked) -> Found:
    path = Path(asked.data).expanduser()
    task: dict[str, Any] = {"name": "image-text", "data": asked.data, **asked.reading}
    columns, has_test, told = asked.columns()
    image = next((c for c in columns if c.name == "image"), None) or next((c for c in columns if _paths(c)), None)
    if image is None:
        where = "a folder with a folder of images for each class" if path.is_dir() else "a table with paths of images"
        raise UserError(f"data: {asked.data} is not {where}.")
    others = [c for c in columns if c.name != image.name]
    label = label_of(asked.free(others), asked.given.get("label_column"))
    if image.name != "image":
        task["image_column"] = image.name
    if label.name != "label":
        task["label_column"] = label.name
    found = Found(task, len(label.values), assumed=told)
    found.assumed.append(
        f"the images are of {label.distinct} classes: {listed(sorted({str(v) for v in label.values}))}"
    )
    if all(str(value).lstrip("-").isdigit() for value in label.values):
        raise UserError("label_column: the classes are only numbers; a model of images and text needs words for them.")
    _sites(found, site_of(others, [label.name], asked.given.get("site_column")))
    _test(found, has_test)
    return found


def _paths(column: Column) -> bool:
    return column.is_text and all(Path(str(value)).suffix.lower() in IMAGES for value in column.given)


def _sites(found: Found, site: Column | None) -> None:
    if site is not None:
        found.partition, found.agents = f"column:{site.name}", site.distinct
        names = listed(sorted({str(value) for value in site.values}))
        found.assumed.append(f"each value of column {site.name!r} is an agent: {names}")
    else:
        found.agents = max(2, min(4, found.size // 20))
        found.assumed.append(f"{found.agents} agents share the rows by chance; --site-column names a column of sites")


def _test(found: Found, has_test: bool) -> None:
    if has_test:
        found.assumed.append("the test set is the split called test")
    else:
        found.task["test_share"] = 0.2
        found.assumed.append("a fifth of the rows is held out as the test set")


def _check(found: Found, asked: Asked) -> None:
    """Reads the data once as the run will: what is wrong in them is said before a file is written."""
    config = checked(TaskConfig, found.task)
    fields = ("text_column", "prompt_column", "answer_column")
    wanted = [(name, getattr(config, name)) for name in fields if name in found.task]
    label = found.task.get("label_column") or ("label" if asked.kind == "images" else None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        examples = datasets_of.load(config, wanted, label=label)
    if label is not None:
        datasets_of.needs_classes(examples.labels, examples.classes)
    found.size = len(examples.labels)
    seen = set(found.assumed)
    found.assumed += [str(warning.message) for warning in told if str(warning.message) not in seen]
    if found.partition.startswith("column:"):
        counts = np.unique(examples.train[found.partition.removeprefix("column:")][:], return_counts=True)
        found.agents = len(counts[0])
