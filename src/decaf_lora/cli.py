"""How does a person say all this? The command `decaf`.

tyro turns the typed configuration into options and help; a mistake becomes one line on standard error and
exit code 2. Progress goes to standard error, results to standard output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from decaf_lora.config import CompareConfig, RunConfig, build, fields, load
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
    wire: Literal["exact", "bfloat16", "int8"] = "exact"
    """torchrun: number format of messages between processes."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point: returns the exit code. 2 for a user's mistake, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal or os.environ.get("RANK", "0") != "0":
        # The libraries' bars (downloads, preprocessing) are for a person who watches, and one process of several.
        for library in ("HUB", "DATASETS"):
            os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "RANK" in os.environ:  # a lost process is one line of ours, not pages of torch's C++
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    warnings.showwarning = functools.partial(_warn, set())
    try:
        return _dispatch(args)
    except UserError as error:
        if debug:
            raise
        if not error.quiet:
            console.print(f"decaf: {error}", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        console.print("decaf: interrupted; the last checkpoint is kept, go on with --resume.", markup=False)
        return 130
    except BrokenPipeError:
        return 0


def _warn(said: set[str], message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning as one line, without the place in the code; libraries' deprecations are not the user's concern.

    `said`: those that were shown, for all runs of a comparison once. (Python forgets them in every catch_warnings.)
    """
    text = " ".join(str(message).split())
    if text not in said and not issubclass(category, DeprecationWarning | FutureWarning | PendingDeprecationWarning):
        said.add(text)
        Console(stderr=True, highlight=False).print(f"decaf: warning: {text}", markup=False, soft_wrap=True)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        _overview()
        return 0
    if args[0] in ("-V", "--version"):
        from decaf_lora import __version__

        print(f"decaf-lora {__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in _COMMANDS:
        close = nearest(name, _COMMANDS)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"command: {name!r} is not known.{hint} Choose one of: {', '.join(_COMMANDS)}.")
    return _COMMANDS[name][0](rest)


def _overview() -> None:
    table = Table.grid(padding=(0, 3))
    for name, (_, summary) in _COMMANDS.items():
        table.add_row(f"  decaf {name}", summary)
    console = Console(highlight=False)
    console.print("Fine-tune one foundation model together, with no server.\n")
    console.print(table)
    console.print(
        "\nFirst: decaf compare digits        Help of a command: decaf COMMAND --help\n"
        "--debug shows the traceback of an error.",
        markup=False,
    )


# run, compare


def _run(args: list[str]) -> int:
    from decaf_lora import execute
    from decaf_lora.progress import display

    config, output, name = _configured(RunConfig, "run", args)
    if output.engine == "torchrun":
        return _run_split(config, output, name, args)
    _refuse_launcher(output)
    out = output.out or _default_out(name)
    err = Console(stderr=True, highlight=False)
    try:
        with display(1, err) as watch:
            row = execute.run(config, out, resume=output.resume, watch=watch)
    except execute.Interrupted as stop:
        return _stopped(err, stop, f"decaf run {_recipe_argument(args)}")
    _results([row], out, output.json)
    return 0


def _run_split(config: RunConfig, output: Output, name: str, args: list[str]) -> int:
    """`run` in one of the processes of torchrun; the main one prints."""
    from decaf_lora import execute
    from decaf_lora.engines import connect
    from decaf_lora.progress import display

    err = Console(stderr=True, highlight=False)
    with connect(output.backend, config.device, output.timeout) as processes:
        with processes.together():
            if output.out is None and processes.launch.max_restarts:
                raise UserError("out: give a folder with --max-restarts, so that a restarted run finds its checkpoint.")
        out = Path(processes.share("out", str(output.out or _default_out(name)))[0])
        try:
            with display(1, err) if processes.is_main else contextlib.nullcontext(execute.nobody) as watch:
                row = execute.run_split(config, out, processes, wire=output.wire, resume=output.resume, watch=watch)
        except execute.Interrupted as stop:
            if not processes.is_main:
                return 130
            return _stopped(err, stop, f"torchrun ... -m decaf_lora run {_recipe_argument(args)} --engine torchrun")
    if row is not None:
        _results([row], out, output.json)
    return 0


def _refuse_launcher(output: Output) -> None:
    """Several processes that each simulate all agents would write into one folder."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and count != "1":
        error = UserError(
            f"engine: torchrun has started {count} processes; `decaf run` shares them with --engine torchrun."
        )
        error.quiet = os.environ.get("RANK") != "0"
        raise error


def _compare(args: list[str]) -> int:
    from decaf_lora import execute
    from decaf_lora.progress import display

    config, output, name = _configured(CompareConfig, "compare", args)
    assert isinstance(config, CompareConfig)
    if output.engine != "simulate":
        raise UserError(
            "engine: compare simulates its runs, several at a time with --jobs; torchrun is for `decaf run`."
        )
    _refuse_launcher(output)
    if output.jobs < 0:
        raise UserError("jobs: must be 0 (one a core) or more.")
    jobs = output.jobs or execute.default_jobs(config.device)
    out = output.out or _default_out(name)
    err = Console(stderr=True, highlight=False)
    try:
        with display(len(execute.cells(config)), err) as watch:
            rows = execute.compare(config, out, resume=output.resume, jobs=jobs, watch=watch)
    except execute.Interrupted as stop:
        return _stopped(err, stop, f"decaf compare {_recipe_argument(args)}")
    _results(rows, out, output.json)
    _refuse_diverged(rows)
    return 0


def _plan(args: list[str]) -> int:
    config, options, name = _configured(RunConfig, "plan", args, Planning)
    if options.tflops is not None and options.tflops <= 0:
        raise UserError(f"tflops: {options.tflops:g} is not above 0.")
    if options.measure and options.tflops is not None:
        raise UserError("measure: it finds the throughput that --tflops states; give one.")
    from decaf_lora import plan

    sizes = plan.DataSizes(options.sequence_length, options.num_classes, options.num_train, options.num_test)
    made = plan.estimate(config, sizes, processes=options.processes, tflops=options.tflops)
    if options.measure:
        made = plan.measured(made, config)
    if options.json:
        print(json.dumps({"name": name, **made.as_dict()}, indent=2))
        return 0
    console = Console(highlight=False)
    for part in plan.shown(made, name):
        console.print(part)
    return 0


def _results(rows: list[Any], out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    from decaf_lora.records import table

    console = Console(highlight=False)
    console.print(table(rows))
    console.print(f"report: {out / 'report.html'}", markup=False, soft_wrap=True)


def _refuse_diverged(rows: list[Any]) -> None:
    """Raises UserError if some runs have no result: a script is told, when all that there is has been written."""
    lost = {(row.algorithm, row.partition, row.seed, row.diverged): row for row in rows if row.diverged}
    if lost:
        row = next(iter(lost.values()))
        count = f"{len(lost)} runs have diverged, the first is" if len(lost) > 1 else "one run has diverged,"
        raise UserError(f"{count} {row.algorithm}, {row.graph}, {row.partition}, seed {row.seed}: {row.diverged}")


def _stopped(err: Console, stop: Any, command: str) -> int:
    where = f" in round {stop.round}" if stop.round else ""
    err.print(
        f"decaf: stopped{where}; everything so far is kept. Go on with: {command} "
        f"--out {stop.directory} --resume (and the same options).",
        markup=False,
        soft_wrap=True,
    )
    return 130


def _recipe_argument(args: list[str]) -> str:
    return args[0]


def _default_out(name: str) -> Path:
    import time

    return Path("runs") / f"{name.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"


Options = TypeVar("Options", Output, Planning)


def _configured(
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
    _check_options(args, [*fields(kind), *(f.name for f in dataclasses.fields(options)), "help"])

    def both(config: Any, output: Any) -> tuple[Any, Output]:
        return config, output

    given = {a[2:].split("=")[0].replace("-", "_") for a in args if a.startswith("--")}
    if "task.test_share" in given and "task.test_split" not in given:  # it replaces the recipe's test split
        base = base.model_copy(update={"task": base.task.model_copy(update={"test_split": None})})
    both.__annotations__.update(
        config=Annotated[_unchecked(kind), arg(name="")], output=Annotated[options, arg(name="")]
    )
    both.__defaults__ = (_unchecked_values(base), options())
    values, output = _tyro(both, prog, args, description=(kind.__doc__ or "").strip())
    return build(kind, asdict(values)), output


def _unchecked(kind: type[BaseModel]) -> type:
    """A dataclass with the fields and help of `kind` but none of its checks: tyro reads options into it, and
    `config.build` checks them all at once, with our messages."""
    columns: list[tuple[str, Any, Any]] = []
    for name, field in kind.model_fields.items():
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
    values = {name: getattr(config, name) for name in type(config).model_fields}
    plain = {k: _unchecked_values(v) if isinstance(v, BaseModel) else v for k, v in values.items()}
    return _UNCHECKED[type(config)](**plain)


def _alias_with_value(argument: str) -> str:
    key, _, value = argument.partition("=")
    return f"{_ALIASES.get(key, key)}={value}"


def _check_options(args: list[str], known: list[str]) -> None:
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


def _tyro(function: Callable[..., Any], prog: str, args: list[str], description: str | None = None) -> Any:
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


# graph, recipes, export, report


def _graph(args: list[str]) -> int:
    from decaf_lora import graphs

    def graph(
        kind: Positional[str] = "ring",
        agents: Annotated[int, arg(aliases=["-n"])] = 10,
        seed: int = 0,
        save: Path | None = None,
        json: bool = False,
    ) -> tuple[str, int, int, Path | None, bool]:
        """Shows a graph: weights, sigma_2, edges, degrees; --save draws it.

        Args:
            kind: name of the graph, with its argument after a colon, or a file with a matrix.
            agents: number of agents N.
            seed: seed of random graphs.
            save: file to draw the graph to (.png, .svg, .pdf).
            json: print JSON.
        """
        return kind, agents, seed, save, json

    if "-h" in args or "--help" in args:
        table = Table.grid(padding=(0, 3))
        for name, kind in graphs.KINDS.items():
            table.add_row(f"  {kind.example or name}", kind.summary)
        table.add_row(
            "  FILE" + "|".join(graphs.FILES), "your own graph, or mixing matrix; .npy also (T, N, N), one a round"
        )
        console = Console(highlight=False)
        console.print("Graphs:")
        console.print(table)
        console.print()
    _check_options(args, ["kind", "agents", "n", "seed", "save", "json", "help"])
    spec, agents, seed, save, as_json = _tyro(graph, "decaf graph", args)
    made = graphs.parse(spec, agents, seed)
    facts = graphs.describe(made)
    if save is not None:
        try:
            graphs.draw(graphs.as_schedule(made).at(0), save)
        except (OSError, ValueError) as error:
            raise UserError(f"save: cannot draw to {save} ({error}).") from error
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    _show_graph(facts, graphs.as_schedule(made).at(0).weights)
    if save is not None:
        print(f"drawn: {save}" + (" (round 0)" if "period" in facts else ""))
    return 0


def _show_graph(facts: dict[str, Any], weights: Any) -> None:
    console = Console(highlight=False)
    n = len(weights)
    title = "mixing matrix" + (" of round 0" if "period" in facts else "")
    table = Table(title=title, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("", justify="right", style="dim")
    for j in range(n):
        table.add_column(str(j), justify="right")
    for i in range(n):
        table.add_row(str(i), *("·" if w == 0 else f"{w:.3f}".removeprefix("0") for w in weights[i]))
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
        console.print(table)
    else:
        console.print(f"{title}: {n} x {n}, wider than this window; --json prints it")
    console.print()
    for key, value in facts.items():
        if key == "weights" or (key == "rounds" and not value):
            continue
        if key == "rounds":  # of a schedule
            for number, round_ in enumerate(value):
                line = f"round {number}: {round_['messages_per_round']} messages, {_pairs(round_['edges'], 30)}"
                console.print(line, markup=False, soft_wrap=True)
            continue
        name, shown = key.replace("_", " "), value
        periodic, over_time = facts.get("period") is not None, "period" in facts
        if over_time and not periodic and key in ("exact_after", "sigma_2", "spectral_gap"):
            continue  # of a period
        if key == "period":
            shown = f"{value} round{'s' * (value > 1)}" if periodic else "none, drawn anew every round"
        elif key == "exact_after":
            name = "exact average"
            shown = "never" if value is None else f"after {value} round{'s' * (value > 1)}"
        elif periodic and key in ("sigma_2", "spectral_gap"):
            name += " of the period"
        elif over_time and not periodic and key in ("sigma_2_per_round", "messages_per_round"):
            name += ", mean of 100 rounds"
        if isinstance(shown, float):
            shown = f"{0 if abs(shown) < 1e-12 else shown:.6g}"
        elif isinstance(shown, dict):
            shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        elif key == "edges":
            shown = f"{len(value)}: {_pairs(value, 60)}"
        console.print(f"{name}: {shown}", markup=False, soft_wrap=True)


def _pairs(edges: list[list[int]], most: int) -> str:
    return " ".join(f"{i}-{j}" for i, j in edges[:most]) + (" ..." if len(edges) > most else "")


def _recipes(args: list[str]) -> int:
    from decaf_lora import recipes

    def list_recipes(json: bool = False) -> bool:
        """Lists the recipes for `decaf run` and `decaf compare`.

        Args:
            json: print JSON.
        """
        return json

    _check_options(args, ["json", "help"])
    if _tyro(list_recipes, "decaf recipes", args):
        print(json.dumps(recipes.describe(), indent=2))
        return 0
    table = Table.grid(padding=(0, 3))
    for name, summary in recipes.describe().items():
        table.add_row(f"  {name}", summary)
    Console(highlight=False).print(table)
    return 0


def _export(args: list[str]) -> int:
    from decaf_lora import execute

    def export(run: Positional[Path], to: Path, agent: str = "averaged", merge: bool = False) -> tuple[Any, ...]:
        """Writes one agent's adapter, or the averaged model, as a PEFT directory.

        Args:
            run: folder of the run.
            to: folder to write, new or empty.
            agent: number of the agent, or `averaged`.
            merge: write the whole model with the adapter folded in.
        """
        return run, to, agent, merge

    _check_options(args, ["to", "agent", "merge", "no-merge", "help"])
    run, to, agent, merge = _tyro(export, "decaf export", args)
    if agent != "averaged" and not agent.isdigit():
        raise UserError(f"agent: {agent!r} is neither a number nor 'averaged'.")
    execute.export(run, int(agent) if agent.isdigit() else agent, to, merge=merge)
    print(f"{'model' if merge else 'adapter'} of {'agent ' * agent.isdigit()}{agent} in {to}")
    return 0


def _report(args: list[str]) -> int:
    from decaf_lora.report import write_figures, write_report

    def report(run: Positional[Path], figures: Path | None = None) -> tuple[Path, Path | None]:
        """Writes report.html of a run or a comparison anew.

        Args:
            run: folder of the run or comparison.
            figures: folder to write every figure to, as a PNG file of its own.
        """
        return run, figures

    _check_options(args, ["figures", "help"])
    run, figures = _tyro(report, "decaf report", args)
    print(write_report(run))
    if figures is not None:
        print(*write_figures(run, figures), sep="\n")
    return 0


_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "compare": (_compare, "several algorithms side by side: table and report"),
    "run": (_run, "one run of one algorithm"),
    "plan": (_plan, "what a run would cost: memory, bytes, arithmetic"),
    "recipes": (_recipes, "what is ready to use"),
    "graph": (_graph, "show a graph and its mixing matrix"),
    "export": (_export, "write an agent's adapter as a PEFT directory"),
    "report": (_report, "write the report of a run anew"),
}


if __name__ == "__main__":
    sys.exit(main())
