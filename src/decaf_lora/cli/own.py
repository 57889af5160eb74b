"""How do arguments reach a kind of the user's own? `--graph mine.py:two_rings --graph.bridges 3`."""

from __future__ import annotations

from typing import Any

from decaf_lora import kinds
from decaf_lora.config import OWN, RunConfig, Section
from decaf_lora.errors import UserError
from decaf_lora.yaml_file import read_value

SECTIONS = ("task", "algorithm")
NAMES = ("graph", "partition")

Values = dict[str, dict[str, Any]]
"""Section -> option -> value."""


def apart(kind: type[RunConfig], base: RunConfig, args: list[str]) -> tuple[list[str], Values]:
    """Separates the options of kinds that are not of this package from the other arguments.

    Args:
        kind: the class of `base`.
        base: the configuration that the arguments override.
        args: the command line, with full names of options.

    Returns:
        The other arguments, and the options that were separated.
    """
    names = {section: _last(args, f"--{section}.name") or getattr(base, section).name for section in SECTIONS}
    others = [*_all(args, "--algorithms"), *getattr(base, "algorithms", ())]
    left: list[str] = []
    found: Values = {}
    place = 0
    while place < len(args):
        end = place + 1
        while end < len(args) and not args[end].startswith("--"):
            end += 1
        key, equals, text = args[place].partition("=")
        section, dot, option = key.removeprefix("--").partition(".")
        if key.startswith("--") and dot and _takes(kind, section, option.replace("-", "_"), names, others):
            given = [text] if equals else args[place + 1 : end]
            read = [read_value(value, f"{section}.{option}") for value in given] or [True]
            found.setdefault(section, {})[option.replace("-", "_")] = read[0] if len(read) == 1 else read
        else:
            left += args[place:end]
        place = end
    return left, found


def _takes(kind: type[RunConfig], section: str, option: str, names: dict[str, str], others: list[str]) -> bool:
    """Whether `--section.option` belongs to a kind that may have options of its own."""
    if section in NAMES:
        return True
    if section not in SECTIONS:
        return False
    model = kind.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, Section)
    candidates = [names[section], *(others if section == "algorithm" else [])]
    return option not in model.model_fields and model.has_own(candidates)


def together(values: dict[str, Any], base: RunConfig, own: Values) -> dict[str, Any]:
    """The plain values of a configuration, with the options of kinds that are not of this package put back.

    Args:
        values: the plain values, without these options.
        base: the configuration that was overridden. Its options stay where the arguments name no other kind.
        own: the options of the command line, from `apart`.
    """
    values = dict(values)
    for section in SECTIONS:
        before = getattr(base, section)
        kept = before.own if values[section]["name"] == before.name else {}
        values[section] = {**values[section], OWN: {**kept, **own.get(section, {})}}
    for field in NAMES:
        values[field] = kinds.joined(values[field], own.get(field, {}), field)
    return values


def shown(args: list[str], base: RunConfig) -> str:
    """The options of the user's own functions that the arguments or `base` name, for `--help`."""
    lines: list[str] = []
    for field in (*SECTIONS, *NAMES):
        before = getattr(base, field).name if field in SECTIONS else getattr(base, field)
        name = _last(args, f"--{field}.name" if field in SECTIONS else f"--{field}") or before
        try:
            found = kinds.own_function(name, field)
        except UserError:
            continue  # the run itself says what is wrong
        if found is not None:
            lines += kinds.described(found[0], field, ("num_agents", "seed", "labels", "column"))
    return "\n\nOptions of your own functions: " + ", ".join(lines) if lines else ""


def _last(args: list[str], key: str) -> str | None:
    found = _all(args, key)
    return found[-1] if found else None


def _all(args: list[str], key: str) -> list[str]:
    """The values that follow `key`, wherever it stands."""
    found: list[str] = []
    inside = False
    for argument in args:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            inside = name == key
            found += [value] if inside and equals else []
        elif inside:
            found.append(argument)
    return found
