"""Which agents lie, and how? The options of attackers: typed, frozen, pure data."""

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
