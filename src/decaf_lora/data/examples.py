"""Where do examples come from?

`load` reads what a user names (a data set of the Hub, a folder, a file) with `datasets.load_dataset`, numbers
its labels, and cuts it into training and test examples. Nothing is dropped or renumbered in silence: a mistake
is a `UserError` that names the field, anything left out is counted in one warning. Tables stay memory-mapped
on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Image, Value
from numpy.typing import NDArray

from decaf_lora.config import TaskConfig
from decaf_lora.data.content import of_rows
from decaf_lora.data.images import holds_images, image_folder, readable_images
from decaf_lora.data.labels import Labels, numbered
from decaf_lora.data.places import PLACE, place
from decaf_lora.data.reading import read
from decaf_lora.errors import UserError, listed, unknown
from decaf_lora.randomness import numpy_generator


class Examples(NamedTuple):
    """Training and test examples, numbered alike in the tables and the label arrays."""

    train: Dataset
    test: Dataset
    labels: Labels
    """(num_train,) class numbers; zeros if the data is used without labels."""
    test_labels: Labels
    """(num_test,)"""
    classes: list[str]
    """Names of the classes; empty if the data is used without labels."""
    named: bool
    """Whether the data or the user gave the names; false if the names are just numbers."""
    content: str = ""
    """A hash of all examples in their order, by which a resumed run checks that they are the same."""


_given: ContextVar[Examples | None] = ContextVar("examples", default=None)


@contextlib.contextmanager
def given(examples: Examples) -> Iterator[None]:
    """A context in which `load` returns `examples`, whatever it is asked for: for a task made to predict."""
    token = _given.set(examples)
    try:
        yield
    finally:
        _given.reset(token)


def load(
    config: TaskConfig,
    columns: Iterable[tuple[str, str]],
    *,
    label: str | None = None,
    image: str | None = None,
    order: Sequence[str] = (),
    label_is_learnt: bool = True,
) -> Examples:
    """Reads the examples that a task's configuration names.

    Args:
        config: names the data, its splits, and which examples to use.
        columns: (field of the configuration, column) for the columns that the task needs.
        label: the column of labels; None: the data is used without labels.
        image: the column of images; None: there is none.
        order: names of a checkpoint's classes. Data with the same classes are numbered in this order.
        label_is_learnt: false if labels only split the data, so that another column may be the label's as well.

    Raises:
        UserError: data that cannot be read, a split or column that does not exist, an empty split, missing values,
            labels that are no classes or unseen in training, or images that do not decode.
    """
    if (given := _given.get()) is not None:
        return given
    wanted = list(columns)
    wanted += [("label_column", label)] if label is not None else []
    wanted += [("image_column", image)] if image is not None else []
    _refuse_two_roles(wanted, label_is_learnt)
    splits = read(config, [column for _, column in wanted])
    check_columns(config, splits, wanted, label)
    if image is not None:
        for rows in splits.values():
            holds_images(rows, image)
        splits = {k: readable_images(config, k, rows.cast_column(image, Image(decode=False)), image)
                  for k, rows in splits.items()}  # fmt: skip
    if label is None:
        zeros = {k: np.zeros(len(rows), np.int64) for k, rows in splits.items()}
        numbers, classes, named = zeros, list[str](), False
    else:
        numbers, classes, named = numbered(config, splits, label, order)
    if config.test_share is not None:
        splits, numbers = _held_out(config, splits["train"], numbers["train"])
    for name, limit in (("train", config.max_train), ("test", config.max_test)):
        if limit is not None and limit < 1:
            limit = math.ceil(limit * len(splits[name]))
        if limit is not None and limit < len(splits[name]):
            kept = np.sort(spread(numbers[name], config.data_seed, f"max_{name}")[: int(limit)])
            splits[name], numbers[name] = splits[name].select(kept), numbers[name][kept]
    _warn_of_absent_classes(numbers, classes)
    used = {column for _, column in wanted}
    folder = image_folder(config) if image is not None else ""
    hashes = [of_rows(splits[name], used, folder) for name in ("train", "test")]
    content = hashlib.sha256(repr([*hashes, classes]).encode()).hexdigest()
    return Examples(splits["train"], splits["test"], numbers["train"], numbers["test"], classes, named, content)


def check_columns(
    config: TaskConfig, splits: Mapping[str, Dataset], wanted: Sequence[tuple[str, str]], label: str | None
) -> None:
    """UserError for an empty split, a column that does not exist, or one besides `label` with missing values.

    Args:
        config: names the splits.
        splits: "train" or "test" -> rows.
        wanted: (field of the configuration, column) for each column.
        label: the column of labels.
    """
    for name, rows in splits.items():
        if len(rows) == 0:
            split = getattr(config, f"{name}_split") or name
            raise UserError(f"task.{name}_split: the split {split!r} holds no example; choose or make another.")
        for field, column in wanted:
            if column not in rows.column_names:
                raise unknown(f"task.{field}", column, set(rows.column_names) - {PLACE})
            if column != label:
                _refuse_missing(field, column, name, rows)


def _refuse_two_roles(wanted: Sequence[tuple[str, str]], label_is_learnt: bool) -> None:
    """UserError for a column that two fields name: the model would read what it is to tell, or one text twice."""
    roles: dict[str, str] = {}
    for field, column in wanted:
        if field == "label_column" and not label_is_learnt:
            continue
        if column in roles:
            raise UserError(
                f"task.{field}: column {column!r} is that of task.{roles[column]} already; each needs a column of "
                "its own."
            )
        roles[column] = field


def needs_text(rows: Dataset, fields: Iterable[tuple[str, str]], numbers: bool = False) -> None:
    """Checks that columns hold text.

    Args:
        rows: the examples.
        fields: (field of the configuration, column) for each column.
        numbers: whether numbers are accepted as well, to be read as their digits.

    Raises:
        UserError: a column holds something else.
    """
    kinds = ("string", "large_string") + ("bool", "int", "uint", "float", "decimal") * numbers
    for field, column in fields:
        feature = rows.features[column]
        if isinstance(feature, ClassLabel):
            raise UserError(
                f"task.{field}: column {column!r} holds the numbers of classes ({listed(feature.names)}), not text; "
                "write their names into a column of text."
            )
        if not (isinstance(feature, Value) and feature.dtype.startswith(kinds)):
            raise UserError(
                f"task.{field}: column {column!r} holds {str(feature)[:200]}, not text; write what the model is to "
                "read into a column of text."
            )


def needs_tokens(rows: Dataset, lengths: NDArray[np.int64], field: str, split: str) -> None:
    """Checks that the tokenizer makes at least one token of every example.

    Args:
        rows: the n examples.
        lengths: (n,) in tokens.
        field: of the configuration that names the column, for errors.
        split: "train" or "test", for errors.

    Raises:
        UserError: an example has no token; gives the place of the first one.
    """
    empty = np.flatnonzero(lengths == 0)
    if empty.size:
        raise UserError(
            f"task.{field}: the tokenizer makes no token of {empty.size} of {len(rows)} {split} examples (first: "
            f"{place(rows, int(empty[0]))}); fill or remove these rows."
        )


def spread(labels: Labels, seed: int, purpose: str) -> NDArray[np.int64]:
    """A random order of examples in which every stretch has nearly the class mix of the whole.

    The m examples of a class are put in random order, and the j-th of them goes to the fraction (j + 1/2) / m.

    Args:
        labels: (n,) class numbers.
        seed: of the data.
        purpose: names the draw (`randomness.py`).

    Returns:
        (n,) indices of the examples.
    """
    order = numpy_generator(seed, "data", purpose).permutation(len(labels))
    _, inverse, counts = np.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = np.argsort(inverse, kind="stable")
    rank = np.empty(len(labels))
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.argsort((rank + 0.5) / counts[inverse], kind="stable")]


def _refuse_missing(field: str, column: str, split: str, rows: Dataset) -> None:
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    if values.null_count:
        first = values.is_null().to_pylist().index(True)
        raise UserError(
            f"task.{field}: {values.null_count} of {len(rows)} {split} examples have nothing in column "
            f"{column!r} (first: {place(rows, first)}); fill or remove these rows."
        )


def _held_out(config: TaskConfig, rows: Dataset, labels: Labels) -> tuple[dict[str, Dataset], dict[str, Labels]]:
    assert config.test_share is not None
    if len(rows) < 2:
        raise UserError("task.test_share: there is only 1 example; none can be held out.")
    size = min(max(1, round(config.test_share * len(rows))), len(rows) - 1)
    order = spread(labels, config.data_seed, "test_share")
    parts = {"train": np.sort(order[size:]), "test": np.sort(order[:size])}
    return {k: rows.select(p) for k, p in parts.items()}, {k: labels[p] for k, p in parts.items()}


def _warn_of_absent_classes(numbers: dict[str, Labels], classes: list[str]) -> None:
    present = {k: set(of_split.tolist()) for k, of_split in numbers.items()}
    for name, other in (("train", "test"), ("test", "train")):
        absent = [classes[c] for c in sorted(present[other] - present[name])] if classes else []
        if absent:
            warnings.warn(
                f"task.data: {len(absent)} of {len(classes)} classes have {other} examples but no {name} "
                f"example: {listed(absent)}.",
                stacklevel=3,
            )
