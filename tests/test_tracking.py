"""Gradient tracking against theory: known optima, SCAFFOLD written by hand, conservation, frames, several exchanges."""

import dataclasses

import numpy as np
import pytest
import torch

from decaf_lora import algorithms, graphs, lowrank
from decaf_lora.adapters.adapter import concatenate
from decaf_lora.adapters.names import flattened
from decaf_lora.algorithms import Round
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.errors import UserError
from decaf_lora.graphs import Schedule
from decaf_lora.runs import checkpoint
from quadratic import LAYER, Quadratic, train
from rounds import one_round, repeated, sent, setting
from samples import LAYERS, make_adapter, products, random_gradients
from toy_runs import SGD, assert_near, corrections, finished, make_run

TRACKABLE = ["dlora", "dlora_fa", "decaf"]


def tracked(name, **options):
    return algorithms.make(name, tracking=True, **options)


# --- what it is for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("name", TRACKABLE)
def test_tracking_reaches_the_optimum_that_gossip_with_a_constant_step_misses(name, n):
    problem = Quadratic(n, spread=0.5)
    untracked, _ = train(problem, algorithms.make(name), graphs.ring(n), rounds=400)
    corrected, _ = train(problem, tracked(name), graphs.ring(n), rounds=400)
    assert problem.error(untracked) > 5e-3
    assert problem.error(corrected) < 1e-9


@pytest.mark.parametrize("gamma", [0.2, 0.5])
def test_damped_tracking_gets_there_too(gamma):
    problem = Quadratic(6)
    adapter, _ = train(problem, tracked("dlora_fa", tracking_gamma=gamma), graphs.ring(6), rounds=400)
    assert problem.error(adapter) < 1e-6


@pytest.mark.parametrize("name", TRACKABLE)
@pytest.mark.parametrize("spec", ["one-peer-hypercube", "base:2", "one-peer-exponential", "random-matching"])
def test_stable_on_graphs_over_time(name, spec):
    """One-peer graphs on 8 agents, among them the hypercube that broke tracking in our first trial."""
    problem = Quadratic(8, spread=0.3)
    schedule = graphs.parse(spec, 8, 0)
    untracked, _ = train(problem, algorithms.make(name), schedule, rounds=300, learning_rate=0.03)
    corrected, _ = train(problem, tracked(name), schedule, rounds=300, learning_rate=0.03)
    assert problem.error(untracked) > 5e-3
    assert problem.error(corrected) < 1e-5


def test_a_period_of_exact_exchanges_corrects_as_a_complete_graph_does():
    """c is updated once a period, from the first round's gradients mixed exactly: c_i = mean_j G_j - G_i."""
    schedule, problem = graphs.one_peer_hypercube(8), Quadratic(8)
    states = [tracked("dlora").init(problem.start, setting(problem.start, period=3))]
    train(problem, tracked("dlora"), schedule, rounds=9, each_round=lambda round_, adapter, state: states.append(state))
    for round_ in range(1, 10):
        before, after = corrections(states[round_ - 1]), corrections(states[round_])
        for name, c in after.items():
            if round_ % 3:
                assert torch.equal(c, before[name])
            else:
                g = states[round_ - 2]["tracking"][f"own/{name}"]
                torch.testing.assert_close(c, g.mean(0) - g)
                assert not torch.equal(c, before[name])


def test_what_is_sent_is_the_mean_gradient_since_it_was_last_sent():
    algorithm, adapter = tracked("dlora"), make_adapter(3)
    state, sums = algorithm.init(adapter, setting(adapter, period=2)), {}
    for round_ in (1, 2, 3):
        for step in range(2):
            gradients = random_gradients(adapter, algorithm.trains(Round(1)), 10 * round_ + step)
            _, state = algorithm.steer(state, gradients, Round(round_, 2))
            if round_ > 1:
                sums = {k: sums.get(k, 0) + g for k, g in gradients.items()}
        if round_ < 3:
            adapter, state = one_round(algorithm, adapter, repeated(graphs.complete(3), 2), round_, state)
    message = sent(algorithm, adapter, state, 3, period=2)
    for name, total in sums.items():
        torch.testing.assert_close(message[f"tracking/{name}"], total / 4 + corrections(state)[name])


# --- against the formula ------------------------------------------------------------------------------------


def test_on_a_complete_graph_it_is_scaffold():
    """SCAFFOLD (Karimireddy et al., algorithm 1, option II, all clients, server step 1), by hand in NumPy."""
    problem, steps, lr, rounds = Quadratic(4), 5, 0.05, 7
    a = problem.start.A[LAYER][0].numpy()
    targets, squares = problem.targets.numpy(), problem.squares.numpy()
    x, c_i = np.zeros((4, 2)), np.zeros((4, 4, 2))  # server model B (d_out, r), client variates (n, d_out, r)
    for _ in range(rounds):
        c, ends, variates = c_i.mean(0), [], []
        for i in range(4):
            y, total = x.copy(), 0
            for _ in range(steps):
                g = ((y @ a - targets[i]) * squares[i]) @ a.T
                y, total = y - lr * (g - c_i[i] + c), total + g
            ends.append(y)
            variates.append(total / steps)
        x, c_i = np.mean(ends, 0), np.stack(variates)
    adapter, _ = train(problem, tracked("dlora_fa"), graphs.complete(4), rounds, steps, lr)
    for agent in range(4):
        np.testing.assert_allclose(adapter.B[LAYER][agent].numpy(), x, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("gamma", [1.0, 0.3])
@pytest.mark.parametrize("name", TRACKABLE)
def test_corrections_follow_the_formula_and_sum_to_zero(name, gamma, n):
    algorithm, adapter = tracked(name, tracking_gamma=gamma), make_adapter(n)
    weights = torch.from_numpy(graphs.ring(n).weights.copy())
    trained = algorithm.trains(Round(1))
    state = algorithm.init(adapter, setting(adapter))
    c = {k: torch.zeros_like(t) for k, t in adapter.tensors(trained).items()}
    for round_ in (1, 2, 3):
        steps = [random_gradients(adapter, trained, 10 * round_ + step) for step in range(3)]
        for gradients in steps:
            steered, state = algorithm.steer(state, gradients, Round(round_))
            for key, g in gradients.items():
                torch.testing.assert_close(steered[key], g + c[key])
        adapter, state = one_round(algorithm, adapter, graphs.ring(n), round_, state)
        for key in c:
            g = sum(step[key] for step in steps) / 3
            mixed = torch.einsum("ij,j...->i...", weights, g + c[key])
            c[key] = (1 - gamma) * c[key] + gamma * (mixed - g)
            torch.testing.assert_close(corrections(state)[key], c[key])
            torch.testing.assert_close(c[key].sum(0), torch.zeros_like(c[key][0]), rtol=0, atol=1e-12)


def test_agents_with_fewer_local_steps_average_over_their_own():
    algorithm, adapter = tracked("dlora"), make_adapter(3)
    state = algorithm.init(adapter, setting(adapter))
    for step in range(4):
        active = torch.tensor([True, step < 2, False])  # 4 steps, 2 steps, none
        gradients = {
            k: torch.ones_like(t) * active.view(-1, *[1] * (t.dim() - 1)) for k, t in adapter.tensors().items()
        }
        _, state = algorithm.steer(state, gradients, Round(1))
    message = sent(algorithm, adapter, state)
    for key in adapter.tensors():
        means = message[f"tracking/{key}"].flatten(1)
        assert torch.equal(means, torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64).expand_as(means))


@pytest.mark.parametrize("options", [{"gauge": "balanced"}, {"reference": "own"}])
def test_corrections_are_carried_into_the_frame_of_the_factors(options):
    """Gauges of one product differ by a rotation of the factors: the corrections must differ by the same one."""
    adapter, graph = make_adapter(5), graphs.ring(5)
    results = []
    for chosen in ({"gauge": "balanced-rotated"}, options):
        algorithm = tracked("decaf", **chosen)
        state = algorithm.init(adapter, setting(adapter))
        _, state = algorithm.steer(state, random_gradients(adapter, algorithm.trains(Round(1)), 0), Round(1))
        new, state = one_round(algorithm, adapter, graph, 1, state)
        results.append((new, corrections(state)))
    (average, c_average), (other, c_other) = results
    for layer in LAYERS:
        p = lowrank.frame_change(average.A[layer], average.B[layer], other.A[layer], other.B[layer])
        torch.testing.assert_close(p @ average.A[layer], other.A[layer])  # a rotation
        assert (p - torch.eye(p.shape[-1])).abs().max() > 0.1  # and not a trivial one
        torch.testing.assert_close(p @ c_average[f"A/{layer}"], c_other[f"A/{layer}"])
        torch.testing.assert_close(c_average[f"B/{layer}"] @ p.mT, c_other[f"B/{layer}"])
    torch.testing.assert_close(c_average["extras/head.weight"], c_other["extras/head.weight"])


@pytest.mark.parametrize("name", TRACKABLE)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_split_over_processes_changes_nothing(name, n):
    """The contract's test with a state that is not empty, over a period of two rounds."""
    algorithm = tracked(name)
    adapter, graph = make_adapter(n), graphs.ring(n)
    state = algorithm.init(adapter, setting(adapter, period=2))
    singles = [adapter.select([i]) for i in range(n)]
    alone = [(own, algorithm.init(own, setting(own, period=2))) for own in singles]
    for number in (1, 2, 3):
        round_ = Round(number, 2)
        gradients = random_gradients(adapter, algorithm.trains(Round(1)), number)
        _, state = algorithm.steer(state, gradients, round_)
        alone = [
            (own, algorithm.steer(its, {k: g[[i]] for k, g in gradients.items()}, round_)[1])
            for i, (own, its) in enumerate(alone)
        ]
        messages, states = zip(*(algorithm.send(own, its, round_) for own, its in alone), strict=True)
        message = {k: torch.cat([m[k] for m in messages]) for k in messages[0]}
        adapter, state = one_round(algorithm, adapter, repeated(graph, 2), number, state)
        for i, (own, _) in enumerate(alone):
            senders = np.flatnonzero(graph.weights[i]).tolist()
            inbox = Inbox.from_weights({k: t[senders] for k, t in message.items()}, graph.weights, senders, [i])
            alone[i] = algorithm.combine(own, states[i], inbox, round_)[:2]
    joined = concatenate([own for own, _ in alone])
    for key, tensor in adapter.tensors().items():
        torch.testing.assert_close(joined.tensors()[key], tensor, rtol=1e-12, atol=1e-12)
    for key, tensor in flattened(state).items():
        torch.testing.assert_close(torch.cat([flattened(its)[key] for _, its in alone]), tensor, rtol=1e-12, atol=1e-12)


def test_what_it_refuses():
    for gamma in (0.0, -1.0, 1.5):
        with pytest.raises(UserError, match=r"algorithm\.tracking_gamma: .* not above 0 and at most 1"):
            tracked("dlora", tracking_gamma=gamma)
    with pytest.raises(
        UserError, match="fedavg does not take this option; it belongs to core, decaf, dlora, dlora_fa, fedsa"
    ):
        algorithms.make("fedavg", tracking=True)
    assert algorithms.make("decaf-tracked").name == tracked("decaf").name == "decaf_tracked"


# --- in a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRACKABLE)
def test_bytes_are_twice_those_of_the_rule_underneath(name):
    _, plain = finished(name, rounds=2)
    _, corrected = finished(name, rounds=2, tracking=True)
    assert [r.bytes_sent for r in corrected] == [2 * r.bytes_sent for r in plain]


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        ((2, 0), {}),
        ((3, 2), {}),
        ((5, 0), {"gauge": "balanced", "tracking_gamma": 0.5}),
        ((3, 2), {"order": "combine-adapt", "gossip_steps": 2, "relay_rank": 3}),
    ],
)
def test_resumed_within_a_period_equals_uninterrupted_bit_for_bit(stop, options, tmp_path):
    """Three rounds a period; the stops lie before, within and after its local steps."""
    cube = graphs.one_peer_hypercube(8)
    training = SGD.model_copy(update={"epochs": 1.0})  # unequal steps
    options = {"n": 8, "graph": cube, "rounds": 7, "training": training, **options}
    whole, expected = finished("decaf_tracked", **options)
    first = make_run("decaf_tracked", **options)
    round_, step = stop
    if step:
        first.on_step = lambda number, done, steps, losses: first.stop() if (number, done) == stop else None
    got = []
    for record in first.train():
        got.append(record)
        if record.round == round_ and not step:
            break
    checkpoint.save(tmp_path, *first.snapshot())
    second = make_run("decaf_tracked", **options)
    second.restore(*checkpoint.load_latest(tmp_path))
    got += [record for record in second.train() if record.round > got[-1].round]
    assert [dataclasses.replace(r, seconds={}) for r in got] == [dataclasses.replace(r, seconds={}) for r in expected]
    for key, tensor in whole.snapshot()[0].items():
        assert torch.equal(second.snapshot()[0][key], tensor), key


# --- several exchanges in a round ---------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["one-peer-hypercube", "base:2", "base:3"])
@pytest.mark.parametrize("name", ["dlora", "dlora_fa", "decaf", "decaf_tracked"])
def test_a_whole_period_of_an_exact_graph_is_the_complete_graph(name, spec):
    n = 8 if spec == "one-peer-hypercube" else 6
    complete, _ = finished(name, n, graphs.complete(n))
    exact, _ = finished(name, n, graphs.parse(spec, n, 0), gossip_steps="period")
    assert_near(complete, exact)
    once, _ = finished(name, n, graphs.parse(spec, n, 0))
    assert (once.adapter.B["first"] - complete.adapter.B["first"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["dlora", "decaf_tracked"])
def test_exchanges_are_made_hop_by_hop_along_the_schedule(name):
    """Two exchanges a round on a period of three: rounds 1, 2, 3 take the graphs (0, 1), (2, 0), (1, 2)."""
    cycle = [graphs.star(4), graphs.line(4), graphs.ring(4)]
    several, _ = finished(name, 4, Schedule.cycle(cycle, "cycle"), 3, gossip_steps=2)
    pairs = [cycle[j].weights @ cycle[i].weights for i, j in ((0, 1), (2, 0), (1, 2))]
    once = Schedule.cycle([graphs.from_matrix(w, require_symmetric=False) for w in pairs], "products")
    assert_near(several, finished(name, 4, once, 3)[0], 0.0)


def test_bytes_of_several_exchanges():
    """By hand: what is averaged goes out in every hop; what is stacked reaches every agent once."""
    a, b, head = 4 * (2 * 12 + 2 * 10), 4 * (10 * 2 + 10 * 2), 4 * (4 * 10 + 4)
    factors, everything = a + b, a + b + head
    cube = graphs.one_peer_hypercube(8)

    def bytes_of(name, graph, steps, n=8, **options):
        return finished(name, n, graph, rounds=1, gossip_steps=steps, **options)[1][-1].bytes_sent

    assert bytes_of("dlora", cube, "period") == 3 * everything
    assert bytes_of("decaf", cube, "period") == 7 * factors + 3 * head  # 1, then 2, then 4 agents' factors
    assert bytes_of("decaf_tracked", cube, "period") == 7 * factors + 3 * head + 3 * everything
    assert bytes_of("dlora", graphs.ring(8), 2) == 4 * everything
    assert bytes_of("decaf", graphs.ring(8), 2) == 4 * factors + 4 * head  # four agents are within two hops
    # Cut to rank 3 after the first hop, factors are 3/2 as large from then on.
    assert bytes_of("decaf", cube, "period", relay_rank=3) == factors + 2 * 1.5 * factors + 3 * head
    assert bytes_of("fedavg", graphs.ring(8), 2) == everything


def test_stacks_cut_to_a_rank_that_holds_everything_lose_nothing():
    cube = graphs.one_peer_hypercube(4)
    whole, records = finished("decaf", 4, cube, rounds=1, gossip_steps="period")
    # Two agents' rank-2 adapters have rank 4; the next hop truncates anyway.
    relayed, cut = finished("decaf", 4, cube, rounds=1, gossip_steps="period", relay_rank=4)
    for layer in whole.adapter.layers:
        expected = whole.adapter.B[layer] @ whole.adapter.A[layer]
        torch.testing.assert_close(relayed.adapter.B[layer] @ relayed.adapter.A[layer], expected, rtol=0, atol=1e-6)
    assert records[-1].recompression is None
    assert cut[-1].recompression < 1e-6
    assert cut[-1].tail == pytest.approx(records[-1].tail, rel=1e-3)


def test_recompression_reports_exactly_what_it_cuts():
    adapter, graph, rank = make_adapter(4), graphs.ring(4), 3
    algorithm = algorithms.decaf(relay_rank=rank)
    inbox = Inbox.from_weights(adapter.tensors(), graph.weights, range(4), range(4))
    relayed, cut = algorithm.relay(adapter, inbox, Round(1))
    squares = np.zeros(4)
    for layer in LAYERS:
        z = np.einsum("ij,jab->iab", graph.weights, products(adapter, layer).numpy())
        u, s, vh = np.linalg.svd(z)
        kept = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
        np.testing.assert_allclose(2 * (relayed[f"B/{layer}"] @ relayed[f"A/{layer}"]).numpy(), kept, atol=1e-9)
        assert relayed[f"A/{layer}"].shape[1] == rank
        squares += (s[..., rank:] ** 2).sum(-1)
    np.testing.assert_allclose(cut.numpy(), np.sqrt(squares))
    weights = torch.from_numpy(graph.weights.copy())
    head = torch.einsum("ij,jab->iab", weights, adapter.extras["head.weight"])
    torch.testing.assert_close(relayed["extras/head.weight"], head)


def test_tracking_through_a_relay_mixes_the_corrections_in_full():
    cube = graphs.one_peer_hypercube(4)
    relayed, _ = finished("decaf_tracked", 4, cube, rounds=1, gossip_steps="period", relay_rank=2)
    complete, _ = finished("decaf_tracked", 4, graphs.complete(4), rounds=1)
    for key, c in corrections(complete.state).items():
        torch.testing.assert_close(corrections(relayed.state)[key], c, rtol=0, atol=1e-6)


def test_gossip_steps_that_cannot_be():
    with pytest.raises(UserError, match="gossip_steps: random-matching never starts again, so it has no period"):
        make_run("dlora", 4, graphs.random_matching(4, 0), gossip_steps="period")
    with pytest.raises(UserError, match=r"algorithm\.relay_rank: 0 is below 1"):
        algorithms.decaf(relay_rank=0)
