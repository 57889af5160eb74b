"""What does the exchange of a whole model cost: send, deliver and combine the adapters of ten agents?

Random factors in the shapes of CLIP ViT-B/16 (query, key and value of 12 image and 12 text blocks, rank 2) and of a
model of 7 billion parameters (query and value of 32 blocks, rank 4). copy: one copy of the same factors. dense: for
every matrix and agent the weighted sum of its neighbours' products, and its SVD by `torch.linalg.svd`; svd merge: the
same by PEFT's `add_weighted_adapter`. Both are timed for one matrix of each size and counted for all. round: local
steps of the paper's recipe, from the operations that `decaf plan` counts and the speed of a matrix product on this
machine, which no training reaches: so the share of a round that is shown is above the true one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .cells import Bar, Found, Scope
from .machine import waiting
from .timing import interleaved, ratio, scaled, shown, spread

QUESTION = "What does the consensus of a whole model cost?"
AGAINST = "one copy of the same factors; the dense SVD; PEFT's svd merge"
WHY = {
    "DeCAF, copies": "a copy moves each float32 number once; the mix gathers the neighbours' factors, takes Gram "
    "matrices and products back in float64, and decomposes hundreds of small cores one after the other",
    "DLoRA, copies": "the sum of three messages is three multiplications and two additions, each of which passes over "
    "all numbers; a fused one rounds differently with the number of agents in the call, and bit equality between "
    "engines rests on it",
    "dense SVD, clip": "at 768 x 768 with ten contributors the stacked factors have rank 20, and their QR is no longer "
    "small",
    "dense SVD, 7b": "",
    "share of a round": "",
}
SHAPES = {
    "clip": {"sizes": ((768, 36), (512, 36)), "rank": 2, "recipe": "paper/food101", "bar": 300},
    "7b": {"sizes": ((4096, 64),), "rank": 4, "recipe": "paper/wic", "bar": 3000},
    "small": {"sizes": ((24, 2), (16, 1)), "rank": 2, "recipe": None, "bar": 1},
}


def cells(scope: Scope, device: str) -> list[dict[str, Any]]:
    if scope == "quick":
        return [{"model": "small", "graph": "ring", "agents": 4}]
    return [{"model": m, "graph": g, "agents": 10} for m in ("clip", "7b") for g in ("ring", "complete")]


def measure(device: str, model: str, graph: str, agents: int) -> dict[str, Any]:
    from decaf_lora import algorithms, graphs
    from decaf_lora.engines import Simulate
    from decaf_lora.exchange import Exchange
    from decaf_lora.graphs import as_schedule

    shapes: dict[str, Any] = SHAPES[model]
    small = model == "small"
    start = _drawn(shapes["sizes"], shapes["rank"], agents, device, apart=0)
    adapter = _drawn(shapes["sizes"], shapes["rank"], agents, device)
    tensors = adapter.tensors()
    schedule = as_schedule(graphs.parse(graph, agents, 0))
    runs: dict[str, Callable[[], object]] = {"copy": lambda: {name: t.clone() for name, t in tensors.items()}}
    for name in ("dlora", "decaf"):
        exchange = Exchange(algorithms.make(name), schedule, Simulate(agents))
        state = exchange.init(start)  # as in a run, whose agents start with one A

        def consensus(exchange: Any = exchange, state: Any = state) -> object:
            return exchange.finish(adapter, exchange.start(adapter, state, 1))

        runs[name] = consensus
    wait = waiting(device)
    seconds = interleaved(runs, budget=1 if small else 30, least=1 if small else 7, most=200, wait=wait)
    figures: dict[str, Any] = {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "dlora, copies": ratio(seconds["dlora"], seconds["copy"]),
        "decaf, copies": ratio(seconds["decaf"], seconds["copy"]),
    }
    contributors = int((schedule.at(0).weights[0] != 0).sum())
    peers: dict[str, float] = {"dense": 0.0, "svd merge": 0.0}
    for size, count in shapes["sizes"]:
        for name, call in _one_matrix(size, shapes["rank"], contributors, device).items():
            # A dense SVD of 4096 x 4096 takes many seconds: few turns, as its own spread is small beside the factor.
            few = interleaved(
                {name: call}, budget=1 if small else 10, least=1, most=3, warm=int(size < 2000), wait=wait
            )
            peers[name] += min(few[name]) * count * agents
    for name, total in peers.items():
        figures[name] = ratio([total] * len(seconds["decaf"]), seconds["decaf"])
    figures |= {f"seconds, {name}": total for name, total in peers.items()}
    if shapes["recipe"]:
        figures["round"] = _round_seconds(shapes["recipe"], device)
        figures["share"] = scaled(figures["seconds"]["decaf"], 1 / figures["round"])
    return figures


def _drawn(sizes: Any, rank: int, agents: int, device: str, apart: float = 0.2) -> Any:
    """An adapter of random factors, whose agents share most of their product, as agents do, and lie `apart`."""
    import torch

    from decaf_lora.adapters import Adapter

    generator = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> torch.Tensor:
        common = torch.randn(1, *shape, generator=generator)
        return (common + apart * torch.randn(agents, *shape, generator=generator)).to(device)

    layers = [(f"layer{size}.{number}", size) for size, count in sizes for number in range(count)]
    A = {name: factor(rank, size) / size**0.5 for name, size in layers}
    B = {name: factor(size, rank) for name, size in layers}
    return Adapter(A, B, {name: torch.ones(agents, device=device) for name, _ in layers}, {})


def _one_matrix(size: int, rank: int, contributors: int, device: str) -> dict[str, Callable[[], object]]:
    """What the mix of one matrix of one agent is elsewhere: dense, and by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    adapter = _drawn(((size, 1),), rank, contributors, device)
    (name,) = adapter.layers
    A, B = adapter.A[name], adapter.B[name]

    def dense() -> object:
        return torch.linalg.svd((B @ A).mean(0), full_matrices=False)

    config = {"r": rank, "lora_alpha": rank, "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(nn.Linear(size, size, bias=False)), LoraConfig(**config), "0").to(device)
    for number in range(contributors):
        if number:
            model.add_adapter(str(number), LoraConfig(**config))
        layer = model.base_model.model[0]
        layer.lora_A[str(number)].weight.data, layer.lora_B[str(number)].weight.data = A[number], B[number]
    names = [str(number) for number in range(contributors)]

    def merge() -> object:
        model.add_weighted_adapter(
            names, [1 / contributors] * contributors, "merged", "svd", svd_rank=rank, svd_full_matrices=False
        )
        return model.delete_adapter("merged")

    return {"dense": dense, "svd merge": merge}


def _round_seconds(recipe: str, device: str) -> float:
    """Seconds of a round of a recipe at the speed of a matrix product."""
    import torch

    from decaf_lora import plan, recipes
    from decaf_lora.config import RunConfig

    config = recipes.get(recipe)
    values = {field: getattr(config, field) for field in RunConfig.model_fields} | {"algorithm": {"name": "decaf"}}
    planned = plan.estimate(RunConfig.model_validate(values))
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    square = torch.randn(4096, 4096, device=device, dtype=dtype)
    fastest, wait = float("inf"), waiting(device)
    for _ in range(4):
        wait()
        started = time.perf_counter()
        square @ square
        wait()
        fastest = min(fastest, time.perf_counter() - started)
    return planned.flops_per_step * planned.steps_per_round / (2 * 4096**3 / fastest)


def bars(found: list[Found]) -> list[Bar]:
    real = [f for f in found if f.settings["model"] in ("clip", "7b")]
    if not real:
        return []
    made = []

    def worst(name: str, key: str, bar: float, least: bool, some: list[Found]) -> None:
        choose = min if least else max
        one = choose(some, key=lambda f: f.figures[key]["median"])
        value, where = one.figures[key], f"{one.settings['model']}, {one.settings['graph']}"
        met = value["median"] >= bar if least else value["median"] <= bar
        made.append(Bar(name, f"{'>=' if least else '<='} {bar:,g}", f"{shown(value)} at {where}", met))

    worst("DLoRA, copies", "dlora, copies", 3, False, real)
    worst("DeCAF, copies", "decaf, copies", 20, False, real)
    for model in ("clip", "7b"):
        if some := [f for f in real if f.settings["model"] == model]:
            worst(f"dense SVD, {model}", "dense", SHAPES[model]["bar"], True, some)
    worst("share of a round", "share", 0.01, False, real)
    return made


def table(found: list[Found]) -> str:
    lines = ["| model, graph | factors, MB | copy, ms | DLoRA, copies | DeCAF, ms | DeCAF, copies | dense / DeCAF |"]
    lines[0] += " PEFT's svd merge / DeCAF | share of a round |"
    lines.append("| --- |" + " ---: |" * 8)
    for settings, figures in found:
        copy, decaf = (scaled(figures["seconds"][name], 1e3) for name in ("copy", "decaf"))
        row = [f"{settings['model']}, {settings['graph']}", f"{figures['bytes'] / 1e6:.1f}", shown(copy)]
        row += [shown(figures["dlora, copies"]), shown(decaf), shown(figures["decaf, copies"])]
        row += [shown(figures["dense"]), shown(figures["svd merge"])]
        share = figures.get("share")
        row.append("-" if share is None else f"{share['median']:.3%}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)
