"""How long until something happens?

help: `decaf --help`, until it has ended. import: `from decaf_lora import Run`, in a new interpreter. first step:
`decaf run digits`, until the record of the start is on disk: model and data are loaded, the agents evaluated as they
begin, and the first local step comes next. What a bare interpreter takes is counted in, and shown; so are CPU seconds,
which a busy machine changes less.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cells import Bar, Found, Scope
from .timing import interleaved, shown, spread

QUESTION = "How long until something happens?"
AGAINST = "a bare interpreter"
PROMISED = {"help": 0.4, "import": 3.0, "first step": 6.0}
WHY = {
    "help": "",
    "import": "torch, transformers and peft are most of it",
    "first step": "imports of torch, transformers and peft are half of it",
}


def cells(scope: Scope, device: str) -> list[dict[str, Any]]:
    if scope == "quick":
        return [{"turns": 1, "small": True}]
    return [{"turns": 9}]


def measure(device: str, turns: int, small: bool = False) -> dict[str, Any]:
    def run(*arguments: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    calls = {
        "bare": run("-c", "pass"),
        "help": run("-m", "decaf_lora", "--help"),
        "import": run("-c", "from decaf_lora import Run"),
        "first step": lambda: _first_step(device),
    }
    if small:
        calls = {name: calls[name] for name in ("bare", "help")}
    cpu: dict[str, list[float]] = {name: [] for name in calls}

    def counted(name: str) -> Callable[[], object]:
        def call() -> None:
            before = os.times()
            calls[name]()
            after = os.times()
            cpu[name].append(sum(after[2:4]) - sum(before[2:4]))  # of ended children: user and system

        return call

    counting = {name: counted(name) for name in calls}
    seconds = interleaved(counting, budget=120, least=min(turns, 3), most=turns, warm=int(not small))
    times = {name: spread(values) for name, values in seconds.items()}
    return {**times, "cpu": {name: spread(values[-len(seconds[name]) :]) for name, values in cpu.items()}}


def _first_step(device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "decaf_lora", "run", "digits", "--device", device, "--out", str(out)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            records = out / "records.jsonl"
            while not (records.exists() and records.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"decaf run digits ended early: {process.stderr and process.stderr.read()}")
                time.sleep(0.005)
            process.kill()


def bars(found: list[Found]) -> list[Bar]:
    figures = found[0].figures if found else {}
    return [
        Bar(name, f"<= {bar:g} s", f"{shown(figures[name])} s", figures[name]["median"] <= bar)
        for name, bar in PROMISED.items()
        if name in figures
    ]


def table(found: list[Found]) -> str:
    lines = ["| | seconds | CPU seconds |", "| --- | ---: | ---: |"]
    for _, figures in found:
        cpu = figures["cpu"]
        lines += [f"| {name} | {shown(figures[name])} | {shown(cpu[name])} |" for name in cpu]
    return "\n".join(lines)
