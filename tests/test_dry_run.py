"""The ledger of a dry run against counts by hand and against PyTorch's own allocator."""

import pytest
import torch
from torch import nn

from decaf_lora.plan.dry_run import DryRun, UnknownNumberError


def faked(module):
    dry = DryRun()
    dry.fake_module(module)
    return dry


def test_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.zeros(5, dtype=torch.bfloat16))
    dry = faked(model)
    assert dry.live == 6 * 6 * 4 + 5 * 2
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_what_the_backward_pass_needs(batch):
    model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5), nn.Tanh())
    dry = faked(model)
    model.requires_grad_(True)
    with dry, dry.phase() as phase:
        x = torch.randn(batch, 7)
        before = dry.live
        loss = model(x).sum()
        # Both tanh outputs, the second of which the first layer after it needs as well, and the loss.
        assert dry.live - before == batch * (11 + 5) * 4 + 4
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert sum(g.numel() for g in grads) == sum(p.numel() for p in model.parameters())
        del grads, loss, x
    assert phase.after == phase.before
    # Forward, weights' gradients, and the gradient of the second layer's input.
    assert phase.flops == 2 * batch * (2 * 7 * 11 + 3 * 11 * 5)


def test_views_and_results_in_place_are_no_new_memory():
    with DryRun() as dry:
        x = torch.zeros(10, 4)
        assert dry.live == 160
        y = x.view(4, 10).t()[2:]
        x.add_(1).mul_(2)
        assert dry.live == 160
        del x
        assert dry.live == 160
        del y
    assert dry.live == 0
    assert dry.peak == 160


def test_integers_and_real_tensors_are_known():
    real = torch.tensor([0.5, 0.25])
    with DryRun():
        numbers = torch.arange(6)
        numbers[2] = 9
        assert numbers.tolist() == [0, 1, 9, 3, 4, 5]
        assert numbers.unique().tolist() == [0, 1, 3, 4, 5, 9]
        assert torch.randn(6, 2)[numbers > 3].shape == (3, 2)
        assert (numbers > 3).nonzero().shape == (3, 1)
        assert float((real * 2).sum()) == 1.5
        out = torch.zeros(3, dtype=torch.long)
        out.copy_(torch.randn(3))  # no longer known
        assert out.tolist() == [1, 1, 1]


def test_unknown_numbers_are_finite_positive_and_differ():
    with DryRun():
        x = torch.randn(3, 4)
        assert bool(torch.isfinite(x).all())
        assert not bool(torch.isnan(x).any())
        assert not bool((x == x[:1]).all())
        assert bool((x > 0).all())
        with pytest.raises(UnknownNumberError, match="mask"):
            x[x.bool()]
        with pytest.raises(UnknownNumberError, match="nonzero"):
            x.nonzero()


def test_modes_end_with_the_context():
    with DryRun():
        assert type(torch.zeros(1)) is not torch.Tensor
    assert type(torch.zeros(1)) is torch.Tensor
