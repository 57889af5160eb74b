"""How much memory do more agents take? The peak of one agent and of several with the same examples in a pass.

MiniLM-L6 with 77 classes, rank 4 on query and value, the head trained in full, 160 random texts of 32 tokens in a pass
of all agents: two rounds of DeCAF on a ring (one agent: local training), three AdamW steps each, and an evaluation of
every agent's model. peak: the largest resident memory of a process of its own (of tensors, on a GPU); before: what
Python, PyTorch and transformers hold before the model is loaded.
"""

from __future__ import annotations

from typing import Any

from .cells import Bar, Found, Scope
from .machine import peak_memory

QUESTION = "How much memory do more agents take?"
AGAINST = "one agent with as many examples in a pass"
WHY: dict[str, str] = {}


def cells(scope: Scope, device: str) -> list[dict[str, Any]]:
    if scope == "quick":
        return [{"agents": 2, "examples": 4, "small": True}]
    return [{"agents": n, "examples": 160} for n in ((1, 2, 5, 10) if scope == "full" else (1, 10))]


def measure(device: str, agents: int, examples: int, small: bool = False) -> dict[str, Any]:
    import transformers.models.bert.modeling_bert  # noqa: F401 - the library's own code is no part of it

    from decaf_lora import Run, TrainingConfig, algorithms, graphs, partition

    from . import models

    before = peak_memory(device)
    task = models.task("minilm", 10 * examples, small=small)
    task.model.to(device)
    each = examples // agents
    run = Run(
        task,
        algorithms.local() if agents == 1 else algorithms.decaf(),
        graphs.complete(1) if agents == 1 else graphs.ring(agents),
        partition.iid(task.labels, agents, seed=0),
        TrainingConfig(steps=3, batch_size=each, agents_per_pass=agents),
        lora=models.lora_of("minilm", task),
        rounds=2,
        evaluate_every=2,
        eval_batch_size=each,
    )
    list(run.train())
    run.close()
    return {
        "peak": peak_memory(device),
        "before": before,
        "base": sum(p.numel() * p.element_size() for p in task.model.parameters()),
        "adapters": sum(t.numel() * t.element_size() for t in run.adapter.tensors().values()),
    }


def bars(found: list[Found]) -> list[Bar]:
    return []


def table(found: list[Found]) -> str:
    lines = ["| agents | examples of each | base, MB | adapters, MB | before, MB | peak, MB | peak / one agent |"]
    lines.append("| ---: |" + " ---: |" * 6)
    alone = next((f.figures["peak"] for f in found if f.settings["agents"] == 1), None)
    for settings, figures in sorted(found, key=lambda f: f.settings["agents"]):
        sizes = [f"{figures[name] / 1e6:,.1f}" for name in ("base", "adapters")]
        sizes += [f"{figures[name] / 1e6:,.0f}" for name in ("before", "peak")]
        times = f"{figures['peak'] / alone:.3f}" if alone else "-"
        each = settings["examples"] // settings["agents"]
        lines.append(f"| {settings['agents']} | {each} | {' | '.join(sizes)} | {times} |")
    return "\n".join(lines)
