"""One contract suite over every algorithm, then each rule against a hand-computed truth."""

import numpy as np
import pytest
import torch

from decaf_lora import algorithms, graphs, lowrank
from decaf_lora.adapters.adapter import ALL_FACTORS, concatenate
from decaf_lora.adapters.names import flattened
from decaf_lora.algorithms import GAUGES, Round
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.errors import UserError
from rounds import begun, one_round, sent, setting
from samples import LAYERS, make_adapter, products

VARIANTS = {
    **{name: (name, {}) for name in algorithms.KINDS},
    **{f"{name}-quasi-global": (name, {"quasi_global": 0.9}) for name in ("dlora", "dlora_fa", "decaf_tracked")},
    **{f"{name}-int8": (name, {"messages": "int8"}) for name in ("dlora", "dlora_fa", "decaf_tracked")},
    "alternating-both": ("alternating", {"mixes": "both", "messages": "int8"}),
    "core-tracked": ("core", {"tracking": True, "messages": "int8"}),
    "dlora-outer": ("dlora", {"transforms": ["personal_head", "outer_momentum", "proximal:0.1"]}),
    "decaf-feedback": ("decaf", {"truncation_feedback": 1.0}),
    "decaf-all": (
        "decaf_tracked",
        {
            "gauge": "balanced",
            "moments": "transport",
            "truncation_feedback": 0.9,
            "quasi_global": 0.5,
            "messages": "int8",
        },
    ),
}
"""Every algorithm, and the options that change state, messages or moments."""


def make(variant):
    name, options = VARIANTS[variant]
    return algorithms.make(name, **options)


def graph_for(algorithm, n):
    if algorithm.topology == "server":
        return graphs.Graph.server(np.arange(1, n + 1))
    return graphs.ring(n)


CASES = [
    pytest.param(name, n, unequal, id=f"{name}-{n}-{'unequal' if unequal else 'equal'}")
    for name in VARIANTS
    for n in (1, 2, 3, 7)
    for unequal in (False, True)
    if not (unequal and make(name).rule.alike)  # refused: test_methods.py
]


@pytest.mark.parametrize(("name", "n", "unequal"), CASES)
class TestContract:
    def test_shapes_types_and_purity(self, name, n, unequal):
        algorithm = make(name)
        adapter = begun(algorithm, make_adapter(n, unequal=unequal))
        before = {k: t.clone() for k, t in adapter.tensors().items()}
        out, state = one_round(algorithm, adapter, graph_for(algorithm, n))
        assert {k: (t.shape, t.dtype) for k, t in out.tensors().items()} == {
            k: (t.shape, t.dtype) for k, t in before.items()
        }
        assert all(torch.equal(t, before[k]) for k, t in adapter.tensors().items())  # inputs untouched
        assert all(t.shape[0] == n for t in flattened(state).values())
        assert all(torch.isfinite(t).all() for t in out.tensors().values())
        assert all(torch.equal(t, out.tensors()[k]) for k, t in out.trim(out.tensors()).items())  # within own ranks

    def test_trained_factors_are_named(self, name, n, unequal):
        trains = make(name).trains(Round(1))
        assert trains <= ALL_FACTORS
        assert trains & {"B", "core"}

    def test_message_has_the_agent_axis(self, name, n, unequal):
        algorithm = make(name)
        adapter = begun(algorithm, make_adapter(n, unequal=unequal))
        message = sent(algorithm, adapter, algorithm.init(adapter, setting(adapter)))
        assert all(t.shape[0] == n for t in message.values())
        assert bool(message) == (algorithm.topology in ("graph", "server"))

    def test_agents_that_agree_stay_where_they_are(self, name, n, unequal):
        algorithm = make(name)
        adapter = begun(algorithm, make_adapter(1, unequal=unequal)).select([0] * n)
        out, _ = one_round(algorithm, adapter, graph_for(algorithm, n))
        for layer in LAYERS:
            expected, got = products(adapter.folded(), layer), products(out.folded(), layer)
            if "messages" not in VARIANTS[name][1]:
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
                continue
            # Entries are rounded by at most max / 254; truncating the sum of such products may double the error.
            a, b = adapter.A[layer], adapter.B[layer]
            off_a, off_b = (x.abs().amax((1, 2)) / 254 * x[0].numel() ** 0.5 for x in (a, b))
            size_a, size_b = a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)
            bound = adapter.scale[layer] * (size_a * off_b + size_b * off_a + off_a * off_b)
            assert ((got - expected).flatten(1).norm(dim=1) <= 2 * bound).all()

    def test_split_over_processes_changes_nothing(self, name, n, unequal):
        """Every agent on its own process, with only the messages that reach it, gets the same bits."""
        algorithm = make(name)
        adapter = begun(algorithm, make_adapter(n, unequal=unequal))
        graph = graph_for(algorithm, n)
        together, _ = one_round(algorithm, adapter, graph)
        message = sent(algorithm, adapter, algorithm.init(adapter, setting(adapter)))
        alone = []
        for agent in range(n):
            senders = [int(j) for j in np.flatnonzero(graph.weights[agent])]
            received = {k: t[senders] for k, t in message.items()}
            inbox = Inbox.from_weights(received, graph.weights, senders, [agent])
            own = adapter.select([agent])
            _, state = algorithm.send(own, algorithm.init(own, setting(own)), Round(1))
            alone.append(algorithm.combine(own, state, inbox, Round(1)).adapter)
        joined = concatenate(alone)
        for key, tensor in together.tensors().items():
            torch.testing.assert_close(joined.tensors()[key], tensor, rtol=1e-12, atol=1e-12)

    def test_state_is_checkpointable_and_moments_keep_their_names(self, name, n, unequal):
        algorithm = make(name)
        adapter = begun(algorithm, make_adapter(n, unequal=unequal))
        _, state = one_round(algorithm, adapter, graph_for(algorithm, n))
        first = {k: torch.ones_like(t) for k, t in adapter.tensors().items()}
        second = {k: torch.ones_like(t) for k, t in adapter.tensors().items()}
        new_first, new_second = algorithm.moments(state, first, second)
        assert {k: t.shape for k, t in new_first.items()} == {k: t.shape for k, t in first.items()}
        assert all((t >= 0).all() for t in new_second.values())
        assert algorithm.moments(state, first, {})[1] == {}  # SGD has no second moment


def test_dlora_averages_each_factor_by_hand():
    adapter, graph = make_adapter(5), graphs.ring(5)
    out, _ = one_round(algorithms.dlora(), adapter, graph)
    weights = torch.from_numpy(graph.weights)
    for layer in LAYERS:
        torch.testing.assert_close(out.A[layer], torch.einsum("ij,jab->iab", weights, adapter.A[layer]))
        torch.testing.assert_close(out.B[layer], torch.einsum("ij,jab->iab", weights, adapter.B[layer]))
    expected = torch.einsum("ij,jab->iab", weights, adapter.extras["head.weight"])
    torch.testing.assert_close(out.extras["head.weight"], expected)


def test_dlora_fa_keeps_a_and_sends_half():
    algorithm, adapter = algorithms.dlora_fa(), make_adapter(5, common_a=True)
    message = sent(algorithm, adapter, algorithm.init(adapter, setting(adapter)))
    assert not any(key.startswith("A/") for key in message)
    assert algorithm.trains(Round(1)) == {"B", "extras"}
    out, _ = one_round(algorithm, adapter, graphs.ring(5))
    weights = torch.from_numpy(graphs.ring(5).weights)
    for layer in LAYERS:
        assert torch.equal(out.A[layer], adapter.A[layer])
        mixed = torch.einsum("ij,jab->iab", weights, products(adapter, layer))
        torch.testing.assert_close(products(out, layer), mixed)  # exactly linear in the product


def dense_truth(adapter, graph, layer, rank):
    z = np.einsum("ij,jab->iab", graph.weights, products(adapter, layer).numpy())
    u, s, vh = np.linalg.svd(z)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


@pytest.mark.parametrize("gauge", [*GAUGES, "rotated"])
@pytest.mark.parametrize("kind", ["ring", "complete", "star", "line"])
def test_decaf_is_the_truncated_svd_of_the_mixed_products(gauge, kind):
    adapter, graph = make_adapter(6), graphs.parse(kind, 6, 0)
    out, _ = one_round(algorithms.decaf(gauge=gauge), adapter, graph)
    for layer, (rank, _, _) in LAYERS.items():
        expected = dense_truth(adapter, graph, layer, rank)
        torch.testing.assert_close(products(out, layer), torch.from_numpy(expected), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("gauge", GAUGES)
def test_decaf_never_kills_a_fresh_adapter(gauge):
    """B starts at 0, so the first product is 0; A must stay alive or both gradients are 0 for ever."""
    adapter = make_adapter(4, common_a=True)
    adapter = adapter.with_tensors({f"B/{k}": torch.zeros_like(b) for k, b in adapter.B.items()})
    out, _ = one_round(algorithms.decaf(gauge=gauge), adapter, graphs.ring(4))
    for layer in LAYERS:
        assert out.A[layer].norm(dim=-1).min() > 0.1 * adapter.A[layer].norm(dim=-1).mean()
        assert not out.B[layer].any()


@pytest.mark.parametrize("gauge", ["balanced-rotated", "orthonormal-rotated"])
def test_decaf_own_frame_stays_near_the_agents_own_factors(gauge):
    adapter = make_adapter(5)
    own, _ = one_round(algorithms.decaf(gauge=gauge, reference="own"), adapter, graphs.ring(5))
    average, _ = one_round(algorithms.decaf(gauge=gauge), adapter, graphs.ring(5))
    for layer in LAYERS:
        torch.testing.assert_close(products(own, layer), products(average, layer), rtol=1e-7, atol=1e-7)
    distance_own = sum((own.A[k] - adapter.A[k]).norm() for k in LAYERS)
    distance_average = sum((average.A[k] - adapter.A[k]).norm() for k in LAYERS)
    assert distance_own < distance_average


def test_decaf_moments_are_transported_with_the_frame():
    """A rotation of the factors rotates the first moment; resetting zeroes LoRA's moments only."""
    algorithm, adapter = algorithms.decaf(gauge="balanced", moments="transport"), make_adapter(3)
    out, state = one_round(algorithm, adapter, graphs.complete(3))
    first = dict(adapter.tensors())  # moments that equal the old factors must follow the factors' frame
    turned, _ = algorithm.moments(state, first, {})
    for layer in LAYERS:
        frame = lowrank.frame_change(adapter.A[layer], adapter.B[layer], out.A[layer], out.B[layer])
        torch.testing.assert_close(turned[f"A/{layer}"], frame @ adapter.A[layer])
        torch.testing.assert_close(turned[f"B/{layer}"], adapter.B[layer] @ frame.mT)
        # The product of the transported pair is the old product: the frame change is orthogonal.
        torch.testing.assert_close(turned[f"B/{layer}"] @ turned[f"A/{layer}"], adapter.B[layer] @ adapter.A[layer])
    reset = algorithms.decaf(moments="reset")
    _, state = one_round(reset, adapter, graphs.complete(3))
    zeroed, _ = reset.moments(state, first, {})
    assert not zeroed["A/x"].any()
    assert torch.equal(zeroed["extras/head.weight"], first["extras/head.weight"])


def test_fedavg_is_dlora_on_a_complete_graph_with_equal_sizes():
    adapter = make_adapter(6)
    server, _ = one_round(algorithms.fedavg(), adapter, graphs.Graph.server([7] * 6))
    gossip, _ = one_round(algorithms.dlora(), adapter, graphs.complete(6))
    for key, tensor in server.tensors().items():
        assert torch.equal(tensor, gossip.tensors()[key])


def test_fedavg_weighs_by_sample_size():
    adapter = make_adapter(3)
    out, _ = one_round(algorithms.fedavg(), adapter, graphs.Graph.server([1, 2, 5]))
    expected = (adapter.A["x"] * torch.tensor([1 / 8, 2 / 8, 5 / 8])[:, None, None].double()).sum(0)
    torch.testing.assert_close(out.A["x"], expected.expand(3, -1, -1))


def test_equal_rows_are_computed_once_and_unequal_degrees_apart():
    message = {"t": torch.arange(5.0)[:, None]}
    complete = Inbox.from_weights(message, graphs.complete(5).weights, range(5), range(5))
    assert [g.senders.shape for g in complete.groups] == [(1, 5)]
    star = Inbox.from_weights(message, graphs.star(5).weights, range(5), range(5))
    assert sorted(tuple(g.senders.shape) for g in star.groups) == [(1, 5), (4, 2)]
    expected = torch.from_numpy(graphs.star(5).weights).float() @ message["t"]
    torch.testing.assert_close(star.average("t"), expected)


def test_disagreement_on_a_ring_shrinks_by_sigma_2_and_the_mean_stays():
    """Gossip theory: the worst disagreement contracts by exactly sigma_2 a round."""
    graph = graphs.ring(8)
    values, vectors = np.linalg.eigh(graph.weights)
    worst = vectors[:, np.argsort(-np.abs(values))[1]]
    adapter = make_adapter(8)
    start = torch.from_numpy(worst)[:, None, None] * torch.ones_like(adapter.A["x"])
    adapter = adapter.with_tensors({"A/x": start + 1})
    out, _ = one_round(algorithms.dlora(), adapter, graph)
    torch.testing.assert_close(out.A["x"] - 1, graph.sigma_2 * start)
    torch.testing.assert_close(out.A["x"].mean(0), adapter.A["x"].mean(0))


def test_interference_is_what_separates_factor_from_product_mixing():
    adapter, graph = make_adapter(5), graphs.ring(5)
    out, _ = one_round(algorithms.dlora(), adapter, graph)
    weights = torch.from_numpy(graph.weights)
    for layer in LAYERS:
        mixed = torch.einsum("ij,jab->iab", weights, products(adapter, layer))
        gap = (mixed - products(out, layer)).flatten(1).norm(dim=1)
        rows = [np.flatnonzero(graph.weights[i]) for i in range(5)]
        closed = [
            lowrank.interference(adapter.A[layer][j], adapter.B[layer][j], weights[i, j]) * 2.0
            for i, j in enumerate(rows)
        ]
        torch.testing.assert_close(gap, torch.stack(closed))


@pytest.mark.parametrize("name", ["dlora", "dlora_fa", "decaf"])
def test_moments_reset_empties_those_of_the_factors_only(name):
    algorithm, adapter = algorithms.make(name, moments="reset"), make_adapter(3, common_a=True)
    _, state = one_round(algorithm, adapter, graphs.ring(3))
    ones = {k: torch.ones_like(t) for k, t in adapter.tensors().items()}
    for moments in algorithm.moments(state, ones, ones):
        assert not any(moments[k].any() for k in moments if not k.startswith("extras/"))
        assert all(moments[k].all() for k in moments if k.startswith("extras/"))
    assert algorithm.name == name


def test_unknown_names_and_options_are_refused_with_a_hint():
    with pytest.raises(UserError, match="Did you mean 'decaf'"):
        algorithms.make("decav")
    with pytest.raises(UserError, match=r"algorithm\.gauge: dlora does not take this option; it belongs to decaf"):
        algorithms.make("dlora", gauge="balanced")
    with pytest.raises(UserError, match=r"algorithm\.gauge: 'balance' is not known\. Did you mean 'balanced'"):
        algorithms.make("decaf", gauge="balance")
    with pytest.raises(UserError, match=r"algorithm\.moments"):
        algorithms.make("decaf", moments="kept")
    with pytest.raises(UserError, match=r"algorithm\.moments: dlora takes keep or reset, not 'transport'"):
        algorithms.make("dlora", moments="transport")
    assert algorithms.make("dlora-fa").name == "dlora_fa"


def test_of_options_for_several_algorithms_each_takes_its_own():
    given = {"gauge": "balanced", "transforms": ["int8"], "nobodys": 1}
    assert algorithms.accepted("decaf", given) == {"gauge": "balanced", "transforms": ["int8"]}
    assert algorithms.accepted("dlora", given) == {"transforms": ["int8"]}
    assert algorithms.accepted("local", given) == {}
