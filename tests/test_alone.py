"""An agent that knows its own examples alone, and no others but its neighbours: the same run, bit for bit."""

import dataclasses

import numpy as np
import pytest
import torch

from decaf_lora import algorithms, consensus, graphs, partition
from decaf_lora.config import TrainingConfig
from decaf_lora.engines import Simulate
from decaf_lora.errors import UserError
from decaf_lora.run import Run
from samples import LAYERS, make_adapter, products
from threads import OwnToy, Peer, Room, train_alone
from toy import Toy

STEPS = TrainingConfig(steps=2, batch_size=4, learning_rate=0.02, agents_per_pass=1)
RANKS = (1, 4, 2, 3)

CASES = {
    "local": ("local", {}, "ring", {}),
    "dlora": ("dlora", {}, "ring", {}),
    "dlora on complete": ("dlora", {"moments": "reset"}, "complete", {}),
    "dlora_fa": ("dlora_fa", {}, "ring", {}),
    "decaf": ("decaf", {}, "ring", {}),
    "decaf on complete": ("decaf", {"gauge": "anchored"}, "complete", {}),
    "decaf_tracked": ("decaf_tracked", {}, "ring", {}),
    "decaf_tracked on complete": ("decaf_tracked", {"gauge": "balanced"}, "complete", {}),
    "int8": ("dlora", {"messages": "int8"}, "ring", {}),
    "tracking and int8": ("decaf_tracked", {"messages": "int8", "reference": "own"}, "ring", {}),
    "feedback": ("decaf", {"truncation_feedback": 1.0}, "star", {}),
    "quasi-global": ("dlora_fa", {"quasi_global": 0.9}, "ring", {}),
    "transport": ("decaf", {"moments": "transport"}, "ring", {}),
    "all": (
        "decaf_tracked",
        {"quasi_global": 0.5, "truncation_feedback": 0.9, "messages": "int8", "gauge": "orthonormal"},
        "ring",
        {},
    ),
    "combine-adapt": ("decaf", {"order": "combine-adapt"}, "ring", {}),
    "combine-adapt and tracking": ("decaf_tracked", {"order": "combine-adapt"}, "ring", {}),
    "unequal ranks": ("decaf_tracked", {}, "ring", {"ranks": RANKS}),
    "unequal ranks, averaged": ("dlora", {}, "star", {"ranks": RANKS}),
    "relay": ("decaf", {"relay_rank": 4}, "ring", {"gossip_steps": 2}),
    "relay and tracking": ("decaf_tracked", {"relay_rank": 3}, "ring", {"gossip_steps": 2}),
    "relay, mixing first": ("decaf", {"relay_rank": 4, "order": "combine-adapt"}, "ring", {"gossip_steps": 3}),
    "relay on a schedule": ("decaf", {"relay_rank": 4}, "one-peer-hypercube", {"gossip_steps": 2}),
    "one-peer hypercube": ("decaf", {}, "one-peer-hypercube", {}),
    "one-peer exponential": ("dlora", {"messages": "int8"}, "one-peer-exponential", {}),
    "some rest in a round": ("decaf", {}, "base:2", {"n": 3}),
    "unequal steps": ("decaf_tracked", {}, "ring", {"epochs": 0.3}),
    "unequal steps, SGD": ("dlora", {}, "ring", {"epochs": 0.3, "optimizer": "sgd"}),
}


def make_run(case, task, shards, engine):
    name, options, graph, more = CASES[case]
    n = more.get("n", 4)
    training = STEPS.model_copy(update={k: v for k, v in more.items() if k in ("epochs", "optimizer")})
    lora = [dataclasses.replace(task.default_lora(), r=r, lora_alpha=r + 1) for r in more.get("ranks", ())]
    return Run(
        task,
        algorithms.make(name, **options),
        graphs.parse(graph, n, 0),
        shards,
        training,
        lora=lora or None,
        rounds=4,
        evaluate_every=2,
        gossip_steps=more.get("gossip_steps", 1),
        engine=engine,
    )


@pytest.mark.parametrize("case", CASES)
def test_agents_that_know_only_their_own_examples_end_as_in_a_simulation(case):
    shards = partition.dirichlet(Toy().labels, CASES[case][3].get("n", 4), alpha=0.5, seed=1)
    whole = make_run(case, Toy(extras=True), shards, Simulate)
    expected = list(whole.train())
    ended = train_alone(shards.shards, lambda task, own, engine: make_run(case, task, own, engine))

    together, parts = whole.snapshot()[0], [run.snapshot()[0] for run, _ in ended]
    for name, tensor in together.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name
    for part in parts:  # an agent alone also keeps what it got over each edge, which is its correction in parts
        edges = {name for name in part if name.startswith("state/tracking/f/")}
        assert part.keys() - edges == together.keys()
        assert bool(edges) == ("state/tracking/steps" in part)
        for name, c in part.items():
            if name.startswith("state/tracking/c/"):
                ending = name.removeprefix("state/tracking/c/")
                total = sum(part[edge] for edge in edges if edge.endswith(f"/{ending}"))
                unsent = part.get(f"state/int8/tracking/{ending}", torch.zeros_like(c))
                torch.testing.assert_close(total, c + unsent, rtol=1e-4, atol=1e-6)
    for agent, (_, records) in enumerate(ended):
        assert [r.round for r in records] == [r.round for r in expected]
        for own, of_all in zip(records, expected, strict=True):
            assert own.losses == (of_all.losses and [of_all.losses[agent]])
            assert own.scores == (of_all.scores and [of_all.scores[agent]])
            assert (own.averaged_score, own.consensus_distance) == (None, None)
    for measure in ("interference", "tail", "recompression"):
        of_all, own = (getattr(expected[-1], measure), [getattr(records[-1], measure) for _, records in ended])
        assert own == [None] * len(own) if of_all is None else of_all == pytest.approx(np.sqrt(np.mean(np.square(own))))
    sent = [records[-1].bytes_sent for _, records in ended]
    assert np.mean(sent) == pytest.approx(expected[-1].bytes_sent)


def test_what_an_agent_records_of_its_neighbours():
    graph = graphs.star(4)
    shards = partition.iid(Toy().labels, 4, seed=0)

    def run_of(task, own, engine):
        return Run(task, algorithms.dlora(), graph, own, STEPS, rounds=2, engine=engine)

    ended = train_alone(shards.shards, run_of)
    for agent, (run, records) in enumerate(ended):
        heard = {str(j): float(graph.weights[agent, j]) for j in graph.neighbours(agent)}
        assert records[-1].weights == heard
        assert records[0].weights is None
        assert (records[-1].waited, records[-1].rejected) == (None, None)
        assert run.sees_all is False
    whole = Run(Toy(extras=True), algorithms.dlora(), graph, shards, STEPS, rounds=2)
    *_, last = whole.train()
    assert last.neighbour_distance is last.weights is None


def test_the_distance_to_the_neighbours_is_of_the_products():
    for unequal in (False, True):
        adapter, graph = make_adapter(5, unequal=unequal), graphs.ring(5)
        inbox = algorithms.Inbox.from_weights(adapter.message(), graph.weights, range(5), range(5))
        inbox = dataclasses.replace(inbox, num_receivers=1, own=(3,))
        squares = [
            sum(float((products(adapter, k)[j] - products(adapter, k)[3]).square().sum()) for k in LAYERS)
            for j in (0, 1, 2, 4)
        ]
        own = adapter.select([3])
        assert consensus.neighbour_distance(own, inbox) == pytest.approx(np.sqrt(np.mean(squares)))
        alone = algorithms.Inbox.from_weights(own.message(), np.eye(5), [3], [3])
        assert consensus.neighbour_distance(own, alone) is None
    assert consensus.neighbour_distance(own, dataclasses.replace(inbox, tensors={"B/x": adapter.B["x"]})) is None


# --- what cannot be done alone ------------------------------------------------------------------------------


def alone(name="decaf", graph="ring", gossip_steps=1, **options):
    task = OwnToy(np.arange(30), extras=True)
    own = partition.Own(1, 4, range(30), task.labels)
    algorithm, links = algorithms.make(name, **options), graphs.parse(graph, 4, 0)
    engine = {"engine": lambda count: Peer(count, 1, Room())}
    return Run(task, algorithm, links, own, STEPS, gossip_steps=gossip_steps, **engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "fedavg"}, "algorithm: fedavg needs a server; use decaf on the complete graph"),
        ({"name": "centralized"}, "algorithm: centralized needs all data in one place; use decaf"),
        ({"graph": "random-matching"}, "graph: random-matching never starts again, so an agent cannot know whom"),
        (
            {"gossip_steps": 2},
            r"gossip_steps: 2 exchanges a round need algorithm\.relay_rank here, .*neighbours only\.",
        ),
        ({"name": "dlora", "gossip_steps": 3}, r"gossip_steps: 3 exchanges a round need algorithm\.relay_rank here"),
        (
            {"gossip_steps": 2, "messages": "int8"},
            r"need algorithm\.relay_rank here, .*messages int8 cannot be combined with it; use full messages",
        ),
        (
            {"name": "decaf_tracked", "graph": "one-peer-hypercube"},
            r"algorithm\.tracking: over the 2 rounds of one-peer-hypercube it needs agents that never miss one",
        ),
    ],
)
def test_what_needs_more_than_neighbours_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        alone(**options)


def test_adapters_of_others_and_their_average_are_not_known(tmp_path):
    run = alone()
    with pytest.raises(UserError, match="agent: 'averaged' is not known here; use 1, the agent of this process"):
        run.save_adapter(tmp_path / "averaged")
    with pytest.raises(UserError, match="agent: 2 is not known here; use 1"):
        run.save_adapter(tmp_path / "2", agent=2)
    with pytest.raises(UserError, match="agent: 4 is not in this run; use 0 to 3"):
        run.save_adapter(tmp_path / "4", agent=4)
    run.save_adapter(tmp_path / "1", agent=1)
    assert (tmp_path / "1" / "adapter_model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


@pytest.mark.parametrize("agent", [0, 1, 3])
def test_one_agents_examples_are_no_partition_of_a_simulation(agent):
    task = Toy()
    own = partition.Own(agent, 4, range(30), task.labels)
    line = f"partition: it holds the examples of agent {agent} alone, but this process trains 4"
    with pytest.raises(UserError, match=line):
        Run(task, algorithms.decaf(), graphs.ring(4), own)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((4, 4, range(3)), "partition: agent 4 is not one of 4"),
        ((-1, 4, range(3)), "partition: agent -1 is not one of 4"),
        ((1, 4, []), "partition: agent 1 holds no example"),
        ((1, 4, [0, 9]), "partition: agent 1 holds example 9; the examples are 0 to 8"),
        ((1, 4, [2, 2]), "partition: agent 1 holds twice example 2"),
    ],
)
def test_own_examples_that_cannot_be(values, message):
    with pytest.raises(UserError, match=message):
        partition.Own(*values, np.arange(9) % 3)


def test_own_examples_are_what_the_agent_knows():
    own = partition.Own(1, 4, [5, 3, 4], np.arange(9) % 3)
    assert own.shard(1).tolist() == [3, 4, 5]
    assert own.label_table().tolist() == [[1, 1, 1]]
    assert (own.sizes.tolist(), own.classes.tolist()) == ([3], [0, 1, 2])
    with pytest.raises(ValueError, match="agent 1 does not know the examples of agent 2"):
        own.shard(2)
