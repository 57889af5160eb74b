"""Which examples are predicted, and what are they called? One split of a file or folder; labels are optional."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Image
from numpy.typing import NDArray

from decaf_lora.config import TaskConfig
from decaf_lora.data import Examples, alike, image_folder
from decaf_lora.data.examples import check_columns
from decaf_lora.data.folders import IMAGES, METADATA
from decaf_lora.data.images import holds_images, readable_images
from decaf_lora.data.reading import read_split
from decaf_lora.errors import UserError, listed, unknown
from decaf_lora.predict.described import Described

ROW = "decaf:row"
"""Name of the column that numbers the examples, from 0: a task may put them into another order."""
NOT = "none"
"""The name of a label column that says: do not look for labels."""
UNKNOWN = -1
"""The class of an example without a label."""


class Rows(NamedTuple):
    """n examples to predict."""

    table: Dataset
    labels: NDArray[np.int64] | None
    """(n,) class numbers, `UNKNOWN` where there is none; None: the data have no labels, or the model no classes."""
    answers: list[str] | None
    """The answers that the data give, for a model that writes its own."""
    shown: list[str]
    """(n,) the text, or the path of the image, of each."""
    skipped: int
    """Examples that were left out: images that do not decode, with `skip_bad`."""


def read_rows(described: Described, config: TaskConfig, split: str | None, label: str | None) -> Rows:
    """Reads the examples that `config` names.

    Args:
        described: the model.
        config: `Described.config`.
        split: of a data set with several; None: `test`, or the only one.
        label: column of the labels; None: the column `label`, if there is one.

    Raises:
        UserError: the data cannot be read, a column is missing, a row has no text, or a label is no class.
    """
    columns, image = described.columns, config.image_column if described.use == "image-text" else None
    table = _folder_of_images(Path(config.data or "").expanduser(), image, config.classes)
    if table is None:
        wanted = [*columns, *([("image_column", image)] if image else [])]
        usual = config.answer_column if described.use == "instruction" else described.task.get("label_column", "label")
        given = label or usual
        table = read_split(config, [column for _, column in wanted], split)
        check_columns(config, {"test": table}, wanted, None)
        if label not in (None, NOT) and label not in table.column_names:
            raise unknown("label_column", label, set(table.column_names))
        has = label != NOT and given in table.column_names and given not in {column for _, column in wanted}
        found = [] if not has else _values(table, str(given))
    else:
        given, has, found = "label", label != NOT, table["label"][:]
    if described.use == "instruction":
        assert config.answer_column is not None
        answers = ["" if value is None else str(value) for value in found] if has else None
        asked = [answer or "?" for answer in answers] if answers else ["?"] * len(table)
        if config.answer_column in table.column_names:
            table = table.remove_columns(config.answer_column)
        table = table.add_column(config.answer_column, asked)  # the task wants one; it is not read to write another
        return Rows(_numbered(table), None, answers, _texts(described, table), 0)
    labels = numbered(found, config.classes, str(given)) if has else None
    before, table = len(table), _numbered(table)
    if image is not None:
        holds_images(table, image)
        table = readable_images(config, "test", table.cast_column(image, Image(decode=False)), image)
        kept = np.array(table[ROW][:], np.int64)
        labels = None if labels is None else labels[kept]
    return Rows(table, labels, None, _shown(described, config, table, image), before - len(table))


def as_examples(rows: Rows, classes: Sequence[str]) -> Examples:
    """The rows as a task takes them: all to score, and a first few in the place of training examples."""
    first = rows.table.select([0] * max(2, min(2, len(classes))))
    labels = np.zeros(len(rows.table), np.int64) if rows.labels is None else np.maximum(rows.labels, 0)
    return Examples(first, rows.table, np.arange(len(first)), labels, list(classes), True)


def numbered(values: Sequence[Any], classes: Sequence[str], column: str) -> NDArray[np.int64]:
    """(n,) the classes that labels name, `UNKNOWN` for those that are missing.

    A label is the name of a class or, where no class is called by a number, its number.

    Raises:
        UserError: labels that are no classes.
    """
    places = {name: number for number, name in enumerate(classes)}
    loose = {alike(name): number for number, name in enumerate(classes)}
    by_number = not any(name.lstrip("-").isdigit() for name in classes)
    numbers = {str(number) for number in range(len(classes))}
    found: list[int] = []
    strange: Counter[str] = Counter()
    for value in values:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or value != value or (isinstance(value, str) and not value.strip()):
            found.append(UNKNOWN)
        elif str(value) in places:
            found.append(places[str(value)])
        elif isinstance(value, bool | np.bool_) and alike(str(value)) in loose:
            found.append(loose[alike(str(value))])
        elif by_number and str(int(value) if isinstance(value, bool) else value) in numbers:
            found.append(int(value))
        else:
            strange[str(value)] += 1
    if strange:
        what = ", ".join(f"{name!r} ({count})" for name, count in strange.most_common(5))
        raise UserError(
            f"label_column: {strange.total()} of {len(values)} labels in column {column!r} are no classes of the model "
            f"({listed(classes, 8)}): {what}; mend them, or leave the labels out with --label-column none."
        )
    return np.array(found, np.int64)


def _values(table: Dataset, column: str) -> list[Any]:
    feature, values = table.features[column], table[column][:]
    if isinstance(feature, ClassLabel):
        return [None if v is None or v < 0 else feature.int2str(v) for v in values]
    return list(values)


def _numbered(table: Dataset) -> Dataset:
    return table.add_column(ROW, np.arange(len(table)))


def _folder_of_images(folder: Path, image: str | None, classes: Sequence[str]) -> Dataset | None:
    """The images below a folder, by path; None if there is no such folder.

    Their folders are labels, unless none of these is called like a class.
    """
    if image is None or not folder.is_dir():
        return None
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith((".", "__"))]
    if any(p.name in METADATA for p in files) or not any(p.suffix.lower() in IMAGES for p in files):
        return None
    paths = [str(p.relative_to(folder)) for p in files if p.suffix.lower() in IMAGES]
    above: list[str | None] = [Path(path).parent.name for path in paths]
    if not any(name in classes for name in above):
        above = [None] * len(paths)
    return Dataset.from_dict({image: [str(folder / path) for path in paths], "label": above})


def _shown(described: Described, config: TaskConfig, table: Dataset, image: str | None) -> list[str]:
    if image is None:
        return _texts(described, table)
    folder = image_folder(config) or config.data or ""
    paths = [str((value or {}).get("path") or "") for value in table[image][:]]
    return [str(Path(p).relative_to(folder)) if folder and p.startswith(f"{folder}/") else p for p in paths]


def _texts(described: Described, table: Dataset) -> list[str]:
    """What each example asks: its text, its pair of texts, or its prompt."""
    from decaf_lora.tasks.sequences import parts_of

    if described.use == "sequence-classification":
        columns = [table[column][:] for _, column in described.columns]
        return [" | ".join(map(str, texts)) for texts in zip(*columns, strict=True)]
    parts = parts_of(described.task["templates"][0])
    read = {column: table[column][:] for _, column in parts if column}
    return [
        "".join(text + (str(read[column][i]) if column else "") for text, column in parts) for i in range(len(table))
    ]
