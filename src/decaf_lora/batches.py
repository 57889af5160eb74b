"""Which examples does an agent see in which step? A pure function of (seed, agent, step number): nothing to save."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from decaf_lora.config import TrainingConfig
from decaf_lora.randomness import numpy_generator


class BatchStream:
    """The example indices that an agent sees: its shard shuffled anew every epoch, cut into batches.

    Shards smaller than a batch are gone through as often as a batch needs.
    """

    def __init__(self, shard: np.ndarray, batch_size: int, seed: int, agent: int) -> None:
        self.shard, self.batch_size, self.seed, self.agent = shard, batch_size, seed, agent
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffled)

    def batch(self, step: int) -> np.ndarray:
        """(batch_size,) indices into the task's training examples of the agent's step number `step`."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.shard))
        out = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = self._epoch(int(epoch))[offsets[chosen]]
        return out

    def _shuffled(self, epoch: int) -> np.ndarray:
        return numpy_generator(self.seed, "batches", self.agent, epoch).permutation(self.shard)


def local_steps(config: TrainingConfig, shards: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) optimizer steps that the agents with these shards take in a round."""
    if config.epochs is None:
        return np.full(len(shards), config.steps)
    return np.array([max(1, int(np.ceil(config.epochs * len(s) / config.batch_size))) for s in shards])
