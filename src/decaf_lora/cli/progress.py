"""What does a person see while runs go on? A live display on a terminal, one line a finished run elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from decaf_lora.runs.events import Event, Watch


@contextlib.contextmanager
def display(total: int, console: Console) -> Iterator[Watch]:
    """A watcher of `total` runs that draws on `console` (standard error)."""
    if console.is_terminal:
        with _live(total, console) as watch:
            yield watch
    else:
        yield _lines(total, console)


@contextlib.contextmanager
def _live(total: int, console: Console) -> Iterator[Watch]:
    progress = Progress(
        TextColumn("{task.description}", justify="left"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        console=console,
    )
    overall = progress.add_task("runs", total=total, facts="") if total > 1 else None
    tasks: dict[str, TaskID] = {}

    def watch(event: Event) -> None:
        # Not before: a live display swallows the bars of reading and preprocessing, which come first.
        progress.start()
        if event.key not in tasks:
            tasks[event.key] = progress.add_task(event.key, total=event.rounds, facts="")
        task = tasks[event.key]
        progress.update(task, completed=event.round - (event.fraction < 1), facts=_facts(event))
        if event.fraction >= 1 and event.loss is None:
            if overall is not None:
                progress.update(overall, advance=1)
                progress.remove_task(task)
                progress.console.print(_done(event), highlight=False)
            else:
                progress.update(task, completed=event.rounds)

    try:
        yield watch
    finally:
        progress.stop()


def _lines(total: int, console: Console) -> Watch:
    finished, started = 0, time.perf_counter()

    def watch(event: Event) -> None:
        nonlocal finished
        if event.fraction >= 1 and event.loss is None:
            finished += 1
            elapsed = time.perf_counter() - started
            console.print(f"[{finished}/{total}] {_done(event)}  ({elapsed:.0f} s)", highlight=False, markup=False)

    return watch


def _facts(event: Event) -> str:
    loss = "" if event.loss is None else f"loss {event.loss:.3f}"
    score = "" if event.score is None else f"score {event.score:.3f}"
    return "  ".join(part for part in (loss, score) if part)


def _done(event: Event) -> str:
    score = "-" if event.score is None else f"{event.score:.3f}"
    return f"{event.key}: mean score {score}"
