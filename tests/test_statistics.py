"""Paired differences over seeds: against scipy's own tests and Holm's published example."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from decaf_lora.statistics import ALPHA, all_pairs, best, holm, paired

SCORES = st.dictionaries(st.integers(0, 9), st.floats(0, 1), min_size=2, max_size=8)


def test_a_difference_is_scipys_paired_test() -> None:
    ours, theirs = {0: 0.81, 1: 0.79, 2: 0.90, 7: 0.85}, {1: 0.70, 0: 0.75, 2: 0.88, 9: 0.1}
    difference = paired(ours, theirs)
    assert difference is not None
    expected = stats.ttest_rel([0.81, 0.79, 0.90], [0.75, 0.70, 0.88])
    assert difference.seeds == 3
    assert difference.mean == pytest.approx((0.06 + 0.09 + 0.02) / 3)
    assert difference.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(1 - ALPHA)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))


@given(SCORES, SCORES)
def test_the_difference_turns_its_sign_with_the_order(ours: dict[int, float], theirs: dict[int, float]) -> None:
    there, back = paired(ours, theirs), paired(theirs, ours)
    if there is None or back is None:
        assert there is back is None
        assert not set(ours) & set(theirs)
        return
    assert back.mean == pytest.approx(-there.mean)
    assert (back.p is None) == (there.p is None) == (there.seeds == 1)
    if there.p is not None:
        assert back.p == pytest.approx(there.p)
        # The interval holds 0 exactly where an uncorrected test would call it noise.
        assert there.low <= there.mean <= there.high
        if abs(there.p - ALPHA) > 1e-6:
            assert (there.low <= 0 <= there.high) == there.is_noise


def test_one_seed_claims_nothing() -> None:
    difference = paired({0: 0.9}, {0: 0.1})
    assert difference is not None
    assert (difference.low, difference.high, difference.p) == (None, None, None)
    assert difference.is_noise
    assert paired({0: 0.9}, {1: 0.1}) is None
    assert paired({0: math.nan}, {0: 0.1}) is None


def test_equal_scores_are_noise_and_a_constant_lead_is_not() -> None:
    assert paired({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6}).is_noise
    assert not paired({0: 0.75, 1: 0.5}, {0: 0.5, 1: 0.25}).is_noise


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_order_and_never_lowers(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, corrected, strict=True))
    assert all(q <= len(p_values) * p or q == 1 or q >= p for p, q in zip(p_values, corrected, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.asarray(corrected)[order]) >= 0).all() if corrected else True


def test_the_best_is_named_alone_only_where_it_is() -> None:
    rng = np.random.default_rng(0)
    noise = {s: float(rng.normal(0, 0.01)) for s in range(8)}
    scores = {
        "far": {s: 0.5 - e for s, e in noise.items()},
        "near": {s: 0.899 + e + (0.01 if s % 2 else -0.01) for s, e in noise.items()},
        "lead": {s: 0.9 + e for s, e in noise.items()},
    }
    found = best(scores)
    assert found is not None
    assert (found.name, found.within_noise, found.is_alone, found.warning) == ("lead", ("near",), False, None)
    assert found.differences["far"].mean == pytest.approx(-0.4, abs=0.02)
    assert found.differences["far"].low <= found.differences["far"].mean <= found.differences["far"].high
    alone = best({name: scores[name] for name in ("far", "lead")})
    assert alone.is_alone
    lower = best(scores, lower_is_better=True)
    assert (lower.name, lower.is_alone) == ("far", True)


def test_all_pairs_are_corrected_together() -> None:
    scores = {name: {s: k * 0.1 + 0.01 * ((s * (k + 2)) % 3) for s in range(4)} for k, name in enumerate("abc")}
    pairs = all_pairs(scores)
    raw = {names: paired(scores[names[0]], scores[names[1]]).p for names in pairs}
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [pairs[n].p for n in pairs] == pytest.approx(holm(list(raw.values())))


def test_few_seeds_are_said() -> None:
    two = {"a": {0: 0.1, 1: 0.2}, "b": {0: 0.3, 1: 0.5}}
    assert best(two).warning.startswith("2 seeds: only large differences")
    assert best({"a": {0: 0.1}, "b": {0: 0.3}}).warning.startswith("One seed:")
    assert best({"a": {0: 0.1}}).warning is None
    assert best({"a": {0: 0.1}}).is_alone is False
    assert best({"a": {}}) is None
