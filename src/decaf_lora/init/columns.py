"""Which column is what? The label, the text, the site, the instruction: by their names, and by what they hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Image

from decaf_lora.data.places import PLACE
from decaf_lora.errors import UserError, unknown

LABELS = (
    *("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "diagnosis", "outcome"),
    *("y", "tag", "type"),
)
TEXTS = (
    *("text", "message", "sentence", "note", "notes", "report", "review", "question", "content", "body", "comment"),
    *("description", "utterance", "query"),
)
SITES = (
    *("site", "hospital", "clinic", "office", "branch", "centre", "center", "department", "institution", "client"),
    *("region", "country", "store", "organisation", "organization", "user", "agent"),
)
"""Names that people give to such columns, the likeliest first."""

MOST_CLASSES, MOST_SITES = 200, 50


@dataclass(frozen=True)
class Column:
    """What a column of a table holds."""

    name: str
    values: list[Any]

    @property
    def given(self) -> list[Any]:
        """Its values without those that are missing."""
        return [value for value in self.values if value is not None and value == value and str(value).strip()]

    @property
    def is_text(self) -> bool:
        """Whether its values are words."""
        return bool(self.given) and all(isinstance(value, str) for value in self.given)

    @property
    def distinct(self) -> int:
        """Number of different values."""
        return len({str(value) for value in self.given})

    @property
    def words(self) -> float:
        """Mean number of words."""
        return sum(len(str(value).split()) for value in self.given) / max(1, len(self.given))

    @property
    def may_be_classes(self) -> bool:
        """Whether its values are few, and each there more than once on average."""
        whole = all(not isinstance(v, float) or v.is_integer() for v in self.given)
        plain = all(isinstance(v, str | int | float | bool) for v in self.given)
        few = 2 <= self.distinct <= min(MOST_CLASSES, len(self.given) / 2)
        return plain and whole and few and self.words < 6


def columns_of(table: Dataset) -> list[Column]:
    """The columns of a table; classes by name."""
    found = []
    for name in table.column_names:
        if name == PLACE:
            continue
        feature = table.features[name]
        values = [] if isinstance(feature, Image) else list(table[name][:])  # images need not be decoded
        if isinstance(feature, ClassLabel):
            values = [None if v is None or v < 0 else feature.int2str(v) for v in values]
        found.append(Column(name, values))
    return found


def label_of(columns: Sequence[Column], asked: str | None) -> Column:
    """The column of labels.

    Args:
        columns: of the table.
        asked: the name that the user gives; None: find it.

    Raises:
        UserError: none can be it, or several.
    """
    if asked is not None:
        return named(columns, asked, "label_column")
    if (called := pick(columns, LABELS[:2])) is not None:
        return called  # what is wrong with it, if anything, the reader of labels says
    found = [column for column in columns if column.may_be_classes]
    return _one(found, LABELS, columns, "label_column", "a label (few values, each several times)")


def text_of(columns: Sequence[Column], asked: str | None, without: Sequence[str], field: str = "text_column") -> Column:
    """The column of texts: the one with such a name, or the one with by far the longest values.

    Raises:
        UserError: there is no column of words, or it is not clear which one is meant.
    """
    if asked is not None:
        return named(columns, asked, field)
    found = [column for column in columns if column.is_text and column.name not in without]
    if any(_named(column.name, TEXTS) for column in found):
        return _one(found, TEXTS, columns, field, "text")
    longest = sorted(found, key=lambda column: -column.words)
    if len(longest) > 1 and longest[1].words * 2 > longest[0].words:
        raise _several([column for column in found if column in longest[:2]], field)
    if not longest:
        raise UserError(f"{field}: no column holds words ({', '.join(c.name for c in columns)}); name one.")
    return longest[0]


def site_of(columns: Sequence[Column], without: Sequence[str], asked: str | None = None) -> Column | None:
    """The column that names the site of each row: `asked`, or one with such a name; None: there is no such."""
    if asked is not None:
        return named(columns, asked, "site_column")
    for column in columns:
        fits = 2 <= column.distinct <= MOST_SITES and len(column.given) == len(column.values)
        if column.name not in without and fits and _named(column.name, SITES) and column.may_be_classes:
            return column
    return None


def pick(columns: Sequence[Column], names: Sequence[str]) -> Column | None:
    """The column with the first of `names` that there is."""
    for name in names:
        for column in columns:
            if _key(column.name) == name:
                return column
    return None


def named(columns: Sequence[Column], name: str, field: str) -> Column:
    """The column called `name`; UserError suggests the nearest."""
    for column in columns:
        if column.name == name:
            return column
    raise unknown(field, name, [column.name for column in columns])


def _one(found: list[Column], names: Sequence[str], columns: Sequence[Column], field: str, what: str) -> Column:
    by_name = [column for column in found if _named(column.name, names)]
    exact = pick(by_name, names[:2])
    if exact is not None:
        return exact
    if len(by_name or found) == 1:
        return (by_name or found)[0]
    if not found:
        raise UserError(f"{field}: no column looks like {what}: {', '.join(c.name for c in columns)}; name it.")
    raise _several(by_name or found, field)


def _several(found: Sequence[Column], field: str) -> UserError:
    option = f"--{field.replace('_', '-')}"
    names = " or ".join(column.name for column in found[:6])
    return UserError(f"{field}: it could be {names}; say which, as in {option} {found[0].name}.")


def _named(name: str, names: Sequence[str]) -> bool:
    return not set(names).isdisjoint([_key(name), *_key(name).split("_")])


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
