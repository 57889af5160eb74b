"""What does a local step of all agents cost, beside the same agents' adapters switched in PEFT, and one adapter alone?

ours: one step of N agents, each on its own batch. switched: PEFT holds N adapters and steps them one after the other,
on the same batches. pooled: one PEFT adapter takes one step on all the batches together, which is what the arithmetic
alone costs: nothing can be faster without being another computation. One agent has nothing to switch, so the bar at
batch 2 is one for several agents.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Sequence
from typing import Any

from .cells import Bar, Found, Scope
from .machine import available, waiting
from .timing import interleaved, ratio, shown, spread

QUESTION = "What does a local step of N agents cost?"
AGAINST = "PEFT adapters switched one by one; one PEFT adapter on the pooled batch"
WHY = {
    "of switching": "at large batches both sides compute the same products and nothing is left to save but PEFT's own "
    "overhead, so that the ratio is 1 within the spread",
    "of switching, batch 2": "the larger the model, the less of a step is overhead that stacking saves; one PEFT "
    "adapter on the pooled batch, the limit, is no further ahead of switching",
    "of pooled": "every agent has its own factors, so the small products are batched, not one matrix; and every agent "
    "has its own optimizer state to read and write; on a GPU a step of this size waits for the launches of kernels, "
    "and ours has more of them",
}
LONGEST = 60.0
"""Seconds of a step above which a cell is left out."""


def cells(scope: Scope, device: str) -> list[dict[str, Any]]:
    if scope == "quick":
        small = {"small": True, "dtype": "float32", "batch": 2}
        one, two = {"model": "minilm", "agents": 2, **small}, {"model": "llama", "agents": 1, **small}
        return [one, two, {"model": "vit", "agents": 3, **small, "dtype": "bf16"}]
    if scope == "bench":
        return [{"model": "minilm", "agents": 10, "batch": batch, "dtype": "float32"} for batch in (2, 8, 32)]
    kinds = ("float32", "bf16")
    grid = itertools.product(("digits", "minilm", "vit"), (1, 10, 50), (2, 8, 32), kinds)
    found = [{"model": m, "agents": n, "batch": b, "dtype": t} for m, n, b, t in grid]
    return found + [{"model": "llama", "agents": n, "batch": 2, "dtype": t} for n in (1, 10) for t in kinds]


class PeftAgents:
    """Agents of PEFT: an adapter and an optimizer each, in one model.

    Args:
        task: its model is adapted in place.
        lora: of every adapter.
        agents: how many.
        rate: learning rate of AdamW.
    """

    def __init__(self, task: Any, lora: Any, agents: int, rate: float = 1e-3) -> None:
        import torch
        from peft import get_peft_model

        self.task = task
        names = [f"agent{i}" for i in range(agents)]
        # PEFT writes into the configuration that it is given.
        self.model = get_peft_model(task.model, copy.deepcopy(lora), adapter_name=names[0])
        for name in names[1:]:
            self.model.add_adapter(name, copy.deepcopy(lora))
        adapted = [n for n, module in task.model.named_modules() if hasattr(module, "base_layer")]
        task.on_attach(adapted)  # so that what no adapter changes is computed once here too
        task.model.eval()  # no dropout, as in ours
        self.names, self.optimizers = names, []
        for name in names:
            self.model.set_adapter(name)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizers.append(torch.optim.AdamW(trained, lr=rate))

    def step(self, agent: int, batch: dict[str, Any], autocast: Any) -> float:
        """One step of one agent; returns the loss."""
        if len(self.names) > 1:
            self.model.set_adapter(self.names[agent])
        self.optimizers[agent].zero_grad()
        with autocast:
            loss = self.task.losses(batch, 1).sum()
        loss.backward()
        self.optimizers[agent].step()
        return loss


def measure(
    device: str, model: str, agents: int, batch: int, dtype: str, small: bool = False, steps: int = 3
) -> dict[str, Any]:
    import numpy as np
    import torch

    from decaf_lora import Run, TrainingConfig, algorithms, graphs, partition
    from decaf_lora.batches import BatchStream

    from . import models

    bf16 = dtype == "bf16"
    examples = max(64, 4 * agents)
    ours, switched, pooled = (models.task(model, examples, bf16, small) for _ in range(3))
    for task in (ours, switched, pooled):
        task.model.to(device)
    lora = models.lora_of(model, ours)

    def autocast() -> Any:
        if not bf16:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(device).type, torch.bfloat16)

    one, many = PeftAgents(pooled, lora, 1), PeftAgents(switched, lora, agents)
    shards = partition.iid(ours.labels, agents, seed=0)
    streams = [BatchStream(shards.shard(i), batch, 0, i) for i in range(agents)]
    wait = waiting(device)

    def examples_of(step: int, who: Sequence[int]) -> dict[str, Any]:
        indices = np.concatenate([streams[i].batch(step) for i in who])
        return {k: t.to(device) for k, t in pooled.train_batch(indices).items()}

    # Is the cell too long, or too large? One agent's step says so.
    first = examples_of(0, [0])
    with autocast():
        held = _held(lambda: one.task.losses(first, 1))
    alone = min(interleaved({"one": lambda: one.step(0, first, autocast())}, least=2, most=2, wait=wait)["one"])
    if alone * agents > LONGEST:
        return {"left_out": f"a step takes about {alone * agents:.0f} s"}
    if held * agents > available(device) / 2:
        return {"left_out": f"a pooled pass holds about {held * agents / 2**30:.0f} GiB"}
    steps = 1 if alone * agents > LONGEST / 12 else steps

    algorithm = algorithms.local() if agents == 1 else algorithms.decaf()
    graph = graphs.complete(1) if agents == 1 else graphs.ring(agents)
    training = TrainingConfig(
        steps=steps, batch_size=batch, learning_rate=1e-3, precision="bfloat16" if bf16 else "float32"
    )
    run = Run(ours, algorithm, graph, shards, training, lora=lora, rounds=10**6)
    round_ = run.exchange.round(1)
    counts = {"switched": 0, "pooled": 0}
    losses: dict[str, float] = {}

    def our_steps() -> None:
        run.adapter, run.state, summed = run.trainer.train_round(
            run.adapter, run.algorithm, run.state, round_, run.rounds
        )
        losses.setdefault("ours", float(summed.mean()) / steps)

    def peft_steps(name: str) -> None:
        total = []
        for _ in range(steps):
            step = counts[name]
            counts[name] += 1
            if name == "pooled":
                total.append(one.step(0, examples_of(step, range(agents)), autocast()))
            else:
                total += [many.step(i, examples_of(step, [i]), autocast()) for i in range(agents)]
        losses.setdefault(name, float(torch.stack(total).detach().mean()))

    runs = {
        "ours": our_steps,
        "switched": lambda: peft_steps("switched"),
        "pooled": lambda: peft_steps("pooled"),
    }
    seconds = interleaved(runs, budget=1 if small else 60, least=1 if small else 3, most=30, wait=wait)
    # The same examples, model and start: the losses of ours and of PEFT's agents are equal but for rounding and for
    # the random start of A, which moves nothing in the first steps (B is 0).
    if not np.isclose(losses["ours"], losses["switched"], rtol=0.05):
        raise RuntimeError(f"not the same computation: losses {losses}")
    run.close()
    return {
        "seconds a step": {name: spread([s / steps for s in times]) for name, times in seconds.items()},
        "switched": ratio(seconds["switched"], seconds["ours"]),
        "pooled": ratio(seconds["pooled"], seconds["ours"]),
        "agents_per_pass": run.trainer.agents_per_pass,
        "steps": steps,
        "losses": losses,
    }


def _held(call: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    import torch

    sizes: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(sizes.values())


def bars(found: list[Found]) -> list[Bar]:
    measured = [f for f in found if "left_out" not in f.figures]
    several = [f for f in measured if f.settings["agents"] > 1]

    def lowest(name: str, bar: float, against: str, some: list[Found]) -> Bar:
        if not some:
            return Bar(name, f">= {bar}", "-", None)
        worst = min(some, key=lambda f: f.figures[against]["median"])
        where = " ".join(str(value) for value in worst.settings.values())
        ratio_ = worst.figures[against]
        return Bar(name, f">= {bar}", f"{shown(ratio_)} at {where}", ratio_["median"] >= bar)

    return [
        lowest("of switching", 1.0, "switched", measured),
        lowest("of switching, batch 2", 2.0, "switched", [f for f in several if f.settings["batch"] == 2]),
        lowest("of pooled", 0.97, "pooled", measured),
    ]


def table(found: list[Found]) -> str:
    lines = ["| model | agents | batch | dtype | ours, s a step | switched / ours | pooled / ours | agents a pass |"]
    lines.append("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for settings, figures in found:
        start = f"| {settings['model']} | {settings['agents']} | {settings['batch']} | {settings['dtype']} |"
        if "left_out" in figures:
            lines.append(f"{start} left out: {figures['left_out']} | | | |")
            continue
        cells_ = [shown(figures["seconds a step"]["ours"]), shown(figures["switched"]), shown(figures["pooled"])]
        lines.append(f"{start} {' | '.join(cells_)} | {figures['agents_per_pass']} |")
    if told := _bf16(found):
        lines.append(f"\nWhat bf16 brings, seconds of a step in float32 over those in bf16: {'; '.join(told)}.")
        lines.append(
            "On a CPU, ours computes attention over up to 128 keys in float32 there, which is faster (`precision.py`); "
            "the references leave it to PyTorch."
        )
    return "\n".join(lines)


def _bf16(found: list[Found]) -> list[str]:
    """A phrase for every cell that was measured in both dtypes."""
    seconds = {
        (f.settings["model"], f.settings["agents"], f.settings["batch"], f.settings["dtype"]): f.figures[
            "seconds a step"
        ]["ours"]["median"]
        for f in found
        if "left_out" not in f.figures
    }
    return [
        f"{model}, {agents} agents, batch {batch}: {seconds[model, agents, batch, 'float32'] / own:.2f}"
        for (model, agents, batch, dtype), own in seconds.items()
        if dtype == "bf16" and (model, agents, batch, "float32") in seconds
    ]
