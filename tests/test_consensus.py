"""How far apart agents are and what their average is, against dense products in float64."""

import dataclasses

import numpy as np
import pytest
import torch

from decaf_lora import algorithms, consensus, graphs
from decaf_lora.adapters.adapter import Adapter
from decaf_lora.engines import Simulate
from decaf_lora.errors import UserError
from decaf_lora.exchange import Exchange
from decaf_lora.graphs import as_schedule

SHAPES = {"first": (5, 7), "second": (9, 4), "third": (5, 7)}


def adapters(n, rank=2, seed=0, extras=True):
    """n agents at random, with scales of their own in every layer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    scale = {k: 0.5 + torch.rand(n, generator=generator) for k in SHAPES}
    return Adapter(
        {k: draw(n, rank, d_in) for k, (_, d_in) in SHAPES.items()},
        {k: draw(n, d_out, rank) for k, (d_out, _) in SHAPES.items()},
        scale,
        {"head": draw(n, 3)} if extras else {},
    )


def dense(adapter, layer):
    """(n, d_out, d_in) products in float64."""
    return (
        adapter.scale[layer].double()[:, None, None] * (adapter.B[layer].double() @ adapter.A[layer].double())
    ).numpy()


def inbox_of(adapter, graph, algorithm="decaf"):
    """What everybody receives in an exchange on `graph`."""
    exchange = Exchange(algorithms.make(algorithm), as_schedule(graph), Simulate(adapter.num_agents))
    return exchange.finish(adapter, exchange.start(adapter, exchange.init(adapter), 1)).inbox


@pytest.mark.parametrize("n", [1, 2, 3, 8])  # from 3 on some layers are measured by their dense mean
def test_distance_against_dense_products(n):
    adapter = adapters(n)
    squares = sum(((z - z.mean(0)) ** 2).sum() for z in (dense(adapter, k) for k in SHAPES))
    assert consensus.distance(adapter) == pytest.approx((squares / n) ** 0.5, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_distance_of_large_layers_against_dense_products(n):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, *shape, generator=generator) for shape in ((2, 30), (40, 2)))
    adapter = Adapter({"w": a}, {"w": b}, {"w": torch.arange(1.0, n + 1)}, {})
    products = dense(adapter, "w")
    expected = (((products - products.mean(0)) ** 2).sum() / n) ** 0.5
    assert consensus.distance(adapter) == pytest.approx(expected, rel=1e-6)
    agreed = adapter.select([0] * n)
    assert consensus.distance(agreed) == pytest.approx(0, abs=1e-9)
    nearly = agreed.with_tensors({"B/w": agreed.B["w"] + 1e-6 * torch.arange(n)[:, None, None]})
    assert 0 < consensus.distance(nearly) < 1e-3


@pytest.mark.parametrize("n", [1, 2, 5])
def test_averaged_is_the_best_rank_r_mean_of_products(n):
    adapter = adapters(n)
    mean = consensus.averaged(adapter)
    assert mean.num_agents == 1
    for layer in SHAPES:
        u, s, vh = np.linalg.svd(dense(adapter, layer).mean(0))
        np.testing.assert_allclose(dense(mean, layer)[0], (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-4, atol=1e-5)
        assert mean.scale[layer].tolist() == adapter.scale[layer][:1].tolist()  # of the first of the largest ranks
    torch.testing.assert_close(mean.extras["head"][0], adapter.extras["head"].mean(0))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_agents_agree_only_if_every_number_is_the_same(n):
    same = adapters(n).select([0] * n)
    assert consensus.agree(same)
    for layer in SHAPES:  # then the averaged model is theirs
        np.testing.assert_allclose(dense(consensus.averaged(same), layer)[0], dense(same, layer)[0], atol=1e-5)
    for tensors in (same.A, same.B, same.scale, same.extras):
        for name, tensor in list(tensors.items()):
            other = tensor.clone()
            other[-1].view(-1)[-1] += 1e-3
            tensors[name] = other
            assert consensus.agree(same) == (n == 1)
            tensors[name] = tensor
    assert consensus.agree(same)


def test_chosen_is_an_agent_or_the_average():
    adapter = adapters(3)
    for agent in range(3):
        alone = consensus.chosen(adapter, agent)
        assert torch.equal(alone.A["first"], adapter.A["first"][agent : agent + 1])
    both = consensus.chosen(adapter, "averaged"), consensus.averaged(adapter)
    assert torch.equal(both[0].B["first"], both[1].B["first"])
    for wrong in (3, -1, "mean", 1.0):
        with pytest.raises(UserError, match="is not in this run; use 0 to 2 or 'averaged'"):
            consensus.chosen(adapter, wrong)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_interference_and_tail_against_dense_products(n):
    """What mixing factors does to the mean product, and what truncating the mixed product cuts off."""
    adapter, graph = adapters(n), graphs.ring(n)
    interference, tail = consensus.interference_and_tail(adapter, inbox_of(adapter, graph))
    for agent, weights in enumerate(np.asarray(graph.weights)):
        mixed = {"interference": 0.0, "tail": 0.0}
        for layer in SHAPES:
            a, b = adapter.A[layer].double().numpy(), adapter.B[layer].double().numpy()
            scale = float(adapter.scale[layer][agent])
            product = scale * np.einsum("j,jor,jri->oi", weights, b, a)
            factors = scale * np.tensordot(weights, b, 1) @ np.tensordot(weights, a, 1)
            mixed["interference"] += ((factors - product) ** 2).sum()
            mixed["tail"] += (np.linalg.svd(product, compute_uv=False)[2:] ** 2).sum()
        assert float(interference[agent]) == pytest.approx(mixed["interference"] ** 0.5, rel=1e-5)
        assert float(tail[agent]) == pytest.approx(mixed["tail"] ** 0.5, rel=1e-4)


def test_neighbour_distance_against_dense_products():
    adapter, graph = adapters(4), graphs.ring(4)
    adapter = dataclasses.replace(adapter, scale={k: s[:1].expand(4) for k, s in adapter.scale.items()})
    inbox = inbox_of(adapter, graph)
    own = inbox.own[0]
    senders = [inbox.senders[k] for k in range(len(inbox.senders)) if k != own]
    assert len(senders) == 3  # a simulation receives of all
    products = [np.concatenate([dense(adapter, k)[i].ravel() for k in SHAPES]) for i in (0, *senders)]
    expected = np.mean([((p - products[0]) ** 2).sum() for p in products[1:]]) ** 0.5
    assert consensus.neighbour_distance(adapter, inbox) == pytest.approx(expected, rel=1e-6)


def test_without_both_factors_nothing_is_measured():
    adapter = adapters(3)
    inbox = inbox_of(adapter, graphs.ring(3), "dlora_fa")
    assert consensus.interference_and_tail(adapter, inbox) is None
    assert consensus.neighbour_distance(adapter, inbox) is None
