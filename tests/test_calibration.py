"""How many agents share a pass: chosen from times that are given, so that no test depends on a clock."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_lora import calibration

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def per_agent(start, each):
    """Seconds of a pass of k agents that costs `start` and `each` for every agent; and the sizes it was asked for."""
    asked = []

    def seconds(agents):
        asked.append(agents)
        return start + each * agents

    return seconds, asked


def test_sizes_are_bounded_by_agents_and_examples():
    assert calibration.sizes(1, 16, CPU) == [1]
    assert calibration.sizes(2, 16, CPU) == [1, 2]
    assert calibration.sizes(3, 16, CPU) == [1, 2, 3]
    assert calibration.sizes(1000, 16, CPU) == [1, 2, 5, 10, 20]
    assert calibration.sizes(1000, 16, GPU) == [1, 2, 5, 10, 20, 50, 100, 200, 500]
    assert calibration.sizes(1000, 4, GPU) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert calibration.sizes(5, 10_000, CPU) == [1]


@given(agents=st.integers(1, 3000), batch=st.integers(1, 3000))
def test_a_run_too_short_to_time_takes_what_fits(agents, batch):
    sizes = calibration.sizes(agents, batch, CPU)
    chosen = calibration.untimed(sizes, batch)
    assert chosen == 1 or chosen * batch <= calibration.UNTIMED
    assert all(size <= chosen or size * batch > calibration.UNTIMED for size in sizes)


@pytest.mark.parametrize(
    ("start", "each", "best"),
    [(1.0, 0.0, 50), (0.0, 1.0, 1), (1.0, 0.01, 50), (0.05, 1.0, 2), (1.0, 1.0, 50), (0.1, 1.0, 5)],
)
def test_the_largest_size_that_is_clearly_faster_wins(start, each, best):
    seconds, _ = per_agent(start, each)
    assert calibration.fastest([1, 2, 5, 10, 20, 50], seconds) == best


def test_larger_sizes_are_not_tried_once_two_are_no_faster():
    seconds, asked = per_agent(0.0, 1.0)
    calibration.fastest([1, 2, 5, 10, 20, 50], seconds)
    assert max(asked) == 5
    clear, asked = per_agent(1.0, 0.0)
    calibration.fastest([1, 2, 5], clear)
    assert len(asked) == 1 + 2 * (1 + 2 * calibration.FEWEST_PAIRS)  # it ends early where pairs agree


def test_one_size_that_is_no_faster_does_not_hide_a_better_one():
    times = {1: 1.0, 2: 2.0, 5: 2.0, 10: 3.0}
    assert calibration.fastest([1, 2, 5, 10], times.__getitem__) == 10


@given(seed=st.integers(0, 10**6), slow=st.floats(1.0, 20.0))
@settings(max_examples=50)
def test_a_machine_that_is_busy_now_and_then_does_not_mislead(seed, slow):
    """One pass in twenty takes up to 20 times as long, and the rest is noisy by 2 %."""
    draw = np.random.default_rng(seed)

    def seconds(agents):
        return (1.0 + 0.01 * agents) * draw.uniform(0.98, 1.02) * (slow if draw.random() < 0.05 else 1.0)

    chosen = calibration.fastest([1, 2, 5], seconds)
    assert chosen == 5


def test_a_drift_of_the_machine_favours_neither_size():
    now = iter(range(10**6))

    def seconds(agents):
        return agents * math.exp(0.01 * next(now))  # every size needs the same for an agent

    assert calibration.fastest([1, 2, 5, 10], seconds) == 1
