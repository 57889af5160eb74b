"""Against whom? The options of attackers and of privacy: typed, frozen, pure data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from decaf_lora.frozen import Frozen


class AttackersConfig(Frozen):
    """Agents of a simulation that lie to the others, to see what a method bears. The scores are those of the honest."""

    kind: Literal["sign-flip", "noise", "label-flip"] | None = None
    """What attackers do: `sign-flip` sends the opposite of the model times `strength`; `noise` adds Gaussian noise of
    `strength` times the size of what is sent; `label-flip` trains on the wrong labels and sends the result."""
    agents: tuple[int, ...] = ()
    """Numbers of the agents that lie."""
    strength: float | None = Field(None, gt=0)
    """How strong a sign flip or noise is. Unset: 1."""

    @model_validator(mode="after")
    def _check(self) -> AttackersConfig:
        if self.kind is None and (self.agents or self.strength is not None):
            raise ValueError("attackers without a kind; give kind, or leave agents and strength out")
        if self.kind is not None and not self.agents:
            raise ValueError("kind without agents; give the numbers of the agents that lie")
        if len(set(self.agents)) < len(self.agents):
            raise ValueError("agents names one twice; name each once")
        if self.kind == "label-flip" and self.strength is not None:
            raise ValueError("strength does not apply to label-flip; leave it out")
        return self


class PrivacyConfig(Frozen):
    """Differential privacy of every training example against whoever sees what its agent sends (docs/privacy.md)."""

    epsilon: float | None = Field(None, gt=0)
    """The privacy loss of the whole run, at most; the noise follows. Give this or `noise`. Unset, without `noise`: no
    privacy."""
    delta: float | None = Field(None, gt=0, lt=1)
    """The probability with which more may be lost. Well below 1 / (examples of an agent)."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of an example's gradient; longer ones are shortened to it."""
    noise: float | None = Field(None, gt=0)
    """Standard deviation of the noise on the sum of a batch's gradients, in units of `clip`; epsilon follows."""
    seed: int | None = Field(None, ge=0)
    """For studies alone: seed of batches and noise. Whoever knows it can subtract the noise, so nothing is protected.
    Unset: a secret of the agent, kept in the checkpoint only."""

    @model_validator(mode="after")
    def _check(self) -> PrivacyConfig:
        if self.epsilon is not None and self.noise is not None:
            raise ValueError("epsilon and noise exclude each other, since one follows from the other; give one")
        if self.on and self.delta is None:
            raise ValueError("delta is missing; give one well below 1 / (examples of an agent), such as 1e-5")
        if not self.on and (self.delta is not None or self.seed is not None):
            raise ValueError("neither epsilon nor noise; give one of them, or leave delta and seed out")
        return self

    @property
    def on(self) -> bool:
        """Whether the run is private."""
        return self.epsilon is not None or self.noise is not None
