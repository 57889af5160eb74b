"""Do agents that go through the model together compute what each computes alone? It is checked once, before a run.

Some layers do not have the batch on the leading axis of their input (the relative positions of DeBERTa, the chunks of
Longformer, XLNet's sequence-first tensors). Wherever the sizes happen to divide, such a layer would apply one agent's
factors to another agent's examples, without an error. So two agents with random factors take one real example each, in
evaluation mode. Their losses and gradients in a common pass must equal those of two passes.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors
from decaf_lora.adapters.stacked import Attached, LeadingAxisError
from decaf_lora.errors import UserError
from decaf_lora.randomness import torch_generator
from decaf_lora.tasks.base import Batch, Task

EQUAL = 1e-4
"""Relative difference up to which results count as equal."""

ROUNDED = 0.05
"""As `EQUAL`, in low precision, where batches of one and of two may be computed by different kernels."""


def check(task: Task, attached: Attached, adapter: Adapter, batch: Batch, together: bool) -> bool:
    """Whether agents may share a pass.

    Args:
        task: gives model and loss.
        attached: the adapted layers of the model.
        adapter: of the agents; gives shapes and scales.
        batch: two training examples, on the model's device.
        together: whether agents are to share a pass at all. If not, only the errors below are checked, and the result
            is true.

    Raises:
        UserError: an adapter or fully trained module that the model never calls, so that training it would change
            nothing; a model that changes its own weights in a forward pass; or a loss that is not finite before any
            training.
    """
    two = _random(attached, adapter)
    use = _Use(attached)
    # A plan has shapes only. They are the same for both agents, and no gradient is compared.
    shapes = any(isinstance(t, FakeTensor) for t in batch.values())
    gradients = together and (not shapes or bool(attached.extra_layers))
    with _exact(), _forked(attached), use.noted():
        alone = [_alone(task, attached, two, batch, i, gradients) for i in range(1 if shapes else 2)]
    use.refuse_unused(task.model)
    if any(not bool(torch.isfinite(result.loss).all()) for result in alone):
        _refuse_start(task, attached, adapter, batch)
        return not together  # nothing to compare
    if not together:
        return True
    with _exact(), _forked(attached):
        try:
            both = _results(task, attached, two, batch)
        except (torch.OutOfMemoryError, UserError):
            raise
        except (RuntimeError, ValueError, IndexError):
            return False
        if isinstance(both.loss, FakeTensor):  # a plan has shapes only; wrong ones seldom divide by 5 and by 7
            return all(_divides(task, attached, adapter, batch, agents) for agents in (5, 7))
        if _equal(both, alone, EQUAL):
            return True
        # Rounding alone can make a difference, for instance with a base in bfloat16. So a second comparison keeps the
        # shapes and replaces only the neighbour by a copy of the agent: if agents are kept apart, the agent's results
        # are exactly as before.
        same = [_results(task, attached, two.select([i, i]), batch).of(i) for i in range(2)]
    return _equal(both, same, EQUAL) and _equal(both, alone, ROUNDED, each_tensor=False)


def examples_apart(task: Task, attached: Attached, adapter: Adapter, batch: Batch) -> bool:
    """Whether an example's loss and gradient are the same whichever example goes through the model beside it.

    Only the neighbour is replaced, so that the shapes, and with them the rounding, stay.

    Args:
        task: gives model and loss.
        attached: the adapted layers of the model.
        adapter: of the agents; gives shapes and scales.
        batch: two training examples, on the model's device.
    """
    two = _random(attached, adapter)
    with _exact(), _forked(attached):
        try:
            both = _results(task, attached, two, batch)
            beside_itself = [
                _results(task, attached, two, {k: t[[i, i]] for k, t in batch.items()}).of(i) for i in range(2)
            ]
        except (torch.OutOfMemoryError, UserError):
            raise
        except (RuntimeError, ValueError, IndexError):
            return False
    return isinstance(both.loss, FakeTensor) or _equal(both, beside_itself, EQUAL)


def _divides(task: Task, attached: Attached, adapter: Adapter, batch: Batch, agents: int) -> bool:
    """Whether no layer refuses the shapes of so many agents with an example each."""
    try:
        _loss_only(task, attached, adapter.select([0] * agents), {k: t[[0] * agents] for k, t in batch.items()})
    except LeadingAxisError:
        return False
    return True


class _Results(NamedTuple):
    """Losses (k,), and gradients by name (k, ...), of k agents."""

    loss: Tensor
    gradients: Tensors

    def of(self, agent: int) -> _Results:
        return _Results(self.loss[[agent]], {name: g[[agent]] for name, g in self.gradients.items()})


def _equal(both: _Results, each: Sequence[_Results], tolerance: float, each_tensor: bool = True) -> bool:
    """Whether the results of agents together are those of each alone, up to a relative difference.

    Losses and gradients are compared.

    Args:
        both: results of all agents in one pass.
        each: results of every agent alone.
        tolerance: relative difference that is allowed.
        each_tensor: whether each gradient is compared on its own, since that of a head may be a million times larger
            than those of the layers that matter here; else all together as one vector.
    """
    for agent, expected in enumerate(each):
        found = both.of(agent)
        if not bool(((found.loss - expected.loss).abs() <= tolerance * expected.loss.abs()).all()):
            return False
        if found.gradients.keys() != expected.gradients.keys():
            return False
        pairs = [(found.gradients[name], gradient) for name, gradient in expected.gradients.items()]
        differences = [float((ours - theirs).float().norm()) for ours, theirs in pairs]
        sizes = [float(theirs.float().norm()) for _, theirs in pairs]
        if not each_tensor:
            differences, sizes = [math.hypot(*differences)], [math.hypot(*sizes)]
        # Gradients are allowed a tenfold difference: they are sums over tokens, which add up rounding.
        if any(difference > 10 * tolerance * size for difference, size in zip(differences, sizes, strict=True)):
            return False
    return True


def _alone(task: Task, attached: Attached, two: Adapter, batch: Batch, agent: int, gradients: bool) -> _Results:
    """An agent's results in a pass of its own.

    If `torch.func.vmap` cannot run a fully trained module, these modules are called agent by agent from now on.
    """
    one, own = two.select([agent]), {k: t[agent : agent + 1] for k, t in batch.items()}
    compute = _results if gradients else _loss_only
    try:
        return compute(task, attached, one, own)
    except UserError:
        raise
    except (RuntimeError, ValueError):
        if not any(extra.vectorized for extra in attached.extra_layers.values()):
            raise
        for extra in attached.extra_layers.values():
            extra.vectorized = False
        return compute(task, attached, one, own)


def _results(task: Task, attached: Attached, adapter: Adapter, batch: Batch) -> _Results:
    leaves = {name: t.detach().requires_grad_() for name, t in adapter.tensors().items()}
    with torch.enable_grad(), attached.bind(adapter.with_tensors(leaves)):
        loss = task.losses(batch, adapter.num_agents)
        if not loss.requires_grad:  # the loss uses no trained tensor
            return _Results(loss.float(), {})
        found = torch.autograd.grad(loss.float().sum(), list(leaves.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
    return _Results(loss.detach().float(), gradients)


@torch.no_grad()
def _loss_only(task: Task, attached: Attached, adapter: Adapter, batch: Batch) -> _Results:
    with attached.bind(adapter):
        return _Results(task.losses(batch, adapter.num_agents).float(), {})


def _random(attached: Attached, adapter: Adapter) -> Adapter:
    """Two agents with the shapes of the first agent of `adapter`, and very different random tensors."""
    like = adapter.select([0, 0])

    def draw(name: str, t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=torch_generator(0, "separation", name)).to(t)

    tensors = {}
    for name, t in like.tensors().items():
        group, layer = name.split("/", 1)
        if group == "A":
            tensors[name] = draw(name, t) / math.sqrt(t.shape[-1])
        elif group == "B":
            # Of a size at which an adapter adds about a third of its input's size.
            scale = like.scale[layer][:, None, None].clamp_min(1e-6)
            tensors[name] = draw(name, t) * (0.3 / math.sqrt(t.shape[-1])) / scale
        elif group == "core":
            tensors[name] = draw(name, t)
        else:
            spread = attached.extras[layer].detach().float().square().mean().sqrt().to(t)
            tensors[name] = t + 0.3 * (spread + 0.1) * draw(name, t)
    return like.with_tensors(like.trim(tensors))


def _refuse_start(task: Task, attached: Attached, adapter: Adapter, batch: Batch) -> None:
    """Raises UserError unless the loss of the start adapters is finite."""
    result = _loss_only(task, attached, adapter.select([0]), {k: t[:1] for k, t in batch.items()})
    if not bool(torch.isfinite(result.loss).all()):
        raise UserError(
            f"task: the loss is {float(result.loss[0])} before any training; the weights of the model, or the first "
            "training examples, hold numbers that are not finite."
        )


class _Use:
    """What the model does with the layers to train: does it call them, read their weights, or change these?"""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self.called: set[str] = set()
        self.sizes: dict[str, float] = {}
        """Layer -> norm of its weight when it was first read. Code that reads a weight may also change it."""

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes calls and reads inside."""
        layers: dict[str, nn.Module] = {**self.attached.layers, **self.attached.extra_layers}
        hooks = [layer.register_forward_pre_hook(self._call_of(name)) for name, layer in layers.items()]
        for lora in self.attached.layers.values():
            lora.on_read = self._read
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for lora in self.attached.layers.values():
                lora.on_read = None

    def _call_of(self, name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        return lambda module, inputs: self.called.add(name)

    def _read(self, name: str, attribute: str) -> None:
        if attribute == "weight" and name not in self.sizes:
            self.sizes[name] = self._size(name)

    def _size(self, name: str) -> float:
        weight = self.attached.layers[name].base.weight
        return float(weight.detach().float().norm()) if isinstance(weight, Tensor) else 0.0

    def refuse_unused(self, model: nn.Module) -> None:
        """Raises UserError for layers whose training would have no effect; warns of layers that took no part."""
        kind = type(model).__name__
        changed = [name for name, size in self.sizes.items() if self._size(name) != size]
        if changed:
            raise UserError(
                f"task.model: {kind} changes its own weights in a forward pass (first: {changed[0]}), which adapters "
                "beside them do not follow; switch that off in its config.json (RWKV: rescale_every 0)."
            )
        uncalled = [name for name in self.attached.extra_layers if name not in self.called]
        if uncalled:
            raise UserError(
                f"lora.modules_to_save: {kind} does not call {uncalled[0]} here, so that training it would change "
                "nothing; leave it out."
            )
        alike = {_without_numbers(name) for name in self.called}  # of experts, one that is called stands for all
        unused = [name for name in self.attached.layers if _without_numbers(name) not in alike]
        read = [name for name in unused if name in self.sizes]
        if read:
            raise UserError(
                f"lora.target_modules: {kind} reads the weight of {read[0]} instead of calling the layer, so that an "
                f"adapter on it would change nothing; leave it out with --lora.exclude_modules {' '.join(read)}."
            )
        if unused and len(unused) == len(self.attached.layers):
            raise UserError(f"lora.target_modules: the loss of the task uses none of the adapted layers ({unused[0]}).")
        if unused:
            warnings.warn(
                f"lora.target_modules: {len(unused)} of {len(self.attached.layers)} adapted layers take no part in the "
                f"loss and learn nothing (first: {unused[0]}).",
                stacklevel=2,
            )


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _forked(attached: Attached) -> contextlib.AbstractContextManager[None]:
    """Restores the global random generators at the end of the block: a user's task might draw from them."""
    index = attached.device.index
    return torch.random.fork_rng([index or 0] if attached.device.type == "cuda" else [])


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Switches TensorFloat-32 off, with which batches of one and of two can differ by 0.1 %."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
