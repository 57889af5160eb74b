"""What no adapter touches is computed once for all agents, and nobody sees it in a result."""

import dataclasses

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

from decaf_lora.adapters import attach
from decaf_lora.evaluation import Evaluator
from decaf_lora.tasks.held_out import HeldOut
from toy import Toy

UPPER = LoraConfig(r=2, lora_alpha=4, target_modules=["second"])


def scored(task, lora, agents=3, batch_size=16):
    """Scores of agents with different adapters together, and of each alone; and calls of `first` for the former."""
    calls = []
    attached = attach(task.model, lora)
    try:
        start = attached.init(range(agents), 0, common_start=False)
        draw = torch.Generator().manual_seed(0)
        adapter = start.with_tensors({k: t + torch.randn(t.shape, generator=draw) for k, t in start.tensors().items()})
        evaluator, first = Evaluator(task, attached, batch_size), task.model.first
        compute = first.forward
        first.forward = lambda *args: (calls.append(len(args[0])), compute(*args))[1]
        together = evaluator.scores(adapter, agents)
        found = list(calls)
        assert "forward" in first.__dict__  # the module is as it was, with what others have put into it
        del first.forward
        alone = torch.cat([evaluator.scores(adapter.select([i]), 1) for i in range(agents)])
        return together, alone, found
    finally:
        attached.detach()


class Exact(Toy):
    """Scores that show every bit: sums of logits instead of counts."""

    def statistics(self, batch, agents):
        sums = self.model(batch["x"]).double().unflatten(0, (agents, -1)).sum((1, 2))
        return torch.stack([sums, torch.ones(agents)], 1)


@pytest.mark.parametrize("agents", [1, 2, 3, 5])
def test_layers_below_the_first_adapted_one_are_computed_once(agents):
    together, alone, calls = scored(Exact(tests=30), UPPER, agents)
    assert torch.equal(together, alone)
    assert len(set(together.tolist())) == agents
    assert calls == [16, 14]


def test_passes_of_several_agents_share_with_passes_of_as_many():
    together, alone, calls = scored(Exact(tests=8), UPPER, agents=5, batch_size=17)
    torch.testing.assert_close(together, alone)
    assert calls == [16, 8]  # two passes of two agents share; the last has one


def test_adapted_layers_and_those_above_are_computed_for_every_agent():
    _, _, calls = scored(Exact(), LoraConfig(r=2, target_modules=["second"], modules_to_save=["first"]))
    assert len(calls) == 6
    together, alone, _ = scored(Exact(), LoraConfig(r=2, target_modules=["first", "second"]))
    assert torch.equal(together, alone)


class Odd(nn.Module):
    """A model that does with the output of its frozen first layer what `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first, self.second, self.head = nn.Linear(12, 10), nn.Linear(10, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.head(self.second(self.how(self, x)))


def in_place(model, x):
    y = model.first(x)
    y += 1
    return y


def input_in_place(model, x):
    x = x.clone()
    y = model.first(x)
    x *= 0
    return y + model.first(x)


def reads_what_is_trained(model, x):
    return model.first(x * model.head.weight.sum())


def result_of_an_adapter(model, x):
    return model.first(torch.cat([model.second(x[:, :10]), x[:, :2]], 1))


@pytest.mark.parametrize("how", [in_place, input_in_place, reads_what_is_trained, result_of_an_adapter])
def test_a_result_that_is_not_the_same_is_computed_anew(how):
    task = Exact(tests=20)
    torch.manual_seed(0)
    task.model = Odd(how)
    lora = UPPER
    if how is reads_what_is_trained:
        lora = dataclasses.replace(UPPER, modules_to_save=["head"])
    together, alone, _ = scored(task, lora, batch_size=32)
    assert torch.equal(together, alone)
    assert len(set(together.tolist())) == 3


class Cached(nn.Linear):
    """A layer that is given an object which it changes."""

    def forward(self, x, seen):
        seen.append(len(x))
        return super().forward(x)


def test_a_module_that_is_given_more_than_tensors_is_called():
    task, seen = Exact(tests=20), []
    torch.manual_seed(0)
    task.model = Odd(lambda model, x: model.extra(model.first(x), [seen]).tanh())
    task.model.extra = Cached(10, 10)
    task.model.extra.forward = lambda x, box: (box[0].append(len(x)), Cached.forward(task.model.extra, x, []))[1]
    together, alone, _ = scored(task, UPPER, batch_size=20)
    assert torch.equal(together, alone)
    assert seen == [20] * 6


def test_a_module_whose_inner_calls_are_watched_is_called():
    task, seen = Exact(tests=20), []
    task.model.first = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 10))
    task.model.first[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    together, alone, _ = scored(task, UPPER, batch_size=20)
    assert torch.equal(together, alone)
    assert seen == [20] * 6


@pytest.mark.parametrize("held_out", [False, True])
def test_text_features_of_an_agent_are_computed_once_in_a_test_set(digits_task, held_out):
    task = HeldOut(digits_task, np.arange(30)) if held_out else digits_task
    text, calls = task.model.text_model, []
    lora = LoraConfig(r=2, target_modules=r".*layers\.0\.self_attn\.q_proj")
    attached = attach(task.model, lora)
    before, task.num_test = task.num_test, 30
    task.on_attach(list(attached.sites))
    hook = text.register_forward_hook(lambda module, inputs, output: calls.append(1))
    try:
        start = attached.init(range(2), 0, common_start=False)
        adapter = start.with_tensors({f"B/{k}": torch.ones_like(b) for k, b in start.B.items()})
        scores = Evaluator(task, attached, 10).scores(adapter, 2)
        assert len(calls) == 2
        assert digits_task.kept is None
        torch.testing.assert_close(Evaluator(task, attached, 30).scores(adapter, 2), scores)
        assert len(calls) == 4
    finally:
        hook.remove()
        attached.detach()
        task.num_test = before
