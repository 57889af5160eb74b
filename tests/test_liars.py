"""Neighbours that lie: what the robust transforms bound, and what they compute when nobody lies."""

import numpy as np
import pytest
import torch

from decaf_lora import algorithms, graphs
from decaf_lora.algorithms import Transform
from decaf_lora.errors import UserError
from quadratic import Quadratic, train
from rounds import begun, one_round
from samples import LAYERS, make_adapter, products


def liar(change, agent=0, kinds=("A", "B", "core", "extras")):
    """One agent sends `change(tensor)` instead of what it has, for tensors of these kinds."""

    def send(adapter, state, message, round_):
        sent = {k: t.clone() for k, t in message.items()}
        for name, t in sent.items():
            if name.split("/")[0] in kinds:
                t[agent] = change(t[agent])
        return sent, state

    return Transform("liar", send=send)


def models(adapter):
    """(n, P): the products of all layers and the extras of every agent in a row."""
    parts = [products(adapter.folded(), layer).flatten(1) for layer in LAYERS]
    return torch.cat([*parts, *(t.flatten(1) for t in adapter.extras.values())], 1).numpy()


def clipped_by_hand(x, weights, tau):
    out = x.copy()
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i and weights[i, j]]
        apart = {j: np.linalg.norm(x[j] - x[i]) for j in others}
        bound = tau or sorted(apart.values())[(len(others) - 1) // 2]
        for j in others:
            out[i] += weights[i, j] * min(1, bound / apart[j]) * (x[j] - x[i])
    return out


@pytest.mark.parametrize("tau", [None, 3.0, 1e6])
@pytest.mark.parametrize("kind", ["ring", "star", "complete"])
def test_clipped_gossip_is_the_papers_rule(kind, tau):
    algorithm, graph = algorithms.core() | algorithms.clipped(tau), graphs.parse(kind, 6, 0)
    adapter = begun(algorithm, make_adapter(6))
    out, _ = one_round(algorithm, adapter, graph)
    np.testing.assert_allclose(models(out), clipped_by_hand(models(adapter), graph.weights, tau), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("unequal", [False, True])
def test_over_decaf_it_clips_the_products_before_the_truncation(unequal):
    algorithm, adapter, graph = (
        algorithms.decaf() | algorithms.clipped(),
        make_adapter(4, unequal=unequal),
        graphs.ring(4),
    )
    out, _ = one_round(algorithm, adapter, graph)
    expected = torch.from_numpy(clipped_by_hand(models(adapter), graph.weights, None))
    start = 0
    for layer, (_, d_in, d_out) in LAYERS.items():
        z = expected[:, start : start + d_in * d_out].view(-1, d_out, d_in)
        start += d_in * d_out
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        for agent, rank in enumerate(adapter.rank_of(layer).tolist()):
            cut = u[agent, :, :rank] * s[agent, :rank] @ vh[agent, :rank]
            torch.testing.assert_close(products(out, layer)[agent], cut, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lie", [lambda t: -1e9 * t, lambda t: t + torch.inf, lambda t: t * torch.nan])
def test_no_lie_moves_an_agent_by_more_than_the_bound(lie):
    graph = graphs.ring(6)
    algorithm = algorithms.core() | liar(lie) | algorithms.clipped(2.0)
    adapter = begun(algorithm, make_adapter(6))
    out, _ = one_round(algorithm, adapter, graph)
    moved = np.linalg.norm(models(out) - models(adapter), axis=1)[1:]  # of the honest
    assert (moved <= 2.0 * (1 - np.diag(graph.weights))[1:] * (1 + 1e-9)).all()
    assert (moved > 0).all()


@pytest.mark.parametrize("count", [1, 2])
def test_a_trimmed_mean_is_the_papers_in_every_entry(count):
    graph = graphs.parse("complete", 7, 0)
    adapter = make_adapter(7)
    out, _ = one_round(algorithms.dlora() | algorithms.trimmed(count), adapter, graph)
    for name, t in adapter.tensors().items():
        for agent in range(7):
            others = np.sort(np.delete(t.numpy(), agent, axis=0), axis=0)[count : 6 - count]
            expected = np.concatenate([t[agent : agent + 1].numpy(), others]).mean(0)
            np.testing.assert_allclose(out.tensors()[name][agent].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("lie", [lambda t: -1e9 * t, lambda t: t * torch.nan])
def test_a_trimmed_mean_stays_among_the_honest(lie):
    adapter = make_adapter(6)
    algorithm = algorithms.dlora() | liar(lie) | algorithms.trimmed()
    out, _ = one_round(algorithm, adapter, graphs.complete(6))
    for name, t in adapter.tensors().items():
        honest, got = t[1:], out.tensors()[name][1:]
        assert ((got >= honest.amin(0) - 1e-12) & (got <= honest.amax(0) + 1e-12)).all()


@pytest.mark.parametrize(("name", "transform"), [("decaf", "clipped"), ("dlora", "trimmed"), ("dlora_fa", "trimmed")])
def test_one_liar_in_ten_costs_little(name, transform):
    """Ten agents on a 4-regular graph, one sends the opposite of its model: the honest ones come near the optimum."""
    problem, graph = Quadratic(10, spread=0.1), graphs.parse("random-regular:4", 10, 0)

    def error(*transforms):
        algorithm = algorithms.make(name)
        for one in transforms:
            algorithm = algorithm | one
        adapter, _ = train(problem, algorithm, graph, 60, steps=5, learning_rate=0.05)
        return problem.error(adapter.select(range(1, 10)))

    flip = liar(lambda t: -t, kinds=("B",))
    defended, plain, honest = error(flip, getattr(algorithms, transform)()), error(flip), error()
    assert defended < 0.35 * plain
    assert defended < 0.2 + 2 * honest


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("decaf", {"transforms": ["clipped:0"]}, r"clipped's tau = 0 is not above 0"),
        ("dlora", {"transforms": ["clipped"]}, r"dlora averages A and B each, which no distance of models bounds"),
        (
            "alternating",
            {"transforms": ["clipped"], "mixes": "both"},
            r"alternating averages A and B each, which no distance of models bounds",
        ),
        ("decaf", {"transforms": ["clipped"], "relay_rank": 4}, r"clipped needs every neighbour's own message"),
        ("decaf", {"transforms": ["trimmed"]}, r"decaf mixes products, not factors; use clipped over it"),
        ("dlora", {"transforms": ["trimmed:0"]}, r"trimmed's count = 0 is below 1"),
    ],
)
def test_what_cannot_be_bounded_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        algorithms.make(name, **options)


def test_what_a_run_cannot_bound_is_refused():
    with pytest.raises(
        UserError,
        match=r"trimmed drops 2 of 2 neighbours and leaves none; .* at least 3 .*, such as random-regular:4\.",
    ):
        one_round(algorithms.dlora() | algorithms.trimmed(), make_adapter(5), graphs.ring(5))
    with pytest.raises(UserError, match=r"clipped bounds models alone, and tracking sends more.*; leave tracking out"):
        one_round(algorithms.decaf_tracked() | algorithms.clipped(), make_adapter(5), graphs.ring(5))
    with pytest.raises(UserError, match=r"trimmed needs agents of one rank and scale"):
        one_round(algorithms.dlora() | algorithms.trimmed(), make_adapter(5, unequal=True), graphs.complete(5))
    with pytest.raises(UserError, match=r"clipped bounds what neighbours send, and fedavg has none"):
        algorithms.fedavg() | algorithms.clipped()
