"""Which transforms are there, which ones do options and names ask for, and in which order do they lie over a rule?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from decaf_lora.algorithms import transforms
from decaf_lora.algorithms.contract import Rule, Transform
from decaf_lora.algorithms.discovery import discovered
from decaf_lora.algorithms.transforms.chain import Algorithm, chain
from decaf_lora.algorithms.transforms.kind import TransformKind
from decaf_lora.errors import UserError
from decaf_lora.kinds import Function, Option, Table, call, options

Messages = Literal["full", "int8"]

Placed = tuple[int, Transform]
"""(place, transform); see `TransformKind.place`."""


def _own(function: Function, name: str) -> TransformKind:
    return TransformKind(function, "a transform of your own", "mine.py:noise")


KINDS: Table[TransformKind] = Table(
    "algorithm.transforms", "decaf_lora.transforms", discovered(transforms), _own, hyphen="_"
)
"""The transforms by name."""


def shared_options() -> dict[str, Option]:
    """All options that ask for a transform, by name. They mean the same over every rule."""
    return {name: option for kind in KINDS.values() for name, option in options(kind.asked).items()}


def asked(given: Mapping[str, Any]) -> list[Placed]:
    """The transforms that the options `given` ask for; all other options are ignored."""
    found = []
    for kind in KINDS.values():
        known = options(kind.asked)
        transform = kind.asked(**{name: value for name, value in given.items() if name in known})
        found += [(kind.place, transform)] if transform is not None else []
    return found


def named(spec: str) -> Placed:
    """The transform that a name means: "int8", "tracking:0.5" or "mine.py:noise:scale=0.1".

    Raises:
        UserError: no transform has this name, or the user's function returned something else than a Transform.
    """
    found = KINDS.find(spec)
    made = call(found.kind.build, found.name, found.argument, KINDS.field, {})
    if not isinstance(made, Transform):
        raise UserError(f"{KINDS.field}: {found.name} returned {type(made).__name__}, not a Transform.")
    return found.kind.place, made


def over(algorithm: Algorithm, more: Iterable[Placed]) -> Algorithm:
    """`algorithm` with more transforms, each in its place."""
    here = [(KINDS[t.name].place if t.name in KINDS else 50, t) for t in algorithm.transforms]
    placed = sorted([*here, *more], key=lambda pair: pair[0])
    return chain(algorithm.rule, *(transform for _, transform in placed))


def with_options(rule: Rule, **given: Any) -> Algorithm:
    """The algorithm of `rule` with the transforms that the options `given` ask for."""
    return over(chain(rule), asked(given))
