"""How many agents should share a pass? Larger passes are timed against smaller ones until it is clear.

Timings on a busy machine differ by more than passes do. So two sizes are timed in turn, and what counts is the median
of the ratios of such pairs. Sizes grow until two in a row are no faster: what is larger still would only take memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

MOST_EXAMPLES = {"cpu": 512}
"""Type of device -> the most training examples in a pass that is tried: beyond, a CPU's caches hold none of them."""

MOST_EXAMPLES_ELSEWHERE = 8192

UNTIMED = 128
"""Examples in a pass for runs too short to time anything: near the fastest for the models that were measured."""

SHORT = 50
"""Local steps of a run below which nothing is timed: it would take a good part of the run."""

FASTER = 0.98
"""A larger pass is taken if it needs at most this share of the time."""

CLEAR, FEWEST_PAIRS, MOST_PAIRS = 0.05, 3, 9
"""Timing ends after so many pairs at the least, once the pairs agree by this much, and after so many at the most."""


def sizes(agents: int, batch_size: int, device: torch.device) -> list[int]:
    """Numbers of agents a pass that are worth a try, ascending; 1 is always among them.

    Args:
        agents: of the process.
        batch_size: training examples of an agent in a step.
        device: of the model.
    """
    most = MOST_EXAMPLES.get(device.type, MOST_EXAMPLES_ELSEWHERE) // batch_size
    steps = {lead * 10**power for power in range(6) for lead in (1, 2, 5)} | {agents}
    return sorted(size for size in steps if size == 1 or size <= min(most, agents))


def untimed(candidates: Sequence[int], batch_size: int) -> int:
    """The largest of the sizes with at most `UNTIMED` examples in a pass; 1 if there is none."""
    return max(size for size in candidates if size == 1 or size * batch_size <= UNTIMED)


def fastest(candidates: Sequence[int], seconds: Callable[[int], float]) -> int:
    """The number of agents a pass with the least time for an agent; of nearly equal ones the smallest.

    Args:
        candidates: ascending.
        seconds: makes one pass of so many agents and returns its seconds.
    """
    best, slower = candidates[0], 0
    seconds(best)  # the first pass of a size warms up
    for size in candidates[1:]:
        seconds(size)
        if _ratio(seconds, size, best) <= FASTER:
            best, slower = size, 0
        else:
            slower += 1
        if slower == 2:
            break
    return best


def _ratio(seconds: Callable[[int], float], size: int, other: int) -> float:
    """The median, over pairs, of the time of an agent in a pass of `size` divided by that in a pass of `other`."""
    ratios: list[float] = []
    while len(ratios) < MOST_PAIRS:
        # Turn about, so that a machine that gets slower or faster favours neither.
        first, second = (other, size) if len(ratios) % 2 else (size, other)
        times = {first: seconds(first) / first, second: seconds(second) / second}
        ratios.append(times[size] / times[other])
        if len(ratios) >= FEWEST_PAIRS and (max(ratios) < 1 - CLEAR or min(ratios) > 1 + CLEAR):
            break
    return median(ratios)
