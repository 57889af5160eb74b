"""Rules and transforms: what a chain of them does once, in which order, and what it refuses."""

import numpy as np
import pytest
import torch

from decaf_lora import algorithms, graphs, lowrank
from decaf_lora.algorithms import Combined, Round, Rule, Transform, average_factors, chain
from decaf_lora.engines import Simulate
from decaf_lora.errors import UserError
from decaf_lora.exchange import Exchange
from decaf_lora.graphs import as_schedule
from rounds import one_round, repeated, setting
from samples import LAYERS, make_adapter, random_gradients
from toy_runs import finished

SAME = [
    (algorithms.decaf() | algorithms.tracking(0.5), algorithms.decaf(tracking=True, tracking_gamma=0.5)),
    (algorithms.dlora() | algorithms.int8(), algorithms.dlora(messages="int8")),
    (algorithms.dlora_fa() | algorithms.tracking(1.0), algorithms.dlora_fa(tracking=True)),
    (
        algorithms.decaf(gauge="balanced")
        | algorithms.feedback(0.9)
        | algorithms.quasi_global(0.5)
        | algorithms.tracking()
        | algorithms.int8(),
        algorithms.decaf_tracked(gauge="balanced", truncation_feedback=0.9, quasi_global=0.5, messages="int8"),
    ),
]


@pytest.mark.parametrize(("chained", "named"), SAME)
def test_a_chain_is_what_the_options_name(chained, named):
    assert chained.name == named.name
    adapter, graph = make_adapter(4), graphs.ring(4)
    results = []
    for algorithm in (chained, named):
        ours, state = adapter, algorithm.init(adapter, setting(adapter))
        for number in (1, 2):
            gradients = random_gradients(ours, algorithm.trains(Round(1)), number)
            _, state = algorithm.steer(state, gradients, Round(number))
            ours, state = one_round(algorithm, ours, graph, number, state)
        results.append((ours.tensors(), state))
    (one, state), (other, same) = results
    assert all(torch.equal(t, other[k]) for k, t in one.items())
    assert {part: set(tensors) for part, tensors in state.items()} == {p: set(t) for p, t in same.items()}
    assert list(state) == ["rule", *(transform.name for transform in chained.transforms)]


def test_a_message_is_made_once_an_exchange_and_frames_once_for_all_transforms(monkeypatch):
    """One frame change a layer is an SVD: three transforms must not make it three times."""
    made, turned = [], []
    algorithm = algorithms.decaf_tracked(gauge="balanced", quasi_global=0.5, messages="int8")
    rule = algorithm.rule._replace(message=lambda *given: made.append(1) or algorithm.rule.message(*given))
    frame_change = lowrank.frame_change
    monkeypatch.setattr(lowrank, "frame_change", lambda *given: turned.append(1) or frame_change(*given))
    adapter = make_adapter(4)
    counted = chain(rule, *algorithm.transforms)
    state = counted.init(adapter, setting(adapter))
    made.clear()
    one_round(counted, adapter, graphs.ring(4), 1, state)
    assert (len(made), len(turned)) == (1, len(LAYERS))
    turned.clear()
    one_round(algorithms.decaf(gauge="balanced"), adapter, graphs.ring(4))
    one_round(algorithms.decaf(gauge="balanced", truncation_feedback=1.0), adapter, graphs.ring(4))
    assert not turned  # nobody asks


def test_every_part_sees_its_own_state_and_messages_alone():
    seen = []

    def watch(name):
        def init(adapter, trained, message, setting):
            return {name: torch.zeros(adapter.num_agents)}

        def send(adapter, state, message, round_):
            seen.append((name, "sends", sorted(state), sorted(message)))
            return message | {f"{name}/more": torch.ones(adapter.num_agents)}, state

        def receive(adapter, state, inbox, round_):
            seen.append((name, "reads", sorted(state), sorted(inbox.tensors)))
            left = {k: t for k, t in inbox.tensors.items() if not k.startswith(name)}
            return algorithms.Inbox(left, inbox.groups, inbox.num_receivers), {name: state[name] + 1}

        return Transform(name, init, send=send, receive=receive)

    def combine(adapter, state, inbox, round_):
        seen.append(("rule", "combines", sorted(state), sorted(inbox.tensors)))
        return Combined(adapter, state)

    rule = Rule("mine", message=lambda adapter, state, round_: {"A/x": adapter.A["x"]}, combine=combine)
    adapter = make_adapter(3)
    algorithm = chain(rule, watch("one"), watch("two"))
    state = algorithm.init(adapter, setting(adapter))
    seen.clear()
    _, state = one_round(algorithm, adapter, graphs.ring(3), 1, state)
    assert seen == [
        ("one", "sends", ["one"], ["A/x"]),
        ("two", "sends", ["two"], ["A/x", "one/more"]),
        ("two", "reads", ["two"], ["A/x", "one/more", "two/more"]),
        ("one", "reads", ["one"], ["A/x", "one/more"]),
        ("rule", "combines", [], ["A/x"]),
    ]
    assert state == {"rule": {}, "one": {"one": state["one"]["one"]}, "two": {"two": state["two"]["two"]}}
    assert state["one"]["one"].tolist() == [1, 1, 1]


def one_factor(name, is_first):
    """A is trained and mixed in some rounds, B in the others."""

    def trains(round_):
        return frozenset({"A" if is_first(round_) else "B", "extras"})

    def message(adapter, state, round_):
        return adapter.message(trains(round_))

    return chain(Rule(name, trains=trains, message=message, combine=average_factors))


def alternating():
    """A is trained and mixed in odd rounds, B in even ones."""
    return one_factor("alternating", lambda round_: round_.number % 2)


def late(first_other):
    """A is trained and mixed, from some round on B."""
    return one_factor("late", lambda round_: round_.number < first_other)


def test_a_rule_of_ones_own_runs_and_takes_transforms():
    adapter, weights = make_adapter(4), torch.from_numpy(graphs.ring(4).weights.copy())
    state = alternating().init(adapter, setting(adapter))
    for number, (moved, still) in ((1, "AB"), (2, "BA")):
        new, state = one_round(alternating(), adapter, graphs.ring(4), number, state)
        for layer in LAYERS:
            before, after = getattr(adapter, moved)[layer], getattr(new, moved)[layer]
            torch.testing.assert_close(after, torch.einsum("ij,jab->iab", weights, before))
            assert torch.equal(getattr(new, still)[layer], getattr(adapter, still)[layer])
    coded, state = alternating() | algorithms.int8(), None
    for number in (1, 2, 3):
        adapter, state = one_round(coded, adapter, graphs.ring(4), number, state)
    assert state["int8"].keys() == adapter.tensors().keys()  # what is still to be sent of either factor is kept


def test_what_a_chain_refuses():
    with pytest.raises(UserError, match="algorithm: int8 lies over dlora twice; leave one out"):
        algorithms.dlora(messages="int8") | algorithms.int8()
    with pytest.raises(UserError, match="algorithm: rule lies over dlora twice"):
        algorithms.dlora() | Transform("rule")
    with pytest.raises(UserError, match=r"truncation_feedback: dlora truncates nothing; leave it out, or use decaf"):
        algorithms.dlora() | algorithms.feedback()
    for field, transform in (("tracking", algorithms.tracking()), ("quasi_global", algorithms.quasi_global())):
        match = rf"algorithm\.{field}: alternating trains other factors in round 2 than in round 1"
        with pytest.raises(UserError, match=match):
            alternating() | transform


def test_noise_by_name_is_the_same_in_every_process():
    """What `Setting` is for: a rule that draws noise for its agents draws it by their numbers."""
    from decaf_lora.randomness import torch_generator

    def init(adapter, setting):
        draws = [torch.rand(2, generator=torch_generator(setting.seed, "mine", agent)) for agent in setting.agents]
        return {"noise": torch.stack(draws)}

    algorithm = chain(Rule("noisy", init=init))
    adapter = make_adapter(4)
    whole = algorithm.init(adapter, algorithms.Setting((0, 1, 2, 3), 4, seed=3))["rule"]["noise"]
    part = algorithm.init(adapter.select([1, 3]), algorithms.Setting((1, 3), 4, seed=3))["rule"]["noise"]
    assert torch.equal(part, whole[[1, 3]])


def test_tensors_of_a_state_have_their_part_in_front_in_a_checkpoint():
    run, _ = finished("decaf_tracked", rounds=1, messages="int8")
    names = {name for name in run.snapshot()[0] if name.startswith("state/")}
    assert {name.split("/")[1] for name in names} == {"rule", "tracking", "int8"}
    assert {"state/tracking/c/A/first", "state/int8/A/first", "state/int8/tracking/B/second"} <= names
    assert np.all([t.shape[0] == 4 for t in run.snapshot()[0].values()])


def test_a_state_is_made_for_the_first_round():
    rule, adapter, seen = algorithms.dlora().rule, make_adapter(2), []

    def trains(round_):
        seen.append(round_)
        return rule.trains(round_)

    def message(adapter, state, round_):
        seen.append(round_)
        return rule.message(adapter, state, round_)

    algorithms.chain(rule._replace(trains=trains, message=message)).init(adapter, setting(adapter, period=3))
    assert seen == [algorithms.Round(1, 3)] * 2


@pytest.mark.parametrize("option", ["tracking", "quasi_global"])
@pytest.mark.parametrize("first_other", [101, 150, 2000])
def test_a_rule_that_changes_its_factors_late_is_refused_where_they_must_stay(option, first_other):
    """A chain asks about a hundred rounds, an exchange about all of its run; the round itself is asked last."""
    algorithm = late(first_other) | getattr(algorithms, option)()
    match = rf"algorithm\.{option}: late trains other factors in round {first_other} than in round 1"
    Exchange(algorithm, as_schedule(graphs.ring(4)), Simulate(4), rounds=first_other - 1)
    with pytest.raises(UserError, match=match):
        Exchange(algorithm, as_schedule(graphs.ring(4)), Simulate(4), rounds=first_other)
    algorithm.trains(Round(first_other - 1))
    with pytest.raises(UserError, match=match):
        algorithm.trains(Round(first_other))


def test_a_rule_that_goes_by_the_period_is_asked_with_it():
    """With a period of 1 every round opens one: such a rule would seem to train the same in all."""
    algorithm = one_factor("by_period", lambda round_: round_.opens) | algorithms.tracking()
    schedule = repeated(graphs.ring(4), 3)
    with pytest.raises(UserError, match="by_period trains other factors in round 2 than in round 1"):
        Exchange(algorithm, schedule, Simulate(4), rounds=2)


def test_what_neighbours_that_catch_up_get_holds_a_factor_that_is_trained_late():
    adapter = make_adapter(4)
    held = [
        Exchange(late(150), as_schedule(graphs.ring(4)), Simulate(4), rounds=rounds).templates(adapter).held
        for rounds in (149, 150)
    ]
    assert {name[0] for name in held[0]} == {"A", "e"}
    assert {name[0] for name in held[1]} == {"A", "B", "e"}


def test_a_factor_of_a_round_nobody_was_asked_about_is_refused():
    adapter = make_adapter(4)
    exchange = Exchange(late(150), as_schedule(graphs.ring(4)), Simulate(4), rounds=120)
    state = exchange.init(adapter)
    exchange.start(adapter, state, 149).pending.wait()
    with pytest.raises(UserError, match=r"late trains B for the first time in round 150; .* \(120\) train A, extras"):
        exchange.start(adapter, state, 150)


class OneSite(Simulate):
    """Sees its own agent alone, as in a mesh."""

    def __init__(self, num_agents):
        super().__init__(num_agents)
        self.agents = self.reports = [0]


def test_between_sites_a_message_is_made_up_alike_in_all_rounds():
    """Neighbours compare what arrives with round 1's message, and would reject another one for ever."""
    adapter = make_adapter(4).select([0])
    Exchange(algorithms.decaf(), as_schedule(graphs.ring(4)), OneSite(4), rounds=9).templates(adapter)
    with pytest.raises(UserError, match=r"alternating sends another A/\w+ in round 2 than in round 1; between sites"):
        Exchange(alternating(), as_schedule(graphs.ring(4)), OneSite(4), rounds=9).templates(adapter)
    exchange = Exchange(late(150), as_schedule(graphs.ring(4)), OneSite(4), rounds=200)
    exchange.templates(adapter)
    with pytest.raises(UserError, match=r"late sends another A/\w+ in round 150 than in round 1"):
        exchange.start(adapter, exchange.init(adapter), 150)
