"""The exchange protocol on a network in memory and in virtual time: what holds whatever the network does."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_lora.engines.mesh.outcome import Limits
from mesh.audit import accounts_agree, audit
from mesh.world import World

GRAPHS = {
    "pair": [(0, 1)],
    "line of 3": [(0, 1), (1, 2)],
    "triangle": [(0, 1), (1, 2), (0, 2)],
    "ring of 4": [(0, 1), (1, 2), (2, 3), (0, 3)],
    "complete of 4": list(itertools.combinations(range(4), 2)),
    "line of 5": [(0, 1), (1, 2), (2, 3), (3, 4)],
    "ring of 5": [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)],
    "complete of 5": list(itertools.combinations(range(5), 2)),
}


def size(edges):
    return 1 + max(max(edge) for edge in edges)


SQUARE = [(0, 1), (2, 3), (0, 2), (1, 3)]


def hypercube(exchange):
    """One-peer exchanges over the square: in each, every agent talks to one neighbour."""
    return SQUARE[:2] if exchange % 2 else SQUARE[2:]


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("graph", GRAPHS)
def test_without_faults_every_edge_is_used_in_every_exchange(graph, hops):
    edges = GRAPHS[graph]
    world = World(size(edges), edges, 12, hops=hops, duplicates=0.1).run()
    counts = audit(world)
    assert counts["uses"] == 2 * len(edges) * 12
    assert counts["whole matrices"] == 12
    assert {n.ended for n in world.nodes} == {"done"}
    accounts_agree(world, calm=True)


@pytest.mark.parametrize("seed", range(5))
def test_without_faults_a_schedule_loses_no_exchange_whoever_is_slow(seed):
    world = World(4, SQUARE, 12, schedule=hypercube, seed=seed, steps=(0.1, 10.0)).run()
    assert audit(world)["uses"] == 4 * 12
    accounts_agree(world, calm=True)


def test_a_slow_agent_is_waited_for():
    world = World(4, GRAPHS["ring of 4"], 10)
    world.slow[2] = 7.5
    assert audit(world.run())["uses"] == 2 * 4 * 10


faults = st.lists(
    st.one_of(
        st.tuples(st.just("break"), st.floats(0, 20), st.integers(0, 9), st.sampled_from([0, 2, 10, 30])),
        st.tuples(st.just("stall"), st.floats(0, 20), st.integers(0, 9), st.sampled_from([1, 5, 14, 20, 40])),
        st.tuples(st.just("crash"), st.floats(0, 20), st.integers(0, 9), st.sampled_from([0.5, 5, 20])),
    ),
    max_size=8,
)


def disturbed(world, edges, plan, lag):
    """`world` with faults at their times: (kind, time, which, seconds)."""
    for kind, time, which, seconds in plan:
        edge, agent = edges[which % len(edges)], which % world.num_agents
        act = {
            "break": lambda e=edge, s=seconds, w=which: world.break_(e, s, lost=w % 2 == 0),
            "stall": lambda a=agent, s=seconds: world.stall(a, s),
            "crash": lambda a=agent, s=seconds: world.crash(a, s, lag),
        }[kind]
        world.at(time, None, act)
    return world


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(GRAPHS)),
    faults,
    st.integers(0, 10**6),
    st.sampled_from([1, 1, 2]),
    st.sampled_from([(0.01, 0.1), (0.01, 0.5), (0.1, 2.0)]),
    st.sampled_from([1.0, 3.0, 20.0]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0, 1]),
)
def test_whatever_happens_no_run_hangs_and_edges_are_used_at_both_ends(
    graph, plan, seed, hops, delay, patience, duplicates, lag
):
    """Also with a patience below the delays. One-sided use only where the protocol cannot avoid it (`audit`)."""
    edges = GRAPHS[graph]
    limits = Limits(patience=patience, give_up=5000.0, linger=500.0)
    world = World(size(edges), edges, 30, hops=hops, seed=seed, delay=delay, limits=limits, duplicates=duplicates)
    disturbed(world, edges, plan, lag).run(until=20_000)
    audit(world)
    accounts_agree(world, calm=False)
    assert {n.ended for n in world.nodes} == {"done"}


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(GRAPHS)), faults, st.integers(0, 10**6), st.sampled_from([0, 1]))
def test_after_calm_all_accounts_agree_and_the_corrections_add_up_to_zero(graph, plan, seed, lag):
    edges = GRAPHS[graph]
    world = World(size(edges), edges, 90, seed=seed)
    disturbed(world, edges, plan, lag).run(until=20_000)
    counts = audit(world)
    assert counts["whole matrices"] > 20
    accounts_agree(world, calm=True)


@settings(max_examples=25, deadline=None)
@given(faults, st.integers(0, 10**6), st.sampled_from([3.0, 20.0]), st.sampled_from([0, 1]))
def test_a_schedule_of_graphs_bears_faults_too(plan, seed, patience, lag):
    limits = Limits(patience=patience, give_up=5000.0, linger=500.0)
    world = World(4, SQUARE, 40, schedule=hypercube, seed=seed, limits=limits)
    disturbed(world, SQUARE, plan, lag).run(until=20_000)
    audit(world)
    accounts_agree(world, calm=False)
    assert {n.ended for n in world.nodes} == {"done"}


def test_a_run_without_crashes_counts_its_one_sided_uses():
    """Breaks alone, many of them: one-sided use happens, and only by giving up with the message in hand."""
    one_sided = uses = 0
    for seed in range(12):
        edges = GRAPHS["ring of 4"]
        limits = Limits(patience=1.0, give_up=5000.0, linger=500.0)
        world = World(4, edges, 40, seed=seed, limits=limits, steps=(0.1, 0.3))
        plan = [("break", 0.5 * k, world.rng.randrange(10), 2) for k in range(30)]
        disturbed(world, edges, plan, 0).run(until=20_000)
        counts = audit(world)
        one_sided, uses = one_sided + counts["one-sided"], uses + counts["uses"]
        accounts_agree(world, calm=False)
    assert 0 < one_sided < 0.02 * uses


def test_an_agent_that_stops_for_good_costs_twice_the_patience_in_all_and_the_others_finish():
    edges = GRAPHS["ring of 4"]
    world = World(4, edges, 30, limits=Limits(patience=20.0, give_up=5000.0, linger=100.0))
    world.run(stop=lambda: world.now > 5)
    world.stall(3, 10.0**6)
    world.at(5000, None, lambda: setattr(world.nodes[3], "ended", "stopped"))
    world.run(until=6000)
    assert [n.ended for n in world.nodes] == ["done"] * 3 + ["stopped"]
    assert {c.agent for c in world.closings if c.exchange == 30} == {0, 1, 2}
    for agent in (0, 2):
        waits = [c.outcome.waited.get(3, 0.0) for c in world.closings if c.agent == agent]
        assert 15 < sum(w for w in waits if w > 1.5) < 2 * 20  # those of rounds as usual left out
