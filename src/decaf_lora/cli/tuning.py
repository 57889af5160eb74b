"""`decaf tune`: which learning rate, which rank? A search on held-out training examples."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from decaf_lora.cli.options import Tuning, configured, refuse_unnamed_code, resumed
from decaf_lora.cli.parsing import parse
from decaf_lora.cli.progress import display
from decaf_lora.cli.runs import refuse_launcher, stopped
from decaf_lora.config import RunConfig
from decaf_lora.errors import UserError
from decaf_lora.runs.events import Interrupted, nobody

if TYPE_CHECKING:
    from decaf_lora.tune import Found


def tune_command(args: list[str]) -> int:
    over, rest = over_apart(args)
    rest, folder = resumed(rest)
    if folder is not None and (not rest or rest[0].startswith("-")):
        config, output, settings = _saved(folder, rest, over)
    else:
        config, output, name = configured(RunConfig, "tune", rest, Tuning)
        from decaf_lora.tune.searching import settings_of

        if output.resume and output.out is None:
            raise UserError("resume: name the folder of the search, as in `--resume runs/mine`.")
        folder = output.out or Path("runs") / f"{name.replace('/', '-')}-tune-{time.strftime('%Y%m%d-%H%M%S')}"
        more = {"keep": output.keep, "rungs": output.rungs, "extensions": output.extensions}
        settings = settings_of(config, over, output.seeds, **more)
    refuse_launcher(False)
    from decaf_lora.runs.compare import default_jobs
    from decaf_lora.tune.searching import Search

    err = Console(stderr=True, highlight=False)

    def tell(line: str) -> None:
        err.print(line, markup=False, soft_wrap=True)

    try:
        with display(1, err) if err.is_terminal else contextlib.nullcontext(nobody) as watch:
            found = Search(settings, folder, tell).run(
                resume=output.resume,
                take_over=output.take_over,
                jobs=output.jobs or default_jobs(config.device),
                watch=watch,
            )
    except Interrupted as stop:
        return stopped(err, stop, config, "decaf tune")
    _show(found, output.json)
    return 0


def over_apart(args: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Separates every `--over FIELD VALUE ...` from the other arguments.

    Returns:
        Field -> its values, and the other arguments.
    """
    found: dict[str, list[str]] = {}
    left: list[str] = []
    place = 0
    while place < len(args):
        name, equals, first = args[place].partition("=")
        if name != "--over":
            left.append(args[place])
            place += 1
            continue
        words = [first] if equals else []
        place += 1
        while place < len(args) and not args[place].startswith("--"):
            words.append(args[place])
            place += 1
        if not words:
            raise UserError("over: name a field and its values, as in --over training.learning_rate 1e-3 3e-3 1e-2.")
        field, *values = words
        if field in found:
            raise UserError(f"over: {field} is given twice; write all its values after one --over.")
        found[field] = values
    return found, left


def _saved(folder: Path, rest: list[str], over: dict[str, list[str]]) -> tuple[RunConfig, Tuning, Any]:
    """The search in a folder, whose settings are there; only what does not change its outcome may be said anew."""
    from decaf_lora.tune.searching import read_settings

    settings = read_settings(folder)
    refuse_unnamed_code(settings.base, rest)
    config, output = parse(RunConfig, settings.base, f"decaf tune --resume {folder}", rest, Tuning)
    default = Tuning()
    changed = [name for name in ("seeds", "keep", "rungs", "extensions", "scale") if getattr(output, name) != getattr(default, name)]  # fmt: skip # noqa: E501
    if over or changed or config != settings.base:
        field = "over" if over else changed[0] if changed else "config"
        raise UserError(
            f"resume: {field}: the search in {folder} is already settled; leave it out, or choose another --out."
        )
    return config, output, settings


def _show(found: Found, as_json: bool) -> None:
    if as_json:
        told = {"best": dict(found.values), "score": found.score, "score_name": found.score_name}
        print(json.dumps({**told, "config": str(found.out / "best.yaml"), "trials": [asdict(r) for r in found.trials]}))
        return
    from decaf_lora.tune.trials import table

    console = Console(highlight=False)
    console.print(table(found.trials, found.score_name, found.best.rounds))
    console.print(f"go on with: decaf run {found.out / 'best.yaml'}", markup=False, soft_wrap=True)
