"""Which method leads, and by more than noise: tables, LaTeX and words against scipy on the same numbers."""

import csv
import io
from dataclasses import replace

import pytest
from scipy import stats

from decaf_lora import records
from decaf_lora.records import SummaryRow

# Score of each method under seeds 0 to 4.
CLEAR = {"a": (0.90, 0.91, 0.89, 0.90, 0.92), "b": (0.50, 0.52, 0.49, 0.50, 0.51), "c": (0.40, 0.43, 0.39, 0.42, 0.40)}
CLOSE = {"a": (0.90, 0.91, 0.89, 0.90, 0.92), "b": (0.91, 0.90, 0.90, 0.88, 0.91), "c": (0.40, 0.43, 0.39, 0.42, 0.40)}


def rows(scores, graph="ring", **more) -> list[SummaryRow]:
    return [
        SummaryRow(name, graph, "iid", seed, score, score, 0.0, score, 1.0, 1.0, **more)
        for name, of in scores.items()
        for seed, score in enumerate(of)
    ]


def test_one_that_is_better_by_more_than_noise_is_bold() -> None:
    assert records.winners(rows(CLEAR)) == {("a", "ring", "iid", metric) for metric in records.RANKED}
    text = records.to_latex(rows(CLEAR))
    assert r"a & ring & iid & 5 & \textbf{0.904 $\pm$ 0.011} & \textbf{0.904 $\pm$ 0.011} & 0.000" in text
    assert text.count(r"\textbf") == 3
    assert records.verdicts(rows(CLEAR)) == ["best mean score (ring, iid): a, by more than the noise of the seeds."]


def test_none_is_bold_where_the_lead_is_noise() -> None:
    assert records.winners(rows(CLOSE)) == set()
    assert r"\textbf" not in records.to_latex(rows(CLOSE))
    [line] = records.verdicts(rows(CLOSE))
    assert line == "no single best mean score (ring, iid): a leads, within noise of it: b."


def test_of_a_loss_the_lowest_leads() -> None:
    assert {name for name, *_ in records.winners(rows(CLEAR, lower_is_better=True))} == {"c"}


def test_differences_are_those_of_scipy() -> None:
    lines = list(csv.DictReader(io.StringIO(records.tables(rows(CLOSE))["differences.csv"])))
    found = {line["algorithm"]: line for line in lines if line["score"] == "mean score"}
    assert set(found) == {"b", "c"}
    p_values = {}
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        p_values[one, other] = stats.ttest_rel(CLOSE[one], CLOSE[other]).pvalue
    for name in ("b", "c"):
        test = stats.ttest_rel(CLOSE[name], CLOSE["a"])
        low, high = test.confidence_interval(0.95)
        assert (found[name]["95 % from"], found[name]["95 % to"]) == (f"{low:+.3f}", f"{high:+.3f}")
        mean = sum(CLOSE[name]) / 5 - sum(CLOSE["a"]) / 5
        assert found[name]["difference"] == f"{mean:+.3f}"
        assert found[name]["against"] == "a"
    assert p_values["a", "b"] == max(p_values.values())  # so Holm leaves it as it is
    assert found["b"]["p (Holm)"] == f"{p_values['a', 'b']:.3f}"
    assert [found[name]["verdict"] for name in ("b", "c")] == ["within noise", "differs"]


@pytest.mark.parametrize(("count", "said"), [(1, "One seed: "), (2, "2 seeds: "), (3, "3 seeds: "), (5, None)])
def test_too_few_seeds_are_said_once(count, said) -> None:
    few = {name: of[:count] for name, of in CLOSE.items()}
    lines = records.verdicts([*rows(few), *rows(few, graph="complete")])
    warnings = [line for line in lines if "seed: " in line or "seeds: " in line]
    assert [line.startswith(str(said)) for line in warnings] == ([True] if said else [])


def test_with_one_seed_nothing_is_bold() -> None:
    one = rows({name: of[:1] for name, of in CLEAR.items()})
    assert records.winners(one) == set()
    assert {line[-1] for line in records.differences(one)} == {"within noise"}


def test_pooled_data_and_runs_without_a_score_take_no_part() -> None:
    better = {**CLEAR, "centralized": (0.99,) * 5}
    assert {name for name, *_ in records.winners(rows(better))} == {"a"}
    diverged = [replace(r, mean_score=None) if (r.algorithm, r.seed) == ("a", 2) else r for r in rows(CLEAR)]
    leader = records.standing(diverged)
    assert leader is not None
    assert leader.name == "b"


def test_one_method_has_nothing_to_be_compared_with() -> None:
    only = rows({"a": CLEAR["a"]})
    assert (records.standing(only), records.verdicts(only), records.differences(only)) == (None, [], [])


def test_settings_are_ranked_apart() -> None:
    both = [*rows(CLEAR), *rows(CLOSE, graph="complete")]
    assert {graph for _, graph, _, _ in records.winners(both)} == {"ring"}
    text = records.tables(both)["scores.tex"]
    assert r"a & \textbf{0.904 $\pm$ 0.011} & 0.904 $\pm$ 0.011 \\" in text


def test_names_are_escaped_in_latex() -> None:
    text = records.tables(rows({"a_b": CLEAR["a"], "c&d": CLEAR["b"]}))["differences.tex"]
    assert r"mean score & ring & iid & c\&d & a\_b & 5 & -0.400 &" in text
    assert r"95 \% from" in text
    assert r"$<$ 0.001 & differs \\" in text
