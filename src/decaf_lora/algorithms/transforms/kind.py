"""What does a table know of a transform, and where in a chain does it lie?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from decaf_lora.algorithms.contract import Transform
from decaf_lora.kinds import Kind


def _never() -> Transform | None:
    return None


@dataclass(frozen=True)
class TransformKind(Kind):
    """A transform by name; `build` takes its own arguments.

    Attributes:
        place: where it lies, from 0 (next to the rule) to 100 (next to the network); of equal ones, as they were named.
        asked: from the options of an algorithm that are its concern, by the names of the parameters, to the transform;
            None where they do not ask for it.
    """

    place: int = 50
    asked: Callable[..., Transform | None] = _never
