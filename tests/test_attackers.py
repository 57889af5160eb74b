"""Agents that lie in a simulation: what their neighbours hear, who is scored, and where it is refused."""

import numpy as np
import pytest
import torch

from decaf_lora import Run, TrainingConfig, algorithms, consensus, graphs, partition
from decaf_lora.algorithms.attack import attack
from decaf_lora.algorithms.transforms.table import over
from decaf_lora.config import RunConfig, build
from decaf_lora.errors import UserError
from decaf_lora.federation.terms import terms_of
from decaf_lora.records import summary_row
from decaf_lora.runs.folder import run as run_folder
from decaf_lora.runs.identity import facts_of
from decaf_lora.runs.trackers import values
from decaf_lora.threats import AttackersConfig
from rounds import begun, one_round
from samples import LAYERS, make_adapter, products
from toy import Toy

FAST = TrainingConfig(steps=2, batch_size=6, learning_rate=0.02, agents_per_pass=8)


class Named(Toy):
    """The toy whose batches call the class `labels`, as this package's tasks do."""

    def train_batch(self, indices):
        return {"x": self.x[indices], "labels": self.y[indices]}

    def losses(self, batch, agents):
        return super().losses({"x": batch["x"], "y": batch["labels"]}, agents)


def make(task, algorithm="decaf", rounds=3, graph="complete", **attackers):
    return Run(
        task,
        algorithms.make(algorithm),
        graphs.parse(graph, 4, 0),
        partition.iid(task.labels, 4, seed=0),
        FAST,
        rounds=rounds,
        attackers=AttackersConfig(**attackers),
    )


def finished(run):
    with run:
        return list(run.train())[-1]


def models(adapter):
    parts = [products(adapter.folded(), layer).flatten(1) for layer in LAYERS]
    return torch.cat([*parts, *(t.flatten(1) for t in adapter.extras.values())], 1).numpy()


@pytest.mark.parametrize("rule", ["core", "dlora_fa", "decaf"])
@pytest.mark.parametrize("graph", ["ring", "complete"])
def test_neighbours_hear_the_opposite_and_the_liar_mixes_its_own(rule, graph):
    """Where mixing is exact a sign flip of strength k is the mixing matrix with -k times the liar's column."""
    n = 5
    graph = graphs.parse(graph, n, 0)
    algorithm = algorithms.make(rule)
    adapter = begun(algorithm, make_adapter(n, common_a=rule == "dlora_fa"))
    out, _ = one_round(algorithm | attack("sign-flip", (1, 3), 2.0, 0, "graph"), adapter, graph)
    weights = graph.weights.copy()
    for liar in (1, 3):
        heard = np.arange(n) != liar
        weights[heard, liar] *= -2
    expected = weights @ models(adapter)
    if rule != "decaf":
        np.testing.assert_allclose(models(out), expected, rtol=1e-9, atol=1e-9)
        return
    start = 0
    for layer, (rank, d_in, d_out) in LAYERS.items():
        z = torch.from_numpy(expected[:, start : start + d_in * d_out]).view(n, d_out, d_in)
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        cut = u[..., :rank] * s[:, None, :rank] @ vh[:, :rank]
        torch.testing.assert_close(products(out, layer), cut, rtol=1e-6, atol=1e-7)
        start += d_in * d_out


def test_noise_has_the_size_that_was_asked_for():
    adapter, graph = make_adapter(3), graphs.complete(3)
    out, _ = one_round(algorithms.dlora() | attack("noise", (0,), 3.0, 7, "graph"), adapter, graph)
    again, _ = one_round(algorithms.dlora() | attack("noise", (0,), 3.0, 7, "graph"), adapter, graph)
    parts = []
    for name, t in adapter.tensors().items():
        torch.testing.assert_close(out.tensors()[name], again.tensors()[name], rtol=0, atol=0)
        noise = 3 * (out.tensors()[name] - t.mean(0))
        torch.testing.assert_close(noise[1], noise[2])  # both hear one lie
        torch.testing.assert_close(noise[0], torch.zeros_like(noise[0]), rtol=0, atol=1e-12)
        parts.append((noise[1] / (3 * t[0].square().mean().sqrt())).flatten())
    drawn = torch.cat(parts)
    assert abs(float(drawn.mean())) < 4 / len(drawn) ** 0.5
    assert abs(float(drawn.std()) - 1) < 4 / (2 * len(drawn)) ** 0.5


@pytest.mark.parametrize("extra", [{"messages": "int8"}, {"transforms": ["clipped"]}, {}])
def test_lies_pass_through_codes_and_defences(extra):
    """Clipped gossip bounds the lie; int8 codes it, and the liar pulls as far as it wants."""
    algorithm = over(algorithms.make("core", **extra), [(85, attack("sign-flip", (0,), 1e3, 0, "graph"))])
    adapter, graph = begun(algorithm, make_adapter(6)), graphs.ring(6)
    out, _ = one_round(algorithm, adapter, graph)
    moved = np.linalg.norm(models(out) - models(adapter), axis=1)
    assert (moved[[1, 5]] < 20).all() if "transforms" in extra else (moved[[1, 5]] > 100).all()
    assert (moved[[0, 2, 3, 4]] < 20).all()


def test_a_label_flip_is_training_on_flipped_labels():
    lying = make(Named(), kind="label-flip", agents=(2,))
    last = finished(lying)
    task = Named()
    flipped = lying.partition.shard(2).copy()
    task.y[flipped] = 3 - task.y[flipped]
    by_hand = Run(task, algorithms.decaf(), graphs.complete(4), lying.partition, FAST, rounds=3)
    wanted = finished(by_hand)
    for name, tensor in by_hand.adapter.tensors().items():
        torch.testing.assert_close(lying.adapter.tensors()[name], tensor, rtol=0, atol=0)
    assert last.scores[2] is None
    assert [last.scores[i] for i in (0, 1, 3)] == [wanted.scores[i] for i in (0, 1, 3)]


def test_only_the_honest_count():
    run = make(Toy(), kind="noise", agents=(1,), strength=2)
    last = finished(run)
    row = summary_row(facts_of(run), [last])
    honest = [last.scores[i] for i in (0, 2, 3)]
    assert last.attackers == [1]
    assert last.scores[1] is None
    assert last.losses[1] is None
    assert row.mean_score == pytest.approx(sum(honest) / 3)
    assert row.worst_score == min(honest)
    assert values(last)["score/mean"] == row.mean_score


def test_the_averaged_model_is_that_of_the_honest():
    run = make(Toy(), kind="sign-flip", agents=(0,), rounds=2)
    last = finished(run)
    adapters = run.adapter
    averaged = consensus.averaged(adapters.select([1, 2, 3]))
    for name, tensor in consensus.chosen(adapters, "averaged", (0,)).tensors().items():
        torch.testing.assert_close(tensor, averaged.tensors()[name], rtol=0, atol=0)
    assert last.consensus_distance == consensus.distance(adapters.select([1, 2, 3]))


def test_a_resumed_run_hears_the_same_lies():
    whole, parts = (make(Toy(), "decaf_tracked", kind="noise", agents=(0,)) for _ in range(2))
    finished(whole)
    with parts:
        next(iter(parts.train()))
        parts.advance()
        saved = parts.snapshot()
    other = make(Toy(), "decaf_tracked", kind="noise", agents=(0,))
    with other:
        other.restore(*saved)
        list(other.train())
    for name, tensor in whole.adapter.tensors().items():
        torch.testing.assert_close(other.adapter.tensors()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("attackers", "message"),
    [
        ({"agents": [1]}, "attackers without a kind"),
        ({"kind": "noise"}, "kind without agents"),
        ({"kind": "noise", "agents": [1, 1]}, "names one twice"),
        ({"kind": "noise", "agents": [1], "strength": 0}, "attackers.strength"),
        ({"kind": "label-flip", "agents": [1], "strength": 2}, "does not apply to label-flip"),
        ({"kind": "lie", "agents": [1]}, "attackers.kind"),
    ],
)
def test_mistakes_are_named(attackers, message):
    with pytest.raises(UserError, match=message):
        build(RunConfig, {"attackers": attackers})


def test_what_makes_no_sense_is_refused(tmp_path):
    for algorithm in ("local", "centralized"):
        with pytest.raises(UserError, match=f"attackers: {algorithm} exchanges nothing"):
            make(Toy(), algorithm, kind="noise", agents=(0,))
    with pytest.raises(UserError, match=r"attackers.agents: 4 is not in this run; use 0 to 3"):
        make(Toy(), kind="noise", agents=(4,))
    with pytest.raises(UserError, match="all agents lie"):
        make(Toy(), kind="noise", agents=(0, 1, 2, 3))
    with pytest.raises(UserError, match="label-flip needs a task whose batches hold the class as `labels`"):
        make(Toy(), kind="label-flip", agents=(0,))
    with pytest.raises(UserError, match=r"attackers: with algorithm.relay_rank agents send on what was mixed"):
        algorithms.decaf(relay_rank=4) | attack("noise", (0,), 1.0, 0, "graph")
    config = build(RunConfig, {"attackers": {"kind": "noise", "agents": [0]}})
    with pytest.raises(UserError, match="attackers: they are for a simulation in one process"):
        terms_of(config)
    with pytest.raises(UserError, match="baseline: it compares every agent"):
        run_folder(config.model_copy(update={"baseline": ("alone",)}), tmp_path / "run")
