"""How much noise does a privacy loss ask for, and what loss has a run spent? Computed by opacus's PRV accountant.

A step of agent i takes each of its m_i examples with probability q_i = min(1, batch size / m_i), sums the gradients,
each clipped to norm C, and adds N(0, (sigma_i C)^2) to every number. T_i such steps are (epsilon, delta)-differentially
private: two data sets of the agent that differ by one example, which one of them lacks, lead to sent messages of
distributions as close as that. The numbers m_i are taken as known to all. Agents hold different examples, so an example
is as safe as its own agent's steps make it: the epsilon of a run is the largest of the agents'.

Poisson subsampled Gaussian: Gopi, Lee and Wutschitz, arXiv 2106.02848, which opacus follows; adding or removing an
example.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decaf_lora.batches import local_steps
from decaf_lora.config import TrainingConfig
from decaf_lora.errors import UserError
from decaf_lora.extras import lacking
from decaf_lora.threats import PrivacyConfig


def _opacus() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import opacus.accountants.utils
    except ImportError as error:
        raise lacking("opacus", "privacy", "privacy") from error
    return opacus.accountants


MOST_NOISE = 10_000.0
"""A noise multiplier beyond which nothing could be learnt."""
MESH = (
    "privacy: not in a federation yet, where an agent that goes back to its checkpoint would send the same noise with "
    "another model, and both together show its gradients; simulate, or leave it out."
)
LOOSE = 30.0
"""An epsilon above which no digit matters; there the memory of the PRV accountant grows without end."""


@functools.lru_cache(maxsize=4096)
def epsilon_of(noise: float, rate: float, steps: int, delta: float) -> float:
    """The privacy loss of `steps` steps at sampling rate `rate` with noise multiplier `noise`; 0 of no steps.

    Above `LOOSE` it is the upper bound of the RDP accountant.
    """
    if not steps:
        return 0.0
    accountants = _opacus()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accountant: Any = accountants.RDPAccountant()
        accountant.history = [(noise, rate, steps)]
        loose = float(accountant.get_epsilon(delta))
        if not loose < LOOSE:
            return loose
        accountant = accountants.PRVAccountant()
        accountant.history = [(noise, rate, steps)]
        return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=4096)
def noise_for(epsilon: float, rate: float, steps: int, delta: float) -> float:
    """The noise multiplier, up to 0.5 %, with which `steps` steps at sampling rate `rate` lose `epsilon` at most.

    Raises:
        UserError: none up to `MOST_NOISE` is enough.
    """
    low, high = 0.0, 1.0
    while epsilon_of(high, rate, steps, delta) > epsilon:
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise UserError(
                f"privacy.epsilon: {epsilon:g} needs noise that drowns everything in {steps} steps; raise it, or take "
                "fewer steps."
            )
    while high - low > 0.005 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon_of(middle, rate, steps, delta) <= epsilon else (middle, high)
    return high


class Account:
    """The privacy of a run: noise of each agent, and the loss after any number of rounds.

    Args:
        config: what is asked for.
        training: batch size and local steps.
        shards: (m_i,) examples of each agent that is known here, by agent.
        rounds: of the run.
        brought: the adapters that the agents start from, if there are any; one for all is public.
        in_step: whether the agents keep step, so that a run that goes on sends what it has sent before.

    Raises:
        UserError: opacus is missing; delta or epsilon cannot be had; agents start from adapters of their own, or live
            in a mesh.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        training: TrainingConfig,
        shards: Mapping[int, np.ndarray],
        rounds: int,
        brought: Sequence[object] | None = None,
        in_step: bool = True,
    ) -> None:
        self.config, self.on = config, config.on
        if not self.on:
            return
        if not in_step:
            raise UserError(MESH)
        if brought is not None and len({str(path) for path in brought}) > 1:
            raise UserError(
                "privacy: the agents bring adapters of their own, which may tell of their examples; start from one "
                "that is public for all (init_adapters), or from fresh ones."
            )
        assert config.delta is not None
        self.delta = config.delta
        largest = max(len(shard) for shard in shards.values())
        if self.delta * largest >= 1:
            raise UserError(
                f"privacy.delta: {self.delta:g} lets one of {largest} examples be published whole; give less than "
                f"{1 / largest:.2g}."
            )
        self.rates = {i: min(1.0, training.batch_size / len(shard)) for i, shard in shards.items()}
        steps = local_steps(training, list(shards.values())).tolist()
        self._steps = dict(zip(shards, steps, strict=True))
        self.noise = {
            i: noise_for(config.epsilon, rate, self._steps[i] * rounds, self.delta)
            if config.epsilon is not None
            else float(config.noise or 0)
            for i, rate in self.rates.items()
        }
        """Agent -> sigma."""

    def epsilon(self, rounds: int) -> float | None:
        """The largest privacy loss of the agents after `rounds` rounds; None where nothing is private."""
        if not self.on:
            return None
        of_each = {(self.noise[i], rate, self._steps[i] * rounds) for i, rate in self.rates.items()}
        return max(epsilon_of(*one, self.delta) for one in of_each)

    def told_of(self, losses: Tensor) -> Tensor:
        """The losses (n,) as other processes may see them: no noise covers them, so private ones become 0."""
        return torch.zeros_like(losses) if self.on else losses

    def spent(self, rounds: int) -> dict[str, float]:
        """Fields of the record after `rounds` rounds."""
        loss = self.epsilon(rounds)
        return {} if loss is None else {"epsilon": loss, "delta": self.delta}

    def told(self, rounds: int) -> str | None:
        """The guarantee of a model of round `rounds`, for people; None where nothing is private."""
        if not self.on:
            return None
        sigmas = sorted(set(self.noise.values()))
        noise = f"{sigmas[0]:.3g}" if len(sigmas) == 1 else f"{sigmas[0]:.3g} to {sigmas[-1]:.3g}"
        seeded = "; simulated with a known seed, so not in force" if self.config.seed is not None else ""
        return (
            f"(ε = {self.epsilon(rounds):.3g}, δ = {self.delta:g}) for every training example of an agent; clip "
            f"{self.config.clip:g}, noise {noise}, Poisson batches, PRV accountant{seeded}"
        )

    def noise_of(self, agents: Sequence[int]) -> np.ndarray:
        """(n,) sigma of some agents."""
        return np.array([self.noise[agent] for agent in agents])
