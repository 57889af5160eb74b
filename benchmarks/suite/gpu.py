"""What is there to know of a GPU beside the other rows? One script; on a CPU it runs as far as it goes.

decompositions: QR against the Gram form in `lowrank.mix_truncate`, all matrices of a model at once, and the batched
float64 decompositions that they are made of. plan: the peak of a round against `decaf plan`. compile: a local step
where the model is compiled, and where CUDA graphs (`mode="reduce-overhead"`) take the launches away. NCCL on one rank
is the row `ranks` on this device, peak memory of N agents the row `evaluation`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from .cells import Bar, Found, Scope
from .machine import peak_memory, waiting
from .timing import interleaved, ratio, scaled, shown, spread

QUESTION = "What else is there to know of a GPU?"
AGAINST = "the other form of the same"
WHY = {
    "plan": "kernels take buffers that no plan sees (cuBLAS alone reserves 32 MiB a thread on such a GPU), and the "
    "demo's model of 0.2 million parameters is small beside them"
}
MATRICES = {"small": (24, 2, 6), "clip": (768, 2, 720), "7b": (4096, 4, 640)}
"""width, rank, and matrices of ten agents."""


def cells(scope: Scope, device: str) -> list[dict[str, Any]]:
    if scope == "quick":
        return [{"what": "decompositions", "model": "small", "contributors": 3}]  # `decaf plan` has tests of its own
    found = [{"what": "decompositions", "model": m, "contributors": c} for m in ("clip", "7b") for c in (3, 10)]
    found += [{"what": "plan", "batch": batch, "agents": 10} for batch in (16, 64)]
    models = ("minilm", "vit", "llama") if scope == "full" else ("minilm",)
    return found + [{"what": "compile", "model": m, "agents": n, "batch": 2} for m in models for n in (1, 10)]


def measure(device: str, what: str, **settings: Any) -> dict[str, Any]:
    return {"decompositions": _decompositions, "plan": _plan, "compile": _compile}[what](device, **settings)


def _decompositions(device: str, model: str, contributors: int) -> dict[str, Any]:
    import torch

    from decaf_lora.lowrank import mix_truncate

    width, rank, count = MATRICES[model]
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(count, contributors, rank, width, generator=generator).to(device) / width**0.5
    B = torch.randn(count, contributors, width, rank, generator=generator).to(device)
    weights = torch.full((contributors,), 1 / contributors, dtype=torch.float64, device=device)
    inner = contributors * rank
    tall = torch.randn(count, width, inner, generator=generator).to(device).double()
    core = tall[:, :inner].contiguous()
    runs: dict[str, Callable[[], object]] = {
        "qr form": lambda: mix_truncate(A, B, weights, rank, method="qr"),
        "gram form": lambda: mix_truncate(A, B, weights, rank, method="gram"),
        "qr": lambda: torch.linalg.qr(tall),
        "gram": lambda: tall.mT @ tall,
        "eigh": lambda: torch.linalg.eigh(core @ core.mT),
        "svd": lambda: torch.linalg.svd(core),
    }
    small = model == "small"
    seconds = interleaved(runs, budget=1 if small else 60, least=1 if small else 3, wait=waiting(device))
    return {
        "ms": {name: scaled(spread(values), 1e3) for name, values in seconds.items()},
        "qr form / gram form": ratio(seconds["qr form"], seconds["gram form"]),
    }


def _plan(device: str, batch: int, agents: int) -> dict[str, Any]:
    from benchmarks.plan_accuracy import in_use, peak_of
    from decaf_lora import plan, recipes
    from decaf_lora.config import RunConfig
    from decaf_lora.runs.build import build_run

    recipe = recipes.get("digits")
    values = {field: getattr(recipe, field) for field in RunConfig.model_fields}
    training = recipe.training.model_copy(update={"batch_size": batch, "steps": 1, "agents_per_pass": agents})
    config = RunConfig.model_validate(values | {"rounds": 1, "agents": agents, "training": training, "device": device})
    planned = plan.estimate(config).peak
    if device.startswith("cuda"):
        with build_run(config) as run:
            list(run.train())
        measured = peak_memory(device)
    else:
        others = in_use()
        with build_run(config) as run:
            measured = peak_of(lambda: list(run.train()), others)
    return {"planned": planned, "measured": measured, "planned / measured": planned / measured}


def _compile(device: str, model: str, agents: int, batch: int) -> dict[str, Any]:
    import torch

    from decaf_lora import Run, TrainingConfig, algorithms, graphs, partition

    from . import models

    runs: dict[str, Callable[[], object]] = {}
    figures: dict[str, Any] = {}
    for name, options in (("plain", None), ("compiled", {}), ("cuda graphs", {"mode": "reduce-overhead"})):
        if name == "cuda graphs" and not device.startswith("cuda"):
            continue
        task = models.task(model, 64)
        task.model.to(device)
        training = TrainingConfig(steps=3, batch_size=batch, agents_per_pass=agents)
        algorithm = algorithms.local() if agents == 1 else algorithms.decaf()
        graph = graphs.complete(1) if agents == 1 else graphs.ring(agents)
        shards = partition.iid(task.labels, agents, seed=0)
        run = Run(task, algorithm, graph, shards, training, lora=models.lora_of(model, task), rounds=10**6)

        def step(run: Any = run) -> None:
            round_ = run.exchange.round(1)
            run.adapter, run.state, _ = run.trainer.train_round(
                run.adapter, run.algorithm, run.state, round_, run.rounds
            )

        if options is not None:
            task.model.forward = torch.compile(task.model.forward, **options)
            try:
                for _ in range(3):
                    step()
            except Exception as error:  # whatever the compiler cannot do is an answer here
                figures[f"{name} failed"] = str(error).strip().splitlines()[-1][:200]
                continue
        runs[name] = step
    seconds = interleaved(runs, budget=60, wait=waiting(device))
    figures["ms a step"] = {name: scaled(spread(values), 1e3 / 3) for name, values in seconds.items()}
    for name in seconds:
        if name != "plain":
            figures[f"plain / {name}"] = ratio(seconds["plain"], seconds[name])
    with contextlib.suppress(Exception):
        torch.compiler.reset()
    return figures


def bars(found: list[Found]) -> list[Bar]:
    plans = [f.figures["planned / measured"] for f in found if f.settings["what"] == "plan"]
    if not plans:
        return []
    worst = max(plans, key=lambda value: abs(value - 1))
    return [Bar("plan", "within 20 %", f"planned / measured {worst:.3f}", abs(worst - 1) <= 0.2)]


def table(found: list[Found]) -> str:
    lines = ["| | |", "| --- | --- |"]
    for settings, figures in found:
        what = " ".join(str(value) for value in settings.values())
        parts = []
        for name, value in figures.items():
            if isinstance(value, dict) and "median" not in value:
                parts += [f"{inner} {shown(number)} {name}" for inner, number in value.items()]
            else:
                parts.append(f"{name} {value if isinstance(value, str) else shown(value)}")
        lines.append(f"| {what} | {'; '.join(parts)} |")
    return "\n".join(lines)
