"""How do arguments become a configuration? tyro turns the typed fields into options and help.

A mistake becomes a UserError of one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from pydantic import BaseModel
from tyro.conf import arg

from decaf_lora.cli import own
from decaf_lora.config import OWN, RunConfig, build, fields, load
from decaf_lora.errors import UserError, nearest

_ALIASES = {
    "--algorithm": "--algorithm.name",
    "--task": "--task.name",
    "--model": "--task.model",
    "--data": "--task.data",
    "--lr": "--training.learning-rate",
    "--skip-bad": "--task.skip-bad",
    "--init-adapter": "--init-adapters",
}


@dataclass(frozen=True)
class Output:
    """Where results go, and how."""

    out: Path | None = None
    """Folder of the run; runs/RECIPE-TIME if unset."""
    resume: bool = False
    """Go on with the run in --out (same configuration)."""
    json: bool = False
    """Print the result rows as JSON instead of a table."""
    scale: float = 1.0
    """Shorten the run: this share of the rounds (at least 2) and of the test examples; 1 is the whole run."""
    jobs: int = 0
    """compare: runs at a time, each in its own process; 0 takes one on a GPU, else one a core, at most the number
    of runs."""
    engine: Literal["simulate", "torchrun"] = "simulate"
    """run: where the agents live: all in this process, or split over the processes that torchrun has started."""
    backend: str = "auto"
    """torchrun: what moves messages, gloo or nccl; auto takes nccl where every process has its own GPU."""
    wire: str = "exact"
    """torchrun: number format of messages between processes: exact, or bfloat16."""
    timeout: float = 600.0
    """torchrun: seconds to wait for a process that does not come, or falls silent."""


@dataclass(frozen=True)
class Planning:
    """What to plan for, and how to show it."""

    json: bool = False
    """Print the plan as JSON instead of tables."""
    scale: float = 1.0
    """Shorten the run: this share of the rounds (at least 2) and of the test examples; 1 is the whole run."""
    processes: int = 1
    """Processes of torchrun that the agents are split over; the plan is of the one that holds most."""
    tflops: float | None = None
    """Throughput to compute hours with, in 10^12 floating-point operations a second."""
    measure: bool = False
    """Load the model and the data, time a step here, and compute hours with that."""
    sequence_length: int | None = None
    """Tokens of a sequence (image-text: of a prompt); if unset, of the longest example of local data, else
    task.max_length or the model's limit."""
    num_classes: int | None = None
    """Number of classes, where the data are not here to count them."""
    num_train: int | None = None
    """Number of training examples, where the data are not here to count them."""
    num_test: int | None = None
    """Number of test examples, where the data are not here to count them."""


Options = TypeVar("Options", Output, Planning)


def configured(
    kind: type[RunConfig],
    command: str,
    args: list[str],
    options: type[Options] = Output,  # type: ignore[assignment]
) -> tuple[RunConfig, Options, str]:
    """The configuration that recipe or file and overrides say, the command's own options, and its name."""
    from decaf_lora import recipes

    if not args or args[0] in ("-h", "--help"):
        names = ", ".join(recipes.RECIPES)
        print(
            f"usage: decaf {command} RECIPE|FILE.yaml [--option value ...]\n\n"
            f"Recipes: {names}\nA file holds the fields of the configuration as YAML.\n"
            f"All options, with the recipe's values: decaf {command} {next(iter(recipes.RECIPES))} --help"
        )
        return sys.exit(0)
    if args[0].startswith("-"):
        raise UserError(f"recipe: name a recipe or a YAML file first, as in `decaf {command} digits {args[0]} ...`.")
    source, rest = args[0], args[1:]
    base: RunConfig
    if source.endswith((".yaml", ".yml")):
        base, name = load(kind, Path(source)), Path(source).stem
    else:
        base, name = recipes.get(source), source
        if kind is RunConfig:
            base = RunConfig.model_validate({k: getattr(base, k) for k in RunConfig.model_fields})
    config, output = _parse(kind, base, f"decaf {command} {source}", rest, options)
    return recipes.shortened(config, output.scale), output, name


def _parse(
    kind: type[RunConfig], base: RunConfig, prog: str, args: list[str], options: type[Options]
) -> tuple[RunConfig, Options]:
    args = [_ALIASES.get(a, a) if "=" not in a else _alias_with_value(a) for a in args]
    args, options_of_own = own.apart(kind, base, args)
    check_options(args, [*fields(kind), *(f.name for f in dataclasses.fields(options)), "help"])

    def both(config: Any, output: Any) -> tuple[Any, Output]:
        return config, output

    given = {a[2:].split("=")[0].replace("-", "_") for a in args if a.startswith("--")}
    if "task.test_share" in given and "task.test_split" not in given:  # it replaces the recipe's test split
        base = base.model_copy(update={"task": base.task.model_copy(update={"test_split": None})})
    both.__annotations__.update(
        config=Annotated[_unchecked(kind), arg(name="")], output=Annotated[options, arg(name="")]
    )
    both.__defaults__ = (_unchecked_values(base), options())
    description = (kind.__doc__ or "").strip()
    if {"-h", "--help"} & set(args):
        description += own.shown(args, base)
    values, output = parsed(both, prog, args, description=description)
    return build(kind, own.together(asdict(values), base, options_of_own)), output


def _unchecked(kind: type[BaseModel]) -> type:
    """A dataclass with the fields and help of `kind` but none of its checks: tyro reads options into it, and
    `config.build` checks them all at once, with our messages."""
    columns: list[tuple[str, Any, Any]] = []
    for name, field in kind.model_fields.items():
        if name == OWN:
            continue
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            columns.append((name, _unchecked(inner), dataclasses.field()))
        else:
            columns.append((name, Annotated[inner, arg(help=field.description)], dataclasses.field()))
    made = make_dataclass(kind.__name__, columns, frozen=True)
    made.__doc__ = kind.__doc__
    _UNCHECKED[kind] = made
    return made


_UNCHECKED: dict[type[BaseModel], type] = {}


def _unchecked_values(config: BaseModel) -> Any:
    values = {name: getattr(config, name) for name in type(config).model_fields if name != OWN}
    plain = {k: _unchecked_values(v) if isinstance(v, BaseModel) else v for k, v in values.items()}
    return _UNCHECKED[type(config)](**plain)


def _alias_with_value(argument: str) -> str:
    key, _, value = argument.partition("=")
    return f"{_ALIASES.get(key, key)}={value}"


def check_options(args: list[str], known: list[str]) -> None:
    """An unknown option as one line that suggests the nearest."""
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


def parsed(function: Callable[..., Any], prog: str, args: list[str], description: str | None = None) -> Any:
    """tyro's parse of `args`; its boxed error becomes one line."""
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            return tyro.cli(function, prog=prog, args=args, description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(caught.getvalue())) from None


def _one_line(box: str) -> str:
    """The message in tyro's error box, without title, frame and help text."""
    groups: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip(" │|\t").strip("╭╮╰╯")
        if text.endswith("──") or not text.strip("─-"):  # the frame with its title, or a rule
            groups.append([])
        else:
            groups[-1].append(text)
    filled = [group for group in groups if group]
    message = filled[0 if "╭" in box else 1] if len(filled) > 1 else filled[0]  # ASCII: the title is a group
    return " ".join(message).removeprefix("Error parsing ").rstrip(".") + ". `--help` lists all options."
