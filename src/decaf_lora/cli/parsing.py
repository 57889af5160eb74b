"""How does tyro read the options? A mistake becomes a UserError of one line; help shows first what most people need."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, make_dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro
from pydantic import BaseModel, ConfigDict, ValidationError, validate_call
from pydantic.fields import FieldInfo
from tyro.conf import Suppress, arg

from decaf_lora.cli import own
from decaf_lora.config import OWN, RunConfig, build, explain, fields
from decaf_lora.errors import UserError, nearest

Options = TypeVar("Options")

_ALIASES = {
    "--algorithm": "--algorithm.name",
    "--task": "--task.name",
    "--model": "--task.model",
    "--data": "--task.data",
    "--lr": "--training.learning-rate",
    "--skip-bad": "--task.skip-bad",
    "--init-adapter": "--init-adapters",
}


def parse(
    kind: type[RunConfig], base: RunConfig, prog: str, args: list[str], options: type[Options]
) -> tuple[RunConfig, Options]:
    """`base` with the fields that `args` set, and the command's own options. Shows help and exits if asked to."""
    args = [_ALIASES.get(a, a) if "=" not in a else _alias_with_value(a) for a in args]
    args = _default_baseline(args)
    args, options_of_own = own.apart(kind, base, args)
    check_options(args, [*fields(kind), *_fields_of(options), "help"])
    if "--help" in args or "-h" in args:
        _show_help(base, prog, args, options)

    def both(config: Any, output: Any) -> tuple[Any, Any]:
        return config, output

    given = {a[2:].split("=")[0].replace("-", "_") for a in args if a.startswith("--")}
    if "task.test_share" in given and "task.test_split" not in given:  # it replaces the recipe's test split
        base = base.model_copy(update={"task": base.task.model_copy(update={"test_split": None})})
    both.__annotations__.update(
        config=Annotated[_unchecked(kind), arg(name="")], output=Annotated[_unchecked(options), arg(name="")]
    )
    both.__defaults__ = (_unchecked_values(base), _unchecked_values(options()))
    values, output = parsed(both, prog, args)
    config = build(kind, own.together(asdict(values), base, options_of_own))
    try:
        return config, options(**asdict(output))
    except ValidationError as error:
        raise UserError(explain(kind, error)) from error


_UNCHECKED: dict[Any, type[Any]] = {}


def _unchecked(kind: Any) -> type[Any]:
    """A dataclass with the fields of `kind` but none of its checks.

    tyro reads options into it. `config.build` then checks them all at once, with our messages.
    """
    if kind not in _UNCHECKED:
        columns: list[tuple[str, Any]] = []
        for name, field in _fields_of(kind).items():
            columns.append((name, _unchecked(field.annotation) if _is_group(field) else field.annotation))
        _UNCHECKED[kind] = make_dataclass(kind.__name__, columns, frozen=True)
    return _UNCHECKED[kind]


def _unchecked_values(config: Any) -> Any:
    values = {name: getattr(config, name) for name in _fields_of(type(config))}
    plain = {k: _unchecked_values(v) if isinstance(v, BaseModel) else v for k, v in values.items()}
    return _unchecked(type(config))(**plain)


def _fields_of(kind: type[Any]) -> dict[str, FieldInfo]:
    """The fields of a model or a dataclass of pydantic."""
    found: dict[str, FieldInfo] = kind.__pydantic_fields__
    return {name: field for name, field in found.items() if name != OWN}


def _is_group(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


# Help

_FIRST = ("run", "algorithm")
"""Groups that plain help shows in full. `run` holds the options of no other group, with graph and partition."""


def _show_help(base: RunConfig, prog: str, args: list[str], options: type[Any]) -> NoReturn:
    """Prints help and exits: the groups that follow --help or, if none does, `_FIRST`; then the names of the others."""
    kind = type(base)
    groups = {"run": _text(kind.__doc__)} | {
        name: _text(field.annotation.__doc__) for name, field in _fields_of(kind).items() if _is_group(field)
    }
    place = min(args.index(word) for word in ("--help", "-h") if word in args)
    asked = [word for word in args[place + 1 :] if not word.startswith("-")]
    for word in asked:
        if word not in (*groups, "all"):
            raise UserError(f"help: there is no group {word!r}; choose of {', '.join(groups)}, or all.")
    shown = tuple(groups) if "all" in asked else tuple(asked) or _FIRST

    def both(config: Any, output: Any) -> None: ...

    kinds = (_explained(base, shown), _explained(options(), shown))
    both.__annotations__.update(config=Annotated[kinds[0], arg(name="")], output=Annotated[kinds[1], arg(name="")])
    both.__defaults__ = tuple(made() for made in kinds)
    with contextlib.suppress(SystemExit):
        parsed(both, prog, ["--help"], description=groups["run"] + own.shown(args, base))
    others = [name for name in groups if name not in shown]
    if others:
        print("More options, in groups; `--help GROUP` lists them, `--help all` everything:\n")
        for name in others:
            print(f"  {name:10} {groups[name]}")
    sys.exit(0)


def _text(documentation: str | None) -> str:
    """What stands in a docstring, on one line."""
    return " ".join((documentation or "").split())


def _explained(config: Any, shown: tuple[str, ...]) -> type[Any]:
    """A dataclass with the options of `config`, their help and their values; those of other groups are hidden."""
    columns: list[tuple[str, Any, Any]] = []
    for name, field in _fields_of(type(config)).items():
        value = getattr(config, name)
        if _is_group(field):
            inner = _explained(value, ("run",) if name in shown else ())
            columns.append((name, inner, dataclasses.field(default_factory=inner)))
            continue
        # None means that an option is left out; it is no value that a person could type.
        optional = type(None) in typing.get_args(field.annotation)
        told = arg(
            help=_text(field.description),
            help_behavior_hint="(unset)" if value is None or value == () else None,
            metavar=_metavar(field.annotation) if optional else None,
        )
        hidden = () if "run" in shown else (Suppress,)
        default = dataclasses.field(default_factory=functools.partial(copy.copy, value))
        columns.append((name, Annotated[field.annotation, told, *hidden], default))
    made = make_dataclass(type(config).__name__, columns)
    made.__doc__ = type(config).__doc__
    return made


def _metavar(annotation: Any) -> str:
    """How help shows the values of a type: `INT|FLOAT` for int | float | None."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return "|".join(_metavar(part) for part in parts if part is not type(None))
    if origin is Literal:
        return f"{{{','.join(map(str, parts))}}}"
    if origin in (list, tuple):
        return f"{_metavar(parts[0])} ..."
    return "{True,False}" if annotation is bool else str(annotation.__name__).upper()


# Reading


def _alias_with_value(argument: str) -> str:
    key, _, value = argument.partition("=")
    return f"{_ALIASES.get(key, key)}={value}"


def _default_baseline(args: list[str]) -> list[str]:
    """`--baseline` without a value means the usual one, alone."""
    out = []
    for argument, following in itertools.zip_longest(args, args[1:], fillvalue="--"):
        out += [argument, "alone"] if argument == "--baseline" and following.startswith("--") else [argument]
    return out


def check_options(args: list[str], known: list[str]) -> None:
    """Raises UserError for an option that is not among `known`; it suggests the nearest."""
    names = {name.replace("_", "-") for name in known}
    for argument in args:
        if not argument.startswith("--"):
            continue
        name = argument[2:].split("=")[0].replace("_", "-")
        if name in names or re.sub(r"(^|\.)no-", r"\1", name) in names:
            continue
        # The last part of a dotted name is what people remember: --gauge for --algorithm.gauge.
        tails = {full.rsplit(".", 1)[-1]: full for full in names}

        close = nearest(name, names) if "." in name else [tails[t] for t in nearest(name, tails)]
        hint = f" Did you mean --{close[0].replace('-', '_')}?" if close else ""
        raise UserError(f"{argument.split('=')[0]}: unknown option.{hint} `--help` lists all.")


checked = validate_call(config=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True))
"""Decorates the function of a command: its arguments must be what their annotations say, such as `Field(gt=0)`."""


def parsed(function: Callable[..., Any], prog: str, args: list[str], description: str | None = None) -> Any:
    """tyro's parse of `args`; its boxed error, and that of a function that is `checked`, become one line."""
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            return tyro.cli(function, prog=prog, args=args, description=description)
    except ValidationError as error:
        raise UserError(explain(BaseModel, error)) from error
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(caught.getvalue())) from None


def _one_line(box: str) -> str:
    """The message inside tyro's error box on one line, without title, frame and help text."""
    groups: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip(" │|\t").strip("╭╮╰╯")
        if text.endswith("──") or not text.strip("─-"):  # the frame with its title, or a horizontal line
            groups.append([])
        else:
            groups[-1].append(text)
    filled = [group for group in groups if group]
    message = filled[0 if "╭" in box else 1] if len(filled) > 1 else filled[0]  # ASCII: the title is a group
    return " ".join(message).removeprefix("Error parsing ").rstrip(".") + ". `--help` lists all options."
