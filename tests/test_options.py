"""Truncation feedback, quasi-global momentum and int8 messages against their formulas, written by hand."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch

import test_ranks
from decaf_lora import algorithms, graphs, lowrank
from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import flattened
from decaf_lora.algorithms import Round, names
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.algorithms.transforms import table
from decaf_lora.errors import UserError
from decaf_lora.runs import checkpoint
from rounds import mix, one_round, sent, setting
from samples import LAYERS, make_adapter, products, random_gradients
from toy_runs import SGD, assert_near, corrections, finished, make_run


def small_adapter(n, unequal, d_in=5, d_out=3, seed=0):
    """Rank 2 of at most 3, so that one truncation and what it keeps of the rest hold everything."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in ((2, d_in), (d_out, 2)))
    one = torch.ones(n, dtype=torch.float64)
    if not unequal:
        return Adapter({"w": a}, {"w": b}, {"w": 2 * one}, {})
    adapter = Adapter({"w": a}, {"w": b}, {"w": 1.0 + torch.arange(n) % 3 * one}, {}, {"w": 1 + torch.arange(n) % 2})
    return adapter.with_tensors(adapter.trim(adapter.tensors()))


def moved(adapter, seed):
    """The adapter after some training."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        k: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for k, t in adapter.tensors().items()
    }
    return adapter.with_tensors(adapter.trim(tensors))


# --- truncation error feedback ------------------------------------------------------------------------------


def remainders(state, adapter, layer):
    """s R (n, d_out, d_in) of the state."""
    scale = adapter.scale[layer][:, None, None]
    return scale * (state["feedback"][f"B/{layer}"] @ state["feedback"][f"A/{layer}"])


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_with_feedback_mixing_conserves_the_mean_product(n, unequal):
    adapter, graph = small_adapter(n, unequal), graphs.ring(n)
    algorithm, plain = algorithms.decaf(truncation_feedback=1.0), algorithms.decaf()
    state, lost = algorithm.init(adapter, setting(adapter)), 0.0
    for round_ in range(1, 6):
        before = (products(adapter, "w") + remainders(state, adapter, "w")).mean(0)
        without, _ = one_round(plain, adapter, graph)
        lost += float((products(without, "w").mean(0) - products(adapter, "w").mean(0)).norm())
        adapter, state = one_round(algorithm, adapter, graph, round_, state)
        after = (products(adapter, "w") + remainders(state, adapter, "w")).mean(0)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
        adapter = moved(adapter, round_)
    assert n < 2 or lost > 0.1  # which plain DeCAF does not


@pytest.mark.parametrize("leak", [1.0, 0.5])
def test_feedback_is_the_rest_of_the_dense_truncated_svd(leak):
    adapter, graph = make_adapter(5), graphs.ring(5)
    algorithm = algorithms.decaf(truncation_feedback=leak)
    state = algorithm.init(adapter, setting(adapter))
    rest = {k: np.zeros(products(adapter, k).shape) for k in LAYERS}
    for round_ in (1, 2, 3):
        sent = {k: products(adapter, k).numpy() for k in LAYERS}
        adapter, state = one_round(algorithm, adapter, graph, round_, state)
        for layer, (r, _, _) in LAYERS.items():
            z = np.einsum("ij,jab->iab", graph.weights, sent[layer]) + leak * rest[layer]
            u, s, vh = np.linalg.svd(z)
            kept = (u[..., :r] * s[..., None, :r]) @ vh[..., :r, :]
            end = min(2 * r, s.shape[-1])
            rest[layer] = (u[..., r:end] * s[..., None, r:end]) @ vh[..., r:end, :]
            np.testing.assert_allclose(products(adapter, layer).numpy(), kept, atol=1e-7)
            np.testing.assert_allclose(remainders(state, adapter, layer).numpy(), rest[layer], atol=1e-7)
        adapter = moved(adapter, round_)


@pytest.mark.parametrize("method", ["qr", "gram"])
def test_the_rest_of_a_truncation_comes_with_it(method):
    adapter = make_adapter(4)
    a, b, weights = adapter.A["x"], adapter.B["x"], torch.full((4,), 0.25, dtype=torch.float64)
    plain = lowrank.mix_truncate(a, b, weights, 2, gauge="balanced_rotated", method=method)
    out = lowrank.mix_truncate(a, b, weights, 2, gauge="balanced_rotated", method=method, rest=7)
    u, s, vh = np.linalg.svd((0.25 * b @ a).sum(0).numpy())
    tail = (u[:, 2:] * s[2:]) @ vh[2:5]
    np.testing.assert_allclose((out.rest_b @ out.rest_a).numpy(), tail, atol=1e-6)  # 5 directions in all, 2 are 0
    assert (out.rest_a.shape, out.rest_b.shape) == ((7, 6), (5, 7))
    torch.testing.assert_close(out.tail, plain.tail)
    for name in ("A", "B"):
        torch.testing.assert_close(getattr(out, name), getattr(plain, name))
    assert plain.rest_a.shape == (0, 6)
    one = torch.ones(1, dtype=torch.float64)
    carried = lowrank.mix_truncate(a[:1], b[:1], one, 4, carried=(a[1], b[1]))
    torch.testing.assert_close(carried.B @ carried.A, b[0] @ a[0] + b[1] @ a[1])
    larger = a[1:].flatten(0, 1), b[1:].mT.flatten(0, 1).mT  # of rank 6, beside contributors of rank 2
    for some, whole in ((larger, b[1:] @ a[1:]), ((a[1, :1], b[1, :, :1]), b[1:2, :, :1] @ a[1:2, :1])):
        carried = lowrank.mix_truncate(a[:1], b[:1], one, 5, carried=some, method=method)
        torch.testing.assert_close(carried.B @ carried.A, b[0] @ a[0] + whole.sum(0))
    with pytest.raises(UserError, match=r"carried: need the shapes \(\.\.\., 1, 6\) and \(\.\.\., 5, 1\)"):
        lowrank.mix_truncate(a, b, weights, 2, carried=(a[0, :1], b[0]))


@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (1, 4, 2, 3)])
def test_feedback_beside_a_relay_of_a_larger_rank(ranks):
    """A relay that cuts nothing changes nothing."""
    runs = []
    for relay_rank in (None, 10):
        options = {"truncation_feedback": 1.0, "relay_rank": relay_rank}
        run = test_ranks.make_run(ranks=ranks, rounds=1, gossip_steps=2, options=options)
        list(run.train())
        mix(run, 2)  # what was kept comes back, without an optimizer that blows rounding up
        runs.append(run)
    for layer in runs[0].adapter.layers:
        ours, theirs = (products(run.adapter, layer) for run in runs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        kept = [remainders(run.state, run.adapter, layer) for run in runs]
        assert float(kept[0].norm()) > 0
        torch.testing.assert_close(*kept, rtol=1e-5, atol=1e-5)


# --- quasi-global momentum ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["dlora", "dlora_fa"])
def test_the_buffer_follows_the_model_from_round_to_round(name, n):
    algorithm, adapter = algorithms.make(name, quasi_global=0.9), make_adapter(n, common_a=True)
    graph, trained = graphs.ring(n), algorithm.trains(Round(1))
    weights = torch.from_numpy(graph.weights.copy())
    state = algorithm.init(adapter, setting(adapter))
    x = {k: t.clone() for k, t in adapter.tensors(trained).items()}
    q = {k: torch.zeros_like(t) for k, t in x.items()}
    first, second = random_gradients(adapter, trained, 1), random_gradients(adapter, trained, 2)
    second = {k: t.square() for k, t in second.items()}
    for round_ in (1, 2, 3):
        adapter = moved(adapter, round_)
        if name == "dlora_fa":
            adapter = dataclasses.replace(adapter, A=make_adapter(n, common_a=True).A)
        mixed = {k: torch.einsum("ij,j...->i...", weights, t) for k, t in adapter.tensors(trained).items()}
        adapter, state = one_round(algorithm, adapter, graph, round_, state)
        q = {k: 0.9 * q[k] + 0.1 * (x[k] - mixed[k]) for k in x}
        x = mixed
        new, same = algorithm.moments(state, first, second)
        for k, m in first.items():
            p = second[k].sqrt() * q[k]
            for i in range(n):
                torch.testing.assert_close(new[k][i], m[i].norm() * p[i] / p[i].norm())
        assert same is second
        momentum, _ = algorithm.moments(state, first, {})  # SGD
        for k, m in first.items():
            assert torch.nn.functional.cosine_similarity(momentum[k].flatten(), q[k].flatten(), 0) > 0.5
            torch.testing.assert_close(momentum[k].flatten(1).norm(dim=1), m.flatten(1).norm(dim=1))


def test_the_momentum_is_kept_where_nothing_moved():
    algorithm, adapter = algorithms.dlora(quasi_global=0.5), make_adapter(1).select([0, 0, 0])
    _, state = one_round(algorithm, adapter, graphs.ring(3))
    first = random_gradients(adapter, algorithm.trains(Round(1)), 0)
    zero = {k: torch.zeros_like(t) for k, t in first.items()}
    still = {k: torch.zeros_like(t) if k.startswith("q/") else t for k, t in state["quasi_global"].items()}
    state = state | {"quasi_global": still}
    for second in (zero, {}):
        new, _ = algorithm.moments(state, first, second)
        assert all(torch.equal(new[k], t) for k, t in first.items())


def test_after_a_step_along_the_buffer_the_model_moves_as_the_network_did():
    """AdamW's step with the new first moment and the second as it is has the direction of q."""
    algorithm, adapter = algorithms.dlora(quasi_global=0.0), make_adapter(4)
    state = algorithm.init(adapter, setting(adapter))
    after, state = one_round(algorithm, moved(adapter, 1), graphs.ring(4), 1, state)
    first, second = (
        random_gradients(adapter, algorithm.trains(Round(1)), 0),
        random_gradients(adapter, algorithm.trains(Round(1)), 1),
    )
    second = {k: t.square() for k, t in second.items()}
    new, _ = algorithm.moments(state, first, second)
    for k, m in new.items():
        step = (-m / second[k].sqrt()).flatten(1)
        went = (after.tensors()[k] - adapter.tensors()[k]).flatten(1)
        torch.testing.assert_close(step / step.norm(dim=1, keepdim=True), went / went.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("messages", ["full", "int8"])
@pytest.mark.parametrize("options", [{"gauge": "balanced"}, {"reference": "own"}])
def test_buffers_and_errors_are_carried_into_the_frame_of_the_factors(options, messages):
    """Gauges of one product differ by a rotation of the factors: all that is kept must differ by the same one."""
    adapter, graph = make_adapter(5), graphs.ring(5)
    results = []
    for chosen in ({"gauge": "balanced-rotated"}, options):
        algorithm = algorithms.decaf(quasi_global=0.5, messages=messages, **chosen)
        new, state = one_round(algorithm, moved(adapter, 1), graph, 1, algorithm.init(adapter, setting(adapter)))
        results.append((new, flattened(state)))
    (average, one), (other, two) = results
    for layer in LAYERS:
        p = lowrank.frame_change(average.A[layer], average.B[layer], other.A[layer], other.B[layer])
        assert (p - torch.eye(p.shape[-1])).abs().max() > 0.1
        for prefix in ("quasi_global/q/", "quasi_global/last/", *(["int8/"] if messages == "int8" else [])):
            torch.testing.assert_close(p @ one[f"{prefix}A/{layer}"], two[f"{prefix}A/{layer}"])
            torch.testing.assert_close(one[f"{prefix}B/{layer}"] @ p.mT, two[f"{prefix}B/{layer}"])


# --- int8 messages ------------------------------------------------------------------------------------------


def test_codes_scales_and_errors_by_hand():
    algorithm, adapter = algorithms.dlora(messages="int8"), make_adapter(3)
    state = algorithm.init(adapter, setting(adapter))
    message = sent(algorithm, adapter, state)
    assert set(message) == {f"int8/{kind}/{k}" for k in adapter.tensors() for kind in ("code", "scale")}
    for name, tensor in adapter.tensors().items():
        x = tensor.numpy()
        scale = np.abs(x).max(axis=(1, 2)) / 127
        code = np.rint(x / scale[:, None, None])
        assert message[f"int8/code/{name}"].dtype == torch.int8
        np.testing.assert_array_equal(message[f"int8/code/{name}"].numpy(), code)
        np.testing.assert_array_equal(message[f"int8/scale/{name}"].numpy(), scale)
        _, after = one_round(algorithm, adapter, graphs.ring(3), 1, state)
        np.testing.assert_allclose(after["int8"][name].numpy(), x - code * scale[:, None, None], atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_sums_are_kept_with_what_is_still_to_be_sent(n):
    algorithm, adapter, graph = algorithms.dlora(messages="int8"), make_adapter(n), graphs.ring(n)
    state = algorithm.init(adapter, setting(adapter))
    told, meant = 0.0, 0.0
    for round_ in range(1, 8):
        message = sent(algorithm, adapter, state, round_)
        told = told + message["int8/code/B/x"] * message["int8/scale/B/x"][:, None, None]
        meant = meant + adapter.B["x"]
        before = {k: (t + state["int8"][k]).sum(0) for k, t in adapter.tensors().items()}
        adapter, state = one_round(algorithm, adapter, graph, round_, state)
        for k, t in adapter.tensors().items():
            torch.testing.assert_close((t + state["int8"][k]).sum(0), before[k], rtol=0, atol=1e-12)
        # However many rounds: all that was sent is all that was meant but for the last round's error.
        torch.testing.assert_close(told + state["int8"]["B/x"], meant, rtol=0, atol=1e-12)
        adapter = moved(adapter, round_)


@pytest.mark.parametrize("name", ["dlora", "dlora_fa", "decaf"])
def test_corrections_and_their_errors_sum_to_zero(name):
    algorithm, adapter = algorithms.make(name, tracking=True, messages="int8"), make_adapter(5, common_a=True)
    state = algorithm.init(adapter, setting(adapter))
    for round_ in (1, 2, 3):
        _, state = algorithm.steer(state, random_gradients(adapter, algorithm.trains(Round(1)), round_), Round(round_))
        adapter, state = one_round(algorithm, adapter, graphs.ring(5), round_, state)
        for key, c in corrections(state).items():
            total = (c + state["int8"][f"tracking/{key}"]).sum(0)
            torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)
            assert c.sum(0).abs().max() > 1e-6  # by themselves they do not


def test_what_is_not_finite_is_not_hidden():
    adapter = make_adapter(3)
    adapter.A["x"][1, 0, 0] = torch.inf
    out, _ = one_round(algorithms.dlora(messages="int8"), adapter, graphs.star(3))
    assert not torch.isfinite(out.A["x"][1]).all()
    assert torch.isfinite(out.A["x"][2]).all()  # not a neighbour of agent 1


def test_bytes_are_a_quarter_and_measures_are_of_what_the_codes_stand_for():
    for name in ("dlora", "dlora_fa", "decaf", "decaf_tracked"):
        _, full = finished(name, rounds=2)
        run, coded = finished(name, rounds=2, messages="int8")
        matrices = [t for t in sent(run.algorithm, run.adapter, run.state, 2).values() if t.dtype == torch.int8]
        bias = 4 * sum(t[0].numel() for k, t in run.adapter.tensors().items() if t.dim() == 2)
        bias *= 2 if name == "decaf_tracked" else 1
        want = (full[-1].bytes_sent / 2 - bias) / 4 + bias + 4 * len(matrices)  # two neighbours
        assert [r.bytes_sent for r in coded[1:]] == [2 * want] * 2
        for measure in ("interference", "tail"):
            expected = getattr(full[-1], measure)
            assert getattr(coded[-1], measure) == (expected if expected is None else pytest.approx(expected, rel=0.2))


@pytest.mark.parametrize("name", ["dlora", "decaf_tracked"])
def test_over_several_exchanges_codes_are_forwarded_whole(name):
    complete, one = finished(name, 6, graphs.complete(6), messages="int8")
    exact, several = finished(name, 6, graphs.parse("base:3", 6, 0), gossip_steps="period", messages="int8")
    assert_near(complete, exact)
    codes = sent(exact.algorithm, exact.adapter, exact.state)
    size = sum(t[0].numel() * t.element_size() for k, t in codes.items() if k.startswith("int8/"))
    assert one[-1].bytes_sent >= several[-1].bytes_sent - 100 >= 5 * size - 100  # everybody's reach each agent once


# --- all together, in a run ---------------------------------------------------------------------------------

EVERYTHING = [
    ("dlora", {"quasi_global": 0.9, "messages": "int8", "gossip_steps": 2}),
    ("dlora_fa", {"quasi_global": 0.5, "tracking": True, "order": "combine-adapt"}),
    ("decaf", {"truncation_feedback": 0.9, "quasi_global": 0.9, "moments": "transport"}),
    ("decaf_tracked", {"truncation_feedback": 1.0, "quasi_global": 0.9, "messages": "int8", "gauge": "balanced"}),
]


@pytest.mark.parametrize(("name", "options"), EVERYTHING)
def test_resumed_within_a_round_equals_uninterrupted_bit_for_bit(name, options, tmp_path):
    options = {"n": 8, "graph": graphs.one_peer_hypercube(8), "rounds": 5, "training": SGD, **options}
    whole, expected = finished(name, **options)
    first = make_run(name, **options)
    first.on_step = lambda round_, done, steps, losses: first.stop() if (round_, done) == (3, 2) else None
    got = list(first.train())
    checkpoint.save(tmp_path, *first.snapshot())
    second = make_run(name, **options)
    second.restore(*checkpoint.load_latest(tmp_path))
    got += list(second.train())
    assert [dataclasses.replace(r, seconds={}) for r in got] == [dataclasses.replace(r, seconds={}) for r in expected]
    for key, tensor in whole.snapshot()[0].items():
        assert torch.equal(second.snapshot()[0][key], tensor), key


@pytest.mark.parametrize("options", [{"quasi_global": 0.9}, {"truncation_feedback": 1.0}])
def test_nothing_more_is_sent(options):
    _, plain = finished("decaf", rounds=3)
    _, other = finished("decaf", rounds=3, **options)
    assert [r.bytes_sent for r in other] == [r.bytes_sent for r in plain]
    assert other[-1].losses != plain[-1].losses


def test_what_they_refuse():
    for leak in (0.0, -1.0, 1.5):
        with pytest.raises(UserError, match=r"algorithm\.truncation_feedback: .* is not above 0 and at most 1"):
            algorithms.decaf(truncation_feedback=leak)
    for mu in (-0.1, 1.0):
        with pytest.raises(UserError, match=r"algorithm\.quasi_global: .* is not at least 0 and below 1"):
            algorithms.dlora(quasi_global=mu)
    with pytest.raises(UserError, match=r"algorithm\.quasi_global: it needs the moments"):
        algorithms.decaf(quasi_global=0.9, moments="reset", tracking=True)
    with pytest.raises(UserError, match=r"algorithm\.messages: int8 cannot be combined with algorithm\.relay_rank"):
        algorithms.decaf(messages="int8", relay_rank=4)
    with pytest.raises(UserError, match=r"algorithm\.messages: 'int4' is not known\. Did you mean 'int8'"):
        algorithms.dlora(messages="int4")
    with pytest.raises(UserError, match="dlora does not take this option; it belongs to decaf, decaf_tracked"):
        algorithms.make("dlora", truncation_feedback=1.0)


def test_an_agent_reads_itself_as_the_others_do():
    algorithm, adapter = algorithms.dlora(messages="int8"), make_adapter(1)
    message, state = algorithm.send(adapter, algorithm.init(adapter, setting(adapter)), Round(1))
    inbox = Inbox.from_weights(message, np.ones((1, 1)), [0], [0])
    out, _, read = algorithm.combine(adapter, state, inbox, Round(1))
    assert read.tensors.keys() == adapter.tensors().keys()
    assert all(torch.equal(t, read.tensors[k]) for k, t in out.tensors().items())
    assert not torch.equal(out.A["x"], adapter.A["x"])


# --- defaults -----------------------------------------------------------------------------------------------


def test_an_option_has_the_same_default_wherever_it_is_taken():
    """Off, or what the documentation says; `gauge` alone is a rule's own."""
    stated = {
        "order": "adapt-combine",
        "moments": "keep",
        "messages": "full",
        "reference": "average",
        "relay_rank": None,
        "tracking": False,
        "tracking_gamma": 1.0,
        "quasi_global": None,
        "truncation_feedback": None,
        "interval": 1,
        "mixes": "trained",
        "proximal": 0.01,
        "server_learning_rate": 0.01,
        "server_momentum": 0.9,
        "server_beta_2": 0.99,
        "server_epsilon": 1e-3,
    }
    found: dict[str, set] = {}
    for name in names.KINDS:
        for option in inspect.signature(names.KINDS.find(name).kind.build).parameters.values():
            found.setdefault(option.name, set()).add(option.default)
    assert found.pop("gauge") == {"rotated", "orthonormal"}
    assert found == {option: {default} for option, default in stated.items()}
    transforms = {name: kind.build for name, kind in table.KINDS.items()}
    assert inspect.signature(transforms["proximal"]).parameters["mu"].default == stated["proximal"]
