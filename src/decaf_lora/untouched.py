"""What no adapter touches is computed once for all agents that score on the same examples.

Below the first adapted layer all agents compute the same: embeddings, whole layers where only the last ones are
adapted, and the frozen part of the first adapted ones. A module without adapters therefore keeps its results in the
first pass over a batch, and returns them in the later passes when its inputs are equal, number by number. So nothing
needs to be known about the model, and results are those of a computation anew, bit by bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from decaf_lora.adapters.stacked import Attached, StackedExtra, StackedLora

KEPT_BYTES = 2**28
"""The most bytes of inputs and results that are kept."""

_COMPARABLE = (Tensor, bool, int, float, str, torch.dtype, torch.device, type(None))
"""Types of arguments that can be compared; a module that is given a cache, for instance, keeps nothing."""


class _Call(NamedTuple):
    """Arguments and result of a call, flattened; and the versions of their tensors, which changes in place count up."""

    spec: Any
    given: list[Any]
    result: Any
    tensors: list[Tensor]
    versions: list[int]

    @property
    def unchanged(self) -> bool:
        return [t._version for t in self.tensors] == self.versions


class Untouched:
    """Keeps and returns results of the modules of a model that have no adapters.

    Args:
        attached: the model with its adapter sites.
    """

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self._bases = {layer.base for layer in attached.layers.values()}
        self._modules = list(dict.fromkeys(_without_adapters(attached.model)))
        self._calls: dict[tuple[nn.Module, int], _Call] = {}
        self._recording = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[Untouched]:
        """Inside, passes begun with `begin` share results; all are forgotten at the end."""
        extras = list(self._attached.extra_layers.values())
        own = {module: module.__dict__.get("forward") for module in [*self._modules, *extras]}
        try:
            for module in self._modules:
                module.__dict__["forward"] = self._keeping(module, module.forward)
            for extra in extras:
                extra.__dict__["forward"] = self._passing(extra.forward)
            yield self
        finally:
            for module, forward in own.items():
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward
            self.forget()

    def forget(self) -> None:
        """Lets go of all results: other examples follow."""
        self._calls, self._recording = {}, False

    def begin(self, more: bool) -> None:
        """To be called before every pass.

        Args:
            more: whether another pass over the same examples follows, so that it is worth while to keep results.
        """
        self._recording = more and not self._calls
        self._room, self._beyond = KEPT_BYTES, False
        self._counts: dict[nn.Module, int] = {}
        self._known: dict[int, Tensor] = {}
        """Tensors of this pass, by id, that are the same for all agents."""

    def _keeping(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of a module, which keeps its result or returns the one that was kept."""

        def called(*args: Any, **kwargs: Any) -> Any:
            if self._beyond and not any(id(x) in self._known for x in (*args, *kwargs.values())):
                return forward(*args, **kwargs)
            number = self._counts[module] = self._counts.get(module, 0) + 1
            given, spec = torch.utils._pytree.tree_flatten((args, kwargs))
            before = [x for x in given if isinstance(x, Tensor)]
            if self._may_be_equal(module, given, before):
                if self._recording:
                    return self._recorded(module, number, spec, given, before, lambda: forward(*args, **kwargs))
                call = self._calls.get((module, number))
                if call is not None and call.unchanged and call.spec == spec and _equal(given, call.given):
                    self._know(call.tensors + before)
                    return call.result
            return forward(*args, **kwargs)

        return called

    def _passing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of a fully trained module, beyond which nothing is the same for all agents."""

        def called(*args: Any, **kwargs: Any) -> Any:
            self._beyond = True
            return forward(*args, **kwargs)

        return called

    def _may_be_equal(self, module: nn.Module, given: list[Any], tensors: list[Tensor]) -> bool:
        """Whether it is worth while to compare: before the first adapted layer, and where all inputs are known."""
        beyond, self._beyond = self._beyond, self._beyond or module in self._bases
        if not (self._recording or self._calls) or not all(isinstance(x, _COMPARABLE) for x in given):
            return False
        if not self._recording and any(isinstance(t, FakeTensor) for t in tensors):
            return False  # a plan has shapes only
        return not beyond or (bool(tensors) and all(id(t) in self._known for t in tensors))

    def _recorded(
        self,
        module: nn.Module,
        number: int,
        spec: Any,
        given: list[Any],
        before: list[Tensor],
        compute: Callable[[], Any],
    ) -> Any:
        versions = [t._version for t in before]
        result = compute()
        found = list(result) if isinstance(result, tuple) else [result]
        tensors = [x for x in found if isinstance(x, Tensor)]
        size = sum(t.numel() * t.element_size() for t in before + tensors if id(t) not in self._known)
        if len(tensors) == len(found) and (type(result) is tuple or isinstance(result, Tensor)) and size <= self._room:
            self._room -= size
            versions += [t._version for t in tensors]
            call = _Call(spec, given, result, before + tensors, versions)
            if call.unchanged:
                self._calls[module, number] = call
                self._know(call.tensors)
        return result

    def _know(self, tensors: list[Tensor]) -> None:
        self._known.update((id(t), t) for t in tensors)


def _without_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that contain no adapter; of an adapted layer its frozen base."""
    if isinstance(module, StackedExtra):
        return
    if isinstance(module, StackedLora):
        yield module.base
    elif any(isinstance(inner, StackedLora | StackedExtra) or _watched(inner, module) for inner in module.modules()):
        for child in module.children():
            yield from _without_adapters(child)
    else:
        yield module


def _watched(inner: nn.Module, outer: nn.Module) -> bool:
    """Whether somebody is told of the calls of a module inside another: it must then be called."""
    return inner is not outer and bool(inner._forward_hooks or inner._forward_pre_hooks)


def _equal(given: list[Any], kept: list[Any]) -> bool:
    return all(one is other or _same(one, other) for one, other in zip(given, kept, strict=True))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
