"""What would this code allocate and compute? Runs it on tensors that have shapes but no memory.

Inside `DryRun` every tensor is a fake one (torch's FakeTensorMode): operations find out shapes, dtypes and which
results share storage, and do no arithmetic. Tensors live as long as in a real run: what the code keeps stays alive,
and what autograd saves for the backward pass stays alive until it is used. A ledger of storages is kept: an entry is
made when an operation returns, and removed when the last reference goes. The ledger gives the bytes in use at every
moment; its maximum is the peak of a real run. It sees neither buffers inside a kernel nor the rounding of an allocator.

Some code reads numbers back (the positions of a mask, "are all agents finite?"). Numbers that follow from real
tensors, or from integers that the code made itself, are computed for real. Any other number counts as positive, finite
and different from every other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

KNOWN_INTEGERS, KNOWN_FLOATS = 2**24, 2**12
"""Largest numbers of elements of integer and of floating-point tensors that are computed for real, where possible."""

_GUESSES = {
    aten.eq: False,
    aten.ne: True,
    aten.lt: False,
    aten.le: False,
    aten.gt: True,
    aten.ge: True,
    aten.isfinite: True,
    aten.isnan: False,
    aten.isinf: False,
}


def _cpu_attention_flops(query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *m: Any, **n: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FLOPS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
}
"""Operation -> function that counts its floating-point operations; a multiply-add counts as two."""


class UnknownNumberError(RuntimeError):
    """The shape of a tensor depends on numbers that only a real run has."""


@dataclass
class Cost:
    """What a stretch of code costs: bytes in use before and after it, the highest in between, and its FLOP."""

    before: int
    after: int = 0
    peak: int = 0
    flops: int = 0


class DryRun(TorchDispatchMode):
    """A context in which tensors are fake; `live` is the bytes of their storages that are in use."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._sizes: dict[int, int] = {}
        self._known = WeakIdKeyDictionary()

    def __enter__(self) -> DryRun:
        self._fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._fake.__exit__(*exception)

    @contextmanager
    def phase(self) -> Iterator[Cost]:
        """Measures the code inside; the `Cost` that it gives is complete at the end of the block."""
        found = Cost(self.live)
        peak, flops = self.peak, self.flops
        self.peak, self.flops = self.live, 0
        try:
            yield found
        finally:
            found.after, found.peak, found.flops = self.live, self.peak, self.flops
            self.peak, self.flops = max(peak, self.peak), flops + self.flops

    def fake(self, tensor: Tensor, nbytes: int | None = None) -> Tensor:
        """A fake tensor on the CPU with the shape and dtype of `tensor`.

        Args:
            tensor: a real tensor, or one on the meta device.
            nbytes: bytes that the fake tensor counts for; None: those of its shape and dtype.
        """
        with self._fake:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        self._count(made, nbytes)
        if tensor.device.type != "meta" and _worth_knowing(tensor):
            with _disable_current_modes():
                self._known[made] = tensor.detach().cpu()
        return made

    def fake_module(self, module: nn.Module) -> None:
        """Replaces parameters and buffers of `module`, in place, by fake ones; tied parameters stay tied."""
        made: dict[int, Tensor] = {}
        for part in module.modules():
            for own in (cast(dict[str, Tensor | None], part._parameters), part._buffers):
                for name, tensor in own.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        size = getattr(part, "stored_bytes", {}).get(name)
                        like: Tensor = self.fake(tensor, size)
                        made[id(tensor)] = nn.Parameter(like, False) if isinstance(tensor, nn.Parameter) else like
                    own[name] = made[id(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two thirds of all calls; it computes nothing
            return func(*args)
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()))
        if func is aten._local_scalar_dense.default:
            value = self._value(tensors[0])
            with _disable_current_modes():
                return 1 if value is None else value.item()
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            args = self._positions(args)
            tensors = _tensors(args)
        tags = func.tags
        if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
            real = self._compute(func, args, kwargs, tensors)
            if real is not None:
                return tree_map_only(Tensor, self.fake, real)
            if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
                raise UnknownNumberError(f"{func.overloadpacket} makes a shape of numbers that only a real run has")
        out = func(*args, **kwargs)
        counter = FLOPS.get(func.overloadpacket)
        if counter is not None:
            self.flops += counter(*args, **kwargs, out_val=out)
        outs = _tensors(out if isinstance(out, tuple | list) else (out,))
        reals: list[Tensor] = []
        if outs and all(_worth_knowing(x) for x in outs):
            real = self._compute(func, args, kwargs, tensors)
            reals = _tensors(real if isinstance(real, tuple | list) else (real,))
            if real is None and func.overloadpacket in _GUESSES:
                same = len(tensors) == 2 and tensors[0] is tensors[1]  # x == x is how torch finds NaN
                guess = _GUESSES[func.overloadpacket] ^ (same and func.overloadpacket in (aten.eq, aten.ne))
                with _disable_current_modes():
                    reals = [torch.tensor(guess).expand(x.shape) for x in outs]
        for made in outs:
            self._count(made)
            self._known.pop(made, None)  # what an operation in place has written is not known
        if len(reals) == len(outs):
            for made, value in zip(outs, reals, strict=True):
                self._known[made] = value
        return out

    def _value(self, tensor: Tensor) -> Tensor | None:
        """The real tensor that a fake one stands for; None if it is not known."""
        return self._known.get(tensor) if isinstance(tensor, FakeTensor) else tensor

    def _compute(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """The result of `func` on real tensors, or None where they are not known."""
        values = [self._value(t) for t in tensors]
        if any(v is None or v.device.type != "cpu" for v in values) or torch.Tag.nondeterministic_seeded in func.tags:
            return None
        with _disable_current_modes():
            return func(*tree_map_only(Tensor, self._value, args), **tree_map_only(Tensor, self._value, kwargs))

    def _positions(self, args: Any) -> Any:
        """The arguments of an indexing, with masks replaced by positions: of positions the number is known."""
        self_, indices, *more = args
        found: list[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
                continue
            value = self._value(index)
            if value is None:
                raise UnknownNumberError("it indexes with a mask made of numbers that only a real run has")
            with _disable_current_modes():
                where = value.nonzero(as_tuple=True)
            found += [self.fake(w) for w in where]
        return (self_, found, *more)

    def _count(self, tensor: Tensor, nbytes: int | None = None) -> None:
        if tensor.device.type == "meta":  # a skeleton that is never run
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes() if nbytes is None else nbytes
        self._sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def replace_methods(of: object, **methods: Callable[..., Any]) -> None:
    """Replaces methods of one object, `of`, for the rest of its life."""
    vars(of).update(methods)


def real_tensors() -> Any:
    """A context in which tensors are real, also within a dry run."""
    return _disable_current_modes()


def _worth_knowing(tensor: Tensor) -> bool:
    floats = tensor.is_floating_point() or tensor.is_complex()
    return tensor.numel() <= (KNOWN_FLOATS if floats else KNOWN_INTEGERS)


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among arguments or results, which may be lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [x for x in value if isinstance(x, Tensor)]
    return found
