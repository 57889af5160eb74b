"""Which classes do the labels of a data set name, and which number has each class?

Labels are words, truth values, whole numbers, or the numbers of a `ClassLabel` with names. An order that the user or a
checkpoint gives is matched by name. Where names could also be meant by position, an error shows both readings.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset
from numpy.typing import NDArray

from decaf_lora.config import TaskConfig
from decaf_lora.data.places import place
from decaf_lora.errors import UserError, listed

Labels = NDArray[np.int64]

_NOTHING = {"na", "n/a", "nan", "null", "none", "-", "?", "."}
"""What people write into a column of numbers where a number is missing."""


class Numbering(NamedTuple):
    """Class c is written `values[c]` in the data and is called `names[c]`."""

    values: list[Any]
    names: list[str]
    named: bool
    """Whether the data or the user gave the names; false if the names are just numbers."""


def numbered(
    config: TaskConfig, splits: Mapping[str, Dataset], column: str, order: Sequence[str] = ()
) -> tuple[dict[str, Labels], list[str], bool]:
    """Numbers the labels of all splits.

    Args:
        config: may name the classes.
        splits: "train" and "test" -> examples.
        column: of the labels.
        order: names of a checkpoint's classes. Data with the same classes are numbered in this order.

    Returns:
        Split -> (n,) class numbers, the names of the classes, and whether the data or the user gave these names.

    Raises:
        UserError: labels that are missing, that are no classes, or that the training split does not have.
    """
    feature = splits["train"].features[column]
    values = _values(config, splits, column, feature)
    own = list(feature.names) if isinstance(feature, ClassLabel) else []
    numbering = _numbering(config, values, own)
    if order and not config.classes:
        numbering = _in_order(numbering, order)
    number = {value: i for i, value in enumerate(numbering.values)}
    _refuse_strange(config, values, number, bool(config.classes or own))
    _tell_alike(values)
    numbers = {k: np.array([number[v] for v in of_split], np.int64) for k, of_split in values.items()}
    return numbers, numbering.names, numbering.named


def needs_classes(labels: Labels, classes: Sequence[str]) -> None:
    """UserError if the training examples are all of one class."""
    present = np.unique(labels)
    if len(present) < 2:
        raise UserError(
            f"task.label_column: all {len(labels)} training examples have the label "
            f"{classes[int(present[0])]!r}; there is nothing to tell apart. Choose another column or other examples."
        )


def alike(name: str) -> str:
    """A form of `name` that is equal for names which differ only in blanks, case or the coding of accents."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _values(config: TaskConfig, splits: Mapping[str, Dataset], column: str, feature: Any) -> dict[str, list[Any]]:
    """The labels of every split as words, truth values or whole numbers, all of one kind."""
    values: dict[str, list[Any]] = {k: rows[column][:] for k, rows in splits.items()}
    for name, of_split in values.items():
        missing = [i for i, v in enumerate(of_split) if _is_missing(v, feature)]
        if missing:
            raise UserError(
                f"task.label_column: {len(missing)} of {len(of_split)} {name} examples have no label in column "
                f"{column!r} (first: {place(splits[name], missing[0])}); remove these rows or choose another split."
            )
    kinds = {type(v) for of_split in values.values() for v in of_split}
    if float in kinds and all(float(v).is_integer() for of_split in values.values() for v in of_split):
        values, kinds = {k: [int(v) for v in of_split] for k, of_split in values.items()}, {int}
    if len(kinds) > 1 or not kinds <= {bool, int, str}:
        strange = [(k, i) for k, of_split in values.items() for i, v in enumerate(of_split) if not _whole(v)]
        first = f" (first: {values[strange[0][0]][strange[0][1]]!r}, {place(splits[strange[0][0]], strange[0][1])})"
        raise UserError(
            f"task.label_column: column {column!r} holds {feature}, which are no classes{first * (float in kinds)}; "
            "use whole numbers or strings."
        )
    if kinds == {str}:
        words = Counter(v for of_split in values.values() for v in of_split)
        nothing = [w for w in words if w.strip().lower() in _NOTHING]
        if nothing and len(nothing) < len(words) and all(_whole(w) for w in words if w not in nothing):
            name, i = next((k, i) for k, of_split in values.items() for i, v in enumerate(of_split) if v in nothing)
            raise UserError(
                f"task.label_column: {sum(words[w] for w in nothing)} examples have {nothing[0]!r} in column "
                f"{column!r}, where all others have a number (first: {place(splits[name], i)}); remove these rows."
            )
    return values


def _whole(value: Any) -> bool:
    try:
        return float(value).is_integer()
    except (TypeError, ValueError, OverflowError):
        return False


def _is_missing(value: Any, feature: Any) -> bool:
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return True
    return isinstance(feature, ClassLabel) and value < 0  # the Hub's mark of a hidden label


def _numbering(config: TaskConfig, values: Mapping[str, list[Any]], own: list[str]) -> Numbering:
    """The classes as the data have them, or as `config.classes` names them."""
    asked = list(config.classes)
    twice = [name for name, count in Counter(asked).items() if count > 1]
    if twice:
        raise UserError(f"task.classes: {twice[0]!r} is there twice; every class needs a name of its own.")
    kind = type(values["train"][0])
    if kind is str:
        words = asked or sorted(set(values["train"]))
        return Numbering(words, list(words), True)
    if kind is bool:
        found: list[Any] = [False, True]
    elif own:
        found = list(range(len(own)))
    else:
        found = sorted({v for of_split in values.values() for v in of_split} if asked else set(values["train"]))
    names = own or [str(v) for v in found]
    if not asked:
        return Numbering(found, names, bool(own))
    by_name = {alike(name) if kind is bool else name: value for name, value in zip(names, found, strict=True)}
    keys = [alike(name) if kind is bool else name for name in asked]
    if sorted(keys) == sorted(by_name):
        return Numbering([by_name[key] for key in keys], asked, True)
    moved = [key for i, key in enumerate(keys) if key in by_name and by_name[key] != i]
    if moved:
        ours, theirs = keys.index(moved[0]), int(by_name[moved[0]])
        raise UserError(
            f"task.classes: {moved[0]!r} is class {theirs} in the data but class {ours} in task.classes. Give all "
            f"names of the data ({listed(names, 20)}) in the order that you want, or new names in the data's order."
        )
    if kind is bool or own:
        if len(asked) != len(found):
            raise UserError(f"task.classes: {len(asked)} names for {len(found)} classes ({listed(names)}).")
        return Numbering(found, asked, True)
    return Numbering(list(range(len(asked))), asked, True)


def _in_order(numbering: Numbering, order: Sequence[str]) -> Numbering:
    """The classes in the order of a checkpoint's, if both have the same names.

    Classes that are numbers without names take the checkpoint's names, if there are as many.
    """
    keys = [alike(name) for name in numbering.names]
    wanted = [alike(name) for name in order]
    if sorted(keys) == sorted(wanted) and len(set(keys)) == len(keys):
        places = [keys.index(key) for key in wanted]
        return Numbering([numbering.values[i] for i in places], [numbering.names[i] for i in places], numbering.named)
    if not numbering.named and numbering.values == list(range(len(order))):
        return Numbering(numbering.values, list(order), True)
    return numbering


def _refuse_strange(
    config: TaskConfig, values: Mapping[str, list[Any]], number: Mapping[Any, int], given: bool
) -> None:
    known = {alike(value): value for value in number if isinstance(value, str)}
    for name, of_split in values.items():
        strange = Counter(v for v in of_split if v not in number)
        if not strange:
            continue
        shown = f"{strange.total()} of {len(of_split)} {name} examples have labels"
        what = ", ".join(f"{v!r} ({n})" for v, n in strange.most_common(5))
        near = [(v, known[alike(v)]) for v in strange if isinstance(v, str) and alike(v) in known]
        hint = f" ({near[0][0]!r} and {near[0][1]!r} differ only in blanks or case.)" if near else ""
        if given:
            raise UserError(
                f"task.classes: {shown} that are not among the {len(number)} classes: {what}; name all classes "
                f"(numbers count from 0).{hint}"
            )
        raise UserError(
            f"task.label_column: {shown} unseen in training: {what}; remove them, choose another split, or "
            f"name all classes in task.classes.{hint}"
        )


def _tell_alike(values: Mapping[str, list[Any]]) -> None:
    """Warns of labels that differ only in blanks or case, and so count as different classes."""
    words = Counter(v for of_split in values.values() for v in of_split if isinstance(v, str))
    groups: dict[str, list[str]] = {}
    for word in sorted(words):
        groups.setdefault(alike(word), []).append(word)
    double = [group for group in groups.values() if len(group) > 1]
    if double:
        each = "; ".join(", ".join(f"{w!r} ({words[w]})" for w in group) for group in double[:5])
        warnings.warn(
            f"task.label_column: labels that differ only in blanks or case count as different classes: {each}. Make "
            "them equal if they mean one class.",
            stacklevel=4,
        )
