"""Does the cost of an agent grow with their number?

`decaf run` on the demo's model, with four examples an agent, drawn with replacement, and 100 test examples (drawn.py):
what is counted is the command, with its records, its checkpoint and its report. Seconds are those of a round (local
steps, exchange, consensus measures) for each agent and step, from the second round on; the sizes take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .cells import Bar, Found, Scope
from .timing import ratio, shown, spread

QUESTION = "Does the cost of an agent grow with the number of agents?"
AGAINST = "100 agents: linear"
WHY = {
    "1,000 agents": "",
    "memory of 1,000 agents": "",
}
STEPS, BATCH = 5, 4


def cells(scope: Scope, device: str) -> list[dict[str, Any]]:
    if scope == "quick":
        return [{"graph": "ring", "sizes": [2], "rounds": 2, "turns": 1, "small": True}]
    full = {"sizes": [10, 100, 1000], "rounds": 4, "turns": 3}
    if scope == "full":
        return [{"graph": graph, **full} for graph in ("ring", "base:3")]
    return [{"graph": graph, **full, "turns": 2} for graph in ("ring", "base:3")]


def measure(device: str, graph: str, sizes: list[int], rounds: int, turns: int, small: bool = False) -> dict[str, Any]:
    found: dict[int, list[dict[str, Any]]] = {n: [] for n in sizes}
    for turn in range(turns):
        for n in sizes if turn % 2 == 0 else reversed(sizes):
            found[n].append(_run(device, graph, n, rounds, small))
    figures: dict[str, Any] = {"agents": {}}
    for n, runs in found.items():
        figures["agents"][str(n)] = {
            "seconds an agent and step": spread([r["round"] / (n * STEPS) for r in runs]),
            "phases": {phase: spread([r["phases"][phase] for r in runs]) for phase in runs[0]["phases"]},
            "process": spread([r["process"] for r in runs]),
            "peak": max(r["peak"] for r in runs),
            "report": runs[0]["report"],
        }
    if {100, 1000} <= set(sizes):
        each = {n: [r["round"] / n for r in found[n]] for n in (100, 1000)}
        figures["1000 to 100"] = ratio(each[1000], each[100])
    return figures


def _run(device: str, graph: str, agents: int, rounds: int, small: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        arguments = ["run", "digits", "--task", f"{Path(__file__).with_name('drawn.py')}:make"]
        arguments += ["--task.agents", str(agents), "--agents", str(agents), "--graph", graph, "--partition", "iid"]
        arguments += ["--training.steps", str(STEPS), "--training.batch-size", str(BATCH), "--rounds", str(rounds)]
        arguments += ["--evaluate-every", str(rounds), "--device", device, "--out", str(out)]
        began, peak = time.perf_counter(), 0
        if small:
            from decaf_lora.cli import main

            main(arguments)
        else:
            peak = _watched([sys.executable, "-m", "decaf_lora", *arguments])
        process = time.perf_counter() - began
        records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
        pages = [len(path.read_bytes()) for path in out.glob("report.html")]
    later = [record["seconds"] for record in records[2:]]
    phases = {phase: sum(r.get(phase, 0.0) for r in later) / len(later) for phase in later[0] if phase != "evaluate"}
    phases["evaluate, in all"] = sum(record["seconds"].get("evaluate", 0.0) for record in records)
    seconds = sum(value for phase, value in phases.items() if not phase.startswith("evaluate"))
    return {"round": seconds, "phases": phases, "process": process, "peak": peak, "report": sum(pages)}


def _watched(command: list[str]) -> int:
    """Runs a command; returns the largest resident memory, in bytes, of its process."""
    # A small process in between: Linux counts the peak of a process's parent at its start as its own.
    code = (
        "import json, resource, subprocess, sys; done = subprocess.run(json.loads(sys.argv[1]), capture_output=True); "
    )
    code += "sys.stderr.buffer.write(done.stderr); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(done.returncode)"
    watcher = [sys.executable, "-I", "-S", "-c", code, json.dumps(command)]
    done = subprocess.run(watcher, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-12:]))
    return int(done.stdout)


def bars(found: list[Found]) -> list[Bar]:
    real = [f for f in found if "1000 to 100" in f.figures]
    if not real:
        return []
    worst = max(real, key=lambda f: f.figures["1000 to 100"]["median"])
    value = worst.figures["1000 to 100"]
    peak = max(f.figures["agents"]["1000"]["peak"] for f in real)
    shown_ = f"{shown(value)} times that of 100 at {worst.settings['graph']}"
    return [
        Bar("1,000 agents", "<= 1.1 times the seconds an agent of 100", shown_, value["median"] <= 1.1),
        Bar("memory of 1,000 agents", "<= 4 GB", f"{peak / 1e9:.2f} GB", peak <= 4e9),
    ]


def table(found: list[Found]) -> str:
    lines = ["| graph | agents | ms an agent and step | a round: train, exchange, combine, measure, s |"]
    lines[0] += " evaluate, in all, s | process, s | peak, MB | report, MB |"
    lines.append("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for settings, figures in found:
        for agents, one in figures["agents"].items():
            each = {k: v * 1e3 for k, v in one["seconds an agent and step"].items() if k != "pairs"}
            phases = {name: value["median"] for name, value in one["phases"].items()}
            parts = ", ".join(f"{phases.get(name, 0.0):.2f}" for name in ("train", "exchange", "combine", "measure"))
            row = [settings["graph"], agents, shown(each), parts, f"{phases['evaluate, in all']:.1f}"]
            row += [f"{one['process']['median']:.1f}", f"{one['peak'] / 1e6:,.0f}", f"{one['report'] / 1e6:.1f}"]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)
