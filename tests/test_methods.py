"""The methods that people compare with, each against a few lines that are its paper's own."""

import dataclasses

import numpy as np
import pytest
import torch
from peft import PeftModel

from decaf_lora import algorithms, graphs, lowrank, partition, records
from decaf_lora.algorithms import Round
from decaf_lora.config import TrainingConfig
from decaf_lora.engines import Simulate
from decaf_lora.errors import UserError
from decaf_lora.exchange import Exchange
from decaf_lora.graphs import Graph, as_schedule
from decaf_lora.run import Run
from quadratic import Quadratic, train
from rounds import begun, one_round, sent, setting
from samples import LAYERS, make_adapter, products
from toy import Toy, TwoLayers
from toy_runs import SGD, make_run

SIZES = [3, 1, 4, 2]
SHARES = torch.tensor(SIZES).double() / sum(SIZES)


def mixed(weights, tensors):
    return torch.einsum("ij,j...->i...", torch.tensor(weights, dtype=torch.float64), tensors.double())


def by_hand(problem, weigh, rounds, steps=5, rate=0.05, penalty=None, correction=None):
    """FedAvg with plain SGD: (A, B) of the server after every round. The hooks say what a paper adds to it.

    weigh(old, new) -> the server's tensors; penalty(value, old) and correction() -> what is added to a gradient.
    """
    x = {k: t[0] for k, t in problem.start.tensors().items()}
    n, server = problem.start.num_agents, []
    for _ in range(rounds):
        w = {k: t.expand(n, *t.shape).clone() for k, t in x.items()}
        raw = {k: torch.zeros_like(t) for k, t in w.items()}
        for _ in range(steps):
            residual = (w["B/w"] @ w["A/w"] - problem.targets) * problem.squares
            for k, g in {"A/w": w["B/w"].mT @ residual, "B/w": residual @ w["A/w"].mT}.items():
                raw[k] += g / steps
                g = g + (penalty(w[k], x[k]) if penalty else 0) + (correction[k] if correction else 0)
                w[k] = w[k] - rate * g
        if correction is not None:
            for k, own in raw.items():
                correction[k] = torch.einsum("j,j...->...", weigh.shares, own) - own
        x = weigh(x, w)
        server.append(x)
    return server


class Weighed:
    """The server's average, and an optional step of its own."""

    def __init__(self, shares, step=None):
        self.shares, self.step = shares, step

    def __call__(self, old, new):
        average = {k: torch.einsum("j,j...->...", self.shares, t) for k, t in new.items()}
        return average if self.step is None else self.step(old, average)


def ends_as(algorithm, graph, server, problem, rounds):
    adapter, _ = train(problem, algorithm, graph, rounds)
    for name, expected in server[-1].items():
        for got in adapter.tensors()[name]:
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# With a server


@pytest.fixture
def problem():
    return Quadratic(4, shares=SHARES)


def test_fedprox_holds_agents_near_the_servers_model(problem):
    server = by_hand(problem, Weighed(SHARES), 3, penalty=lambda w, x: 0.7 * (w - x))
    ends_as(algorithms.fedprox(0.7), Graph.server(SIZES), server, problem, 3)
    free, _ = train(problem, algorithms.fedprox(0.0), Graph.server(SIZES), 3)
    plain, _ = train(problem, algorithms.fedavg(), Graph.server(SIZES), 3)
    assert all(torch.equal(t, free.tensors()[k]) for k, t in plain.tensors().items())


def test_scaffold_corrects_by_the_control_variates(problem):
    zeros = {k: torch.zeros_like(t) for k, t in problem.start.tensors().items()}
    server = by_hand(problem, Weighed(SHARES), 4, correction=zeros)
    ends_as(algorithms.scaffold(), Graph.server(SIZES), server, problem, 4)
    assert algorithms.scaffold().name == "scaffold"


def test_fedadam_is_adam_along_the_mean_change_and_all_agents_keep_the_same_server(problem):
    moments = dict.fromkeys(problem.start.tensors(), (0.0, 0.01**2))

    def step(x, average):
        new = {}
        for k, old in x.items():
            m, v = moments[k]
            change = average[k] - old
            m, v = 0.8 * m + 0.2 * change, 0.95 * v + 0.05 * change**2
            moments[k], new[k] = (m, v), old + 0.1 * m / (v**0.5 + 0.01)
        return new

    server = by_hand(problem, Weighed(SHARES, step), 4)
    algorithm = algorithms.fedadam(0.1, server_momentum=0.8, server_beta_2=0.95, server_epsilon=0.01)
    ends_as(algorithm, Graph.server(SIZES), server, problem, 4)
    _, state = train(problem, algorithm, Graph.server(SIZES), 2)
    assert all(torch.equal(t, t[:1].expand_as(t)) for t in state["rule"].values())


def test_flexlora_cuts_the_average_of_the_products_to_every_rank():
    adapter = make_adapter(4, unequal=True)
    out, _ = one_round(algorithms.flexlora(), adapter, Graph.server(SIZES))
    for layer in LAYERS:
        z = torch.einsum("j,jab->ab", SHARES, products(adapter, layer))
        u, s, vh = torch.linalg.svd(z)
        for agent, rank in enumerate(adapter.ranks[layer].tolist()):
            expected = u[:, :rank] * s[:rank] @ vh[:rank]
            torch.testing.assert_close(products(out, layer)[agent], expected, rtol=1e-7, atol=1e-9)


# On a graph


def test_alternating_trains_and_sends_one_factor_in_turn():
    algorithm, adapter, weights = algorithms.alternating(2), make_adapter(4), graphs.ring(4).weights
    turns = [sorted(algorithm.trains(Round(number))) for number in range(1, 6)]
    assert turns == [["B", "extras"]] * 2 + [["A", "extras"]] * 2 + [["B", "extras"]]
    for number, moves in ((1, "B"), (3, "A")):
        out, _ = one_round(algorithm, adapter, graphs.ring(4), number)
        assert set(sent(algorithm, adapter, {"rule": {}}, number)) == set(adapter.tensors(frozenset({moves, "extras"})))
        for name, old in adapter.tensors().items():
            expected = old if name[0] in "AB" and name[0] != moves else mixed(weights, old)
            torch.testing.assert_close(out.tensors()[name], expected)
    both, _ = one_round(algorithms.alternating(mixes="both"), adapter, graphs.ring(4))
    for name, old in adapter.tensors().items():
        torch.testing.assert_close(both.tensors()[name], mixed(weights, old))


@pytest.mark.parametrize(("graph", "steps"), [(graphs.ring(20), 1), (graphs.ring(20), 2), (graphs.complete(20), 1)])
def test_the_automatic_interval_is_that_of_the_spectral_gap(graph, steps):
    sigma = np.sort(np.linalg.svd(graph.weights, compute_uv=False))[-2] ** steps
    exchange = Exchange(algorithms.alternating("auto"), as_schedule(graph), Simulate(20), gossip_steps=steps)
    first = next(k for k in range(1, 50) if "A" in exchange.algorithm.trains(Round(k))) - 1
    assert first == max(1, round((1 - sigma) ** -0.5))
    assert first > 1 or graph.name == "complete"


def test_an_alternating_run_trains_what_its_graph_says():
    run = make_run("alternating", n=12, graph=graphs.ring(12), rounds=6, interval="auto")
    before = {k: t.clone() for k, t in run.adapter.A.items()}
    records = run.train()
    for _ in range(4):  # the start, and T = 3 rounds
        next(records)
    assert all(torch.equal(t, before[k]) for k, t in run.adapter.A.items())
    next(records)
    assert not any(torch.equal(t, before[k]) for k, t in run.adapter.A.items())


@pytest.mark.parametrize("tracking", [False, True])
def test_fedsa_mixes_a_and_never_sends_b(tracking):
    algorithm, adapter = algorithms.fedsa(tracking=tracking), make_adapter(4)
    exchange = Exchange(algorithm, as_schedule(graphs.ring(4)), Simulate(4))
    held = exchange.templates(adapter).held
    assert not any("B/" in name for name in [*held, *sent(algorithm, adapter, exchange.init(adapter))])
    out, _ = one_round(algorithm, adapter, graphs.ring(4))
    for name, old in adapter.tensors().items():
        expected = old if name.startswith("B/") else mixed(graphs.ring(4).weights, old)
        torch.testing.assert_close(out.tensors()[name], expected)


@pytest.mark.parametrize("name", ["decaf_tracked", "fedsa"])
def test_a_personal_head_stays_with_its_agent(name):
    algorithm, adapter = algorithms.make(name, transforms=["personal_head"]), make_adapter(4)
    exchange = Exchange(algorithm, as_schedule(graphs.ring(4)), Simulate(4))
    held = exchange.templates(adapter).held
    assert not any("head" in name for name in [*held, *sent(algorithm, adapter, exchange.init(adapter))])
    ours, _ = one_round(algorithm, adapter, graphs.ring(4))
    shared, _ = one_round(algorithms.make(name), adapter, graphs.ring(4))
    assert torch.equal(ours.extras["head.weight"], adapter.extras["head.weight"])
    assert all(torch.equal(t, shared.tensors()[k]) for k, t in ours.tensors().items() if "head" not in k)


@pytest.mark.parametrize("kind", ["ring", "star", "erdos-renyi:0.5"])
def test_core_mixes_the_products_exactly_with_r_squared_numbers(kind):
    algorithm, graph = algorithms.core(), graphs.parse(kind, 6, 0)
    adapter = begun(algorithm, make_adapter(6))
    out, _ = one_round(algorithm, adapter, graph)
    message = sent(algorithm, adapter, algorithm.init(adapter, setting(adapter)))
    for layer, (rank, _, _) in LAYERS.items():
        dense = adapter.scale[layer][:, None, None] * (adapter.B[layer] @ adapter.core[layer] @ adapter.A[layer])
        torch.testing.assert_close(products(out.folded(), layer), mixed(graph.weights, dense))
        assert message[f"core/{layer}"][0].numel() == rank**2
        eye = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(adapter.A[layer][0] @ adapter.A[layer][0].mT, eye)
        torch.testing.assert_close(adapter.B[layer][0].mT @ adapter.B[layer][0], eye)
    assert {name.split("/")[0] for name in message} == {"core", "extras"}


@pytest.mark.parametrize(("name", "shared"), [("core", "core"), ("fedsa", "A")])
def test_what_is_shared_contracts_by_sigma_2_a_round(name, shared):
    """Linear gossip: the worst disagreement shrinks by exactly sigma_2, and in core so does that of the products."""
    algorithm, graph = algorithms.make(name), graphs.ring(7)
    adapter = algorithm.begin(make_adapter(7), setting(make_adapter(7)))
    values, vectors = np.linalg.eigh(graph.weights)
    worst = torch.from_numpy(vectors[:, np.argsort(-np.abs(values))[1]])[:, None, None]
    start = {k: worst * torch.ones_like(t) for k, t in getattr(adapter, shared).items()}
    adapter = adapter.with_tensors({f"{shared}/{k}": t for k, t in start.items()})
    for number in (1, 2):
        adapter, _ = one_round(algorithm, adapter, graph, number)
    for layer, t in start.items():
        torch.testing.assert_close(getattr(adapter, shared)[layer], graph.sigma_2**2 * t)


def core_run(**values):
    task = Toy(extras=True)
    values = {"rounds": 2, "evaluate_every": 2, **values}
    return Run(
        task,
        algorithms.core(**values.pop("options", {})),
        graphs.ring(3),
        partition.iid(task.labels, 3, 0),
        values.pop("training", SGD),
        **values,
    )


def test_core_trains_as_autograd_says():
    training = TrainingConfig(
        steps=1, batch_size=5, optimizer="sgd", momentum=0.0, weight_decay=0.0, learning_rate=0.3, schedule="constant"
    )
    with core_run(training=training, rounds=1) as run:
        adapter, task = run.adapter, run.task
        steps = [task.train_batch(stream.batch(0)) for stream in run.trainer.streams]
        *_, last = run.train()
        weights = run.schedule.at(0).weights
        moved = []
        for agent, batch in enumerate(steps):
            model = TwoLayers()
            model.load_state_dict({k.replace(".base.", "."): v for k, v in task.model.state_dict().items()})
            for layer in ("first", "second"):
                linear = getattr(model, layer)
                linear.weight = torch.nn.Parameter(linear.weight.detach())
            loss = torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"])
            loss.backward()
            moved.append(
                {
                    layer: -0.3
                    * adapter.scale[layer][agent]
                    * (adapter.B[layer][agent].mT @ getattr(model, layer).weight.grad @ adapter.A[layer][agent].mT)
                    for layer in ("first", "second")
                }
            )
        for layer in ("first", "second"):
            expected = mixed(weights, torch.stack([one[layer] for one in moved])).float()
            torch.testing.assert_close(run.adapter.core[layer], expected, rtol=1e-4, atol=1e-6)
            assert torch.equal(run.adapter.A[layer], adapter.A[layer])
        head = 4 * 10 + 4
        assert last.bytes_sent == 2 * 4 * (2 * 2**2 + head)


def test_a_core_is_exported_as_a_plain_lora_adapter(tmp_path):
    with core_run() as run:
        list(run.train())
        run.save_adapter(tmp_path, 1)
        with torch.no_grad(), run.attached.bind(run.adapter.select([1])) as model:
            expected = model(run.task.test_x)
        base = run.attached.detach()
    with torch.no_grad():
        got = PeftModel.from_pretrained(base, tmp_path).eval()(run.task.test_x)
    torch.testing.assert_close(got, expected)


def test_a_core_goes_on_from_a_checkpoint_bit_for_bit():
    with core_run(rounds=3) as whole, core_run(rounds=3) as first, core_run(rounds=3) as second:
        list(whole.train())
        first.on_step = lambda round_, done, *_: first.stop() if (round_, done) == (2, 1) else None
        list(first.train())
        second.restore(*first.snapshot())
        list(second.train())
        assert all(torch.equal(t, second.adapter.tensors()[k]) for k, t in whole.adapter.tensors().items())
        assert any(t.any() for t in whole.adapter.core.values())


# Outer momentum


def test_outer_momentum_on_the_complete_graph_is_nesterovs_on_the_mean_change():
    """DiLoCo, with torch's own SGD as the outer optimizer."""
    problem = Quadratic(4)
    outer = {k: torch.nn.Parameter(t[0].clone()) for k, t in problem.start.tensors().items()}
    optimizer = torch.optim.SGD(outer.values(), lr=0.7, momentum=0.9, nesterov=True)

    def step(x, average):
        for k, parameter in outer.items():
            parameter.grad = x[k] - average[k]
        optimizer.step()
        return {k: t.detach().clone() for k, t in outer.items()}

    server = by_hand(problem, Weighed(torch.full((4,), 0.25, dtype=torch.float64), step), 5)
    ends_as(algorithms.dlora() | algorithms.outer_momentum(0.9, 0.7), graphs.complete(4), server, problem, 5)


def test_outer_momentum_of_rate_1_without_momentum_changes_nothing():
    plain, _ = train(Quadratic(4), algorithms.decaf(gauge="balanced"), graphs.ring(4), 3)
    same = algorithms.decaf(gauge="balanced") | algorithms.outer_momentum(0.0, 1.0)
    same, _ = train(Quadratic(4), same, graphs.ring(4), 3)
    for name, t in plain.tensors().items():
        torch.testing.assert_close(same.tensors()[name], t, rtol=1e-6, atol=1e-9)


def test_the_buffer_of_outer_momentum_turns_with_the_factors():
    algorithm = algorithms.decaf(gauge="balanced") | algorithms.outer_momentum(0.5)
    adapter = make_adapter(1).select([0, 0, 0])  # agents that agree: the factors change their frame alone
    state = algorithm.init(adapter, setting(adapter))
    state["outer_momentum"] |= {f"b/{k}": t for k, t in adapter.tensors().items()}
    start = adapter.with_tensors({k: t * 1.35 for k, t in adapter.tensors().items()})
    out, state = one_round(algorithm, start, graphs.complete(3), 1, state)
    for layer in LAYERS:
        sent_a, sent_b = (
            x[layer] - 0.7 * (-0.35 * x[layer] + 0.5 * (0.5 - 0.35) * x[layer]) for x in (adapter.A, adapter.B)
        )
        torch.testing.assert_close(products(out, layer), 2.0 * sent_b @ sent_a)
        frame = lowrank.frame_change(sent_a, sent_b, out.A[layer], out.B[layer])
        torch.testing.assert_close(state["outer_momentum"][f"b/A/{layer}"], frame @ (0.15 * adapter.A[layer]))
        torch.testing.assert_close(state["outer_momentum"][f"b/B/{layer}"], (0.15 * adapter.B[layer]) @ frame.mT)
        assert torch.equal(state["outer_momentum"][f"x/A/{layer}"], out.A[layer])


def test_a_proximal_term_leaves_alone_what_is_not_sent():
    algorithm, adapter = algorithms.fedsa() | algorithms.proximal(2.0), make_adapter(3)
    state = algorithm.init(adapter, setting(adapter))
    values = {k: t + 1 for k, t in adapter.tensors().items()}
    steered, _ = algorithm.steer(state, {k: torch.zeros_like(t) for k, t in values.items()}, Round(1), values)
    for name, g in steered.items():
        assert torch.equal(g, torch.full_like(g, 0.0 if name.startswith("B/") else 2.0)) or torch.allclose(
            g, torch.full_like(g, 2.0)
        )
        assert bool(g.any()) == (not name.startswith("B/"))


# What is refused


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("alternating", {"interval": 0}, r"algorithm\.interval: 0 is below 1"),
        ("alternating", {"mixes": "one"}, r"algorithm\.mixes: 'one' is not known"),
        (
            "alternating",
            {"transforms": ["tracking"]},
            r"algorithm\.tracking: alternating trains other factors in round 2",
        ),
        (
            "alternating",
            {"transforms": ["outer_momentum"]},
            r"outer_momentum: alternating trains other factors in round 2",
        ),
        ("alternating", {"transforms": ["proximal"]}, r"proximal: alternating trains other factors in round 2"),
        ("fedprox", {"proximal": -1.0}, r"algorithm\.proximal: -1 is not at least 0"),
        ("fedadam", {"server_learning_rate": 0.0}, r"algorithm\.server_learning_rate: 0 is not above 0"),
        ("fedadam", {"server_epsilon": 0.0}, r"algorithm\.server_epsilon: 0 is not above 0"),
        ("fedadam", {"server_momentum": 1.0}, r"algorithm\.server_momentum: 1 is not at least 0 and below 1"),
        ("fedadam", {"server_beta_2": -0.1}, r"algorithm\.server_beta_2: -0\.1 is not at least 0 and below 1"),
        ("flexlora", {"gauge": "x"}, r"algorithm\.gauge: 'x' is not known"),
        ("dlora", {"transforms": ["outer_momentum:1"]}, r"outer_momentum's mu = 1 is not at least 0 and below 1"),
        ("dlora", {"transforms": ["outer_momentum:0.5,rate=0"]}, r"outer_momentum's rate = 0 is not above 0"),
        ("fedavg", {"transforms": ["outer_momentum"]}, r"fedavg mixes nothing among neighbours"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        algorithms.make(name, **options)


@pytest.mark.parametrize("name", ["core", "fedadam"])
def test_agents_that_must_be_alike_are_refused_where_they_are_not(name):
    lora = Toy().default_lora()
    unlike = {"lora": [dataclasses.replace(lora, r=rank) for rank in (1, 2, 3)]}
    for values, message in (
        (unlike, f"lora.ranks: the agents differ in rank or scale, but {name} needs them alike; make them so, or use"),
        ({"common_start": False}, f"start: the agents start apart, but {name} needs them alike"),
    ):
        task = Toy()
        with pytest.raises(UserError, match=message):
            Run(task, algorithms.make(name), graphs.ring(3), partition.iid(task.labels, 3, 0), **values)
    adapter = make_adapter(3, unequal=True)
    exchange = Exchange(algorithms.make(name), as_schedule(graphs.ring(3)), Simulate(3))
    with pytest.raises(UserError, match=rf"lora\.ranks: {name} needs one rank and scale"):
        exchange.init(exchange.begin(adapter))


def test_a_start_that_a_rule_cannot_use_is_refused():
    with pytest.raises(UserError, match=r"init_adapters: core begins with factors of its own; leave them out"):
        core_run(init_adapters=["x", "x", "x"])
    task, algorithm = Toy(), algorithms.dlora() | algorithms.personal_head()
    with pytest.raises(UserError, match=r"personal_head: no module is trained in full here .*; leave it out"):
        Run(task, algorithm, graphs.ring(3), partition.iid(task.labels, 3, 0))


def test_a_server_is_no_graph():
    with pytest.raises(
        UserError, match=r"graph: a server is no graph but a kind of algorithm \(fedavg, .*; for the others"
    ):
        graphs.parse("server", 4, 0)


def test_a_graph_that_mixes_nothing_has_no_automatic_interval():
    apart = Graph(np.eye(3), connected=False)
    with pytest.raises(UserError, match=r"algorithm\.interval: auto has no answer"):
        algorithms.alternating("auto").fitted(algorithms.Setting((0,), 3, measure_sigma_2=lambda: apart.sigma_2))


# The score on data like the agent's own


def test_alike_tests_hold_the_agents_classes_in_its_shares():
    labels = np.repeat([0, 1, 2, 3], [40, 40, 20, 20])
    split = partition.dirichlet(labels, 5, alpha=0.3, seed=2)
    test_labels = np.tile([0, 1, 2, 3], 15)
    found = split.alike_tests(test_labels, seed=0)
    for shard, own in zip(split.shards, found, strict=True):
        held, got = (np.bincount(values, minlength=4) for values in (labels[shard], test_labels[own]))
        size = 15 / held.max() * len(shard)  # the most frequent class runs out first
        assert np.array_equal(got > 0, held > 0)
        assert got.max() == 15
        assert np.abs(got - np.maximum(held / held.sum() * size, held > 0)).max() < 1
        assert len(set(own.tolist())) == len(own)
    again = split.alike_tests(test_labels, seed=0)
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))
    with pytest.raises(UserError, match=r"test: no test example has class 3, which agent \d holds; use test = all"):
        split.alike_tests(test_labels % 3, seed=0)
    with pytest.raises(UserError, match=r"test: the classes of this task's test examples are not known"):
        split.alike_tests(None, seed=0)


def personal_run(test, name="fedsa"):
    task = Toy(extras=True, tests=60)
    task.test_labels = task.test_y.numpy()
    split = partition.dirichlet(task.labels, 3, alpha=0.5, seed=1)
    return Run(task, algorithms.make(name), graphs.ring(3), split, SGD, rounds=3, evaluate_every=3, test=test)


@pytest.mark.filterwarnings("error")
def test_agents_are_scored_on_data_like_their_own_beside_the_common_test_set():
    with personal_run("all") as plain, personal_run("alike") as run:
        *_, expected = plain.train()
        *_, last = run.train()
        assert last.scores == expected.scores
        assert (last.averaged_score, expected.own_scores) == (expected.averaged_score, None)
        for agent, own in enumerate(run.partition.alike_tests(run.task.test_labels, 0)):
            own = own.copy()
            with torch.no_grad(), run.attached.bind(run.adapter.select([agent])) as model:
                right = model(run.task.test_x[own]).argmax(1) == run.task.test_y[own]
            assert last.own_scores[agent] == pytest.approx(right.double().mean().item())
        assert last.own_scores != last.scores


def test_tables_show_scores_on_own_data_where_there_are_some():
    row = records.SummaryRow("fedsa", "ring", "dirichlet:0.1", 0, 0.5, 0.4, 0.1, 0.3, 10.0, 1.0, own_score=0.75)
    other = dataclasses.replace(row, algorithm="local", own_score=0.5, graph="star")
    texts = records.tables([row, other])
    header, _, first, second, *_ = texts["table.md"].splitlines()
    place = header.split(" | ").index("on own data")
    assert [line.split(" | ")[place] for line in (first, second)] == ["0.750", "0.500"]
    assert "own_score" in texts["table.csv"]
    assert "data of their own" in texts["scores.md"]
    assert texts["table.tex"].count("on own data") == 1
    widths = {len(line) for line in records.lines(records.aggregate([row, other]))}
    assert widths == {len(records.columns(records.aggregate([row, other])))}
    without = records.tables([dataclasses.replace(row, own_score=None)])
    assert not any("own" in text.replace("unknown", "") for text in without.values())
