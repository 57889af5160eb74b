"""Exchanges one by one: what a round is made of, several in a round, and neighbours that are ahead."""

import dataclasses

import numpy as np
import pytest
import torch

from decaf_lora import algorithms, graphs, lowrank, partition
from decaf_lora.algorithms import Inbox, Round
from decaf_lora.config import TrainingConfig
from decaf_lora.engines import Pending, Simulate
from decaf_lora.exchange import Exchange
from decaf_lora.graphs import as_schedule
from decaf_lora.run import Run
from samples import make_adapter
from toy import Toy


def test_a_round_knows_where_it_lies_in_its_period():
    assert [(Round(t, 3).opens, Round(t, 3).closes) for t in (1, 2, 3, 4)] == [
        (True, False),
        (False, False),
        (False, True),
        (True, False),
    ]
    assert Round(7).opens
    assert Round(7).closes


@pytest.mark.parametrize(
    ("spec", "steps", "period"),
    [
        ("ring", 1, 1),
        ("ring", 3, 1),
        ("one-peer-hypercube", 1, 3),
        ("one-peer-hypercube", 2, 3),
        ("one-peer-hypercube", 3, 1),
        ("one-peer-hypercube", 6, 1),
    ],
)
def test_what_an_algorithm_is_told_of_its_run(spec, steps, period):
    schedule = as_schedule(graphs.parse(spec, 8, 0))
    exchange = Exchange(algorithms.decaf(), schedule, Simulate(8), gossip_steps=steps, seed=5)
    setting = exchange.setting
    assert (setting.agents, setting.num_agents, setting.seed, setting.period) == (tuple(range(8)), 8, 5, period)
    assert exchange.round(4) == (4, period)
    if spec == "ring":
        assert setting.sigma_2 == pytest.approx(graphs.ring(8).sigma_2 ** steps)


def test_the_period_of_a_random_schedule_is_found_for_those_who_need_it():
    schedule = graphs.random_matching(6, seed=0)
    assert Exchange(algorithms.decaf(), schedule, Simulate(6)).setting.period == 1
    assert Exchange(algorithms.decaf_tracked(), schedule, Simulate(6)).setting.period == schedule.pace > 1


class Counted(Simulate):
    """Writes down the exchanges that it is asked for."""

    def __init__(self, num_agents):
        super().__init__(num_agents)
        self.asked = []

    def start(self, message, graph, exchange, sizes=None):
        self.asked.append((exchange, graph.name))
        return super().start(message, graph, exchange, sizes)


def test_every_hop_is_an_exchange_of_its_own_number():
    """Were one number to serve all hops of a round, a late message could be taken for the next hop's."""
    schedule = graphs.Schedule.cycle([graphs.ring(4), graphs.line(4), graphs.star(4)], "cycle")
    engine, adapter = Counted(4), make_adapter(4)
    exchange = Exchange(algorithms.decaf(relay_rank=3), schedule, engine, gossip_steps=2)
    state = exchange.init(adapter)
    for number in (1, 2):
        done = exchange.finish(adapter, exchange.start(adapter, state, number))
        adapter, state = done.adapter, done.state
        assert done.round.number == number
    assert engine.asked == [(0, "ring"), (1, "line"), (2, "star"), (3, "ring")]


def test_a_started_exchange_changes_nothing_until_it_is_finished():
    adapter = make_adapter(4)
    exchange = Exchange(algorithms.decaf_tracked(messages="int8"), as_schedule(graphs.ring(4)), Simulate(4))
    state = exchange.init(adapter)
    before = {part: dict(tensors) for part, tensors in state.items()}
    first, again = (exchange.finish(adapter, exchange.start(adapter, state, 1)) for _ in range(2))
    for part, tensors in before.items():
        assert all(torch.equal(state[part][name], t) for name, t in tensors.items())
        assert state[part].keys() == tensors.keys()
    assert all(torch.equal(t, again.adapter.tensors()[k]) for k, t in first.adapter.tensors().items())
    assert any(not torch.equal(first.state["int8"][k], t) for k, t in state["int8"].items())


@pytest.mark.parametrize(("steps", "told"), [(1, 96.0), (3, 288.0)])
def test_bytes_on_the_wire_are_those_of_all_exchanges_of_a_round(steps, told):
    class Wired(Simulate):
        def wire_bytes(self, message, graph, sizes=None):
            return 96.0

    adapter = make_adapter(4)
    exchange = Exchange(algorithms.decaf(relay_rank=2), as_schedule(graphs.ring(4)), Wired(4), gossip_steps=steps)
    made = exchange.finish(adapter, exchange.start(adapter, exchange.init(adapter), 1))
    assert made.wire_bytes == told
    assert exchange.bytes_per_round(adapter) == made.bytes_sent  # as told before any message


# --- sums over the senders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 40, 2**20])
@pytest.mark.parametrize("graph", [graphs.ring(5), graphs.complete(5), graphs.star(5)], ids=lambda graph: graph.name)
def test_many_tensors_are_summed_at_once_as_each_alone(monkeypatch, graph, chunk):
    """Alone, in any company and in float64's own arithmetic: a sum rounds in the same way wherever it is made."""
    monkeypatch.setattr(lowrank, "CHUNK", chunk)
    shapes = {"head": (3,), "A/1": (2, 7), "A/2": (2, 7), "B/1": (9, 2), "A/3": (2, 7), "gain": ()}
    draw = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    tensors = {
        f"{name}/{dtype}": torch.randn(5, *shape, generator=draw).to(dtype)
        for name, shape in shapes.items()
        for dtype in dtypes
    }
    inbox = Inbox.from_weights(tensors, graph.weights, range(5), range(5))
    found = inbox.averages(tensors)
    assert list(found) == list(tensors)
    for name, x in tensors.items():
        assert torch.equal(found[name], inbox.average(name))
        total = torch.zeros_like(x)
        for receiver, row in enumerate(torch.tensor(graph.weights, dtype=x.dtype)):
            for sender in graph.weights[receiver].nonzero()[0]:
                total[receiver] = total[receiver] + x[sender] * row[sender]
        assert torch.equal(found[name], total)
        one = Inbox.from_weights({name: x}, graph.weights, range(5), [3]).average(name)
        assert torch.equal(one[0], found[name][3])


# --- who is missing -----------------------------------------------------------------------------------------


def test_a_record_says_who_was_waited_for_missed_and_refused():
    everybody = range(3)
    inbox = Inbox.from_weights({"x": torch.ones(3, 1)}, graphs.ring(3).weights, everybody, everybody)
    assert inbox.notes() == {"weights": inbox.weights_of_first(), "waited": None, "missed": None, "rejected": None}
    told = dataclasses.replace(inbox, waited={1: 0.5}, missed={4: {2: "late"}}, rejected=("of 2: torn",))
    assert told.notes() == {
        "weights": inbox.weights_of_first(),
        "waited": {"1": 0.5},
        "missed": {"5": {"2": "late"}},
        "rejected": ["of 2: torn"],
    }


def test_the_weight_of_a_missing_sender_goes_to_the_receiver_itself():
    graph, x = graphs.ring(5), torch.randn(5, 3, dtype=torch.float64)
    senders = [0, 1, 4]  # of agent 1's neighbours 0 and 2, agent 2 is missing
    inbox = Inbox.from_weights({"x": x[senders]}, graph.weights, senders, [0, 1], exchange=7)
    weights = graph.weights.copy()
    weights[1, 1] += weights[1, 2]
    weights[1, 2] = 0
    torch.testing.assert_close(inbox.average("x"), torch.from_numpy(weights[:2]) @ x)
    assert (inbox.senders, inbox.own, inbox.exchange) == ((0, 1, 4), (0, 1), 7)
    assert inbox.weights_of_first() == {"1": graph.weights[0, 1], "4": graph.weights[0, 4]}
    with pytest.raises(ValueError, match=r"agent 1 does not send to itself, and hears nothing of \[1, 2\]"):
        Inbox.from_weights({"x": x[:1]}, graph.weights, [0], [1])


# --- neighbours that are ahead ------------------------------------------------------------------------------


class Elsewhere(Simulate):
    """All agents of one process, whose neighbours are said to be in other exchanges."""

    def __init__(self, num_agents, said=None, met=None, late=False, over=10**6):
        super().__init__(num_agents)
        self.said, self.met, self.late, self.over = said or {}, met or {}, late, over
        self.held, self.asked = [], []

    def current(self, exchange):
        found = self.said.pop(exchange, exchange)
        return found, self.late and found != exchange

    def hold(self, tensors):
        self.held.append(tensors)

    def catch_up(self, tensors):
        everybody = np.full((self.num_agents, self.num_agents), 1 / self.num_agents)
        inbox = Inbox.from_weights(tensors, everybody, self.agents, self.agents, exchange=self.met["catch up"])
        self.caught_up = tensors
        return inbox

    def start(self, message, graph, exchange, sizes=None):
        self.asked.append(exchange)
        found = self.met.pop(exchange, exchange)
        if found != exchange and (exchange in self.met.get("within", ()) or found >= self.over):
            return Pending(lambda: Inbox({}, (), self.num_agents, exchange=found))
        return super().start(message, graph, found, sizes)


def an_exchange(engine, algorithm=None, steps=1):
    graph = graphs.Schedule.cycle([graphs.ring(4), graphs.star(4)], "cycle")
    return Exchange(algorithm or algorithms.dlora(), graph, engine, gossip_steps=steps)


def test_an_exchange_that_took_place_later_belongs_to_the_later_round():
    adapter, engine = make_adapter(4), Elsewhere(4, met={2: 5})
    exchange = an_exchange(engine)
    done = exchange.finish(adapter, exchange.start(adapter, exchange.init(adapter), 3))
    assert (done.round.number, engine.asked) == (6, [2])
    assert done.bytes_sent > 0


def test_a_round_that_is_left_in_a_later_hop_begins_again_where_the_neighbours_are():
    adapter = make_adapter(4)
    engine = Elsewhere(4, met={3: 6, "within": (3,)})
    exchange = an_exchange(engine, algorithms.decaf(relay_rank=3), steps=2)
    done = exchange.finish(adapter, exchange.start(adapter, exchange.init(adapter), 2))
    assert engine.asked == [2, 3, 6, 7]  # the first message is sent again, and mixed over both hops
    assert done.round.number == 4
    plain = an_exchange(Simulate(4), algorithms.decaf(relay_rank=3), steps=2)
    expected = plain.finish(adapter, plain.start(adapter, plain.init(adapter), 4))
    for name, tensor in expected.adapter.tensors().items():
        assert torch.equal(done.adapter.tensors()[name], tensor)
    assert torch.equal(done.cut, expected.cut)
    # What was sent in vain counts: both messages on the graphs of round 2, which are those of round 4.
    assert done.bytes_sent == 2 * expected.bytes_sent


def test_if_the_run_is_over_the_agents_stay_as_they_are():
    adapter, engine = make_adapter(4), Elsewhere(4, met={2: 9}, over=9)
    exchange = an_exchange(engine)
    done = exchange.finish(adapter, exchange.start(adapter, exchange.init(adapter), 3))
    assert done.round.number == 9  # exchanges 0 to 8 were made, one a round; the next round would be the 10th
    assert done.adapter is adapter


def test_who_is_late_takes_the_neighbours_average_and_a_fresh_state():
    adapter = make_adapter(4)
    algorithm = algorithms.dlora(tracking=True, quasi_global=0.9, messages="int8")
    engine = Elsewhere(4, said={2: 6}, met={"catch up": 7}, late=True)
    exchange = an_exchange(engine, algorithm)
    old = exchange.init(adapter)
    old["tracking"] = {k: t + 1 for k, t in old["tracking"].items()}
    number, new, state = exchange.meet(adapter, old, 3)
    assert number == 8  # the exchange that catching up led to
    for name, tensor in adapter.tensors().items():
        torch.testing.assert_close(new.tensors()[name], tensor.mean(0, keepdim=True).expand_as(tensor))
    fresh = exchange.init(new)
    for part, tensors in fresh.items():
        assert all(torch.equal(state[part][name], t) for name, t in tensors.items())


def test_factors_that_are_never_trained_are_not_taken_over():
    adapter = make_adapter(4, common_a=True)
    engine = Elsewhere(4, said={2: 6}, met={"catch up": 6}, late=True)
    exchange = an_exchange(engine, algorithms.dlora_fa())
    _, new, _ = exchange.meet(adapter, exchange.init(adapter), 3)
    assert not any(name.startswith("A/") for name in engine.caught_up)
    assert all(torch.equal(new.A[k], a) for k, a in adapter.A.items())


def test_nothing_changes_for_those_who_are_not_late():
    adapter, engine = make_adapter(4), Elsewhere(4, said={4: 6})
    exchange = an_exchange(engine)
    state = exchange.init(adapter)
    assert exchange.meet(adapter, state, 3) == (3, adapter, state)
    number, same, kept = exchange.meet(adapter, state, 5)
    assert (number, same is adapter, kept is state) == (7, True, True)


STEPS = TrainingConfig(steps=2, batch_size=4, learning_rate=0.02, agents_per_pass=4)


def a_run(engine, rounds=8, **options):
    task = Toy(extras=True)
    shards = partition.iid(task.labels, 4, seed=0)
    return Run(
        task,
        algorithms.dlora(**options),
        graphs.ring(4),
        shards,
        STEPS,
        rounds=rounds,
        evaluate_every=3,
        engine=lambda count: engine,
    )


@pytest.mark.parametrize("order", ["adapt-combine", "combine-adapt"])
def test_rounds_that_are_jumped_have_no_record_and_their_evaluations_are_made_up_for(order):
    engine = Elsewhere(4, said={1: 3})  # instead of round 2, round 4
    run = a_run(engine, order=order)
    records = list(run.train())
    assert [r.round for r in records] == [0, 1, 4, 5, 6, 7, 8]
    assert [r.round for r in records if r.scores] == [0, 4, 6, 8]  # 4 for 3, which nobody took
    assert engine.asked == [0, 3, 4, 5, 6, 7]
    assert run.trainer.steps_taken.tolist() == [12] * 4  # steps are the agent's own: no examples are skipped


@pytest.mark.parametrize("order", ["adapt-combine", "combine-adapt"])
def test_a_relabelled_exchange_moves_the_run_on(order):
    engine = Elsewhere(4, met={2: 4})
    records = list(a_run(engine, order=order).train())
    assert [r.round for r in records] == [0, 1, 2, 5, 6, 7, 8]
    assert [r.round for r in records if r.scores] == [0, 5, 6, 8]


@pytest.mark.parametrize("order", ["adapt-combine", "combine-adapt"])
def test_who_comes_back_when_the_run_is_over_ends_with_the_last_round(order):
    engine = Elsewhere(4, said={3: 8}, met={"catch up": 8}, late=True)
    run = a_run(engine, order=order)
    records = list(run.train())
    assert [r.round for r in records] == [0, 1, 2, 3, 8]
    assert records[-1].scores is not None
    if order == "adapt-combine":  # nothing was trained after the neighbours' average was taken
        assert all(float((t - t[:1]).abs().max()) == 0 for t in run.adapter.tensors().values())


def test_the_agents_are_held_for_others_after_every_exchange():
    engine = Elsewhere(4)
    run = a_run(engine, rounds=3)
    list(run.train())
    assert len(engine.held) == 4  # the start, and three rounds
    assert all(torch.equal(engine.held[-1][k], t) for k, t in run.adapter.tensors().items())


def test_a_checkpoint_keeps_what_the_engine_asks_for(tmp_path):
    class Remembering(Elsewhere):
        def snapshot(self):
            return {"edges": [1, 2]}

        def restore(self, values):
            self.restored = values

    run, other = a_run(Remembering(4)), a_run(Remembering(4))
    for record in run.train():
        if record.round == 2:
            break
    tensors, values = run.snapshot()
    other.restore(tensors, values)
    assert other.engine.restored == {"edges": [1, 2]}
    records = list(other.train())
    assert [r.round for r in records] == [3, 4, 5, 6, 7, 8]


def test_an_exchange_that_was_started_ahead_is_abandoned_when_the_run_stops():
    class Patient(Simulate):
        abandoned = 0

        def start(self, message, graph, exchange, sizes=None):
            def abandon():
                self.abandoned += 1

            return dataclasses.replace(super().start(message, graph, exchange, sizes), abandon=abandon)

    engine = Patient(4)
    run = a_run(engine, order="combine-adapt")
    for record in run.train():
        if record.round == 2:
            run.stop()
    assert engine.abandoned == 1
    assert [r.round for r in run.train()] == [3, 4, 5, 6, 7, 8]
    assert engine.abandoned == 1
