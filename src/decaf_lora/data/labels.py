"""Which classes do the labels of a data set name, and which number has each?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from numpy.typing import NDArray

from decaf_lora.config import TaskConfig
from decaf_lora.errors import UserError

Labels = NDArray[np.int64]


def numbered(config: TaskConfig, splits: dict[str, Dataset], column: str) -> tuple[dict[str, Labels], list[str], bool]:
    """The class numbers of every split, the names of the classes, and whether these were given."""
    feature = splits["train"].features[column]
    values: dict[str, list[Any]] = {k: rows[column][:] for k, rows in splits.items()}
    for name, of_split in values.items():
        missing = [i for i, v in enumerate(of_split) if _is_missing(v, feature)]
        if missing:
            raise UserError(
                f"task.label_column: {len(missing)} of {len(of_split)} {name} examples have no label in column "
                f"{column!r} (first: row {missing[0]}); remove these rows or choose another split."
            )
    kinds = {type(v) for of_split in values.values() for v in of_split}
    if float in kinds and all(v == int(v) for of_split in values.values() for v in of_split):
        values, kinds = {k: [int(v) for v in of_split] for k, of_split in values.items()}, {int}
    if len(kinds) > 1 or not kinds <= {bool, int, str}:
        raise UserError(
            f"task.label_column: column {column!r} holds {feature}, which are no classes; use whole numbers or strings."
        )
    given = list(config.classes) or (list(feature.names) if isinstance(feature, ClassLabel) else [])
    known: Sequence[Any]
    if kinds == {bool}:
        known = [False, True]
    elif kinds == {int} and given:
        known = range(len(given))
    else:
        known = given or sorted(set(values["train"]))
    if given and len(given) != len(known):
        raise UserError(f"task.classes: {len(given)} names for {len(known)} classes ({listed(known)}).")
    number = {value: i for i, value in enumerate(known)}
    for name, of_split in values.items():
        strange = Counter(v for v in of_split if v not in number)
        if not strange:
            continue
        shown = f"{strange.total()} of {len(of_split)} {name} examples have labels"
        what = ", ".join(f"{v!r} ({n})" for v, n in strange.most_common(5))
        if given:
            raise UserError(
                f"task.classes: {shown} that are not among the {len(given)} classes: {what}; name all classes "
                "(numbers count from 0)."
            )
        raise UserError(
            f"task.label_column: {shown} unseen in training: {what}; remove them, choose another split, or "
            "name all classes in task.classes."
        )
    numbers = {k: np.array([number[v] for v in of_split], np.int64) for k, of_split in values.items()}
    return numbers, given or [str(v) for v in known], bool(given) or kinds == {str}


def _is_missing(value: Any, feature: Any) -> bool:
    if value is None or value == "" or value != value:
        return True
    return isinstance(feature, ClassLabel) and value < 0  # the Hub's mark of a hidden label


def listed(names: Sequence[Any], most: int = 5) -> str:
    return ", ".join(str(n) for n in names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))
