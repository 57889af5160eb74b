"""What theory says of consensus on factors and on products, measured on the algorithms themselves."""

import itertools
import math

import numpy as np
import pytest
import torch

from decaf_lora import algorithms, consensus, graphs, lowrank
from decaf_lora.adapters.adapter import Adapter
from quadratic import LAYER, many_agents, slope, square_gradients, windows
from rounds import begun, one_round
from samples import LAYERS, make_adapter, products


def mixed_products(adapter, graph, layer):
    """(N, d_out, d_in) sum_j W_ij s_j B_j A_j, dense."""
    return torch.einsum("ij,jab->iab", torch.from_numpy(graph.weights.copy()), products(adapter, layer))


def with_layer(a, b, scale=1.0):
    n = len(a)
    return Adapter({LAYER: a}, {LAYER: b}, {LAYER: torch.full((n,), scale, dtype=a.dtype)}, {})


# --- mixing -------------------------------------------------------------------------------------------------


LINEAR = {"dlora_fa": "B", "core": "core", "fedsa": "A"}
"""Rules that mix one factor alone, and which. The product is linear in it, given the other ones."""


def contraction(graph, rounds=120, rule="dlora_fa"):
    """What a round leaves of the consensus distance, after `rounds` of them from a random start.

    With one factor mixed, and the others equal for all, mixing is linear in the product. (Under fedsa B is personal:
    equal B's show what is left of the disagreement about A.) For symmetric graphs repeated rounds are a power
    iteration for the second eigenvalue.
    """
    algorithm = algorithms.make(rule)
    adapter = make_adapter(graph.num_agents, common_a=rule == "dlora_fa")
    if rule == "fedsa":
        adapter = adapter.with_tensors({f"B/{k}": b[:1].expand_as(b).clone() for k, b in adapter.B.items()})
    adapter = begun(algorithm, adapter)
    for _ in range(rounds):
        before = consensus.distance(adapter.folded())
        adapter, _ = one_round(algorithm, adapter, graph)
        after = consensus.distance(adapter.folded())
        # Scaled up about the mean: what is measured is a ratio, and must not sink into rounding.
        mixed = adapter.tensors(frozenset({LINEAR[rule]}))
        grown = {name: t.mean(0) + (t - t.mean(0)) / max(graph.sigma_2, 0.1) for name, t in mixed.items()}
        adapter = adapter.with_tensors(grown)
    return after / before


@pytest.mark.parametrize(
    ("spec", "rule"),
    [(spec, "dlora_fa") for spec in ("ring", "line", "star", "torus:2x4", "bipartite:6+2", "hypercube")]
    + [(spec, rule) for spec in ("ring", "bipartite:6+2") for rule in ("core", "fedsa")],
)
def test_disagreement_contracts_by_sigma_2_a_round(spec, rule):
    """From any start the consensus distance shrinks in the long run by exactly sigma_2 a round."""
    graph = graphs.parse(spec, 8, 0)
    assert contraction(graph, rule=rule) == pytest.approx(graph.sigma_2, abs=1e-6)


def test_with_fedsa_personal_factors_stay_apart():
    """Only the disagreement about A goes away: the products end at B_i Abar, apart by their B's alone."""
    adapter = make_adapter(4)
    mean = {layer: a.mean(0) for layer, a in adapter.A.items()}
    adapter, _ = one_round(algorithms.fedsa(), adapter, graphs.complete(4))
    for layer in LAYERS:
        torch.testing.assert_close(products(adapter, layer), 2 * adapter.B[layer] @ mean[layer], rtol=0, atol=1e-9)


# --- clipped gossip -----------------------------------------------------------------------------------------


def clipped_gossip(tau, seed=0, n=9, line=False):
    """One exchange of clipped gossip with a liar, far away: how far it leaves the honest agents from honest gossip.

    Models are cores, in which mixing is exact. The weight of the liar, agent 0, is delta. Without it, an agent would
    have mixed x_i + sum_j Pi_ij (x_j - x_i) over the honest j.

    Args:
        tau: the clipping distance; None: sqrt(sum_j Pi_ij d_ij^2 / delta), the paper's, of each agent by itself.
        seed: of the models.
        n: agents.
        line: whether the honest models, and the liar's on the other side, lie on one line from agent 1's.

    Returns:
        Of the honest agents (n - 1,), or with `line` of agent 1 (1,): the error; sum_j Pi_ij (d_ij - tau)_+ + delta
        tau; and 2 sqrt(delta sum_j Pi_ij d_ij^2).
    """
    graph = graphs.parse("random-regular:4", n, seed) if not line else graphs.complete(n)
    adapter = begun(algorithms.core(), make_adapter(n, seed))
    first = {name: t[1] for name, t in adapter.tensors(frozenset({"core", "extras"})).items()}
    places = 1 + torch.arange(n, dtype=torch.float64)
    places[:2] = torch.tensor([-1e4, 0.0])
    if line:
        parts = {name: t + places.view(-1, *[1] * t.dim()) * torch.ones_like(t) for name, t in first.items()}
    else:
        parts = {name: torch.cat([1e4 * t[:1], t[1:]]) for name, t in adapter.tensors(frozenset({"core"})).items()}
    adapter = adapter.with_tensors(parts)
    x = flattened_models(adapter)
    weights = torch.from_numpy(graph.weights.copy())
    apart = (x[:, None] - x).norm(dim=-1)
    honest = [1] if line else list(range(1, n))
    errors, bounds, papers = [], [], []
    for i in honest:
        delta, others = weights[i, 0], [j for j in range(1, n) if j != i]
        squares = (weights[i, others] * apart[i, others].square()).sum()
        own_tau = tau if tau is not None else float((squares / delta).sqrt()) if delta else 1e9
        out, _ = one_round(algorithms.core() | algorithms.clipped(own_tau), adapter, graph)
        gossip = x[i] + (weights[i, others, None] * (x[others] - x[i])).sum(0)
        errors.append(float((flattened_models(out)[i] - gossip).norm()))
        over = (weights[i, others] * (apart[i, others] - own_tau).clamp_min(0)).sum()
        bounds.append(float(over + delta * own_tau))
        papers.append(float(2 * (delta * squares).sqrt()))
    return np.array(errors), np.array(bounds), np.array(papers)


def flattened_models(adapter):
    """(n, P) the products of all layers and the extras of every agent in a row."""
    parts = [products(adapter.folded(), layer).flatten(1) for layer in LAYERS]
    return torch.cat([*parts, *(t.flatten(1) for t in adapter.extras.values())], 1)


@pytest.mark.parametrize("tau", [0.3, 3.0, 10.0, 30.0])
def test_clipped_gossip_strays_by_its_bound_at_most(tau):
    """sum_j Pi_ij (d_ij - tau)_+ for what honest neighbours lose, and delta tau for what the liar gains."""
    errors, bounds, _ = clipped_gossip(tau)
    assert (errors <= bounds * (1 + 1e-9) + 1e-9).all()
    assert (errors > 0.1 * bounds).any()


@pytest.mark.parametrize("tau", [0.5, 5.0, 50.0])
def test_the_bound_of_clipped_gossip_is_reached_on_a_line(tau):
    errors, bounds, _ = clipped_gossip(tau, line=True)
    np.testing.assert_allclose(errors, bounds, rtol=1e-9)


@pytest.mark.parametrize("line", [False, True])
def test_at_the_papers_distance_the_error_is_of_the_order_of_the_disagreement(line):
    errors, bounds, papers = clipped_gossip(None, line=line)
    heard = papers > 0  # the liar's neighbours; the others are not clipped at all
    assert (errors[heard] <= bounds[heard] * (1 + 1e-9)).all()
    assert (bounds[heard] <= papers[heard] * (1 + 1e-9)).all()
    assert (errors[~heard] < 1e-9).all()


@pytest.mark.parametrize("spec", ["ring", "base:2", "one-peer-exponential", "random-matching", "failing:0.3:ring"])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_mixing_conserves_the_mean(spec, n):
    """Of the factors under DLoRA, of the product under DLoRA-FA."""
    graph = graphs.as_schedule(graphs.parse(spec, n, 0)).at(0)
    adapter = make_adapter(n)
    mixed, _ = one_round(algorithms.dlora(), adapter, graph)
    for key, tensor in adapter.tensors().items():
        torch.testing.assert_close(mixed.tensors()[key].mean(0), tensor.mean(0))
    frozen = make_adapter(n, common_a=True)
    mixed, _ = one_round(algorithms.dlora_fa(), frozen, graph)
    for layer in LAYERS:
        torch.testing.assert_close(products(mixed, layer).mean(0), products(frozen, layer).mean(0))


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_truncation_loses_exactly_the_tail(n):
    """The network mean moves by the mean of the residuals, whose norms are the singular values beyond the rank."""
    graph, adapter = graphs.ring(n), make_adapter(n)
    out, _ = one_round(algorithms.decaf(), adapter, graph)
    for layer, (rank, _, _) in LAYERS.items():
        z = mixed_products(adapter, graph, layer)
        residual = z - products(out, layer)
        tails = torch.linalg.svdvals(z)[:, rank:].norm(dim=1)
        torch.testing.assert_close(residual.flatten(1).norm(dim=1), tails, rtol=0, atol=1e-9)
        # The residual is orthogonal to what is kept (Eckart and Young).
        inner = (residual * products(out, layer)).flatten(1).sum(1)
        torch.testing.assert_close(inner, torch.zeros_like(inner), rtol=0, atol=1e-8)
        moved = products(adapter, layer).mean(0) - products(out, layer).mean(0)
        torch.testing.assert_close(moved, residual.mean(0), rtol=0, atol=1e-9)


# --- factors or products ------------------------------------------------------------------------------------


def interference_of(layer, size):
    """Interference of five agents on a star whose factors are apart by `size`: what DLoRA loses against the mixed
    product, and the closed form, both (5, d_out, d_in); the norms that lowrank.py measures (5,)."""
    graph, adapter = graphs.star(5), make_adapter(5)
    weights = torch.from_numpy(graph.weights.copy())
    a, b = adapter.A[layer], adapter.B[layer]
    near_a, near_b = a[:1] + size * (a - a[:1]), b[:1] + size * (b - b[:1])
    some = with_layer(near_a, near_b)
    dlora, _ = one_round(algorithms.dlora(), some, graph)
    lost = mixed_products(some, graph, LAYER) - products(dlora, LAYER)
    mean_a, mean_b = dlora.A[LAYER], dlora.B[LAYER]
    closed = torch.stack(
        [sum(weights[i, j] * (near_b[j] - mean_b[i]) @ (near_a[j] - mean_a[i]) for j in range(5)) for i in range(5)]
    )
    measured = lowrank.interference(near_a.expand(5, -1, -1, -1), near_b.expand(5, -1, -1, -1), weights)
    return lost, closed, measured


@pytest.mark.parametrize("layer", LAYERS)
def test_interference_is_its_closed_form_and_of_second_order(layer):
    """sum_j W_ij B_j A_j - Bbar_i Abar_i = sum_j W_ij (B_j - Bbar_i)(A_j - Abar_i): disagreement squared."""
    norms = []
    for size in (1.0, 0.1, 0.01):
        lost, closed, measured = interference_of(layer, size)
        torch.testing.assert_close(lost, closed, rtol=0, atol=1e-12)
        torch.testing.assert_close(measured, closed.flatten(1).norm(dim=1))
        norms.append(measured)
    torch.testing.assert_close(norms[1], 0.01 * norms[0])
    torch.testing.assert_close(norms[2], 1e-4 * norms[0])


def by_rank():
    """For ranks 1 to 7 of layers (7, 7), six agents on a ring, each with a target of its own:

    truncated: what DeCAF cuts off the mix of every agent's best product; difference: DeCAF's consensus of these minus
    DLoRA's of the best products that share one A (both relative to the mixed targets); gaps: DLoRA minus
    DeCAF from the same adapters with that common A; apart, interference: the same where A differs too.
    """
    generator = torch.Generator().manual_seed(0)
    n, d_out, d_in, graph = 6, 7, 7, graphs.ring(6)
    targets = torch.randn(n, d_out, d_in, generator=generator, dtype=torch.float64)
    full_a = torch.linalg.svd(targets.flatten(0, 1), full_matrices=False)[2]  # the best frame for all of them
    noise = 0.1 * torch.randn(n, d_out, d_in, generator=generator, dtype=torch.float64)
    truncated, difference, gaps, apart, interference = [], [], [], [], []
    mixed = torch.einsum("ij,jab->iab", torch.from_numpy(graph.weights.copy()), targets)
    u, s, vh = torch.linalg.svd(targets)
    for rank in range(1, d_out + 1):
        best = with_layer(vh[:, :rank], u[..., :rank] * s[:, None, :rank])
        decaf, _ = one_round(algorithms.decaf(), best, graph)
        exact = mixed_products(best, graph, LAYER)
        truncated.append(float((exact - products(decaf, LAYER)).norm() / exact.norm()))
        common = with_layer(full_a[:rank].repeat(n, 1, 1), targets @ full_a[:rank].T)
        dlora, _ = one_round(algorithms.dlora(), common, graph)
        difference.append(float((products(dlora, LAYER) - products(decaf, LAYER)).norm() / mixed.norm()))
        gaps.append(_consensus_gap(common, graph))
        moved = with_layer(common.A[LAYER] + noise[:, :rank], common.B[LAYER])
        apart.append(_consensus_gap(moved, graph))
        interference.append(_interference(moved, graph))
    return truncated, difference, gaps, apart, interference


def test_dlora_and_decaf_agree_at_full_rank():
    """The consensus difference of agents that fit their targets in one frame (DLoRA) or each as well as the rank
    allows (DeCAF) falls with the rank, to nothing at full rank, as the truncation does. From the same adapters the two
    differ by interference and truncation: with a common A by neither at any rank; where A differs too, what is left
    at full rank is the interference alone."""
    truncated, difference, gaps, apart, interference = by_rank()
    for values in (truncated, difference[2:]):  # at ranks 1 and 2 both hold little
        assert all(later < earlier for earlier, later in itertools.pairwise(values))
        assert values[-1] < 1e-9
    assert max(gaps) < 1e-9
    assert apart[-1] == pytest.approx(interference[-1], rel=1e-7)
    assert min(apart) > 1e-3


def _consensus_gap(adapter, graph):
    """Frobenius norm over agents of DLoRA's product consensus minus DeCAF's."""
    both = [one_round(algorithms.make(name), adapter, graph)[0] for name in ("dlora", "decaf")]
    return float((products(both[0], LAYER) - products(both[1], LAYER)).norm())


def _interference(adapter, graph):
    a, b = (x[LAYER].expand(adapter.num_agents, -1, -1, -1) for x in (adapter.A, adapter.B))
    return float(lowrank.interference(a, b, torch.from_numpy(graph.weights.copy())).norm())


# --- convergence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 16, 64])
@pytest.mark.parametrize("name", ["dlora", "decaf"])
def test_the_mean_square_gradient_vanishes_like_one_over_the_root_of_time(name, n):
    """The theorem: with step size c / sqrt(T) the mean over T rounds of E ||grad f||^2 is O(T^-1/2) (5 seeds).

    It is the square that has this rate (Lian et al., arXiv 1705.09056, corollary 2, whose rate the paper matches);
    the norm itself then has T^-1/4.
    """
    horizons = (50, 200, 800)
    runs = [square_gradients(algorithms.make(name), graphs.ring(n), T, 1 / math.sqrt(T)) for T in horizons]
    assert np.mean([slope(horizons, [run[:, seed].mean() for run in runs]) for seed in range(5)]) == pytest.approx(
        -0.5, abs=0.1
    )


@pytest.mark.parametrize("n", [4, 16, 64])
@pytest.mark.parametrize("name", ["dlora", "decaf"])
def test_the_gradient_norm_vanishes_like_one_over_the_root_of_time(name, n):
    """With steps c / t, where the optimum attracts (as that of this problem does), E ||grad f||^2 is O(1/t)
    (Koloskova et al., arXiv 2003.10422, theorem 2), so that the norm itself falls as t^-1/2 (5 seeds)."""
    rounds = 800 if n == 64 else 1600  # enough, and half the time
    squares = square_gradients(algorithms.make(name), graphs.parse("torus", n, 0), rounds, lambda t: 2 / (t + 20))
    assert slope(*windows(np.sqrt(squares).mean(1))) == pytest.approx(-0.5, abs=0.1)


# --- many agents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("weighing", ["server", "ring"])
def test_truncation_does_not_collapse_with_fifty_agents(weighing, independent):
    """Agents far apart (20 local steps), relative to no training at all, which is 1: on 50 agents product consensus
    ends within 0.05 of factor consensus, and under a server nearer to the optimum than on 10."""
    factors, product = (many_agents(name, 50, weighing, independent) for name in ("dlora", "decaf"))
    assert product < factors + 0.05
    if weighing == "server":
        # What is left between them is the split of the product, not the truncation: with A kept at the average, as
        # factor consensus keeps it, the same truncation loses next to nothing.
        anchored = many_agents("decaf", 50, weighing, independent=False, gauge="anchored")
        assert anchored < many_agents("dlora", 50, weighing, independent=False) + 0.02
        assert product < 0.2
        assert product < many_agents("decaf", 10, weighing, independent)
