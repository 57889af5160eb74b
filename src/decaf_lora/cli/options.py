"""How do arguments become a configuration, and what else can be said on the command line?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from decaf_lora.cli.parsing import check_options, checked, parse, parsed
from decaf_lora.config import CompareConfig, RunConfig, load
from decaf_lora.errors import UserError

__all__ = [
    "Checking",
    "Output",
    "Planning",
    "Tuning",
    "check_options",
    "checked",
    "configured",
    "parsed",
    "refuse_unnamed_code",
    "resumed",
]

_options = dataclass(frozen=True, config=ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False))


@_options
class Output:
    """Where results go, and how."""

    out: Path | None = None
    """Folder of the run. Unset: runs/RECIPE-TIME."""
    resume: bool = False
    """Go on with the run in --out. `--resume DIR` alone is enough, since its configuration is there. Only rounds may
    change, to a larger number."""
    take_over: bool = False
    """Take over the folder of a run on another machine, if you know that this run has ended."""
    json: bool = False
    """Print the result rows as JSON instead of a table."""
    scale: float = 1.0
    """Shorten the run: this share of the rounds (at least 2) and of the test examples; 1 is the whole run."""
    jobs: int = Field(0, ge=0, le=10_000)
    """compare: number of runs at a time, each in its own process. 0: one on a GPU, otherwise one for each core."""
    log: tuple[Literal["tensorboard", "trackio"], ...] = ()
    """Tell trackers on this machine of every round: tensorboard, trackio."""
    live: bool = False
    """Serve the report's page while the run goes on, on this machine alone; it is updated every round."""
    port: int = 0
    """Port of --live. 0: a free one."""
    engine: Literal["simulate", "torchrun"] = "simulate"
    """run: where the agents live: all in this process, or split over the processes that torchrun has started."""
    backend: str = "auto"
    """torchrun: library that moves messages, gloo or nccl. auto: nccl if every process has its own GPU, else gloo."""
    wire: str = "exact"
    """torchrun: number format of messages between processes: exact, or bfloat16."""
    timeout: float = Field(600.0, gt=0, le=10**7)
    """torchrun: seconds to wait for a process that does not appear, or stops answering."""


@_options
class Planning:
    """What to plan for, and how to show it."""

    json: bool = False
    """Print the plan as JSON instead of tables."""
    scale: float = 1.0
    """Shorten the run: this share of the rounds (at least 2) and of the test examples; 1 is the whole run."""
    processes: int = Field(1, ge=1)
    """Number of torchrun's processes that the agents are split over. The plan is for the process with most agents."""
    tflops: float | None = Field(None, gt=0)
    """Throughput from which hours are computed, in 10^12 floating-point operations per second."""
    measure: bool = False
    """Load the model and the data, time a step on this machine, and compute hours from it."""
    sequence_length: int | None = Field(None, ge=1)
    """Tokens of a sequence (image-text: of a prompt). Unset: those of the longest example of local data, else
    task.max_length, else the model's limit."""
    num_classes: int | None = Field(None, ge=1)
    """Number of classes, if the data are not on this machine."""
    num_train: int | None = Field(None, ge=1)
    """Number of training examples, if the data are not on this machine."""
    num_test: int | None = Field(None, ge=1)
    """Number of test examples, if the data are not on this machine."""


@_options
class Tuning:
    """What to search, and where results go."""

    over: tuple[str, ...] = ()
    """A field and the values to try, as in `--over training.learning_rate 1e-3 3e-3 1e-2`. Several --over: all
    combinations."""
    out: Path | None = None
    """Folder of the search. Unset: runs/RECIPE-tune-TIME."""
    resume: bool = False
    """Go on with the search in --out. `--resume DIR` alone is enough, since all that was asked for is there."""
    take_over: bool = False
    """Take over the folder of a search on another machine, if you know that this search has ended."""
    json: bool = False
    """Print the trials as JSON instead of a table."""
    scale: float = 1.0
    """Shorten the run: this share of the rounds (at least 2) and of the test examples; 1 is the whole run."""
    jobs: int = Field(0, ge=0, le=10_000)
    """Number of runs at a time, each in its own process. 0: one on a GPU, otherwise one for each core."""
    seeds: tuple[int, ...] = ()
    """Train every trial with each of these seeds; its score is the mean. Unset: with the run's own."""
    keep: int = 3
    """One of so many trials goes on at a rung."""
    rungs: int | None = None
    """Number of rungs, the rounds at which trials are compared. 1 trains all to the end. Unset: as many as leave one
    trial in the last."""
    extensions: int = 3
    """How many values may be added to an axis whose best value is the lowest or the highest that was tried."""


@_options
class Checking:
    """How to show what is found."""

    json: bool = False
    """Print the findings as JSON instead of lines."""
    scale: float = 1.0
    """Shorten the run: this share of the rounds (at least 2) and of the test examples; 1 is the whole run."""


@_options
class Shortening:
    """How much of a recipe is meant."""

    scale: float = 1.0
    """Shorten the run: this share of the rounds (at least 2) and of the test examples; 1 is the whole run."""


Options = TypeVar("Options", Output, Planning, Tuning, Checking, Shortening)

_USED = {
    "jobs": "`decaf compare` uses it, for several runs at a time, and a run with learning_rate auto; leave it out",
    "backend": "--engine torchrun uses it; leave it out",
    "wire": "--engine torchrun uses it; leave it out, or take --algorithm.messages int8, which works here",
    "timeout": "--engine torchrun uses it; leave it out",
}


def refuse_unused(output: Output, *names: str) -> None:
    """Raises UserError for one of the options `names` that was given, where nothing uses them."""
    for name in names:
        if getattr(output, name) != getattr(Output(), name):
            raise UserError(f"{name}: only {_USED[name]}.")


def configured(
    kind: type[RunConfig],
    command: str,
    args: list[str],
    options: type[Options],
) -> tuple[RunConfig, Options, str]:
    """The configuration that recipe, file or the folder of a run and overrides say, the command's own options, and
    its name."""
    from decaf_lora import recipes

    if not args or args[0] in ("-h", "--help"):
        names = ", ".join(recipes.RECIPES)
        print(
            f"usage: decaf {command} RECIPE|FILE.yaml [--option value ...]\n\n"
            f"Recipes: {names}\nA file holds the fields of the configuration as YAML.\n"
            f"The options, with the recipe's values: decaf {command} {next(iter(recipes.RECIPES))} --help"
        )
        return sys.exit(0)
    folder = None
    if options is Output:
        args, folder = resumed(args)
    if args and not args[0].startswith("-"):
        source, rest = args[0], args[1:]
    elif folder is not None:
        source, rest = str(saved_config(folder)), args
        _refuse_other_kind(kind, folder)
    else:
        raise UserError(f"recipe: name a recipe or a YAML file first, as in `decaf {command} digits {args[0]} ...`.")
    base: RunConfig
    if source.endswith((".yaml", ".yml")):
        base, name = load(kind, Path(source)), Path(source).stem
    else:
        base, name = recipes.get(source), source
        if isinstance(base, CompareConfig) and any(a.partition("=")[0] == "--algorithms" for a in rest):
            base = base.model_copy(update={"settings": {}})  # who names algorithms gets these alone
        if kind is RunConfig:
            base = RunConfig.model_validate({k: getattr(base, k) for k in RunConfig.model_fields})
    if folder is not None and Path(source).resolve() == saved_config(folder).resolve():
        refuse_unnamed_code(base, rest)
    config, output = parse(kind, base, f"decaf {command} {source}", rest, options)
    return recipes.shortened(config, output.scale), output, name


def resumed(args: list[str]) -> tuple[list[str], Path | None]:
    """`--resume DIR` as `--out DIR --resume`; and the folder to go on in, if there is one."""
    left, folder, resume = [], None, False
    for place, argument in enumerate(args):
        before = args[place - 1] if place else ""
        if argument.startswith("--resume="):
            resume, folder = True, argument.partition("=")[2]
        elif argument == "--resume":
            resume = True
        elif before == "--resume" and not argument.startswith("-"):
            folder = argument
        else:
            left.append(argument)
            continue
    out = next((a.partition("=")[2] for a in left if a.startswith("--out=")), None)
    if "--out" in left[:-1]:
        out = left[left.index("--out") + 1]
    if folder is not None and out is not None and Path(folder) != Path(out):
        raise UserError(f"resume: it names {folder} and --out {out}; give one of them.")
    if not resume:
        return args, None
    where = folder or out
    if folder is not None and out is None:
        left += ["--out", folder]
    return [*left, "--resume"], None if where is None else Path(where)


def saved_config(folder: Path) -> Path:
    """The configuration in the folder of a run; before its first round, that in its search for a learning rate."""
    before = folder / "learning_rate" / "config.yaml"
    return before if before.exists() and not (folder / "config.yaml").exists() else folder / "config.yaml"


def _refuse_other_kind(kind: type[RunConfig], folder: Path) -> None:
    """Raises UserError if the folder holds a comparison and `decaf run` is to go on with it, or the other way round."""
    if not saved_config(folder).exists():
        raise UserError(f"resume: {folder} holds no run (no config.yaml); name the recipe to start one there.")
    single = (folder / "run.json").exists() or (folder / "records.jsonl").exists()
    if single and kind is CompareConfig:
        raise UserError(f"resume: {folder} holds one run; go on with it by `decaf run --resume {folder}`.")
    if not single and kind is RunConfig and _is_comparison(folder):
        raise UserError(f"resume: {folder} holds a comparison; go on with it by `decaf compare --resume {folder}`.")


def _is_comparison(folder: Path) -> bool:
    try:
        return isinstance(load(CompareConfig, saved_config(folder)), CompareConfig) and not _loads(folder)
    except UserError:
        return False


def _loads(folder: Path) -> bool:
    """Whether the configuration is that of one run."""
    try:
        load(RunConfig, saved_config(folder))
    except UserError:
        return False
    return True


def refuse_unnamed_code(config: RunConfig, args: list[str]) -> None:
    """Raises UserError if the folder's configuration names Python that the command line does not name.

    The folder may be somebody else's, so its Python runs only if the user names it.
    """
    from decaf_lora.runs.identity import own_code

    given = {value for argument in args for value in (argument, argument.partition("=")[2])}
    for value, field in own_code(config).items():
        if not any(value == text or (".py:" in text and value.startswith(f"{text}:")) for text in given):
            raise UserError(
                f"resume: this run uses Python of its own, {value}; to let it run, name it again: "
                f"--{field.removesuffix('.name')} {value}"
            )
