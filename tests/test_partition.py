"""Partitions against their definition, over random labels."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_lora import partition
from decaf_lora.errors import UserError
from decaf_lora.partition import Partition, parse

quick = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**62)
label_lists = st.lists(st.integers(-3, 6), min_size=1, max_size=80)
FLOWERS = np.repeat(np.arange(102), 41)  # as many classes as Flowers102


def assert_deals(split: Partition, agents: int, examples) -> None:
    """Every one of `examples` is in exactly one of `agents` shards and none is empty."""
    assert len(split.shards) == agents
    assert sorted(np.concatenate(split.shards).tolist()) == sorted(np.asarray(examples).tolist())
    assert split.examples.tolist() == sorted(np.asarray(examples).tolist())
    for shard in split.shards:
        assert shard.dtype == np.int64
        assert not shard.flags.writeable
        assert shard.size > 0
        assert (np.diff(shard) > 0).all()
    assert split.sizes.tolist() == [shard.size for shard in split.shards]


def assert_equal(one: Partition, two: Partition) -> None:
    assert one.name == two.name
    assert [shard.tolist() for shard in one.shards] == [shard.tolist() for shard in two.shards]


# --- the rules ----------------------------------------------------------------------------------------------


@quick
@given(label_lists, st.integers(1, 12), seeds)
def test_iid_is_even_in_sizes_and_in_classes(labels, agents, seed):
    agents = min(agents, len(labels))
    split = partition.iid(labels, agents, seed)
    assert_deals(split, agents, range(len(labels)))
    assert_equal(split, partition.iid(labels, agents, seed))
    assert np.ptp(split.sizes) <= 1
    assert np.ptp(split.label_table(), axis=0).max() <= 1


@quick
@given(label_lists, st.integers(1, 12), st.floats(1e-3, 1e3), st.integers(1, 6), seeds)
def test_dirichlet_deals_everything_and_keeps_the_least_size(labels, agents, alpha, least, seed):
    agents = min(agents, len(labels))
    least = min(least, len(labels) // agents)
    split = partition.dirichlet(labels, agents, alpha, seed, least)
    assert_deals(split, agents, range(len(labels)))
    assert split.sizes.min() >= least
    assert_equal(split, partition.dirichlet(labels, agents, alpha, seed, least))


@quick
@given(label_lists, st.integers(1, 12), seeds)
def test_by_class_puts_class_c_on_agent_c_mod_n(labels, agents, seed):
    classes = sorted(set(labels))
    agents = min(agents, len(classes))
    split = partition.by_class(labels, agents)
    assert_deals(split, agents, range(len(labels)))
    for agent, shard in enumerate(split.shards):
        assert {classes.index(labels[example]) % agents for example in shard} == {agent}


@quick
@given(label_lists, st.integers(1, 12), st.integers(1, 10), seeds)
def test_shots_takes_so_many_of_every_class_in_all(labels, agents, shots, seed):
    shots = min(shots, min(labels.count(label) for label in labels))
    agents = min(agents, shots * len(set(labels)))
    split = partition.shots(labels, agents, shots, seed)
    chosen = partition.few_shot(labels, shots, seed)
    assert_deals(split, agents, chosen)
    assert set(split.label_table().sum(axis=0).tolist()) == {shots}
    assert np.ptp(split.sizes) <= 1
    assert_equal(split, partition.shots(labels, agents, shots, seed))


@quick
@given(label_lists, st.integers(1, 10), st.sampled_from(["iid", "dirichlet:0.1", "by-class"]), seeds)
def test_any_rule_splits_a_chosen_subset(labels, agents, rule, seed):
    shots = min(labels.count(label) for label in labels)
    agents = min(agents, len(set(labels)))
    split = parse(f"shots:{shots}/{rule}", labels, agents, seed)
    assert_deals(split, agents, partition.few_shot(labels, shots, seed))
    assert split.name == (f"shots:{shots}" if rule == "iid" else f"shots:{shots}/{rule}")


def test_the_paper_set_up_is_four_shots_an_agent():
    split = partition.shots(FLOWERS, 10, 40, seed=0)
    assert split.name == "shots:40"
    assert (split.label_table() == 4).all()
    assert split.label_table().shape == (10, 102)


@pytest.mark.parametrize("spec", ["iid", "shots:2", "dirichlet:0.5", "shots:2/dirichlet:0.5"])
def test_another_seed_is_another_partition(spec):
    labels = np.repeat(np.arange(5), 20)
    shards = [parse(spec, labels, 3, seed).shards[0].tolist() for seed in range(5)]
    assert len({tuple(shard) for shard in shards}) == 5


def test_scarce_classes_reach_every_agent():
    # Ten classes of three examples for ten agents: a deal in fixed order would always favour the same agents.
    labels = np.repeat(np.arange(10), 3)
    tables = np.array([partition.iid(labels, 10, seed).label_table() for seed in range(200)])
    np.testing.assert_allclose(tables.mean(axis=0), 0.3, atol=0.15)


def test_alpha_sets_the_skew():
    # The largest share of a class on one agent, averaged over classes: 1 for alpha 0, 1/N for infinity.
    def concentration(alpha):
        table = partition.dirichlet(FLOWERS, 10, alpha, 0).label_table()
        return (table.max(axis=0) / table.sum(axis=0)).mean()

    skew = [concentration(alpha) for alpha in (1e-6, 0.1, 1, 10, 1e6)]
    assert skew == sorted(skew, reverse=True)
    assert skew[0] == 1
    assert skew[-1] == pytest.approx(0.1, abs=0.025)


def test_dirichlet_proportions_have_the_variance_of_the_distribution():
    # Var of a share = (1/N)(1 - 1/N) / (N alpha + 1); large classes, so rounding does not matter.
    labels = np.repeat(np.arange(200), 500)
    for alpha in (0.1, 1.0):
        shares = partition.dirichlet(labels, 5, alpha, 3).label_table() / 500
        assert shares.var() == pytest.approx(0.2 * 0.8 / (5 * alpha + 1), rel=0.1)


def test_dirichlet_ends_when_no_draw_can_do():
    # One class wholly on one agent in every draw: only moving examples fills the other shards.
    split = partition.dirichlet(np.zeros(20), 5, 1e-6, 0, least=4)
    assert split.sizes.tolist() == [4] * 5
    assert partition.dirichlet(np.zeros(7), 7, 1e-6, 0).sizes.tolist() == [1] * 7
    for alpha in (1e-300, 1e300):
        assert_deals(partition.dirichlet(FLOWERS, 10, alpha, 0), 10, range(len(FLOWERS)))


def test_large_alpha_leaves_no_agent_out_of_small_classes():
    # Four examples a class for ten agents: rounding cumulated shares would starve the same agents each time.
    labels = np.repeat(np.arange(100), 4)
    sizes = partition.dirichlet(labels, 10, 1e6, 0).sizes
    assert sizes.min() > 20
    assert sizes.max() < 60


def test_few_shot_takes_what_there_is_when_allowed():
    labels = ["cat"] * 3 + ["dog"] * 9
    with pytest.raises(UserError, match=r"class 'cat' has 3 examples, fewer than 4 shots; use at most 3 shots"):
        partition.few_shot(labels, 4, 0)
    with pytest.raises(UserError, match="class 'cat' has 3 examples"):
        partition.shots(labels, 2, 4, 0)
    split = partition.shots(labels, 2, 4, 0, allow_fewer=True)
    assert split.label_table().sum(axis=0).tolist() == [3, 4]
    with pytest.raises(UserError, match="0 shots; take at least 1"):
        partition.few_shot(labels, 0, 0)


def test_up_to_takes_all_of_a_scarce_class_and_counts_such_classes():
    labels = ["cat"] * 3 + ["dog"] * 9 + ["owl"] * 4
    with pytest.warns(UserWarning, match=r"1 of 3 classes have fewer than 4 examples \(at least 3\)"):
        split = parse("up-to:4", labels, 2, 0)
    assert split.label_table().sum(axis=0).tolist() == [3, 4, 4]
    with warnings.catch_warnings(action="error"):
        enough = parse("up-to:3/by-class", labels, 3, 0)
    assert enough.name == "up-to:3/by-class"
    assert_equal(replace(enough, name="shots:3/by-class"), parse("shots:3/by-class", labels, 3, 0))


# --- the type -----------------------------------------------------------------------------------------------


def test_label_table_counts_by_hand():
    split = Partition(([3, 0], [1, 2, 4]), np.array(["b", "a", "b", "c", "a"]))
    assert split.shards[0].tolist() == [0, 3]
    assert split.classes.tolist() == ["a", "b", "c"]
    assert split.label_table().tolist() == [[0, 1, 1], [2, 1, 0]]
    assert split.label_table([0, 0, 0, 1, 1]).tolist() == [[1, 1], [2, 1]]
    assert split.sizes.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "there is no shard"),
        ([[0], []], "agent 1 holds no example"),
        ([[0, 1], [2, 1]], "agent 0 and agent 1 both hold example 1; shards must be disjoint"),
        ([[0], [2, 1, 2]], "agent 1 holds twice example 2"),
        ([[0], [7]], "agent 1 holds example 7; the examples are 0 to 3"),
        ([[-1, 0]], "agent 0 holds example -1"),
        ([[0.5]], "type float64; they must be"),
        ([[[0]]], r"shape \(1, 1\)"),
    ],
)
def test_bad_shards_are_refused(shards, message):
    with pytest.raises(UserError, match=message):
        Partition(tuple(shards), np.zeros(4))


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.1", "by-class", "shots:1"])
def test_bad_labels_and_agents_are_refused(spec):
    with pytest.raises(UserError, match=r"labels have shape \(2, 3\), not \(M,\)"):
        parse(spec, np.zeros((2, 3)), 1, 0)
    with pytest.raises(UserError, match="there are no labels"):
        parse(spec, [], 1, 0)
    with pytest.raises(UserError, match="partition: 10 agents but only 7 examples; use at most 7 agents"):
        parse(spec, np.arange(7), 10, 0)
    with pytest.raises(UserError, match="partition: 0 agents; use at least 1"):
        parse(spec, np.arange(7), 0, 0)


@pytest.mark.parametrize("agents", [1, 2, 3])
@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.1", "by-class", "shots:2"])
def test_few_agents(spec, agents):
    labels = [2, 5, 2, 9, 5, 9, 2]
    split = parse(spec, labels, agents, 0)
    assert_deals(split, agents, split.examples if spec == "shots:2" else range(7))


def test_dirichlet_refuses_what_cannot_be():
    for alpha in (0, -1, math.nan, math.inf):
        with pytest.raises(UserError, match=f"alpha is {alpha}; it must be above 0 and finite"):
            partition.dirichlet([0, 1], 2, alpha, 0)
    with pytest.raises(UserError, match="least is 0"):
        partition.dirichlet([0, 1], 2, 0.1, 0, least=0)
    with pytest.raises(UserError, match=r"3 agents .* 4 examples each need 12 but .* only 10; lower least to 3"):
        partition.dirichlet(np.zeros(10), 3, 0.1, 0, least=4)


def test_by_class_needs_a_class_for_every_agent():
    with pytest.raises(UserError, match="3 classes to 5 agents and leaves agent 3 without any; use at most 3"):
        partition.by_class([0, 0, 1, 1, 2, 2], 5)


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("iid", "iid"),
        (" IID ", "iid"),
        ("by_class", "by-class"),
        ("dirichlet:0.10", "dirichlet:0.1"),
        ("shots:4", "shots:4"),
        ("shots:4/iid", "shots:4"),
        ("shots:4/by_class", "shots:4/by-class"),
        ("Shots:4/Dirichlet:1", "shots:4/dirichlet:1"),
        ("up_to:4/by-class", "up-to:4/by-class"),
    ],
)
def test_names(spec, name):
    labels = np.repeat(np.arange(4), 6)
    split = parse(spec, labels, 3, 1)
    assert split.name == name
    assert_equal(parse(name, labels, 3, 1), split)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dirichle", r"partition: 'dirichle' is not known\. Did you mean 'dirichlet'\?"),
        ("shots:4/nothing", "'nothing' is not known.*by-class.*iid"),
        ("shots:4/", "is not known"),
        ("shots", "shots needs an argument, for example shots:40"),
        ("shots:4.5", "shots:4.5 is not readable; write it as shots:40"),
        ("dirichlet", "dirichlet needs an argument, for example dirichlet:0.1"),
        ("shots:4/dirichlet:x", "dirichlet:x is not readable"),
        ("iid:3", "iid takes no argument; write iid instead of iid:3"),
        ("by-class:2", "by-class takes no argument"),
        ("shots:4/shots:2", "chooses shots twice; write it as shots:4"),
        ("up-to:4/shots:2", "chooses shots twice; write it as up-to:4"),
        ("up-to", "up-to needs an argument, for example up-to:40"),
        ("iid/by-class", "only shots can come before the slash"),
        ("shots:9", "class 0 has 6 examples, fewer than 9 shots"),
        ("dirichlet:0", "alpha is 0; it must be above 0"),
    ],
)
def test_names_that_do_not_work(spec, message):
    with pytest.raises(UserError, match=message):
        parse(spec, np.repeat(np.arange(4), 6), 3, 1)


# --- what somebody else says --------------------------------------------------------------------------------


@quick
@given(label_lists, st.data())
def test_every_value_is_an_agent_and_called_by_it(labels, data):
    values = data.draw(st.lists(st.sampled_from("cab"), min_size=len(labels), max_size=len(labels)))
    split = partition.by_value(labels, values)
    assert split.names == tuple(sorted(set(values)))
    assert_deals(split, len(set(values)), range(len(labels)))
    for name, shard in zip(split.names, split.shards, strict=True):
        assert [i for i, value in enumerate(values) if value == name] == shard.tolist()


def test_numbers_are_agents_in_their_order():
    assert partition.by_value(np.zeros(4), [10, 9, 10, 9]).names == ("9", "10")
    assert partition.by_value(np.zeros(4), ["10", "9", "10", "9"]).names == ("9", "10")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", "", "b", "a"], r"1 of 4 examples have nothing in by-value \(first: example 1\)"),
        ([1.0, math.nan, 2.0, math.nan], r"2 of 4 examples have nothing in by-value \(first: example 1\)"),
        (np.array(["a", None, "b", "a"], object), "1 of 4 examples have nothing"),
        (["a", "b"], "by-value has 2 values for 4 examples"),
    ],
)
def test_values_that_make_no_split(values, message):
    with pytest.raises(UserError, match=message):
        partition.by_value([0, 1, 0, 1], values)


SITES = {"hospital": ["kings", "charite", "kings", "mayo"], "ward": [1, 1, 1, 1]}
LABELS = [0, 1, 1, 0]


def column(name, split="train"):
    return SITES[name] if split == "train" else np.array(["mayo", "ucl", "kings", "mayo"])


def test_a_column_splits():
    split = parse("column:hospital", LABELS, 3, 0, column)
    assert split.name == "column:hospital"
    assert split.names == ("charite", "kings", "mayo")
    assert [shard.tolist() for shard in split.shards] == [[1], [0, 2], [3]]
    assert [test.tolist() for test in split.tests] == [[], [2], [0, 3]]  # nobody learns at ucl
    with pytest.raises(UserError, match=r"hospital has 3 agents \(charite, kings, mayo\) but the run has 10"):
        parse("column:hospital", LABELS, 10, 0, column)
    with pytest.raises(UserError, match=r"this task has no columns, so none called 'hospital'"):
        parse("column:hospital", LABELS, 3, 0)
    with pytest.raises(UserError, match=r"agent (charite|kings|mayo) holds no example"):
        parse("shots:1/column:hospital", LABELS, 3, 2, column)


@pytest.mark.parametrize("seed", range(4))
def test_shots_choose_before_a_column_splits(seed):
    labels, sites = np.tile([0, 1], 20), {"site": np.repeat(["a", "b"], 20)}
    split = parse("shots:15/column:site", labels, 2, seed, lambda name, split="train": sites[name])
    assert split.name == "shots:15/column:site"
    np.testing.assert_array_equal(split.examples, partition.few_shot(labels, 15, seed))
    assert (split.shards[0] < 20).all()
    assert (split.shards[1] >= 20).all()


def test_indices_of_a_file(tmp_path):
    (tmp_path / "sites.json").write_text('{"zoe": [3, 0], "adam": [1]}')
    split = parse(f"indices:{tmp_path}/sites.json", LABELS, 2, 0)
    assert split.names == ("zoe", "adam")
    assert [shard.tolist() for shard in split.shards] == [[0, 3], [1]]
    (tmp_path / "plain.json").write_text("[[3, 0], [1]]")
    assert parse(f"indices:{tmp_path}/plain.json", LABELS, 2, 0).names == ()
    np.savez(tmp_path / "sites.npz", zoe=[3, 0], adam=[1])
    assert_equal(
        parse(f"indices:{tmp_path}/sites.npz", LABELS, 2, 0), replace(split, name=f"indices:{tmp_path}/sites.npz")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0], [4]]", "agent 1 holds example 4; the examples are 0 to 3"),
        ('{"a": [0], "b": [0]}', "agent a and agent b both hold example 0"),
        ('{"a": [0], "b": []}', "agent b holds no example"),
        ("[[0], [1], [2]]", "has 3 agents but the run has 2; use 3 agents"),
        ("[[0], [1.5]]", "indices have shape .* must be"),
        ('[[0], ["x"]]', "must be .n,. integers"),
        ("[0, 1]", "must be .n,. integers"),
        ("3", "must hold"),
        ("{", "cannot be read"),
    ],
)
def test_indices_that_make_no_split(tmp_path, content, message):
    (tmp_path / "sites.json").write_text(content)
    with pytest.raises(UserError, match=message):
        parse(f"indices:{tmp_path}/sites.json", LABELS, 2, 0)
    with pytest.raises(UserError, match="there is no file"):
        parse(f"indices:{tmp_path}/nowhere.json", LABELS, 2, 0)


class Halves:
    num_partitions = 2

    def load_partition(self, agent):
        return [2 * agent, 2 * agent + 1]


def test_anything_that_gives_the_rows_of_an_agent_is_a_partition():
    split = partition.as_partition(Halves(), LABELS, 2)
    assert [shard.tolist() for shard in split.shards] == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match="has 2 agents but the run has 3"):
        partition.as_partition(Halves(), LABELS, 3)
    with pytest.raises(UserError, match="custom is int; give a mapping"):
        partition.as_partition(3, LABELS, 2)

    class Rows:
        def load_partition(self, agent):
            return [{"text": "a"}, {"text": "b"}]

    with pytest.raises(UserError, match=r"must be \(n,\) integers"):
        partition.as_partition(Rows(), LABELS, 2)


def test_a_function_of_ones_own_splits(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def by_hospital(column, name='hospital'):\n"
        "    values = column(name)\n"
        "    return {value: np.flatnonzero(values == value) for value in np.unique(values)}\n"
        "def drawn(labels, num_agents, seed):\n"
        "    order = np.random.default_rng(seed).permutation(len(labels))\n"
        "    return np.array_split(order, num_agents)\n"
    )
    split = parse(f"{tmp_path}/mine.py:by_hospital", LABELS, 3, 0, column)
    assert_equal(replace(split, name=""), replace(parse("column:hospital", LABELS, 3, 0, column), name=""))
    assert parse(f"{tmp_path}/mine.py:by_hospital:name=ward", LABELS, 1, 0, column).names == ("1",)
    assert_deals(parse(f"{tmp_path}/mine.py:drawn", LABELS, 2, 5), 2, range(4))
    few = parse(f"shots:1/{tmp_path}/mine.py:drawn", np.repeat([0, 1], 10), 1, 5)
    np.testing.assert_array_equal(few.examples, partition.few_shot(np.repeat([0, 1], 10), 1, 5))
