"""What is measured, and where do the results stay? Cells of rows, each in a process of its own, and one JSON file."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from .machine import ROOT

Scope = Literal["quick", "bench", "full"]
ROWS = ("local_steps", "flower", "evaluation", "memory", "consensus", "matrix", "scale", "ranks", "start", "gpu")
"""Modules of the rows, in the order of the page. Each has

    QUESTION, AGAINST: one line each
    WHY: name of a bar -> why it is missed where it is
    cells(scope, device): settings of the cells, JSON values by name; the settings of a cell are its name
    measure(device, **settings): figures, JSON values by name; {"left_out": reason} for what is left out
    bars(found): what is promised, and what was measured
    table(found): the figures as a Markdown table
"""
LIMIT = 3600
"""Seconds after which a cell is given up."""


class Bar(NamedTuple):
    """A promise, and what was measured."""

    name: str
    bar: str
    measured: str
    met: bool | None
    """None: not measured."""


class Found(NamedTuple):
    """A measured cell."""

    settings: dict[str, Any]
    figures: dict[str, Any]


def rows_of(device: str) -> tuple[str, ...]:
    """The rows that say something of a device."""
    return tuple(name for name in ROWS if name != "gpu" or device != "cpu")


def row(name: str) -> ModuleType:
    """The module of a row."""
    return importlib.import_module(f"{__package__}.{name}")


def place(device: str) -> Path:
    """The file of a device's results."""
    return ROOT / "benchmarks" / f"results_suite_{'cuda' if device.startswith('cuda') else 'cpu'}.json"


def key(row: str, settings: dict[str, Any]) -> str:
    """One line that names a cell."""
    return " ".join([row, *(f"{name}={value}" for name, value in settings.items())])


class Results:
    """The JSON file of a device: row and settings -> figures, with where, when and from which commit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: list[dict[str, Any]] = json.loads(path.read_text())["cells"] if path.exists() else []

    def has(self, row: str, settings: dict[str, Any], commit: str, threads: int | None) -> bool:
        """Whether a cell was measured at this commit, with so many threads (None: any number)."""
        return any(
            cell["row"] == row
            and cell["settings"] == settings
            and cell["machine"]["commit"] == commit
            and threads in (None, cell["machine"]["threads"])
            for cell in self.cells
        )

    def put(self, cell: dict[str, Any]) -> None:
        """Adds a cell, in place of an older one, and writes the file."""
        same = [c for c in self.cells if (c["row"], c["settings"]) == (cell["row"], cell["settings"])]
        self.cells = [c for c in self.cells if c not in same] + [cell]
        self.cells.sort(key=lambda c: ROWS.index(c["row"]))  # stable: in the order of measuring within a row
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(json.dumps({"cells": self.cells}, indent=1) + "\n")
        fresh.replace(self.path)

    def of(self, row: str) -> list[Found]:
        """The cells of a row."""
        return [Found(c["settings"], c["figures"]) for c in self.cells if c["row"] == row]


def measure(row_name: str, settings: dict[str, Any], device: str) -> dict[str, Any]:
    """Measures a cell in this process."""
    from . import machine

    started, began = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    facts = machine.facts(device)
    figures = row(row_name).measure(device, **settings)
    seconds = round(time.perf_counter() - began, 1)
    return {
        "row": row_name,
        "settings": settings,
        "figures": rounded(figures),
        "machine": {**facts, "started": started, "seconds": seconds, "peak": machine.peak_memory(device)},
    }


def rounded(value: Any) -> Any:
    """Floats with six significant digits: more of them would only be noise in the committed file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def in_process(row_name: str, settings: dict[str, Any], device: str, threads: int | None) -> dict[str, Any]:
    """Measures a cell in a process of its own.

    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    command = [sys.executable, "-m", __package__, "--cell", row_name, json.dumps(settings), "--device", device]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    # A session of its own, so that what the cell has started ends with it.
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:
        try:
            out, error = process.communicate(timeout=LIMIT)
        except BaseException as stopped:
            os.killpg(process.pid, signal.SIGTERM)
            if isinstance(stopped, subprocess.TimeoutExpired):
                raise RuntimeError(f"given up after {LIMIT} s") from None
            raise
    if process.returncode:
        raise RuntimeError("\n".join((error.strip() or out.strip()).splitlines()[-15:]))
    return json.loads(out.splitlines()[-1])


def settings_of(rows: Iterable[str], scope: Scope, device: str) -> list[tuple[str, dict[str, Any]]]:
    """All cells of some rows."""
    return [(name, settings) for name in rows for settings in row(name).cells(scope, device)]
