"""How long does one thing take beside another? Runs that take turns, and the ratios of the turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

Ratio = dict[str, float]
"""median, low and high (quartiles), pairs: of the ratios of all turns."""


SHARE = 1.0
"""Of every budget; less on a device that is lent for minutes."""


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    budget: float = 60,
    least: int = 3,
    most: int = 50,
    warm: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each run in each turn; every turn begins with another run, since the first of a turn may pay more.

    Args:
        runs: what to time.
        budget: seconds after which no turn begins, once `least` are done.
        least: turns at least.
        most: turns at most.
        warm: untimed calls of each run at first.
        wait: returns once the device has done its work.
    """
    for run in runs.values():
        for _ in range(warm):
            run()
    wait()
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - began > SHARE * budget:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            runs[name]()
            wait()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(of: Sequence[float], to: Sequence[float]) -> Ratio:
    """How many times as long as `to` did `of` take, turn by turn?"""
    return spread([a / b for a, b in zip(of, to, strict=True)])


def spread(values: Sequence[float]) -> Ratio:
    """Median and quartiles of some values."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "low": low, "high": high, "pairs": len(values)}


def scaled(value: Ratio, by: float) -> Ratio:
    """The spread of values that are each `by` times as large."""
    return {key: number if key == "pairs" else number * by for key, number in value.items()}


def shown(value: Any, digits: int = 3) -> str:
    """A spread as `1.93 (1.90 to 1.97)`, a number, or a dash for what was not measured."""
    if value is None:
        return "-"
    if not isinstance(value, dict):
        return number(value, digits)
    middle = number(value["median"], digits)
    if value.get("pairs") == 1:
        return middle
    return f"{middle} ({number(value['low'], digits)} to {number(value['high'], digits)})"


def number(value: float, digits: int = 3) -> str:
    """With so many significant digits, but whole numbers in full."""
    if not value or abs(value) < 1e-3:
        return f"{value:.{digits}g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, decimals)}f}"
