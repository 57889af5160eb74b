"""What theory says of consensus on factors and on products, measured on the algorithms themselves."""

import itertools
import math

import numpy as np
import pytest
import torch

from decaf_lora import algorithms, consensus, graphs, lowrank
from decaf_lora.algorithms.base import Adapter
from decaf_lora.graphs import Graph, Schedule
from quadratic import LAYER, Quadratic, train
from test_algorithms import LAYERS, make_adapter, one_round, products


def mixed_products(adapter, graph, layer):
    """(N, d_out, d_in) sum_j W_ij s_j B_j A_j, dense."""
    return torch.einsum("ij,jab->iab", torch.from_numpy(graph.weights.copy()), products(adapter, layer))


def with_layer(a, b, scale=1.0):
    n = len(a)
    return Adapter({LAYER: a}, {LAYER: b}, {LAYER: torch.full((n,), scale, dtype=a.dtype)}, {})


# --- mixing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["ring", "line", "star", "torus:2x4", "bipartite:6+2", "hypercube"])
def test_disagreement_contracts_by_sigma_2_a_round(spec):
    """From any start the consensus distance shrinks in the long run by exactly sigma_2 a round.

    With a frozen common A mixing is linear in the product. The graphs are symmetric, so repeated rounds are a
    power iteration for the second eigenvalue.
    """
    graph, algorithm = graphs.parse(spec, 8, 0), algorithms.dlora_fa()
    adapter = make_adapter(8, common_a=True)
    distances = []
    for _ in range(120):
        adapter, _ = one_round(algorithm, adapter, graph)
        distances.append(consensus.distance(adapter))
        # Scaled up about the mean: what is measured is a ratio, and must not sink into rounding.
        grown = {f"B/{k}": b.mean(0) + (b - b.mean(0)) / max(graph.sigma_2, 0.1) for k, b in adapter.B.items()}
        distances[-1] = (distances[-1], consensus.distance(adapter.with_tensors(grown)))
        adapter = adapter.with_tensors(grown)
    (after, _), (_, before) = distances[-1], distances[-2]
    assert after / before == pytest.approx(graph.sigma_2, abs=1e-6)


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


def test_interference_is_its_closed_form_and_of_second_order():
    """sum_j W_ij B_j A_j - Bbar_i Abar_i = sum_j W_ij (B_j - Bbar_i)(A_j - Abar_i): disagreement squared."""
    graph, adapter = graphs.star(5), make_adapter(5)
    weights = torch.from_numpy(graph.weights.copy())
    for layer in LAYERS:
        a, b = adapter.A[layer], adapter.B[layer]
        norms = []
        for size in (1.0, 0.1, 0.01):
            near_a, near_b = a[:1] + size * (a - a[:1]), b[:1] + size * (b - b[:1])
            some = with_layer(near_a, near_b)
            dlora, _ = one_round(algorithms.dlora(), some, graph)
            lost = mixed_products(some, graph, LAYER) - products(dlora, LAYER)
            mean_a, mean_b = dlora.A[LAYER], dlora.B[LAYER]
            closed = torch.stack(
                [
                    sum(weights[i, j] * (near_b[j] - mean_b[i]) @ (near_a[j] - mean_a[i]) for j in range(5))
                    for i in range(5)
                ]
            )
            torch.testing.assert_close(lost, closed, rtol=0, atol=1e-12)
            measured = lowrank.interference(near_a.expand(5, -1, -1, -1), near_b.expand(5, -1, -1, -1), weights)
            torch.testing.assert_close(measured, closed.flatten(1).norm(dim=1))
            norms.append(measured)
        torch.testing.assert_close(norms[1], 0.01 * norms[0])
        torch.testing.assert_close(norms[2], 1e-4 * norms[0])


def test_dlora_and_decaf_agree_at_full_rank():
    """Their consensus differs by interference and truncation. With a common A (agents that have moved in B only)
    there is no interference, and truncation falls with the rank, to nothing at full rank; where A differs too,
    what is left at full rank is the interference alone."""
    generator = torch.Generator().manual_seed(0)
    n, d_out, d_in, graph = 6, 7, 8, graphs.ring(6)
    full_a = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, dtype=torch.float64))[0]
    targets = torch.randn(n, d_out, d_in, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(n, d_out, d_in, generator=generator, dtype=torch.float64)
    truncated, gaps, apart = [], [], []
    for rank in range(1, d_out + 1):
        # Every agent's best product of this rank; then the same in the frame of a common A.
        u, s, vh = torch.linalg.svd(targets)
        best = with_layer(vh[:, :rank], u[..., :rank] * s[:, None, :rank])
        decaf, _ = one_round(algorithms.decaf(), best, graph)
        exact = mixed_products(best, graph, LAYER)
        truncated.append(float((exact - products(decaf, LAYER)).norm() / exact.norm()))
        common = with_layer(full_a[:rank].repeat(n, 1, 1), targets @ full_a[:rank].T)
        gaps.append(_consensus_gap(common, graph))
        moved = with_layer(common.A[LAYER] + noise[:, :rank], common.B[LAYER])
        apart.append((_consensus_gap(moved, graph), _interference(moved, graph)))
    assert all(later < earlier for earlier, later in itertools.pairwise(truncated))
    assert truncated[-1] < 1e-9
    assert max(gaps) < 1e-9
    assert apart[-1][0] == pytest.approx(apart[-1][1], rel=1e-7)
    assert all(gap > 1e-3 for gap, _ in apart)


def _consensus_gap(adapter, graph):
    """Frobenius norm over agents of DLoRA's product consensus minus DeCAF's."""
    both = [one_round(algorithms.make(name), adapter, graph)[0] for name in ("dlora", "decaf")]
    return float((products(both[0], LAYER) - products(both[1], LAYER)).norm())


def _interference(adapter, graph):
    a, b = (x[LAYER].expand(adapter.num_agents, -1, -1, -1) for x in (adapter.A, adapter.B))
    return float(lowrank.interference(a, b, torch.from_numpy(graph.weights.copy())).norm())


# --- convergence --------------------------------------------------------------------------------------------


class Noisy(Quadratic):
    """Five seeds side by side, each its own network of n agents: gradients with noise of their own."""

    def __init__(self, n, seeds=5):
        parts = [Quadratic(n, seed, spread=0.3) for seed in range(seeds)]
        self.n, self.seeds = n, seeds
        self.targets = torch.cat([p.targets for p in parts])
        self.squares = torch.cat([p.squares for p in parts])
        self.start = with_layer(*(torch.cat([getattr(p.start, f)[LAYER] for p in parts]) for f in "AB"))
        self.generator = torch.Generator().manual_seed(0)

    def gradients(self, adapter, trained):
        exact = super().gradients(adapter, trained)
        return {k: g + 0.5 * torch.randn(g.shape, generator=self.generator, dtype=g.dtype) for k, g in exact.items()}

    def square_gradient(self, adapter):
        """(seeds,) of sum_i f_i / n at the mean factors of each network."""
        mean = [x[LAYER].unflatten(0, (self.seeds, self.n)).mean(1) for x in (adapter.A, adapter.B)]
        spread = with_layer(*(x.repeat_interleave(self.n, 0) for x in mean))
        whole = super().gradients(spread, {"A", "B"}).values()
        return sum(g.unflatten(0, (self.seeds, self.n)).mean(1).square().flatten(1).sum(1) for g in whole)


@pytest.mark.parametrize("n", [4, 16, 64])
@pytest.mark.parametrize("name", ["dlora", "decaf"])
def test_the_gradient_vanishes_like_one_over_the_root_of_time(name, n):
    """Step size c / sqrt(T): the mean square gradient over T rounds falls as T^-1/2 (5 seeds)."""
    network = Graph(np.kron(np.eye(5), graphs.ring(n).weights), connected=False)
    blocks = Schedule("five networks", 5 * n, lambda round: network)
    horizons, means = (50, 200, 800), []
    for horizon in horizons:
        problem, squares = Noisy(n), []
        train(
            problem,
            algorithms.make(name),
            blocks,
            rounds=horizon,
            steps=1,
            learning_rate=1.0 / math.sqrt(horizon),
            each_round=lambda round_, adapter, state, p=problem, s=squares: s.append(p.square_gradient(adapter)),
        )
        means.append(torch.stack(squares).mean(0))
    slopes = (means[-1] / means[0]).log() / math.log(horizons[-1] / horizons[0])
    assert float(slopes.mean()) == pytest.approx(-0.5, abs=0.1)
