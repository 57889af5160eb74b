"""How are values checked, and a refused one told in one line that names the field? For every model of pydantic here."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from decaf_lora.errors import UserError, nearest

OWN = "own"
"""The field of a section that holds the options of a kind which is not of this package."""

_Model = TypeVar("_Model", bound=BaseModel)


def checked(kind: type[_Model], values: dict[str, Any]) -> _Model:
    """A model of `kind` from plain values; UserError in one line that names the first field at fault."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(kind, error)) from error


_TAG = re.compile(r"(constrained-)?(int|float|str|bool)|literal\[.*\]|(list|tuple)\[.*\]")
"""What pydantic adds to the place of a fault in a field of several types."""


def explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first fault of a validation as `field: what is wrong, what to do`."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"] if not _TAG.fullmatch(str(part))) or "config"
    if fault["type"] == "extra_forbidden":
        close = nearest(where, fields(kind))
        return f"{where}: unknown field." + (f" Did you mean {close[0]}?" if close else "")
    message = fault["msg"].removeprefix("Value error, ")
    given = fault.get("input")
    shown = ""
    if isinstance(given, str | int | float | bool | None) and abs(given if isinstance(given, int) else 0) < 10**30:
        shown = f" (got {given!r})" if len(repr(given)) < 80 else f" (got {repr(given)[:80]} ...)"
    if fault["type"] == "string_type" and isinstance(given, int | float):
        shown += "; write it in quotes"
    return f"{where}: {message[0].lower()}{message[1:]}{shown}."


def fields(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all fields of a configuration, such as "training.steps"; `prefix` goes before each."""
    names = []
    for name, field in kind.model_fields.items():
        if name == OWN:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += fields(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def flat(config: BaseModel) -> dict[str, Any]:
    """Dotted name of every field -> its value, in JSON's types."""

    def walk(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        out = {}
        for key, value in values.items():
            out.update(walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
        return out

    return walk(config.model_dump(mode="json"), "")
