"""Successive halving as a pure function: against landscapes whose best point is known, and by its own rules."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_lora.tune.halving import LOST, Plan, open_ends, rungs, standing

RATE = "training.learning_rate"


def searched(plan, score, valid=lambda point: True):
    """The end of a search, and the (trial, rung) pairs in the order in which they were wanted."""
    scores, order = {}, []
    while (now := standing(plan, scores, valid)).wanted:
        for trial, rung in now.wanted:
            assert (trial, rung) not in scores
            assert rung == 0 or (trial, rung - 1) in scores  # nobody skips a rung
            scores[trial, rung] = score(now.points[trial], rung)
            order.append((trial, rung))
    return now, scores, order


@given(st.integers(1, 500), st.integers(1, 100), st.integers(2, 5), st.floats(0.05, 1))
def test_rungs(rounds, trials, keep, share):
    found = rungs(rounds, trials, keep, share=share)
    assert list(found) == sorted(set(found))
    assert found[-1] <= rounds
    assert found[-1] == rounds or share < 1
    assert all(round_ % found[0] == 0 for round_ in found if round_ != rounds)  # so that all of them are evaluated
    assert keep ** (len(found) - 1) <= trials


def test_rungs_by_hand():
    assert rungs(30, 3) == (10, 30)
    assert rungs(30, 9) == (3, 9, 30)
    assert rungs(30, 9, keep=2) == (3, 6, 12, 30)
    assert rungs(30, 9, count=1) == (30,)
    assert rungs(30, 5, share=1 / 3) == (3, 9)
    assert rungs(1, 9) == (1,)
    assert rungs(2, 3) == (1, 2)


AXES = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.lists(st.integers(1, 60), min_size=2, max_size=4, unique=True).map(tuple),
    min_size=1,
    max_size=2,
)


@settings(max_examples=60)
@given(AXES, st.integers(1, 3), st.integers(2, 4), st.integers(0, 3), st.randoms(use_true_random=False), st.data())
def test_a_search_by_its_own_rules(axes, count, keep, extensions, random, data):
    plan = Plan(axes, rungs(40, 9, keep, count), keep, extensions)
    table = {}

    def score(point, rung):
        drawn = (random.random(), random.random()) if random.random() > 0.2 else LOST
        return table.setdefault((tuple(point.values()), rung), drawn)

    now, scores, order = searched(plan, score)
    last = len(plan.rungs) - 1
    ends = {trial: merit for (trial, rung), merit in scores.items() if rung == last and merit != LOST}
    assert (now.best is None) == (not ends)
    if ends:
        assert ends[now.best] == max(ends.values())
    product = math.prod(map(len, axes.values()))
    alive = product
    for rung in range(len(plan.rungs)):
        assert sum(r == rung for trial, r in order if trial < product) == alive  # those that went on, and no other
        fine = sum(scores[t, r] != LOST for t, r in order if r == rung and t < product)
        alive = min(math.ceil(alive / keep), fine)
        if not alive:
            break
    for field, first in axes.items():
        assert len({p[field] for p in now.points}) <= len(first) + extensions
    # Stopped anywhere, a search goes on with what is left to do, in the same order.
    part = order[: data.draw(st.integers(0, len(order)))]
    again = standing(plan, {key: scores[key] for key in part})
    assert set(again.wanted) == set(order[len(part) : len(part) + len(again.wanted)])


@pytest.mark.parametrize("optimum", [1e-5, 1e-4, 2e-3, 3e-3, 1e-2, 5e-2, 1e-1])
@pytest.mark.parametrize("values", [(1e-3, 3e-3, 1e-2), (1e-2, 3e-3, 1e-3), (1e-3, 1e-2)])
def test_a_range_grows_towards_an_optimum_outside(optimum, values):
    plan = Plan({RATE: values}, (10, 30), extensions=20)
    now, *_ = searched(plan, lambda point, rung: (-abs(math.log(point[RATE] / optimum)), 0.0))
    tried = sorted(point[RATE] for point in now.points)
    best = now.points[now.best][RATE]
    assert best == min(tried, key=lambda rate: abs(math.log(rate / optimum)))
    assert tried[0] < best < tried[-1]
    assert not open_ends(plan, now)
    ratios = [b / a for a, b in itertools.pairwise(tried)]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.15)  # 1, 3, 10 are steps of about 3.16


def test_an_extension_that_is_behind_is_given_up_at_once():
    plan = Plan({RATE: (1e-3, 1e-2)}, (10, 30))
    now, _, order = searched(plan, lambda point, rung: (-abs(math.log(point[RATE] / 1e-2)), 0.0))
    assert now.points[now.best] == {RATE: 1e-2}
    assert [key for key in order if key[0] >= 2] == [(2, 0)]
    assert now.points[2] == {RATE: 0.1}


def test_extensions_end_and_say_so():
    plan = Plan({RATE: (1e-3, 1e-2)}, (10,), extensions=2)
    now, *_ = searched(plan, lambda point, rung: (point[RATE], 0.0))
    assert [point[RATE] for point in now.points] == [1e-3, 1e-2, 0.1, 1.0]
    assert open_ends(plan, now) == [RATE]
    assert open_ends(plan, now, lambda point: point[RATE] < 5) == []


def test_axes_that_do_not_grow():
    """Words, and numbers with a zero, have no next value; a rank of 1 has none below; a refused value is not tried."""
    plan = Plan({"graph": ("ring", "line"), "training.weight_decay": (0.0, 0.1), "lora.r": (1, 2)}, (10,))
    now, *_ = searched(plan, lambda point, rung: (-point["lora.r"] - point["training.weight_decay"], 0.0))
    assert len(now.points) == 8
    assert now.points[now.best] == {"graph": "ring", "training.weight_decay": 0.0, "lora.r": 1}
    plan = Plan({"lora.r": (4, 8)}, (10,))
    now, *_ = searched(plan, lambda point, rung: (point["lora.r"], 0.0), valid=lambda point: point["lora.r"] <= 20)
    assert [point["lora.r"] for point in now.points] == [4, 8, 16]


def test_equal_scores_are_decided_by_the_second_number_then_by_order():
    plan = Plan({"graph": ("ring", "line", "star")}, (10,))
    assert searched(plan, lambda point, rung: (0.5, float(point["graph"] == "line")))[0].best == 1
    assert searched(plan, lambda point, rung: (0.5, 0.0))[0].best == 0


def test_what_has_diverged_loses_and_does_not_end_the_search():
    plan = Plan({RATE: (1e-3, 1e-2, 1e-1)}, (10, 30))
    now, *_ = searched(plan, lambda point, rung: LOST if point[RATE] > 1e-2 else (point[RATE], 0.0))
    assert now.points[now.best][RATE] == 1e-2
    now, _, order = searched(plan, lambda point, rung: LOST)
    assert (now.best, now.wanted) == (None, ())
    assert order == [(0, 0), (1, 0), (2, 0)]
    now, *_ = searched(plan, lambda point, rung: LOST if rung else (point[RATE], 0.0))
    assert now.best is None
