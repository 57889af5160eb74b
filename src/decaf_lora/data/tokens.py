"""How are token sequences of different lengths held and batched? As one `Ragged` array, padded on the right."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset


def warn_truncated(counts: dict[str, int], limit: int, sizes: dict[str, int]) -> None:
    """Warns, once for all splits, of sequences that were cut.

    Args:
        counts: split -> number of sequences longer than `limit`.
        limit: in tokens.
        sizes: split -> number of all sequences.
    """
    if any(counts.values()):
        each = ", ".join(f"{n} of {sizes[name]} {name}" for name, n in counts.items() if n)
        warnings.warn(f"task.max_length: truncated to {limit} tokens: {each} examples.", stacklevel=3)


class Ragged:
    """Token sequences of different lengths in one array: sequence i is values[offsets[i] : offsets[i + 1]]."""

    def __init__(self, values: NDArray[Any], offsets: NDArray[np.int64]) -> None:
        self.values, self.offsets = values, offsets

    @classmethod
    def of(cls, rows: Dataset, column: str) -> Ragged:
        """The sequences in a column of lists, as `preprocess` returns it."""
        chunks = rows.data.column(column).chunks if len(rows) else []
        values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
        lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
        offsets = np.concatenate([[0], *lengths]).astype(np.int64).cumsum()
        empty = np.zeros(0, np.int32)
        return cls(np.concatenate([empty, *values], dtype=np.int32, casting="unsafe"), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | np.integer[Any]) -> NDArray[Any]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens of each sequence."""
        return np.diff(self.offsets)

    def take(self, indices: NDArray[np.int64]) -> Ragged:
        """Sequences `indices` (m,) as an array of their own; this one if they are all, in order."""
        if np.array_equal(indices, np.arange(len(self))):
            return self
        values = [self[i] for i in indices] or [self.values[:0]]
        return Ragged(np.concatenate(values), np.concatenate([[0], self.lengths[indices].cumsum()]))

    def padded(self, indices: NDArray[np.int64], fill: int) -> tuple[Tensor, Tensor]:
        """Sequences `indices` (m,) padded on the right to the longest: (tokens (m, L), mask (m, L)), int64."""
        lengths = self.lengths[indices]
        positions = np.arange(lengths.max(initial=0))
        inside = positions < lengths[:, None]
        where = np.where(inside, self.offsets[indices][:, None] + positions, 0)
        tokens = np.where(inside, self.values[where] if self.values.size else 0, fill)
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(inside.astype(np.int64))
