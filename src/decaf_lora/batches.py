"""Which examples does an agent see in which step? A pure function of (seed, agent, step) says, so nothing is saved."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from decaf_lora.config import TrainingConfig
from decaf_lora.randomness import numpy_generator


class BatchStream:
    """The batches of one agent: its shard, shuffled anew every epoch, cut into batches.

    A batch that is larger than the shard goes through the shard several times.

    Args:
        shard: (m,) indices of the agent's training examples.
        batch_size: examples in a batch.
        seed: of the run.
        agent: number of the agent.
    """

    def __init__(self, shard: np.ndarray, batch_size: int, seed: int, agent: int) -> None:
        self.shard, self.batch_size, self.seed, self.agent = shard, batch_size, seed, agent
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffled)

    def batch(self, step: int) -> np.ndarray:
        """(batch_size,) indices of the training examples in the agent's step number `step`, from 0."""
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
    """(n,) optimizer steps that each of n agents takes in a round, given their shards (m_i,)."""
    if config.epochs is None:
        return np.full(len(shards), config.steps)
    return np.array([max(1, int(np.ceil(config.epochs * len(s) / config.batch_size))) for s in shards])
