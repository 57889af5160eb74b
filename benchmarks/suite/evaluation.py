"""What does it cost to score the models of N agents?

speed: the evaluation of N agents whose adapters differ, beside one forward pass of as many examples through one PEFT
adapter. demo: which share of the demo's time (`decaf compare digits`, all phases of all runs) evaluation takes.
memory: the largest resident memory of a run of the demo's task with N agents, evaluated before and after a round; what
adapters and optimizer take is subtracted, since that may grow with N.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .cells import Bar, Found, Scope
from .machine import peak_memory, waiting
from .timing import interleaved, ratio, shown, spread

QUESTION = "What does the evaluation of N agents cost?"
AGAINST = "one forward pass of the pooled examples through one PEFT adapter"
WHY = {
    "share of the demo": "the demo's local steps are short (a model of 0.2 million parameters, 5 steps of 16 examples),"
    " and each evaluation takes 397 examples through the models of ten agents",
    "of one forward pass": "every agent has its own factors, so the small products are batched, not one matrix",
    "memory at 400 agents": "the optimizer's and the trainer's temporary copies of 400 adapters are not subtracted",
}


def cells(scope: Scope, device: str) -> list[dict[str, Any]]:
    if scope == "quick":
        speed = {"what": "speed", "model": "minilm", "agents": 2, "small": True}
        return [speed, {"what": "memory", "agents": 2}]
    found = [{"what": "speed", "model": "digits", "agents": n} for n in ((1, 10, 50) if scope == "full" else (10,))]
    found += [{"what": "speed", "model": "minilm", "agents": n} for n in ((1, 10, 50) if scope == "full" else (10,))]
    if scope == "full":
        found += [{"what": "speed", "model": "vit", "agents": n} for n in (1, 10)]
    found.append({"what": "demo"})
    return found + [{"what": "memory", "agents": n} for n in ((10, 100, 400) if scope == "full" else (10, 400))]


def measure(device: str, what: str, **settings: Any) -> dict[str, Any]:
    return {"speed": _speed, "demo": _demo, "memory": _memory}[what](device, **settings)


def _speed(device: str, model: str, agents: int, small: bool = False) -> dict[str, Any]:
    import numpy as np
    import torch

    from decaf_lora import Run, TrainingConfig, algorithms, graphs, partition

    from . import models
    from .local_steps import PeftAgents

    ours, theirs = (models.task(model, max(64, 4 * agents), small=small) for _ in range(2))
    for task in (ours, theirs):
        task.model.to(device)
    lora = models.lora_of(model, ours)
    one = PeftAgents(theirs, lora, 1)
    algorithm = algorithms.local() if agents == 1 else algorithms.decaf()
    graph = graphs.complete(1) if agents == 1 else graphs.ring(agents)
    shards = partition.iid(ours.labels, agents, seed=0)
    run = Run(ours, algorithm, graph, shards, TrainingConfig(batch_size=8), lora=lora, rounds=1)
    torch.manual_seed(1)  # no two agents alike
    adapter = run.adapter.with_tensors({k: t + 0.01 * torch.randn_like(t) for k, t in run.adapter.tensors().items()})
    every = np.tile(np.arange(theirs.num_test), agents)
    parts = np.array_split(every, max(1, len(every) // 256))

    @torch.no_grad()
    def pooled() -> None:
        for part in parts:
            batch = {k: t.to(device) for k, t in theirs.test_batch(part).items()}
            theirs.statistics(batch, 1).cpu()

    runs = {"ours": lambda: run.trainer.evaluate(adapter), "pooled": pooled}
    least = 1 if small else 5
    seconds = interleaved(runs, budget=1 if small else 45, least=least, wait=waiting(device))
    run.close()
    del one
    times = {name: spread(values) for name, values in seconds.items()}
    return {"seconds": times, "pooled": ratio(seconds["pooled"], seconds["ours"]), "examples": len(every)}


def _demo(device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "decaf_lora", "compare", "digits", "--out", folder, "--device", device]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        phases: dict[str, float] = {}
        for path in Path(folder).rglob("records.jsonl"):
            for line in path.read_text().splitlines():
                for phase, seconds in json.loads(line)["seconds"].items():
                    phases[phase] = phases.get(phase, 0.0) + seconds
    return {"share": phases["evaluate"] / sum(phases.values()), "phases": phases}


def _memory(device: str, agents: int) -> dict[str, Any]:
    from decaf_lora import Run, TrainingConfig, algorithms, graphs, partition
    from decaf_lora.tasks.demo.task import Digits

    task = Digits()
    task.model.to(device)
    before = peak_memory(device)
    shards = partition.iid(task.labels, agents, seed=0)
    run = Run(task, algorithms.decaf(), graphs.ring(agents), shards, TrainingConfig(), rounds=1, evaluate_every=1)
    list(run.train())
    adapters = sum(t.numel() * t.element_size() for t in run.adapter.tensors().values())
    moments = sum(t.numel() * t.element_size() for m in run.trainer.moments.values() for t in (m.first, m.second))
    run.close()
    return {
        "peak": peak_memory(device),
        "before": before,
        "adapters": adapters,
        "optimizer": moments,
        "agents_per_pass": run.trainer.agents_per_pass,
    }


def bars(found: list[Found]) -> list[Bar]:
    speed = [f for f in found if f.settings["what"] == "speed"]
    demo = [f.figures["share"] for f in found if f.settings["what"] == "demo"]
    memory = {f.settings["agents"]: f.figures for f in found if f.settings["what"] == "memory"}
    made = []
    if speed:
        worst = min(speed, key=lambda f: f.figures["pooled"]["median"])
        where = f"{worst.settings['model']} {worst.settings['agents']}"
        value = worst.figures["pooled"]
        made.append(Bar("of one forward pass", ">= 0.95", f"{shown(value)} at {where}", value["median"] >= 0.95))
    if demo:
        made.append(Bar("share of the demo", "<= 15 %", f"{demo[0]:.1%}", demo[0] <= 0.15))
    if {10, 400} <= memory.keys():
        own = memory[400]["peak"] - memory[400]["adapters"] - memory[400]["optimizer"]
        times = own / memory[10]["peak"]
        made.append(Bar("memory at 400 agents", "<= 1.3 times that at 10", f"{times:.2f}", times <= 1.3))
    return made


def table(found: list[Found]) -> str:
    lines = ["| model | agents | examples in all | ours, s | pooled / ours |", "| --- | ---: | ---: | ---: | ---: |"]
    for settings, figures in found:
        if settings["what"] == "speed":
            numbers = [shown(figures["seconds"]["ours"]), shown(figures["pooled"])]
            what = f"{settings['model']} | {settings['agents']} | {figures['examples']:,}"
            lines.append(f"| {what} | {' | '.join(numbers)} |")
    lines += ["", "| agents of the demo's task | peak, MB | before, MB | adapters and optimizer, MB | agents a pass |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: |")
    for settings, figures in found:
        if settings["what"] == "memory":
            held = figures["adapters"] + figures["optimizer"]
            sizes = [f"{size / 1e6:,.0f}" for size in (figures["peak"], figures["before"], held)]
            lines.append(f"| {settings['agents']} | {' | '.join(sizes)} | {figures['agents_per_pass']} |")
    for settings, figures in found:
        if settings["what"] == "demo":
            phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in figures["phases"].items())
            lines.append(f"\nThe demo's phases, over all runs: {phases}.")
    return "\n".join(lines)
