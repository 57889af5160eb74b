"""Graphs against networkx, closed forms and the definition of a doubly stochastic matrix."""

import functools
import itertools
import json
import math
import subprocess
import sys

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_lora import graphs
from decaf_lora.errors import UserError
from decaf_lora.graphs import Graph, Schedule, parse

THIRD = 1 / 3
# Which N a kind can take; all the others take any.
FITS = {
    "torus": lambda n: n == 1 or any(n % rows == 0 for rows in range(2, n)),
    "bipartite": lambda n: n >= 3,
    "complete-bipartite": lambda n: n >= 2,
    "hypercube": lambda n: n in (1, 2, 4, 8, 16),
    "random-regular:4": lambda n: n >= 5,
}
ALL_SPECS = [kind.example if kind.required else name for name, kind in graphs.KINDS.items()]
OVER_TIME = [
    "one-peer-exponential",
    "one-peer-hypercube",
    "base",
    "random-matching",
    "random-edges:0.2",
    "failing:0.1:ring",
]
SPECS = [spec for spec in ALL_SPECS if spec not in OVER_TIME]
quick = settings(max_examples=60, deadline=None)


@st.composite
def connected_graphs(draw):
    """A random tree on 1 to 12 nodes and any further edges."""
    n = draw(st.integers(1, 12))
    links = nx.empty_graph(n)
    links.add_edges_from((node, draw(st.integers(0, node - 1))) for node in range(1, n))
    pairs = list(itertools.combinations(range(n), 2))
    if pairs:
        links.add_edges_from(draw(st.lists(st.sampled_from(pairs), max_size=20)))
    return links


def assert_mixing(graph: Graph, links: nx.Graph) -> None:
    """Doubly stochastic, symmetric, on exactly the edges of `links`, and contracting."""
    W = graph.weights
    np.testing.assert_allclose(W.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(W.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(W, W.T)
    assert (W >= 0).all()
    adjacency = nx.to_numpy_array(links, sorted(links), weight=None) != 0
    np.fill_diagonal(adjacency, False)
    np.testing.assert_array_equal((W > 0) & ~np.eye(len(W), dtype=bool), adjacency)
    assert nx.is_connected(links)
    eigenvalues = np.sort(np.abs(np.linalg.eigvalsh(W)))
    if len(W) > 1:
        assert graph.sigma_2 == pytest.approx(eigenvalues[-2], abs=1e-9)
    assert graph.sigma_2 < 1


# --- weights ------------------------------------------------------------------------------------------------


@quick
@given(connected_graphs())
def test_metropolis_on_any_connected_graph(links):
    graph = graphs.from_networkx(links)
    assert_mixing(graph, links)
    for i, j in links.edges:
        assert graph.weights[i, j] == 1 / (1 + max(links.degree(i), links.degree(j)))


@quick
@given(st.sampled_from(SPECS), st.integers(1, 24), st.integers(0, 2**32))
def test_every_kind_is_a_mixing_matrix_or_says_what_fits(spec, n, seed):
    if not FITS.get(spec, lambda n: True)(n):
        with pytest.raises(UserError, match=rf"graph: {n} agents cannot .*use "):
            parse(spec, n, seed)
        return
    graph = parse(spec, n, seed)
    assert graph.num_agents == n
    assert_mixing(graph, nx.from_numpy_array(graph.weights))
    again = parse(graph.name, n, seed)  # the name of a graph is the spec that makes it
    np.testing.assert_array_equal(again.weights, graph.weights)
    assert again.name == graph.name


@pytest.mark.parametrize(
    ("graph", "links"),
    [
        (graphs.ring(7), nx.cycle_graph(7)),
        (graphs.complete(6), nx.complete_graph(6)),
        (graphs.star(5), nx.star_graph(4)),
        (graphs.line(6), nx.path_graph(6)),
        (graphs.torus(3, 4), nx.grid_2d_graph(3, 4, periodic=True)),
        (graphs.torus(2, 5), nx.circular_ladder_graph(5)),
        (graphs.torus(2, 2), nx.cycle_graph(4)),
        (graphs.torus(1, 5), nx.cycle_graph(5)),
        (graphs.torus(1, 2), nx.path_graph(2)),
        (graphs.bipartite_hubs(10, 2), nx.complete_bipartite_graph(8, 2)),
        (graphs.bipartite_hubs(7, 3), nx.complete_bipartite_graph(4, 3)),
        (graphs.complete_bipartite(3, 4), nx.complete_bipartite_graph(3, 4)),
        (graphs.hypercube(8), nx.hypercube_graph(3)),
    ],
    ids=lambda value: value.name if isinstance(value, Graph) else "",
)
def test_named_graphs_have_the_edges_of_networkx(graph, links):
    assert nx.is_isomorphic(nx.from_edgelist(graph.edges), links)
    assert graph.degrees.tolist() == [graph.degree(i) for i in range(graph.num_agents)]
    assert sorted(graph.degrees.tolist()) == sorted(degree for _, degree in links.degree)
    assert graph.messages_per_round == 2 * links.number_of_edges()


def test_the_smallest_graphs():
    for make in (graphs.ring, graphs.complete, graphs.star, graphs.line, graphs.hypercube):
        assert make(1).weights.tolist() == [[1.0]]
        assert make(1).sigma_2 == 0.0
        assert make(1).edges == []
        assert make(1).messages_per_round == 0
        assert make(2).weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]
        assert make(2).edges == [(0, 1)]
    assert graphs.ring(3).weights.tolist() == [[THIRD] * 3] * 3
    assert graphs.complete(3).weights.tolist() == [[THIRD] * 3] * 3
    np.testing.assert_allclose(graphs.line(3).weights, [[2 / 3, THIRD, 0], [THIRD] * 3, [0, THIRD, 2 / 3]])
    np.testing.assert_allclose(graphs.star(3).weights, [[THIRD] * 3, [THIRD, 2 / 3, 0], [THIRD, 0, 2 / 3]])
    assert graphs.bipartite_hubs(3, 2).edges == [(0, 1), (0, 2)]
    assert graphs.complete_bipartite(1, 1).edges == [(0, 1)]
    assert graphs.erdos_renyi(1, 0.5, 0).weights.tolist() == [[1.0]]
    assert graphs.random_regular(1, 0, 0).weights.tolist() == [[1.0]]
    assert graphs.random_regular(2, 1, 0).edges == [(0, 1)]
    assert graphs.torus(1, 1).weights.tolist() == [[1.0]]


@pytest.mark.parametrize("n", [4, 5, 7, 10, 16, 33])
def test_ring_has_the_published_weights_and_closed_form_gap(n):
    ring = graphs.ring(n)
    assert set(ring.weights.ravel().tolist()) == {0.0, THIRD}
    # A circulant matrix: its eigenvalues are the discrete Fourier transform of a row.
    assert ring.sigma_2 == pytest.approx(THIRD + 2 / 3 * math.cos(2 * math.pi / n), abs=1e-12)
    assert ring.spectral_gap == pytest.approx(2 / 3 * (1 - math.cos(2 * math.pi / n)), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 49])
def test_complete_averages_at_once_and_its_rows_are_equal_bit_by_bit(n):
    complete = graphs.complete(n)
    assert complete.sigma_2 == pytest.approx(0, abs=1e-12)
    assert (complete.weights == 1 / n).all()


def test_sigma_2_of_the_paper_set_up():
    # Closed forms of the spectral gap: a ring of 10 has 1/3 + 2/3 cos(2 pi / 10).
    assert graphs.ring(10).sigma_2 == pytest.approx(0.873, abs=5e-4)
    assert graphs.bipartite_hubs().sigma_2 == pytest.approx(0.78, abs=1e-12)
    assert graphs.complete_bipartite(5, 5).sigma_2 == pytest.approx(2 / 3, abs=1e-12)


def test_bipartite_hubs_has_the_published_weights():
    hubs = graphs.bipartite_hubs()
    leaf, hub = hubs.weights[0], hubs.weights[9]
    np.testing.assert_allclose(leaf, [0.78, 0, 0, 0, 0, 0, 0, 0, 0.11, 0.11], atol=1e-15)
    np.testing.assert_allclose(hub, [0.11] * 8 + [0, 0.12], atol=1e-15)


def test_sigma_2_bounds_the_contraction_of_disagreement():
    x = np.random.default_rng(0).normal(size=(10, 40))
    for spec in SPECS:
        if spec == "hypercube":
            continue
        graph = parse(spec, 10, 3)
        apart = np.linalg.norm(x - x.mean(axis=0))
        mixed = graph.weights @ x
        np.testing.assert_allclose(mixed.mean(axis=0), x.mean(axis=0))
        assert np.linalg.norm(mixed - x.mean(axis=0)) <= graph.sigma_2 * apart + 1e-12


def test_networkx_nodes_are_sorted_and_what_is_no_link_ignored():
    links = nx.Graph([("c", "b"), ("a", "b"), ("a", "a")])
    links["a"]["b"]["weight"] = 0.0  # an edge weight is not a mixing weight
    assert graphs.from_networkx(links).edges == [(0, 1), (1, 2)]
    mixed = nx.Graph([("x", 1), (1, 2.5)])  # does not sort: in the order added
    assert graphs.from_networkx(mixed).edges == [(0, 1), (1, 2)]
    doubled = nx.MultiGraph([(0, 1), (0, 1)])
    assert graphs.from_networkx(doubled).weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    with pytest.raises(UserError, match=r"directed; pass graph\.to_undirected"):
        graphs.from_networkx(nx.DiGraph([(0, 1)]))


def test_metropolis_refuses_a_one_sided_link():
    with pytest.raises(UserError, match="agent 0 is linked to agent 1 but 1 not to 0"):
        graphs.metropolis([[0, 1], [0, 0]])
    with pytest.raises(UserError, match=r"shape \(2, 3\)"):
        graphs.metropolis(np.zeros((2, 3)))


# --- random graphs ------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 30), st.floats(0.3, 1), st.integers(0, 2**62))
def test_erdos_renyi_is_a_function_of_its_seed(n, p, seed):
    one, two = graphs.erdos_renyi(n, p, seed), graphs.erdos_renyi(n, p, seed)
    np.testing.assert_array_equal(one.weights, two.weights)


def test_erdos_renyi_links_pairs_with_its_probability():
    pairs = [len(graphs.erdos_renyi(40, 0.4, seed).edges) / 780 for seed in range(20)]
    assert np.mean(pairs) == pytest.approx(0.4, abs=0.02)
    assert len(set(pairs)) > 5
    assert len(graphs.erdos_renyi(12, 1.0, 0).edges) == 66


@quick
@given(st.integers(1, 25), st.integers(0, 24), st.integers(0, 2**62))
def test_random_regular_is_regular_or_impossible(n, degree, seed):
    # A connected d-regular graph exists iff n d is even, d < n and (d >= 2, or one agent, or one pair).
    possible = n * degree % 2 == 0 and degree < n and (degree >= 2 or n <= degree + 1)
    if not possible:
        with pytest.raises(UserError, match=r"use at least|use a degree|must be even"):
            graphs.random_regular(n, degree, seed)
        return
    graph = graphs.random_regular(n, degree, seed)
    assert set(graph.degrees.tolist()) == {degree}
    assert_mixing(graph, nx.from_numpy_array(graph.weights))
    np.testing.assert_array_equal(graph.weights, graphs.random_regular(n, degree, seed).weights)


def test_random_graphs_that_cannot_be():
    with pytest.raises(UserError, match=r"none of 1000 draws .* 0\.01 connected all 40 agents; .* = 0\.092"):
        graphs.erdos_renyi(40, 0.01, 0)
    for p in (0, -0.1, 1.1, math.nan):
        with pytest.raises(UserError, match=r"edge probability is .*above 0 and at most 1"):
            graphs.erdos_renyi(5, p, 0)
    with pytest.raises(UserError, match=r"9 agents .*random-regular:3 .*even\); use 8 or 10 agents"):
        graphs.random_regular(9, 3, 0)
    with pytest.raises(UserError, match=r"5 agents cannot have 5 neighbours.*at most 4, or at least 6 agents"):
        graphs.random_regular(5, 5, 0)
    with pytest.raises(UserError, match="degree 1 cannot connect 4 agents; use at least 2"):
        graphs.random_regular(4, 1, 0)


# --- validation ---------------------------------------------------------------------------------------------


def bad_ring(row, column, value):
    weights = graphs.ring(5).weights.copy()
    weights[row, column] = value
    return weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones((2, 3)), r"graph: the weights have shape \(2, 3\), not \(N, N\)"),
        (np.ones(3), r"shape \(3,\)"),
        (np.zeros((0, 0)), "0 agents cannot form a graph; use at least 1"),
        (bad_ring(1, 2, math.nan), r"row 1, column 2 of the weights is nan; .* finite"),
        (bad_ring(4, 0, math.inf), r"row 4, column 0 of the weights is inf"),
        (bad_ring(2, 0, -0.1), r"row 2, column 0 of the weights is -0\.1; weights are 0 or more"),
        (
            np.eye(5) - np.diag([0, 0, 0, 0.1, 0]),
            r"row 3 of the weights sums to 0\.9, not 1; .*row 3, column 3\) by \+0\.1",
        ),
        (np.full((2, 2), 0.6), r"row 0 of the weights sums to 1\.2, not 1; .* by -0\.2"),
        ([[0.5, 0.5], [0.25, 0.75]], r"column 0 of the weights sums to 0\.75, not 1.*Graph\.server"),
        (
            [[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]],
            r"row 0, column 1 of the weights is 0\.5 but row 1, column 0 is 0; .*require_symmetric=False",
        ),
        (np.eye(2), "graph: agent 1 cannot be reached from agent 0; link them; pass connected=False"),
        (
            np.kron(np.eye(2), np.full((2, 2), 0.5)),
            "graph: agents 2, 3 cannot be reached from agent 0; link them",
        ),
        (np.eye(20), r"agents 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 9 more cannot be reached"),
        ([[0, 1], [1, 0]], "turns of 2 and the agents never agree; give at least one agent a weight"),
    ],
)
def test_a_bad_matrix_is_refused_by_name(weights, message):
    with pytest.raises(UserError, match=message):
        Graph(np.array(weights))


def test_directed_graphs_pass_when_allowed():
    cycle = (np.eye(4) + np.roll(np.eye(4), 1, axis=1)) / 2
    graph = Graph(cycle, require_symmetric=False)
    assert graph.neighbours(0) == [1]
    assert graph.neighbours(3) == [0]
    assert graph.edges == [(0, 1), (0, 3), (1, 2), (2, 3)]
    assert graph.messages_per_round == 4
    assert graph.sigma_2 == pytest.approx(math.cos(math.pi / 4))
    # Without weights on themselves three agents only pass their models round.
    with pytest.raises(UserError, match="turns of 3"):
        Graph(np.roll(np.eye(3), 1, axis=1), require_symmetric=False)


@quick
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**32))
def test_a_directed_matrix_is_accepted_iff_its_powers_average(n, terms, seed):
    # Any doubly stochastic matrix is a mean of permutations (Birkhoff, von Neumann).
    rng = np.random.default_rng(seed)
    weights = np.mean([np.eye(n)[rng.permutation(n)] for _ in range(terms)], axis=0)
    agrees = np.allclose(np.linalg.matrix_power(weights, 2**16), 1 / n, atol=1e-6)
    try:
        Graph(weights, require_symmetric=False)
    except UserError:
        assert not agrees
    else:
        assert agrees


def test_weights_are_a_read_only_copy():
    mine = np.full((2, 2), 0.5)
    graph = Graph(mine)
    mine[0, 0] = 7
    assert graph.weights[0, 0] == 0.5
    assert graph.weights.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        graph.weights[0, 0] = 1


def test_senders_are_the_row_in_ascending_order():
    hubs = graphs.bipartite_hubs()
    indices, weights = hubs.senders(0)
    assert indices.tolist() == [0, 8, 9]
    assert weights.tolist() == [hubs.weights[0, 0], 0.11, 0.11]
    assert hubs.neighbours(0) == [8, 9]
    assert hubs.neighbours(9) == list(range(8))
    no_self = Graph((np.ones((3, 3)) - np.eye(3)) / 2)
    assert no_self.senders(1)[0].tolist() == [0, 2]


def test_from_matrix_mends_rounding_and_nothing_else():
    for n in (2, 3, 4, 7, 10):
        single = graphs.ring(n).weights.astype(np.float32)
        mended = graphs.from_matrix(single)
        np.testing.assert_allclose(mended.weights, graphs.ring(n).weights, atol=2e-7)
        np.testing.assert_allclose(mended.weights.sum(axis=0), 1, atol=1e-15)
    # Rows that sum to more than 1 with nothing on the diagonal to take it from.
    without_self = ((np.ones((4, 4)) - np.eye(4)) / 3).astype(np.float32)
    assert (graphs.from_matrix(without_self).weights >= 0).all()
    exact = graphs.ring(5).weights
    np.testing.assert_array_equal(graphs.from_matrix(exact).weights, exact)
    with pytest.raises(UserError, match=r"row 0 of the weights sums to 0\.9999"):
        graphs.from_matrix(np.array([[0.4999, 0.5], [0.5, 0.4999]]))
    with pytest.raises(UserError, match="not a matrix of numbers"):
        graphs.from_matrix([[1.0], [0.5, 0.5]])


# --- the server ---------------------------------------------------------------------------------------------


def test_server_weighs_agents_by_their_examples():
    server = Graph.server([6, 0, 3])
    assert server.is_server
    assert not graphs.ring(3).is_server
    np.testing.assert_allclose(server.weights, [[2 / 3, 0, THIRD]] * 3)
    assert server.senders(1)[0].tolist() == [0, 2]
    assert server.sigma_2 == pytest.approx(0, abs=1e-12)
    assert server.messages_per_round == 6
    assert Graph.server([5]).weights.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([0, 0], "every count is 0; at least one agent must hold examples"),
        ([1, -2], "count of agent 1 is -2"),
        ([math.nan, 2], "count of agent 0 is nan"),
        ([], r"counts has shape \(0,\)"),
        ([[1, 2]], r"counts has shape \(1, 2\)"),
    ],
)
def test_server_refuses_bad_counts(counts, message):
    with pytest.raises(UserError, match=message):
        Graph.server(counts)


def test_server_rows_must_be_equal():
    with pytest.raises(UserError, match=r"row 1 of a server's weights differs from row 0.*Graph\.server"):
        Graph(np.array([[0.5, 0.5], [0.25, 0.75]]), is_server=True)


# --- schedules ----------------------------------------------------------------------------------------------


def one_peer_hypercube(dimensions: int) -> list[Graph]:
    """Round d pairs the agents whose numbers differ in bit d: exact averaging in `dimensions` rounds."""
    schedule = graphs.one_peer_hypercube(2**dimensions)
    return [schedule.at(round) for round in range(dimensions)]


def test_a_constant_schedule_is_its_graph():
    ring = graphs.ring(6)
    schedule = graphs.as_schedule(ring)
    assert graphs.as_schedule(schedule) is schedule
    assert schedule.at(0) is schedule.at(17) is ring
    assert (schedule.name, schedule.num_agents, schedule.period) == ("ring", 6, 1)
    np.testing.assert_array_equal(schedule.weights_of_period(), ring.weights)
    assert schedule.sigma_2 == ring.sigma_2
    server = graphs.as_schedule(Graph.server([1, 0]))  # agent 1 is never heard, and need not be
    assert server.at(3).is_server


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_rounds_that_average_exactly_together(dimensions):
    rounds = one_peer_hypercube(dimensions)
    schedule = Schedule.cycle(rounds, "one-peer")
    n = 2**dimensions
    assert schedule.period == dimensions
    assert [schedule.at(t) for t in range(2 * dimensions)] == rounds * 2
    np.testing.assert_allclose(schedule.weights_of_period(), np.full((n, n), 1 / n))
    assert schedule.sigma_2 == pytest.approx(0, abs=1e-12)


def assert_doubly_stochastic(W: np.ndarray) -> None:
    assert (W >= 0).all()
    np.testing.assert_allclose(W.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(W.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_base_averages_any_number_of_agents_exactly(k):
    """Independent of the construction: degree, double stochasticity and the product of one period."""
    periods = {}
    for n in range(1, 65):
        schedule = graphs.base(n, k)
        product = np.eye(n)
        for round in range(schedule.period):
            W = schedule.at(round).weights
            assert_doubly_stochastic(W)
            np.testing.assert_array_equal(W, W.T)
            assert (np.count_nonzero(W, axis=1) - (W.diagonal() > 0) <= k).all()
            product = W @ product
        np.testing.assert_allclose(product, np.full((n, n), 1 / n), rtol=0, atol=1e-12)
        assert schedule.exact_after == schedule.period
        assert schedule.period <= max(1, 2 * math.log(n, k + 1) + 2)  # the paper's theorem 1
        periods[n] = schedule.period
    assert periods[10] == {1: 6, 2: 4, 3: 4}[k]  # at k = 3: 2 x (1 + 1 + 1), and 1 across
    assert [periods[(k + 1) ** power] for power in (1, 2, 3)] == [1, 2, 3]  # hyper-hypercubes


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 12, 16])
def test_one_peer_exponential_is_exact_for_powers_of_two_only(n):
    schedule = graphs.one_peer_exponential(n)
    assert schedule.period == max(1, math.ceil(math.log2(n)))
    for round in range(schedule.period):
        graph = schedule.at(round)
        assert_doubly_stochastic(graph.weights)
        assert graph.degrees.tolist() == [int(n > 1)] * n
        for agent in range(n):
            assert graph.neighbours(agent) == ([(agent + 2**round) % n] if n > 1 else [])
    exact = np.allclose(schedule.weights_of_period(), 1 / n, rtol=0, atol=1e-12)
    assert exact == (n & (n - 1) == 0)
    assert schedule.exact_after == (schedule.period if exact else None)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 11])
def test_random_schedules_are_pure_functions_of_seed_and_round(n):
    for spec in ("random-matching", "random-edges:0.3", "failing:0.3:ring", "failing:0.3:base:3"):
        one, two, other = parse(spec, n, 5), parse(spec, n, 5), parse(spec, n, 6)
        assert one.name == spec
        assert one.period is None
        weights = [one.at(round).weights for round in range(12)]
        for round in reversed(range(12)):
            np.testing.assert_array_equal(two.at(round).weights, weights[round])
            assert_doubly_stochastic(weights[round])
            np.testing.assert_array_equal(weights[round], weights[round].T)
        if n > 2:
            assert any((other.at(round).weights != weights[round]).any() for round in range(12))
        product = functools.reduce(np.matmul, (one.at(round).weights for round in range(200)))
        np.testing.assert_allclose(product, 1 / n, atol=1e-3)  # together they agree


def test_random_matchings_pair_everybody_uniformly():
    schedule, counts = graphs.random_matching(7, 0), np.zeros((7, 7))
    for round in range(2100):
        W = schedule.at(round).weights
        assert sorted(np.count_nonzero(W, axis=1)) == [1] + [2] * 6  # one of seven is left alone
        counts += W > 0
    off = counts[~np.eye(7, dtype=bool)]
    # Every pair meets with probability 1/7: 300 times, standard deviation 16.
    assert off.min() > 230
    assert off.max() < 370


def test_random_edges_are_drawn_with_their_probability_each_round():
    schedule = graphs.random_edges(30, 0.2, 0)
    shares = [len(schedule.at(round).edges) / 435 for round in range(40)]
    assert np.mean(shares) == pytest.approx(0.2, abs=0.01)
    for i, j in schedule.at(3).edges:
        degrees = schedule.at(3).degrees
        assert schedule.at(3).weights[i, j] == 1 / (1 + max(degrees[i], degrees[j]))


def test_failed_links_give_their_weight_to_both_ends():
    base = graphs.erdos_renyi(12, 0.5, 1)
    schedule = graphs.failing(base, 0.25, 0)
    failed = 0
    for round in range(200):
        W = schedule.at(round).weights
        lost = base.weights - np.where(np.eye(12, dtype=bool), base.weights, W)
        gone = lost > 0
        np.testing.assert_array_equal(W[gone], 0)  # a link carries its weight or nothing
        np.testing.assert_allclose(W.diagonal() - base.weights.diagonal(), lost.sum(axis=1), atol=1e-15)
        failed += gone.sum() / 2
    assert failed / (200 * len(base.edges)) == pytest.approx(0.25, abs=0.015)
    none = graphs.failing(graphs.ring(5), 0.0, 0)
    np.testing.assert_array_equal(none.at(9).weights, graphs.ring(5).weights)


def test_composed_graphs_do_what_their_hops_do_in_a_row():
    schedule = Schedule.cycle([graphs.star(4), graphs.line(4)], "two")
    x = np.random.default_rng(0).normal(size=(4, 3))
    window = schedule.window(1, 3)  # line, star, line
    hop_by_hop = x
    for hop in window.hops:
        hop_by_hop = hop.weights @ hop_by_hop
    np.testing.assert_allclose(window.weights @ x, hop_by_hop)
    assert [hop.name for hop in window.hops] == ["line", "star", "line"]
    assert schedule.window(5, 1) is schedule.at(5)
    cube = graphs.one_peer_hypercube(8)
    # Exact but for rounding is made exact, so that all rows are equal bit by bit.
    assert (graphs.base(10, 2).window(0, 4).weights == graphs.complete(10).weights).all()
    assert (cube.window(3, 3).weights == 1 / 8).all()


def test_sigma_2_a_round_is_what_disagreement_shrinks_by():
    ring = graphs.as_schedule(graphs.ring(7))
    assert ring.sigma_2_per_round == graphs.ring(7).sigma_2
    cycle = Schedule.cycle([graphs.star(5), graphs.line(5)], "two")
    assert cycle.sigma_2_per_round == pytest.approx(cycle.sigma_2**0.5)
    assert graphs.base(10, 2).sigma_2_per_round == 0.0
    # In a random matching of 2m agents E[W^T W] = E[W]: 1/2 on the diagonal and 1/2 shared by 2m - 1 others.
    matching = graphs.random_matching(8, 0)
    assert matching.sigma_2_per_round == pytest.approx((1 / 2 - 1 / 14) ** 0.5, abs=0.06)
    # All its eigenvalues but the first are equal: the mean square factor is the same for any disagreement.
    apart = np.random.default_rng(0).normal(size=(8, 50))
    apart -= apart.mean(axis=0)
    mixed = np.stack([matching.at(round).weights @ apart for round in range(400)])
    factors = np.linalg.norm(mixed, axis=1) / np.linalg.norm(apart, axis=0)
    np.testing.assert_allclose((factors**2).mean(axis=0), 1 / 2 - 1 / 14, atol=0.04)


def test_pace_is_the_rounds_until_everybody_was_heard():
    assert graphs.as_schedule(graphs.ring(9)).pace == 1
    assert graphs.base(10, 2).pace == 4
    matching = graphs.random_matching(8, 0)
    product = np.eye(8)
    for round in range(matching.pace):
        assert not (product > 0).all()
        product = matching.at(round).weights @ product
    assert (product > 0).all()
    apart = Schedule("apart", 2, lambda round: Graph(np.eye(2), connected=False))
    with pytest.raises(UserError, match="1000 rounds of apart do not connect all 2 agents"):
        _ = apart.pace


def test_the_period_multiplies_later_rounds_from_the_left():
    first, second = graphs.star(4), graphs.line(4)
    product = Schedule.cycle([first, second], "two").weights_of_period()
    np.testing.assert_allclose(product, second.weights @ first.weights)
    assert not np.allclose(product, first.weights @ second.weights)


def test_a_schedule_must_connect_everybody_over_its_period():
    rounds = one_peer_hypercube(3)
    with pytest.raises(UserError, match="schedule: agents 4, 5, 6, 7 cannot be reached from agent 0; link"):
        Schedule.cycle(rounds[:2], "no bit 2")
    swap = Graph(np.array([[0, 1], [1, 0]]), "swap", connected=False)
    with pytest.raises(UserError, match="schedule: models go round in turns of 2"):
        Schedule.constant(swap)
    with pytest.raises(UserError, match="round 1 has 4 agents, not 3"):
        Schedule.cycle([graphs.ring(3), graphs.ring(4)], "mixed")
    with pytest.raises(UserError, match="no graph in it"):
        Schedule.cycle([], "empty")
    with pytest.raises(UserError, match="period is 0"):
        Schedule("none", 3, lambda round: graphs.ring(3), period=0)
    with pytest.raises(UserError, match="0 agents"):
        Schedule("none", 0, lambda round: graphs.ring(3))


def test_a_random_schedule_has_no_period():
    schedule = Schedule("random", 6, lambda round: graphs.erdos_renyi(6, 0.5, round))
    assert schedule.period is None
    np.testing.assert_array_equal(schedule.at(1000).weights, graphs.erdos_renyi(6, 0.5, 1000).weights)
    with pytest.raises(UserError, match="random never starts again"):
        schedule.weights_of_period()
    with pytest.raises(UserError, match="round 2 has 3 agents, not 6"):
        Schedule("wrong", 6, lambda round: graphs.ring(3)).at(2)


# --- names and files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "n", "name"),
    [
        (" Ring ", 5, "ring"),
        ("torus", 12, "torus:3x4"),
        ("torus:2x6", 12, "torus:2x6"),
        ("bipartite", 10, "bipartite:8+2"),
        ("bipartite:7+3", 10, "bipartite:7+3"),
        ("complete_bipartite", 7, "complete-bipartite:4+3"),
        ("complete-bipartite:2+5", 7, "complete-bipartite:2+5"),
        ("ERDOS_RENYI:0.50", 8, "erdos-renyi:0.5"),
        ("random-regular:3", 8, "random-regular:3"),
        ("one_peer_exponential", 7, "one-peer-exponential"),
        ("one-peer-hypercube", 8, "one-peer-hypercube"),
        ("base", 7, "base:2"),
        ("Base:4", 7, "base:4"),
        ("random-matching", 7, "random-matching"),
        ("random-edges:0.30", 7, "random-edges:0.3"),
        ("failing:0.1", 7, "failing:0.1:ring"),
        ("failing:.1:Torus:2X3", 6, "failing:0.1:torus:2x3"),
    ],
)
def test_names(spec, n, name):
    graph = parse(spec, n, 0)
    assert graph.name == name
    assert graph.num_agents == n


@pytest.mark.parametrize(
    ("spec", "n", "message"),
    [
        (
            "rinf",
            5,
            r"graph: 'rinf' is not known\. Did you mean 'ring'\? .*hypercube.* Or give a file: \.npy",
        ),
        ("ring", 0, "0 agents cannot form a graph; use at least 1"),
        ("ring:3", 5, "ring takes no argument; write ring instead of ring:3"),
        ("erdos-renyi", 5, "needs an argument, for example erdos-renyi:0.4"),
        ("random-regular", 5, "needs an argument, for example random-regular:4"),
        ("erdos-renyi:x", 5, "erdos-renyi:x is not readable; write it as erdos-renyi:0.4"),
        ("random-regular:2.5", 5, "random-regular:2.5 is not readable"),
        ("torus:10", 10, "torus:10 is not readable; write it as torus:2x5"),
        ("torus:0x5", 5, "0 agents"),
        ("torus:2x6", 10, "torus:2x6 has 12 agents but the run has 10"),
        ("torus", 7, r"7 agents cannot form a torus .*; use 6 or 8 agents"),
        ("torus", 2, "2 agents cannot form a torus .*; use 4 agents"),
        ("hypercube", 10, "10 agents cannot form a hypercube .*power of 2.*; use 8 or 16 agents"),
        ("bipartite:8+3", 10, r"bipartite:8\+3 has 11 agents but the run has 10"),
        ("bipartite:10+0", 10, "0 hubs; a bipartite graph needs at least 1"),
        ("bipartite", 2, "2 agents cannot form a bipartite graph with 2 hubs .* use at least 3 agents"),
        ("complete-bipartite:5+0", 5, r"complete-bipartite:5\+0 has an empty side"),
        ("complete-bipartite:5+5", 11, r"complete-bipartite:5\+5 has 10 agents but the run has 11"),
        ("complete-bipartite", 1, "1 agents cannot form a complete-bipartite graph; use at least 2"),
        ("one-peer-hypercube", 10, "10 agents cannot form a one-peer-hypercube .*power of 2.*; use 8 or 16 agents"),
        ("base:1", 5, "base:1 has no links; the base must be at least 2"),
        ("base:x", 5, "base:x is not readable; write it as base:3"),
        ("random-edges", 5, r"needs an argument, for example random-edges:0\.2"),
        ("random-edges:1.5", 5, r"edge probability is 1\.5; .*above 0 and at most 1"),
        ("failing:1:ring", 5, "failure probability is 1; .*below 1"),
        ("failing:x:ring", 5, "failing:x is not readable; write it as failing:0.1:ring"),
        ("failing:0.1:rinf", 5, "graph: 'rinf' is not known"),
        ("failing:0.1:nowhere.npy", 5, r"there is no file nowhere\.npy"),
        ("failing:0.1:one-peer-exponential", 6, "one-peer-exponential is directed"),
        ("failing:0.1:hypercube", 6, "use 4 or 8 agents"),
        ("nowhere.npy", 5, r"there is no file nowhere\.npy"),
    ],
)
def test_names_that_do_not_work(spec, n, message):
    with pytest.raises(UserError, match=message):
        parse(spec, n, 0)


def test_every_kind_explains_itself():
    for name, kind in graphs.KINDS.items():
        assert name == name.lower()
        assert "_" not in name
        assert 5 < len(kind.summary) < 70
        assert kind.example is None or kind.example.startswith(f"{name}:")
        assert kind.example or not kind.required


def test_files(tmp_path):
    weights = graphs.ring(12).weights
    np.save(tmp_path / "w.npy", weights)
    np.save(tmp_path / "single.npy", weights.astype(np.float32))
    np.savetxt(tmp_path / "w.csv", weights, delimiter=",")
    np.savetxt(tmp_path / "w.txt", weights, fmt="%.8f")
    nx.write_edgelist(nx.cycle_graph(12), tmp_path / "w.edgelist")
    (tmp_path / "weighted.edgelist").write_text("".join(f"{i} {(i + 1) % 12} 0.5\n" for i in range(12)))
    nx.write_graphml(nx.cycle_graph(12), tmp_path / "w.graphml")
    for file in sorted(tmp_path.iterdir()):
        graph = parse(str(file), 12, 0)
        assert graph.name == file.name
        # Node 10 must not sort before node 2, and float32 must not be refused.
        np.testing.assert_allclose(graph.weights, weights, atol=1e-7)
    np.save(tmp_path / "one.npy", [[1.0]])
    assert parse(str(tmp_path / "one.npy"), 1, 0).num_agents == 1


def test_a_file_of_all_rounds_is_a_schedule(tmp_path):
    path = tmp_path / "rounds.npy"
    for made in (graphs.base(6, 1), graphs.one_peer_exponential(6)):
        rounds = np.stack([made.at(round).weights for round in range(made.period)])
        np.save(path, rounds.astype(np.float32))
        schedule = parse(str(path), 6, 0)
        assert (schedule.name, schedule.period) == ("rounds.npy", made.period)
        for round in range(2 * made.period):
            np.testing.assert_allclose(schedule.at(round).weights, made.at(round).weights, atol=1e-7)
    with pytest.raises(UserError, match=r"rounds\.npy is directed"):
        parse(f"failing:0.1:{path}", 6, 0)
    late = [graphs.ring(6).weights, graphs.one_peer_exponential(6).at(0).weights]
    np.save(path, late)
    with pytest.raises(UserError, match=r"rounds\.npy is directed"):  # in its second round only
        parse(f"failing:0.1:{path}", 6, 0)
    np.save(path, np.zeros((0, 6, 6)))
    with pytest.raises(UserError, match="no graph in it"):
        parse(str(path), 6, 0)


def test_files_that_do_not_work(tmp_path):
    np.save(tmp_path / "ring.npy", graphs.ring(4).weights)
    with pytest.raises(UserError, match=r"ring\.npy has 4 agents but the run has 5"):
        parse(str(tmp_path / "ring.npy"), 5, 0)
    contents = {
        "empty.npy": b"",
        "words.csv": b"a,b\n1,d\n",
        "ragged.txt": b"1 2\n3\n",
        "broken.graphml": b"<graphml",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read as"):
            parse(str(tmp_path / name), 2, 0)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as"):  # nothing pickled is ever loaded
        parse(str(tmp_path / "objects.npy"), 1, 0)
    np.savetxt(tmp_path / "low.csv", [[0.5, 0.4], [0.4, 0.6]], delimiter=",")
    with pytest.raises(UserError, match=r"row 0 of the weights sums to 0\.9"):
        parse(str(tmp_path / "low.csv"), 2, 0)
    (tmp_path / "apart.edgelist").write_text("0 1\n2 3\n")
    with pytest.raises(UserError, match="agents 2, 3 cannot be reached"):
        parse(str(tmp_path / "apart.edgelist"), 4, 0)


# --- to look at ---------------------------------------------------------------------------------------------


def test_describe_is_json():
    told = json.loads(json.dumps(graphs.describe(graphs.star(4))))
    assert told["name"] == "star"
    assert told["num_agents"] == 4
    assert told["edges"] == [[0, 1], [0, 2], [0, 3]]
    assert told["degrees"] == {"min": 1, "mean": 1.5, "max": 3}
    assert told["messages_per_round"] == 6
    assert told["sigma_2"] + told["spectral_gap"] == pytest.approx(1)
    np.testing.assert_allclose(told["weights"], graphs.star(4).weights)

    schedule = graphs.describe(Schedule.cycle(one_peer_hypercube(2), "one-peer"))
    assert json.loads(json.dumps(schedule))["period"] == 2
    assert [round["name"] for round in schedule["rounds"]] == ["bit 0", "bit 1"]
    assert schedule["spectral_gap"] == pytest.approx(1)
    assert schedule["exact_after"] == 2
    assert schedule["messages_per_round"] == 4
    base = graphs.describe(graphs.base(5, 1))  # 4 + 1 agents: two rounds of two pairs, one pair, two rounds
    assert [round["messages_per_round"] for round in base["rounds"]] == [4, 4, 2, 4, 4]
    assert base["messages_per_round"] == pytest.approx(3.6)
    assert graphs.describe(graphs.one_peer_exponential(6))["exact_after"] is None
    assert graphs.describe(graphs.random_matching(8, 0))["messages_per_round"] == 8
    endless = graphs.describe(Schedule("endless", 3, lambda round: graphs.ring(3)))
    assert json.loads(json.dumps(endless))["sigma_2"] is None


@pytest.mark.parametrize(
    "graph",
    [
        *(graphs.ring(n) for n in (1, 2, 3)),
        graphs.line(5),
        graphs.star(6),
        graphs.bipartite_hubs(),
        graphs.erdos_renyi(12, 0.4, 0),
        graphs.complete(100),
        Graph.server([3, 0, 1]),
        one_peer_hypercube(2)[0],
    ],
    ids=lambda graph: f"{graph.name}-{graph.num_agents}",
)
def test_draw_shows_every_agent_and_every_link(graph):
    from matplotlib.collections import LineCollection, PathCollection
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    graphs.draw(graph, axes)
    texts = {text.get_text() for text in axes.texts}
    hub = {"server"} if graph.is_server else set()
    assert texts == {str(agent) for agent in range(graph.num_agents)} | hub
    (nodes,) = [artist for artist in axes.collections if isinstance(artist, PathCollection)]
    places = np.asarray(nodes.get_offsets())
    assert np.isfinite(places).all()
    assert len(np.unique(places.round(6), axis=0)) == len(texts)
    drawn = sum(len(lines.get_segments()) for lines in axes.collections if isinstance(lines, LineCollection))
    assert drawn == (graph.num_agents if graph.is_server else len(graph.edges))


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_draw_writes_a_file_without_pyplot(tmp_path, suffix, magic, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it would now fail
    graphs.draw(graphs.bipartite_hubs(), tmp_path / f"graph.{suffix}")
    assert (tmp_path / f"graph.{suffix}").read_bytes().startswith(magic)


# --- agents with names --------------------------------------------------------------------------------------

PATH = [[2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3]]  # alice - bob - carol, Metropolis weights
NAMED = {
    "names.edgelist": "carol bob\nbob alice\n",
    "weights.edgelist": "carol bob 3\nbob alice {'since': 1}\n",
    "names.adjlist": "bob alice carol\nalice\ncarol\n",
    "edges.csv": "source,target\nbob,alice\ncarol,bob\n",
    "bare.csv": "bob,alice\ncarol,bob\n",
    "adjacency.csv": ",alice,bob,carol\nalice,0,1,0\nbob,1,0,1\ncarol,0,1,0\n",
    "header.csv": "\ufeffalice, bob, carol\n0,1,0\n1,0,1\n0,1,0\n",
    "columns.csv": "site,bob,carol,alice\nalice,1,0,0\nbob,0,1,1\ncarol,1,0,0\n",
    "adjacency.txt": "alice bob carol  # no corner\nalice 0 1 0\nbob 1 0 1\ncarol 0 1 0\n",
}


@pytest.mark.parametrize("name", NAMED)
def test_files_with_names_get_metropolis_weights(tmp_path, name):
    (tmp_path / name).write_text(NAMED[name])
    graph = parse(str(tmp_path / name), 3, 0)
    assert graph.names == ("alice", "bob", "carol")
    np.testing.assert_allclose(graph.weights, PATH, atol=1e-15)
    assert graphs.describe(graph)["names"] == ["alice", "bob", "carol"]
    assert parse(f"failing:0.1:{tmp_path / name}", 3, 0).names == ("alice", "bob", "carol")


def test_a_table_with_names_may_give_the_weights_and_keeps_its_order(tmp_path):
    (tmp_path / "w.csv").write_text(",zoe,adam\nzoe,0.75,0.25\nadam,0.25,0.75\n")
    graph = parse(str(tmp_path / "w.csv"), 2, 0)
    assert graph.names == ("zoe", "adam")
    np.testing.assert_array_equal(graph.weights, [[0.75, 0.25], [0.25, 0.75]])


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".txt"])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_matrix_of_zeros_and_ones_is_an_adjacency(tmp_path, suffix, n):
    links = nx.to_numpy_array(nx.path_graph(n))
    file = tmp_path / f"links{suffix}"
    if suffix == ".npy":
        np.save(file, links)
    else:
        np.savetxt(file, links, delimiter="," if suffix == ".csv" else " ")
    np.testing.assert_array_equal(parse(str(file), n, 0).weights, graphs.line(n).weights)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            ",alice,bob\nalice,0,1\nbbo,1,0\n",
            "rows of .* are named alice, bbo but its columns alice, bob",
        ),
        ("a.csv", ",alice,alice\nalice,0,1\nalice,1,0\n", "two agents are called 'alice'"),
        ("a.csv", "alice,bob,carol\n0,1\n1,0\n", "3 names for 2 agents"),
        ("a.csv", ",alice,bob\nalice,0,1\nbob,0,0\n", "agent alice is linked to agent bob but bob not to alice"),
        ("a.edgelist", "alice bob\nKing's College\tUCL London\n", "line 2 of .* has more than two names"),
        ("a.edgelist", "alice bob\ncarol dave\n", "agents carol, dave cannot be reached from agent alice"),
    ],
)
def test_files_with_names_that_do_not_fit(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        parse(str(tmp_path / name), 2, 0)


@quick
@given(connected_graphs(), st.randoms())
def test_agents_in_another_order_keep_their_neighbours(links, order):
    names = [f"agent {node}" for node in range(len(links))]
    graph = graphs.from_networkx(nx.relabel_nodes(links, dict(enumerate(names))))
    order.shuffle(names)
    for made in (graph.arranged(names), Schedule.constant(graph).arranged(names).at(5)):
        assert made.names == tuple(names)
        for i, j in itertools.product(range(len(names)), repeat=2):
            there = graph.names.index(names[i]), graph.names.index(names[j])
            assert made.weights[i, j] == graph.weights[there]


def test_agents_in_an_order_of_other_names_are_refused():
    graph = graphs.from_networkx(nx.Graph([("alice", "bob"), ("bob", "carol")]))
    with pytest.raises(UserError, match="but those of the run alice, bob, dave; carol, dave are not in"):
        graph.arranged(["alice", "bob", "dave"])
    assert graphs.ring(3).arranged(["x", "y", "z"]).names == ("x", "y", "z")  # without names: as they come
    assert graphs.ring(3).names == ()
    assert "names" not in graphs.describe(graphs.ring(3))


def test_draw_writes_the_names():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    graphs.draw(graphs.from_networkx(nx.Graph([("alice", "bob")])), axes)
    assert {text.get_text() for text in axes.texts} == {"alice", "bob"}


# --- what it costs to look ----------------------------------------------------------------------------------


def test_decaf_graph_imports_no_heavy_library():
    code = "import sys; from decaf_lora.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "graph", "erdos-renyi:0.5", "--agents", "5", "--json"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout)["num_agents"] == 5
    loaded = set(out.stderr.split())
    assert "networkx" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "peft", "datasets", "sklearn", "matplotlib"})


def test_decaf_graph_works_where_torch_is_not_installed():
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft", "datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from decaf_lora.cli import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, "graph", "ring", "--agents", "8"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "messages per round: 16" in out.stdout
