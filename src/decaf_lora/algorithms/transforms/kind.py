"""What does the table of transforms hold of each, and at which place of a chain does a transform lie?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from decaf_lora.algorithms.contract import Transform
from decaf_lora.kinds import Kind


def _never() -> Transform | None:
    return None


@dataclass(frozen=True)
class TransformKind(Kind):
    """A transform by name. `build` takes the transform's own arguments.

    Attributes:
        place: from 0 (next to the rule) to 100 (next to the network). Transforms of equal place lie in the order in
            which they were named.
        asked: makes the transform from those options of an algorithm that ask for it; the parameters' names are the
            options' names. Returns None where the options do not ask for the transform.
    """

    place: int = 50
    asked: Callable[..., Transform | None] = _never
