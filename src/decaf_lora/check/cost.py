"""What will a run take? Time from a batch that was measured, bytes from its messages, memory from the plan."""

from __future__ import annotations

import os
import time
import warnings

import numpy as np
import torch

from decaf_lora import plan
from decaf_lora.check.findings import Finding
from decaf_lora.config import RunConfig
from decaf_lora.errors import UserError
from decaf_lora.records import Spread, human_bytes
from decaf_lora.run import Run


def seconds_of_example(run: Run) -> float:
    """Seconds to score one model on one test example: a batch is scored twice, and the second time counts."""
    trainer = run.trainer
    count = min(run.task.num_test, trainer.evaluator.batch_size)
    for _ in range(2):
        began = time.perf_counter()
        trainer.evaluate_own(run.adapter.select([0]), [np.arange(count)])
        passed = time.perf_counter() - began
    return passed / count


def cost(run: Run, config: RunConfig, step: float, example: float, bytes_sent: float) -> list[str]:
    """Time and bytes of a run, in words.

    Args:
        run: the run.
        config: its configuration.
        step: seconds of a local step of all agents in this process.
        example: seconds to score one model on one test example.
        bytes_sent: that an agent sends in a round.
    """
    agents, steps = len(run.engine.agents), run.trainer.steps_in_round
    models = agents + (agents > 1)  # the averaged one, too
    round_ = step * steps + models * example * run.task.num_test / config.evaluate_every
    each = f"{steps} step{'s' * (steps > 1)} of {span(step)}, and scoring"
    says = [f"about {span(round_)} a round ({each}), {span(round_ * run.rounds)} for {run.rounds} rounds"]
    if bytes_sent:
        sent = f"{_bytes(bytes_sent)} a round, {_bytes(bytes_sent * run.rounds)} in all"
        says.append(f"{'this' if agents == 1 else 'an'} agent sends {sent}")
    return says


def memory(config: RunConfig, processes: int, device: torch.device) -> Finding:
    """What the tensors of a process take at the highest, by the plan, and whether this machine has it.

    Args:
        config: the run.
        processes: number of processes that the agents are split over.
        device: of this process.
    """
    try:
        with warnings.catch_warnings():  # of the data, which have been said already
            warnings.simplefilter("ignore")
            peak = plan.estimate(config, processes=processes).peak
    except UserError as error:
        return Finding("memory", "odd", f"not known before it runs: {error}")
    there = _memory_of(device)
    says = f"about {_bytes(peak)} at the highest, beside Python and its libraries (about 1 GB)"
    if there is not None and peak > there:
        return Finding(
            "memory",
            "odd",
            f"{says}, and this machine has {_bytes(there)}. Set training.batch_size, training.agents_per_pass or "
            "task.max_length lower, or task.gradient_checkpointing.",
        )
    return Finding("memory", "right", f"{says}.")


def span(seconds: float) -> str:
    """A time for people: 0.02 s, 12 s, 3 min, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _memory_of(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not everywhere
        return None


def _bytes(count: float) -> str:
    return human_bytes(Spread(count))
