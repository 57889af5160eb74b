"""Differential privacy: gradients against a loop over examples, noise and batches by their moments, the accountant
against closed forms and its own library, resume, and what is refused."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from opacus.accountants.utils import get_noise_multiplier
from scipy.optimize import brentq
from scipy.stats import norm

from decaf_lora import Run, TrainingConfig, algorithms, graphs, partition
from decaf_lora.adapters import attach
from decaf_lora.algorithms import Transform
from decaf_lora.config import RunConfig, build
from decaf_lora.errors import UserError
from decaf_lora.federation.terms import terms_of
from decaf_lora.privacy import Account, PrivateTrainer
from decaf_lora.privacy.accounting import epsilon_of, noise_for
from decaf_lora.privacy.trainer import PoissonStream
from decaf_lora.records import read_facts, read_records
from decaf_lora.runs.build import build_run
from decaf_lora.runs.export import export
from decaf_lora.runs.folder import run as run_folder
from decaf_lora.threats import PrivacyConfig
from toy import Toy

SILENT = 1e-30
"""A noise multiplier that leaves the clipped sums as they are."""
SHARDS = {0: np.arange(0, 20), 1: np.arange(20, 30), 2: np.arange(30, 33)}
TRAINING = TrainingConfig(steps=2, batch_size=8, learning_rate=0.02, agents_per_pass=2)


def make(noise=SILENT, clip=0.5, agents=(0, 1, 2), ranks=None, training=TRAINING, scale=1.0, extras=True):
    """(trainer, adapter, attached) of the toy with random factors."""
    task = Toy(extras=extras)
    task.x = task.x * scale
    lora = task.default_lora()
    attached = attach(
        task.model, [dataclasses.replace(lora, r=r, lora_alpha=r) for r in ranks] if ranks is not None else lora
    )
    account = Account(PrivacyConfig(noise=noise, delta=1e-3, clip=clip, seed=5), training, SHARDS, 4)
    trainer = PrivateTrainer(account, task, attached, training, list(agents), [SHARDS[i] for i in agents], 0)
    adapter = attached.init(list(agents), 0)
    draw = torch.Generator().manual_seed(3)
    values = {name: t + 0.3 * torch.randn(t.shape[1:], generator=draw) for name, t in adapter.tensors().items()}
    adapter = adapter.with_tensors(adapter.trim(values))
    trainer.prepare(adapter)
    return trainer, adapter, attached


def gradients(trainer, adapter, trained=("A", "B", "extras"), active=None):
    """Names -> (n, ...) the gradients of the agents' next step."""
    flats = {g: layout.pack(getattr(adapter, g)) for g, layout in trainer._layouts.items()}
    batches = [s.batch(int(t)) for s, t in zip(trainer.streams, trainer.steps_taken, strict=True)]
    active = np.ones(len(batches), dtype=bool) if active is None else active
    found, _ = trainer._gradients(flats, adapter, [g for g in flats if g in trained], batches, active)
    return {f"{g}/{k}": t for g in found for k, t in trainer._layouts[g].unpack(found[g]).items()}


def by_a_loop(trainer, adapter, attached, place, clip, trained=("A", "B", "extras")):
    """The clipped sum of one agent's batch over the expected batch size, one example after the other."""
    own, task = adapter.select([place]), trainer.task
    total = {name: torch.zeros_like(t) for name, t in own.tensors(frozenset(trained)).items()}
    stream = trainer.private[place]
    for example in stream.batch(int(trainer.steps_taken[place])):
        leaves = {name: t.clone().requires_grad_() for name, t in own.tensors(frozenset(trained)).items()}
        with attached.bind(own.with_tensors(leaves)):
            loss = task.losses(task.train_batch(np.array([example])), 1).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        size = math.sqrt(sum(float(g.square().sum()) for g in grads))
        for name, g in zip(leaves, grads, strict=True):
            total[name] += g * min(1.0, clip / size)
    return {name: t / (stream.rate * len(stream.shard)) for name, t in total.items()}


@pytest.mark.parametrize("ranks", [None, (2, 1, 3)])
@pytest.mark.parametrize("clip", [0.3, 1e6])
@pytest.mark.parametrize("trained", [("A", "B", "extras"), ("B",)])
def test_every_example_is_clipped_by_itself(ranks, clip, trained):
    trainer, adapter, attached = make(clip=clip, ranks=ranks)
    found = gradients(trainer, adapter, trained)
    for place in range(3):
        for name, wanted in by_a_loop(trainer, adapter, attached, place, clip, trained).items():
            torch.testing.assert_close(found[name][place], wanted[0], rtol=1e-4, atol=1e-6)


def test_passes_and_processes_change_nothing():
    """The gradients of an agent do not depend on who shares its pass or its process."""
    together, adapter, _ = make(noise=0.7)
    whole = gradients(together, adapter)
    for agents in ((0,), (1, 2)):
        alone, own, _ = make(noise=0.7, agents=agents, training=TRAINING.model_copy(update={"agents_per_pass": 1}))
        own = own.with_tensors({name: t[list(agents)] for name, t in adapter.tensors().items()})
        for name, t in gradients(alone, own).items():
            torch.testing.assert_close(t, whole[name][list(agents)], rtol=1e-5, atol=1e-6)


def test_no_example_counts_for_more_than_the_clip():
    """Inputs a million times too large: the sum of a batch stays below C times its size."""
    trainer, adapter, _ = make(clip=0.5, scale=1e6)
    found = gradients(trainer, adapter)
    for place, stream in enumerate(trainer.private):
        size = math.sqrt(sum(float(t[place].square().sum()) for t in found.values()))
        assert size * stream.rate * len(stream.shard) <= 0.5 * len(stream.batch(0)) * (1 + 1e-5)


@pytest.mark.parametrize("ranks", [None, (2, 1, 3)])
def test_noise_has_its_standard_deviation_and_is_new_in_every_step(ranks):
    quiet, adapter, _ = make(ranks=ranks)
    loud, _, _ = make(noise=3.0, ranks=ranks)
    drawn = []
    for step in range(12):
        quiet.steps_taken[:] = loud.steps_taken[:] = step
        silent, noisy = gradients(quiet, adapter), gradients(loud, adapter)
        expected = torch.tensor([s.rate * len(s.shard) for s in loud.private])
        noise = {k: (noisy[k] - t) * expected.view(-1, *[1] * (t.dim() - 1)) / (3.0 * 0.5) for k, t in silent.items()}
        for name, t in adapter.trim({name: torch.ones_like(t) for name, t in noise.items()}).items():
            assert not noise[name][t == 0].any()  # nothing beyond an agent's own rank
        live = adapter.trim({name: torch.ones_like(t) for name, t in noise.items()})
        drawn.append([torch.cat([t[i][live[k][i] != 0].flatten() for k, t in noise.items()]) for i in range(3)])
    for place in range(3):
        all_ = torch.stack([step[place] for step in drawn])
        count = all_.numel()
        assert abs(float(all_.mean())) < 4.5 / count**0.5
        assert abs(float(all_.std()) - 1) < 4.5 / (2 * count) ** 0.5
        between = float((all_[0] * all_[1]).mean())
        assert abs(between) < 4.5 / all_.shape[1] ** 0.5


def test_an_agent_that_rests_or_draws_no_example():
    trainer, adapter, _ = make(noise=1.0)
    found = gradients(trainer, adapter, active=np.array([True, False, True]))
    assert not any(bool(t[1].any()) for t in found.values())
    empty = next(step for step in range(2000) if not len(PoissonStream(SHARDS[0], 0.1, 4).batch(step)))
    trainer.private[0].rate, trainer.private[0].key = 0.1, 4
    trainer.steps_taken[0] = empty
    noise = gradients(trainer, adapter)
    assert all(bool(t[0].any()) for t in noise.values())


def test_examples_are_drawn_each_with_the_same_probability():
    shard, rate, steps = np.arange(100, 140), 0.3, 1500
    drawn = np.zeros((steps, len(shard)), dtype=bool)
    stream = PoissonStream(shard, rate, 9)
    for step in range(steps):
        drawn[step, stream.batch(step) - 100] = True
    assert (abs(drawn.mean(0) - rate) < 4.5 * (rate * (1 - rate) / steps) ** 0.5).all()
    sizes = drawn.sum(1)  # binomial
    assert sizes.var() == pytest.approx(len(shard) * rate * (1 - rate), rel=0.15)
    np.testing.assert_array_equal(stream.batch(7), PoissonStream(shard, rate, 9).batch(7))
    assert len(PoissonStream(shard, 1.0, 9).batch(3)) == len(shard)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (5.0, 150), (20.0, 150)])
def test_without_sampling_the_loss_is_that_of_the_gaussian_mechanism(noise, steps):
    """Balle and Wang, arXiv 1805.06530, theorem 8, of sensitivity sqrt(T) / sigma; the accountant adds 0.02 at most."""
    mu, delta = math.sqrt(steps) / noise, 1e-3

    def over(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    exact = brentq(over, 0, 100)
    assert exact <= epsilon_of(noise, 1.0, steps, delta) <= exact + 0.02


@pytest.mark.filterwarnings("ignore:Optimal order")
def test_noise_is_what_the_library_finds():
    ours = noise_for(1.0, 0.05, 1000, 1e-5)
    theirs = get_noise_multiplier(
        target_epsilon=1.0, target_delta=1e-5, sample_rate=0.05, steps=1000, accountant="prv", epsilon_tolerance=0.01
    )
    assert ours == pytest.approx(theirs, rel=0.01)
    assert 0.98 < epsilon_of(ours, 0.05, 1000, 1e-5) <= 1.0
    assert epsilon_of(1e-4, 0.2, 150, 1e-3) > 1e6  # the bound of another accountant, without its memory
    with pytest.raises(UserError, match=r"privacy.epsilon: 1e-09 needs noise that drowns everything"):
        noise_for(1e-9, 1.0, 150, 1e-12)


def private_run(algorithm="decaf_tracked", seed=0, rounds=3, more=None, **privacy):
    task = Toy(extras=True)
    given = {"noise": 0.8, "delta": 1e-3, "seed": seed, **privacy}
    shards = partition.iid(task.labels, 4, seed=0)
    return Run(
        task,
        algorithms.make(algorithm, messages="int8") if more is None else algorithms.make(algorithm) | more,
        graphs.ring(4),
        shards,
        TRAINING,
        rounds=rounds,
        privacy=PrivacyConfig(**given),
    )


@pytest.mark.parametrize("seed", [0, None])
def test_a_resumed_run_draws_the_same(seed):
    """Also with secrets of the system, which the checkpoint hands on."""
    whole = private_run(seed=seed)
    with whole:
        saved = None
        for record in whole.train():
            if record.round == 1:
                tensors, values = whole.snapshot()
                saved = {k: t.clone() for k, t in tensors.items()}, values
        wanted = {name: t.clone() for name, t in whole.adapter.tensors().items()}
    other = private_run(seed=seed)
    with other:
        other.restore(*saved)
        list(other.train())
    for name, tensor in wanted.items():
        torch.testing.assert_close(other.adapter.tensors()[name], tensor, rtol=0, atol=0)


def test_secrets_differ_between_runs():
    first, second = private_run(seed=None), private_run(seed=None)
    assert {s.key for s in first.trainer.private}.isdisjoint(s.key for s in second.trainer.private)
    assert len({s.key for s in first.trainer.private}) == 4
    first.close()
    second.close()


def test_transforms_see_private_gradients_alone():
    """What steers, and so all that is sent, gets exactly the clipped and noisy gradients."""
    seen = []

    def steer(state, gradients, round_):
        seen.append({name: t.clone() for name, t in gradients.items()})
        return gradients, state

    run = private_run("dlora", more=Transform("spy", steer=steer), rounds=1)
    with run:
        wanted = gradients(run.trainer, run.adapter)
        list(run.train())
    for name, tensor in wanted.items():
        torch.testing.assert_close(seen[0][name], tensor, rtol=0, atol=0)


def test_more_rounds_are_refused_where_the_noise_was_planned():
    saved = make(noise=1.0)[0].snapshot()
    other, _, _ = make(noise=1.1)
    with pytest.raises(UserError, match=r"privacy.epsilon was planned for another number of rounds"):
        other.restore(saved)


def test_records_report_and_card_say_what_was_promised_and_no_loss(tmp_path):
    values = {
        "task": {"name": "tests/helpers/toy.py:make_toy"},
        "agents": 4,
        "rounds": 2,
        "evaluate_every": 1,
        "training": TRAINING.model_dump(),
        "partition": "iid",
        "graph": "complete",
        "privacy": {"noise": 1.5, "delta": 1e-3},
        "attackers": {"kind": "noise", "agents": [1], "strength": 2},
    }
    _, folder = run_folder(build(RunConfig, values), tmp_path / "run")
    records, facts = read_records(folder / "records.jsonl"), read_facts(folder)
    assert [record.losses for record in records] == [None] * 3
    assert [record.delta for record in records] == [1e-3] * 3
    spent = [record.epsilon for record in records]
    assert spent[0] == 0
    assert 0 < spent[1] < spent[2] < 5
    assert facts["attackers"] == "noise times 2 by agent 1"
    assert facts["privacy"].startswith(f"(ε = {spent[2]:.3g}, δ = 0.001) for every training example")
    export(folder, "averaged", tmp_path / "model")
    for page in (folder / "report.html", tmp_path / "model" / "README.md"):
        assert facts["privacy"] in page.read_text(encoding="utf-8")
        assert facts["attackers"] in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("privacy", "message"),
    [
        ({"epsilon": 3}, "delta is missing"),
        ({"epsilon": 3, "noise": 1, "delta": 1e-3}, "epsilon and noise exclude each other"),
        ({"delta": 1e-3}, "neither epsilon nor noise"),
        ({"epsilon": 0, "delta": 1e-3}, r"privacy\.epsilon"),
        ({"noise": 1, "delta": 1}, r"privacy\.delta"),
        ({"noise": 1, "delta": 1e-3, "clip": 0}, r"privacy\.clip"),
    ],
)
def test_mistakes_are_named(privacy, message):
    with pytest.raises(UserError, match=message):
        build(RunConfig, {"privacy": privacy})


class Mixing(Toy):
    """A model whose examples see each other."""

    def losses(self, batch, agents):
        batch = {**batch, "x": batch["x"] + batch["x"].mean(0)}
        return super().losses(batch, agents)


def test_what_no_accountant_covers_is_refused():
    on = {"noise": 1, "delta": 1e-3}
    with pytest.raises(UserError, match=r"privacy.delta: 0.05 lets one of 20 examples be published whole"):
        Account(PrivacyConfig(noise=1, delta=0.05), TRAINING, SHARDS, 4)
    with pytest.raises(UserError, match=r"task.packing: a block holds several texts"):
        build_run(build(RunConfig, {"privacy": on, "task": {"name": "causal-lm", "packing": True}}))
    with pytest.raises(UserError, match=r"training.learning_rate auto looks at the examples many times"):
        build(RunConfig, {"privacy": on, "training": {"learning_rate": "auto"}})
    with pytest.raises(UserError, match="privacy: not in a federation yet"):
        terms_of(build(RunConfig, {"privacy": on}))
    with pytest.raises(UserError, match="privacy: not in a federation yet"):
        Account(PrivacyConfig(**on), TRAINING, SHARDS, 4, in_step=False)
    task = Mixing()
    with pytest.raises(UserError, match="privacy: TwoLayers does not keep the examples of a batch apart"):
        Run(
            task,
            algorithms.decaf(),
            graphs.ring(4),
            partition.iid(task.labels, 4, seed=0),
            TRAINING,
            privacy=PrivacyConfig(**on),
        )


def test_adapters_that_agents_bring_are_refused(tmp_path):
    task = Toy()
    with pytest.raises(UserError, match="privacy: the agents bring adapters of their own"):
        Run(
            task,
            algorithms.decaf(),
            graphs.ring(4),
            partition.iid(task.labels, 4, seed=0),
            TRAINING,
            init_adapters=[tmp_path / "a", None, None, None],
            privacy=PrivacyConfig(noise=1, delta=1e-3),
        )


def test_a_private_run_learns():
    """Little noise and every example in every batch: as good as without privacy."""
    run = private_run("decaf", noise=0.01, clip=10.0, rounds=8)
    with run:
        records = list(run.train())
    assert records[-1].averaged_score > records[0].averaged_score
