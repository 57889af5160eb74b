"""Local steps: against torch's own optimizers, stacked against one by one, batches, schedules, clipping."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_lora import algorithms, optimizers
from decaf_lora.adapters import attach
from decaf_lora.algorithms import Round
from decaf_lora.batches import BatchStream
from decaf_lora.config import TrainingConfig
from decaf_lora.errors import TrainingError, UserError
from decaf_lora.evaluation import distinct
from decaf_lora.training import FlatGroup, Trainer
from toy import Toy


def trained(task, config, agents, shards, rounds=1, algorithm=None, seed=0, lora=None, common=True):
    """Adapter and trainer after `rounds` rounds of local steps without exchange."""
    attached = attach(task.model, lora or task.default_lora())
    try:
        trainer = Trainer(task, attached, config, agents, shards, seed)
        adapter = attached.init(agents, seed, common)
        trainer.prepare(adapter)
        losses, algorithm = None, algorithm or algorithms.local()
        for number in range(1, rounds + 1):
            adapter, _, losses = trainer.train_round(adapter, algorithm, {}, Round(number), rounds)
        return dataclasses.replace(adapter), trainer, losses
    finally:
        attached.detach()


def shards_of(n, size=20):
    return [np.arange(i * size, (i + 1) * size) for i in range(n)]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_stacked_equals_one_by_one_after_20_steps(optimizer):
    config = TrainingConfig(
        steps=20,
        batch_size=5,
        learning_rate=0.02,
        optimizer=optimizer,
        agents_per_pass=6,
    )
    together, _, _ = trained(Toy(extras=True), config, range(6), shards_of(6))
    for agents_per_pass in (1, 4):
        passes, _, _ = trained(
            Toy(extras=True),
            config.model_copy(update={"agents_per_pass": agents_per_pass}),
            range(6),
            shards_of(6),
        )
        for key, tensor in together.tensors().items():
            torch.testing.assert_close(passes.tensors()[key], tensor, rtol=1e-5, atol=1e-5)
    for agent in range(6):
        alone, _, _ = trained(Toy(extras=True), config, [agent], [shards_of(6)[agent]])
        for key, tensor in together.tensors().items():
            torch.testing.assert_close(alone.tensors()[key][0], tensor[agent], rtol=1e-5, atol=1e-5)


def test_the_demo_model_stacked_equals_one_by_one(digits_task):
    config = TrainingConfig(steps=20, batch_size=4, learning_rate=0.005, agents_per_pass=3)
    shards = shards_of(3, 40)
    together, _, _ = trained(digits_task, config, range(3), shards)
    one, _, _ = trained(digits_task, config.model_copy(update={"agents_per_pass": 1}), range(3), shards)
    for key, tensor in together.tensors().items():
        torch.testing.assert_close(one.tensors()[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_ratio", [None, 1.0, 16.0])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_single_agent_trains_as_with_peft_and_torch(optimizer, head_ratio):
    """The whole local step against PEFT's LoRA layers, its copy of a head if there is one, and torch.optim."""
    import copy

    from peft import get_peft_model

    task, clip = Toy(extras=head_ratio is not None), 0.2 if head_ratio is None else 0.45
    config = TrainingConfig(
        steps=12,
        batch_size=6,
        learning_rate=0.03,
        optimizer=optimizer,
        weight_decay=0.05,
        clip_norm=clip,
        schedule="linear",
        warmup=0.25,
        head_rate_ratio=head_ratio or 1.0,
    )
    shard = np.arange(40)
    plain = copy.deepcopy(task.model)
    start = attach(task.model, task.default_lora())
    initial = start.init([0], 0)
    start.detach()
    adapter, _, losses = trained(task, config, [0], [shard])

    peft = get_peft_model(plain, task.default_lora())
    layers = {name: peft.base_model.model.get_submodule(name) for name in initial.layers}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A["default"].weight.copy_(initial.A[name][0])
            layer.lora_B["default"].weight.copy_(initial.B[name][0])
    named = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    head = [p for name, p in named.items() if ".head." in name]
    groups = [{"params": [p for p in parameters if all(p is not other for other in head)]}]
    groups += [{"params": head}] if head else []
    kinds = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1.0, weight_decay=0.05),
        "sgd": lambda: torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=0.05),
    }
    theirs = kinds[optimizer]()
    stream, total, norms = BatchStream(shard, 6, 0, 0), 0.0, []
    for step in range(12):
        batch = stream.batch(step)
        loss = torch.nn.functional.cross_entropy(peft(task.x[batch]), task.y[batch])
        total += float(loss.detach())
        theirs.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, clip)))
        for group, ratio in zip(theirs.param_groups, (1.0, head_ratio), strict=False):
            group["lr"] = ratio * optimizers.learning_rate(config, step / 12)
        theirs.step()
    assert min(norms) < clip < max(norms)  # some steps are clipped, some are not
    assert float(losses[0]) == pytest.approx(total, rel=1e-5)
    for name, layer in layers.items():
        torch.testing.assert_close(adapter.A[name][0], layer.lora_A["default"].weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapter.B[name][0], layer.lora_B["default"].weight, rtol=1e-4, atol=1e-6)
    assert len(adapter.extras) == len(head)
    for name, tensor in adapter.extras.items():
        (own,) = [
            p for other, p in named.items() if other.endswith(name.replace("head.", "head.modules_to_save.default."))
        ]
        torch.testing.assert_close(tensor[0], own, rtol=1e-4, atol=1e-6)


def test_a_rate_of_a_head_that_is_not_there():
    task = Toy()
    attached = attach(task.model, task.default_lora())
    try:
        with pytest.raises(
            UserError, match=r"head_rate_ratio: 16, but no module .* name a module in lora.modules_to_save"
        ):
            Trainer(task, attached, TrainingConfig(head_rate_ratio=16), [0], shards_of(1), 0)
    finally:
        attached.detach()


def test_agents_with_fewer_local_steps_stand_still():
    """With whole epochs, shards of unequal size take unequal numbers of steps; each as if alone."""
    shards = [np.arange(10), np.arange(20, 50), np.arange(60, 65)]
    config = TrainingConfig(epochs=2, batch_size=5, learning_rate=0.05, agents_per_pass=3)
    together, trainer, _ = trained(Toy(), config, range(3), shards, rounds=2)
    assert trainer.local_steps.tolist() == [4, 12, 2]
    assert trainer.steps_taken.tolist() == [8, 24, 4]
    assert trainer.moments["A"].steps.tolist() == [8, 24, 4]
    # Progress of the learning rate follows the round, so a constant one lets agents be compared alone.
    constant = config.model_copy(update={"schedule": "constant"})
    together, _, _ = trained(Toy(), constant, range(3), shards, rounds=2)
    for agent in range(3):
        alone, _, _ = trained(Toy(), constant, [agent], [shards[agent]], rounds=2)
        for key, tensor in together.tensors().items():
            torch.testing.assert_close(alone.tensors()[key][0], tensor[agent], rtol=1e-5, atol=1e-6)


@given(size=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 5), agent=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_every_epoch_shows_every_example_once(size, batch, seed, agent):
    shard = np.arange(100, 100 + size)
    stream = BatchStream(shard, batch, seed, agent)
    steps = math.ceil(3 * size / batch)
    seen = np.concatenate([stream.batch(s) for s in range(steps)])
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == shard.tolist()
    fresh = BatchStream(shard, batch, seed, agent)
    assert np.array_equal(fresh.batch(steps - 1), stream.batch(steps - 1))  # no hidden state


def test_only_the_factors_that_the_algorithm_trains_change():
    config = TrainingConfig(steps=4, batch_size=5, agents_per_pass=2)
    task = Toy(extras=True)
    attached = attach(task.model, task.default_lora())
    start = attached.init(range(2), 0)
    attached.detach()
    adapter, _, _ = trained(task, config, range(2), shards_of(2), algorithm=algorithms.dlora_fa())
    for name in adapter.layers:
        assert torch.equal(adapter.A[name], start.A[name])
        assert adapter.B[name].abs().max() > 0
    assert not torch.equal(adapter.extras["head.weight"], start.extras["head.weight"])


def test_clipping_is_per_agent():
    gradients = [torch.tensor([[3.0, 0.0], [0.3, 0.0]]), torch.tensor([[4.0], [0.4]])]
    optimizers.clip_(gradients, 1.0)
    norms = torch.sqrt(gradients[0].square().sum(1) + gradients[1].square().sum(1))
    torch.testing.assert_close(norms, torch.tensor([1.0, 0.5]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0, 0.5, 1, 1, 1]), ("linear", [0, 0.5, 1, 0.55, 0.1]), ("cosine", [0, 0.5, 1, 0.55, 0.1])],
)
def test_schedules_by_hand(schedule, expected):
    config = TrainingConfig(learning_rate=1.0, final_learning_rate=0.1, warmup=0.2, schedule=schedule)
    got = [optimizers.learning_rate(config, t) for t in (0, 0.1, 0.2, 0.6, 1.0)]
    assert got == pytest.approx(expected)


def test_dropout_masks_do_not_depend_on_the_pass_and_do_drop():
    lora = dataclasses.replace(Toy().default_lora(), lora_dropout=0.5)
    config = TrainingConfig(steps=6, batch_size=5, learning_rate=0.02, agents_per_pass=3)
    together, _, _ = trained(Toy(), config, range(3), shards_of(3), lora=lora)
    one, _, _ = trained(Toy(), config.model_copy(update={"agents_per_pass": 1}), range(3), shards_of(3), lora=lora)
    none, _, _ = trained(Toy(), config, range(3), shards_of(3))
    for key, tensor in together.tensors().items():
        torch.testing.assert_close(one.tensors()[key], tensor, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together.B["first"], none.B["first"], atol=1e-4)


def test_bfloat16_autocast_trains_in_float32_and_stays_near():
    config = TrainingConfig(steps=5, batch_size=10, learning_rate=0.01, agents_per_pass=2)
    exact, _, _ = trained(Toy(), config, range(2), shards_of(2))
    half, _, losses = trained(Toy(), config.model_copy(update={"precision": "bfloat16"}), range(2), shards_of(2))
    assert all(t.dtype == torch.float32 for t in half.tensors().values())
    assert losses.dtype == torch.float32
    assert not torch.equal(half.B["second"], exact.B["second"])  # autocast was really on
    cosine = torch.nn.functional.cosine_similarity(half.B["second"].flatten(), exact.B["second"].flatten(), dim=0)
    assert cosine > 0.95


def test_a_loss_that_is_not_finite_names_agent_and_round():
    task = Toy()
    task.x[20] = float("nan")
    shards = [np.arange(10), np.array([20, 21])]
    attached = attach(task.model, task.default_lora())
    trainer = Trainer(task, attached, TrainingConfig(steps=3, batch_size=2), [4, 7], shards, 0)
    adapter = attached.init([4, 7], 0)
    trainer.prepare(adapter)
    with pytest.raises(TrainingError, match=r"loss of agent 7 is not finite in round 2, step \d"):
        trainer.train_round(adapter, algorithms.local(), {}, Round(2), 3)


class Kinked(Toy):
    """A finite loss with a gradient that is not, at the examples from 20 on."""

    def losses(self, batch, agents):
        x = batch["x"]
        kink = torch.where(x[:, 0] == 0, self.model(x).sum(-1) * 0, torch.ones(())).sqrt()
        return super().losses(batch, agents) + kink.unflatten(0, (agents, -1)).mean(1)


def test_an_adapter_that_is_not_finite_names_agent_and_round():
    """Else the exchange would pass it on, or fail without a name."""
    task = Kinked()
    task.x[20:, 0] = 0
    attached = attach(task.model, task.default_lora())
    trainer = Trainer(task, attached, TrainingConfig(steps=1, batch_size=2), [4, 7], [np.arange(10), [20, 21]], 0)
    adapter = attached.init([4, 7], 0)
    trainer.prepare(adapter)
    with pytest.raises(TrainingError, match=r"the adapter of agent 7 is not finite after round 2; lower"):
        trainer.train_round(adapter, algorithms.local(), {}, Round(2), 3)


def test_auto_agents_per_pass_is_calibrated_without_leaving_a_trace():
    config = TrainingConfig(steps=3, batch_size=5)
    adapter, trainer, _ = trained(Toy(), config, range(4), shards_of(4))
    assert trainer.agents_per_pass in (1, 2, 4)
    explicit, _, _ = trained(
        Toy(), config.model_copy(update={"agents_per_pass": trainer.agents_per_pass}), range(4), shards_of(4)
    )
    for key, tensor in adapter.tensors().items():
        assert torch.equal(explicit.tensors()[key], tensor)


def test_evaluation_counts_every_test_example_once():
    task = Toy(tests=37)
    attached = attach(task.model, task.default_lora())
    trainer = Trainer(task, attached, TrainingConfig(agents_per_pass=2), range(3), shards_of(3), 0, 10)
    start = attached.init(range(3), 0)
    generator = torch.Generator().manual_seed(0)
    trained = start.with_tensors({f"B/{k}": torch.randn(b.shape, generator=generator) for k, b in start.B.items()})
    scores = trainer.evaluate(trained)
    assert len(set(scores.tolist())) == 3
    for agent in range(3):
        with torch.no_grad(), attached.bind(trained.select([agent])):
            expected = (task.model(task.test_x).argmax(1) == task.test_y).double().mean()
        torch.testing.assert_close(scores[agent], expected)
    attached.detach()


@pytest.mark.parametrize("agents", [1, 2, 3])
def test_equal_adapters_are_evaluated_once(agents):
    task = Toy(tests=37)
    attached = attach(task.model, task.default_lora())
    trainer = Trainer(task, attached, TrainingConfig(agents_per_pass=2), range(agents), shards_of(agents), 0, 10)
    adapter = attached.init(range(agents), 0)
    rows = []
    task.model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    scores = trainer.evaluate(adapter)
    assert sum(rows) == 37
    attached.detach()
    with torch.no_grad():
        expected = (task.model(task.test_x).argmax(1) == task.test_y).double().mean()
    torch.testing.assert_close(scores, expected.expand(agents))
    name = next(iter(adapter.B))
    adapter.B[name][agents - 1, 0, 0] = 1  # one number of one agent differs
    rows.clear()
    trainer.evaluate(adapter)
    assert sum(rows) == 37 * min(agents, 2)  # the others are still equal


@pytest.mark.parametrize(("batch_size", "passes"), [(10, [10] * 9 + [7] * 3), (37, [37] * 3), (80, [74, 37])])
def test_a_pass_of_the_evaluation_is_bounded_over_all_agents(batch_size, passes):
    task = Toy(tests=37)
    attached = attach(task.model, task.default_lora())
    trainer = Trainer(task, attached, TrainingConfig(), range(3), shards_of(3), 0, batch_size)
    generator = torch.Generator().manual_seed(0)
    start = attached.init(range(3), 0)
    trained = start.with_tensors({f"B/{k}": torch.randn(b.shape, generator=generator) for k, b in start.B.items()})
    rows = []
    task.model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    scores = trainer.evaluate(trained)
    assert rows == passes
    alone = torch.cat([trainer.evaluate(trained.select([i])) for i in range(3)])
    assert torch.equal(scores, alone)
    attached.detach()


def test_agents_that_hold_equal_adapters_are_found_bit_by_bit():
    attached = attach(Toy().model, Toy().default_lora())
    start = attached.init(range(5), 0)
    start.B["first"][1, 0, 0] = start.B["first"][3, 0, 0] = 1
    start.B["first"][4, 0, 0] = -0.0
    assert distinct(start) == ([0, 1, 4], [0, 1, 0, 1, 2])
    assert distinct(start.select([2])) == ([0], [0])


def test_flat_groups_are_views():
    tensors = {"a": torch.arange(12.0).view(2, 2, 3), "b": torch.arange(8.0).view(2, 4)}
    group = FlatGroup(tensors)
    flat = group.pack(tensors)
    views = group.unpack(flat)
    flat += 1
    assert torch.equal(views["a"], tensors["a"] + 1)
    assert torch.equal(views["b"], tensors["b"] + 1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_learning_rate_of_an_agent_follows_its_own_steps_alone(optimizer):
    """With epochs, agents take unequal numbers of steps: each trains bit for bit as it does without the others."""
    config = TrainingConfig(
        epochs=1.0, batch_size=4, learning_rate=0.05, agents_per_pass=1, optimizer=optimizer, weight_decay=0.1
    )
    shards = [np.arange(5), np.arange(10, 30), np.arange(40, 49)]
    task = Toy(extras=True)
    together, trainer, losses = trained(task, config, range(3), shards, rounds=3)
    assert trainer.local_steps.tolist() == [2, 5, 3]
    for agent, shard in enumerate(shards):
        alone, _, own = trained(task, config, [agent], [shard], rounds=3)
        assert torch.equal(own[0], losses[agent])
        for key, tensor in together.tensors().items():
            assert torch.equal(alone.tensors()[key][0], tensor[agent]), key


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_with_equal_steps_epochs_and_steps_train_alike(optimizer):
    shards = [np.arange(i * 20, (i + 1) * 20) for i in range(3)]
    found = []
    for amount in ({"epochs": 1.0}, {"steps": 5}):
        config = TrainingConfig(
            batch_size=4, learning_rate=0.05, agents_per_pass=3, warmup=0.3, optimizer=optimizer, **amount
        )
        found.append(trained(Toy(extras=True), config, range(3), shards, rounds=2)[0].tensors())
    assert all(torch.equal(found[1][key], tensor) for key, tensor in found[0].items())
