"""How does the command `decaf` find the command that a person means?

A mistake becomes one line on standard error and exit code 2. Progress goes to standard error, results to
standard output.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from decaf_lora.cli.agent import agent_command
from decaf_lora.cli.checking import check_command
from decaf_lora.cli.federation import federation_command
from decaf_lora.cli.graph import graph_command
from decaf_lora.cli.planning import plan_command
from decaf_lora.cli.predicting import predict_command
from decaf_lora.cli.runs import (
    compare_command,
    export_command,
    merge_command,
    recipes_command,
    report_command,
    run_command,
)
from decaf_lora.cli.starting import init_command
from decaf_lora.cli.tuning import tune_command
from decaf_lora.errors import UserError, nearest, out_of_memory
from decaf_lora.extras import missing


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point of `decaf`. Returns the exit code: 2 for a user's mistake, 130 after Ctrl-C.

    Args:
        arguments: what follows `decaf`; None: those of this process, which ends with the command.
    """
    if arguments is None:
        # The libraries are a million objects that stay. Python's collector would go over them again and again while
        # they come in, a second of the start.
        gc.set_threshold(50_000)
    code = _answer(list(sys.argv[1:] if arguments is None else arguments))
    if arguments is None and threading.current_thread() is threading.main_thread():
        # All is saved and said. A further Ctrl-C ends the process at once, and not with a traceback of what ends it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def _answer(args: list[str]) -> int:
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if hasattr(sys.stdout, "reconfigure"):  # what a terminal's encoding lacks becomes a question mark
        with contextlib.suppress(OSError, ValueError):  # a stream that was moved, or is closed
            sys.stdout.reconfigure(errors="replace")
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
    except (MemoryError, RuntimeError, ImportError) as error:
        line = missing(error) if isinstance(error, ImportError) else out_of_memory(error)
        if debug or line is None:
            raise
        console.print(f"decaf: {line}", markup=False, soft_wrap=True)
        return 2


def _warn(said: set[str], message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Shows a warning as one line, without the place in the code. Deprecations of libraries are left out.

    `said` holds the warnings that were shown, so that each is shown once for all runs of a comparison: Python's own
    memory of them is lost at every `catch_warnings`.
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


_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "compare": (compare_command, "several algorithms side by side: table and report"),
    "run": (run_command, "one run of one algorithm"),
    "tune": (tune_command, "find a learning rate, a rank, ... on held-out training examples"),
    "init": (init_command, "a commented configuration for a file of your own"),
    "check": (check_command, "is all ready for a run? data, labels, one batch, cost; what is odd"),
    "plan": (plan_command, "what a run would cost: memory, bytes, arithmetic"),
    "recipes": (recipes_command, "what is ready to use"),
    "graph": (graph_command, "show a graph and its mixing matrix"),
    "export": (export_command, "write an agent's adapter as a PEFT directory"),
    "predict": (predict_command, "what a trained model says of new examples, and how well"),
    "merge": (merge_command, "average several PEFT adapters, of any ranks, without data"),
    "report": (report_command, "write the report of a run again"),
    "agent": (agent_command, "a site's agent of a federation"),
    "federation": (federation_command, "organisations train together, each with its own data, without a server"),
}
