"""How are local steps made private? Poisson batches, every example's gradient clipped, noise on the sum.

    S_t = each example of the agent with probability q;      h_e = g_e min(1, C / ||g_e||) for e in S_t
    g   = (sum_{e in S_t} h_e + sigma C z) / (q m),           z standard normal

g takes the place of the gradient of the mean loss; transforms, clipping by `training.clip_norm` and the optimizer
see nothing else of the data. ||g_e|| is over all trained tensors together.

The gradient of every example by itself comes from the pass that serves many agents at once: each example is an agent of
its own there, with its agent's adapter and a batch of one. The model must keep examples apart, which `separation.check`
finds out. It is in eval mode, so no statistics of a batch enter. The pass computes class prompts, and whatever else a
task computes for each agent, once for each example.

Batches and noise are drawn by name from a secret of the agent, which only its checkpoint holds, so a resumed run draws
the same. torch's generators are not cryptographic.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decaf_lora import calibration, separation
from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors
from decaf_lora.adapters.stacked import DropoutMasks
from decaf_lora.errors import UserError
from decaf_lora.privacy.accounting import Account
from decaf_lora.randomness import derive_seed, numpy_generator, torch_generator
from decaf_lora.training import Trainer


def trainer_class(account: Account) -> Callable[..., Trainer]:
    """The trainer of a run with this account; takes what `Trainer` takes."""
    return functools.partial(PrivateTrainer, account) if account.on else Trainer


class PoissonStream:
    """The batches of one agent: every example with the same probability, by itself, in every step.

    Args:
        shard: (m,) indices of the agent's training examples.
        rate: q, in (0, 1].
        key: the agent's secret.
    """

    def __init__(self, shard: np.ndarray, rate: float, key: int) -> None:
        self.shard, self.rate, self.key = np.asarray(shard), rate, key

    def batch(self, step: int) -> np.ndarray:
        """Indices of the training examples in the agent's step number `step`, from 0; perhaps none."""
        return self.shard[numpy_generator(self.key, "poisson", step).random(len(self.shard)) < self.rate]


class PrivateTrainer(Trainer):
    """A trainer whose gradients are private.

    Args:
        account: of the run; gives sampling rates and noise.
        arguments: as of `Trainer`.
    """

    def __init__(self, account: Account, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.clip = account.config.clip
        self.noise = account.noise_of(self.agents)
        seed = account.config.seed
        keys = [secrets.randbits(63) if seed is None else derive_seed(seed, "privacy", i) for i in self.agents]
        shards = [(stream.shard, account.rates[i]) for stream, i in zip(self.streams, self.agents, strict=True)]
        self.private = [PoissonStream(shard, rate, key) for (shard, rate), key in zip(shards, keys, strict=True)]
        self.streams = list(self.private)  # type: ignore[arg-type]

    def prepare(self, adapter: Adapter, steps: int | None = None) -> None:
        """As `Trainer.prepare`.

        Raises:
            UserError: also if the model does not keep the examples of a batch apart.
        """
        checked = (self.task, self.attached, adapter, self._two_examples())
        if not (separation.check(*checked, together=True) and separation.examples_apart(*checked)):
            raise UserError(
                f"privacy: {type(self.task.model).__name__} does not keep the examples of a batch apart in a layer "
                "that is trained, so an example has no gradient of its own to clip; use another model."
            )
        super().prepare(adapter, steps)

    def _calibrate(self, adapter: Adapter, steps: int | None) -> int:
        """A number of agents a pass that bounds the memory of their examples' gradients; nothing is timed."""
        batch_size = self.config.batch_size
        return calibration.untimed(calibration.sizes(len(self.streams), batch_size, self.device), batch_size)

    def snapshot(self) -> Tensors:
        """As `Trainer.snapshot`, with the secrets and the noise of the agents."""
        keys = torch.tensor([stream.key for stream in self.private], dtype=torch.int64)
        return super().snapshot() | {"privacy/keys": keys, "privacy/noise": self._noise_as_bits()}

    def _noise_as_bits(self) -> Tensor:
        """(n,) the noise, exactly, also on devices without float64."""
        return torch.from_numpy(self.noise.view(np.int64).copy())

    def restore(self, tensors: Tensors) -> None:
        """As `Trainer.restore`.

        Raises:
            UserError: the run was begun with other noise, as for another number of rounds.
        """
        if not torch.equal(tensors["privacy/noise"].cpu(), self._noise_as_bits()):
            raise UserError(
                "resume: privacy.epsilon was planned for another number of rounds or steps, and noise that is drawn "
                "cannot be made more; give the rounds of before, or begin a new run."
            )
        super().restore(tensors)
        for stream, key in zip(self.private, tensors["privacy/keys"].tolist(), strict=True):
            stream.key = int(key)

    def _gradients(
        self,
        flats: dict[str, Tensor],
        adapter: Adapter,
        trained: list[str],
        batches: list[np.ndarray],
        active: np.ndarray,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Private gradients group -> (n, P) and losses (n,) of one step; 0 for agents that are not active."""
        gradients = {g: torch.zeros_like(flats[g]) for g in trained}
        losses = torch.zeros(len(batches), device=self.device)
        for rows, positions, indices in self._examples(batches, active):
            # Each example is an agent of its own, so these are the gradients and losses of every example.
            masks = self._masks_of(rows, positions)
            found, each = self._pass(flats, adapter, trained, torch.from_numpy(rows), indices, masks)
            grads = [
                flats[group].new_zeros(len(rows), flats[group].shape[1]) if grad is None else grad
                for group, grad in zip(trained, found, strict=True)
            ]
            norms = torch.stack([g.square().sum(1) for g in grads]).sum(0).sqrt()
            shares = (self.clip / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1)
            for agent in np.unique(rows).tolist():  # sums by agent, in an order that no device changes
                own = torch.from_numpy(rows == agent).to(self.device)
                losses[agent] += each[own].sum() / len(batches[agent])
                for group, grad in zip(trained, grads, strict=True):
                    gradients[group][agent] += (shares[own, None] * grad[own]).sum(0)
        for agent in np.flatnonzero(active).tolist():
            expected = self.private[agent].rate * len(self.private[agent].shard)
            for group in trained:
                drawn = self._drawn(agent, group, flats[group])
                gradients[group][agent] = (gradients[group][agent] + drawn) / expected
        return {group: self._trimmed(group, adapter, t) for group, t in gradients.items()}, losses

    def _drawn(self, agent: int, group: str, like: Tensor) -> Tensor:
        """(P,) the noise on the sum of an agent's clipped gradients in its next step."""
        key, step = self.private[agent].key, int(self.steps_taken[agent])
        generator = torch_generator(key, "noise", step, group)
        drawn = torch.randn(like.shape[1], generator=generator, dtype=like.dtype).to(like.device)
        return float(self.noise[agent]) * self.clip * drawn

    def _trimmed(self, group: str, adapter: Adapter, gradient: Tensor) -> Tensor:
        """The gradients (n, P) without noise beyond the agents' own ranks."""
        if not adapter.ranks:
            return gradient
        named = {f"{group}/{name}": t for name, t in self._layouts[group].unpack(gradient).items()}
        return self._layouts[group].pack({k.split("/", 1)[1]: t for k, t in adapter.trim(named).items()})

    def _examples(
        self, batches: list[np.ndarray], active: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The step's examples in passes: agents' places (e,), positions in their batches (e,), indices (e,)."""
        chosen = [(i, batches[i]) for i in np.flatnonzero(active).tolist()]
        if not sum(len(batch) for _, batch in chosen):
            return []
        rows = np.concatenate([np.full(len(batch), i) for i, batch in chosen])
        positions = np.concatenate([np.arange(len(batch)) for _, batch in chosen])
        indices = np.concatenate([batch for _, batch in chosen])
        size = max(1, self.agents_per_pass) * self.config.batch_size
        cuts = range(size, len(rows), size)
        return list(zip(*(np.split(values, cuts) for values in (rows, positions, indices)), strict=True))

    def _masks_of(self, rows: np.ndarray, positions: np.ndarray) -> DropoutMasks | None:
        """Dropout masks, each a function of (secret, step, position in the batch, layer); None without dropout."""
        return self._drawn_by(
            [
                (self.private[i].key, "dropout", int(self.steps_taken[i]), int(k))
                for i, k in zip(rows, positions, strict=True)
            ]
        )
