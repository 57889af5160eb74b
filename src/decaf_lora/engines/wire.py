"""How do tensors cross a wire? As rows of bytes, one an agent, exact or rounded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from decaf_lora.adapters.names import Tensors
from decaf_lora.engines.base import Sizes
from decaf_lora.errors import UserError, unknown

Wire = Literal["exact", "bfloat16"]
"""How floating-point messages cross between processes: as they are, or rounded to bfloat16."""


def as_wire(name: str) -> Wire:
    """The wire of that name. Raises UserError if there is none."""
    if name == "int8":
        raise UserError(
            "wire: int8 between processes would have no error feedback; use --algorithm.messages int8, which has."
        )
    if name not in get_args(Wire):
        raise unknown("wire", name, get_args(Wire))
    return cast(Wire, name)


@dataclass(frozen=True)
class _Column:
    """Where one tensor of an agent lies in the agent's row of bytes, and how it is written there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    written: torch.dtype

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.written.itemsize


class Rows:
    """Tensors name -> (k, ...) as rows of bytes (k, `size`), one an agent, and back."""

    def __init__(self, tensors: Tensors, wire: Wire = "exact") -> None:
        self.columns = []
        for name, x in tensors.items():
            rounded = wire != "exact" and x.dtype in (torch.float32, torch.float64)
            written = torch.bfloat16 if rounded else x.dtype
            self.columns.append(_Column(name, tuple(x.shape[1:]), x.dtype, written))
        self.size = sum(column.size for column in self.columns)

    def write(self, tensors: Tensors, device: torch.device) -> Tensor:
        """name -> (k, ...) to bytes (k, size) on `device`."""
        parts = [_bytes(tensors[column.name].to(column.written)) for column in self.columns]
        return torch.cat(parts, 1).to(device)

    def read(self, rows: Tensor, device: torch.device) -> Tensors:
        """Bytes (k, size) to name -> (k, ...) on `device`."""
        rows, tensors, start = rows.to(device), {}, 0
        for column in self.columns:
            part = rows[:, start : start + column.size]
            tensors[column.name] = _numbers(part, column.written).view(len(rows), *column.shape).to(column.dtype)
            start += column.size
        return tensors


def _bytes(x: Tensor) -> Tensor:
    """(k, ...) to its bytes (k, b)."""
    width = x[0].numel()
    return x.contiguous().view(len(x), width).view(torch.uint8)


def _numbers(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of bytes (k, b) to the numbers that they hold, as one flat row."""
    # A copy: a view may start at any byte, and numbers must be aligned. `contiguous` would not copy a single row.
    return part.clone(memory_format=torch.contiguous_format).flatten().view(dtype)


class Parcels:
    """Messages of some agents as one flat buffer of bytes, and back.

    Agents of the same sizes (one profile) lie together in the buffer; profiles lie in the order of their first agents.
    An agent's row holds only its own part of the message.

    Args:
        message: name -> (k, ...); gives names, shapes and dtypes.
        wire: how floating-point numbers are written.
        sizes: what of the message travels, where agents differ.
    """

    def __init__(self, message: Tensors, wire: Wire, sizes: Sizes | None) -> None:
        self.wire, self.sizes = wire, {k: v for k, v in (sizes or {}).items() if k in message}
        self.shapes = {name: t[:0] for name, t in message.items()}
        self._rows: dict[tuple[int, ...], Rows] = {}

    def size(self, agent: int) -> int:
        """Bytes of an agent's message."""
        return self._rows_of(self._profile(agent)).size

    def write(self, message: Tensors, first: int, agents: Sequence[int], device: torch.device) -> Tensor:
        """The messages of some agents as bytes.

        Args:
            message: name -> (n, ...), of consecutive agents.
            first: number of the agent in row 0 of `message`.
            agents: numbers of the agents to write.
            device: where the bytes go.
        """
        parts = []
        for profile, places in self._profiles(agents).items():
            chosen = [agents[place] - first for place in places]
            own = {name: t[chosen] for name, t in self._cut(message, profile).items()}
            parts.append(self._rows_of(profile).write(own, device).flatten())
        return torch.cat(parts)

    def read(self, buffer: Tensor, agents: Sequence[int], device: torch.device) -> Tensors:
        """The messages of `agents` in a buffer of bytes: name -> (k, ...) on `device`."""
        if not self.sizes:
            return self._rows_of(()).read(buffer.view(len(agents), -1), device)
        message = {k: t.new_zeros(len(agents), *t.shape[1:], device=device) for k, t in self.shapes.items()}
        start = 0
        for profile, places in self._profiles(agents).items():
            rows = self._rows_of(profile)
            end = start + len(places) * rows.size
            own = rows.read(buffer[start:end].view(len(places), -1), device)
            for name, part in self._cut(message, profile).items():
                part[places] = own[name]
            start = end
        return message

    def _profile(self, agent: int) -> tuple[int, ...]:
        return tuple(sizes[agent] for _, sizes in self.sizes.values())

    def _profiles(self, agents: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
        """Profile (the size of every tensor in `sizes`) -> positions in `agents` of those that have it."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, agent in enumerate(agents):
            places.setdefault(self._profile(agent), []).append(place)
        return places

    def _cut(self, message: Tensors, profile: tuple[int, ...]) -> Tensors:
        """Views of the part of `message` that agents with this profile send."""
        own = {k: message[k].narrow(axis, 0, n) for (k, (axis, _)), n in zip(self.sizes.items(), profile, strict=True)}
        return {**message, **own}

    def _rows_of(self, profile: tuple[int, ...]) -> Rows:
        if profile not in self._rows:
            self._rows[profile] = Rows(self._cut(self.shapes, profile), self.wire)
        return self._rows[profile]
