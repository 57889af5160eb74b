"""Which algorithm does a name mean, and which options does it take?

An algorithm is a function that returns a `Rule` or an `Algorithm`. Its options are the function's parameters, and an
option means the same in every algorithm that has it.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from decaf_lora.algorithms import rules
from decaf_lora.algorithms.contract import Rule
from decaf_lora.algorithms.discovery import discovered
from decaf_lora.algorithms.transforms.chain import Algorithm, chain
from decaf_lora.algorithms.transforms.table import asked, named, over, shared_options
from decaf_lora.errors import UserError, nearest
from decaf_lora.kinds import Found, Function, Kind, Option, Table, call, options


def _own(function: Function, name: str) -> Kind:
    return Kind(function, "an algorithm of your own", "mine.py:in_turn")


KINDS: Table[Kind] = Table("algorithm", "decaf_lora.algorithms", discovered(rules), _own, hyphen="_")
"""The algorithms by name."""


def make(name: str, transforms: Sequence[str] = (), **given: Any) -> Algorithm:
    """The algorithm called `name`.

    Args:
        name: one of `KINDS`, or a function of the user's own, "mine.py:in_turn".
        transforms: names of further transforms to lay over the algorithm, "mine.py:noise:scale=0.1".
        given: options of the algorithm. One from outside this package also takes every option that asks for a
            transform, such as `messages`.

    Raises:
        UserError: the name or an option is not known, an option means something else in another algorithm, transforms
            are given for an algorithm that mixes nothing, or the function returned neither a rule nor an algorithm.
    """
    found = KINDS.find(name)
    own = options(found.kind.build)
    known = _options(found)
    _refuse_other_meanings({**_built_in(), found.name: own})
    for option in given:
        if option not in known:
            raise _not_taken(option, found.name, known)
    if transforms and not _mixes(found):
        raise UserError(
            f"algorithm.transforms: {found.name} mixes nothing among neighbours and takes none; leave it out."
        )
    values = {option: value for option, value in given.items() if option in own}
    if found.name in KINDS:
        made = found.kind.build(**values)
    else:
        made = call(found.kind.build, found.name, found.argument, "algorithm", {}, values)
    algorithm = chain(made) if isinstance(made, Rule) else made
    if not isinstance(algorithm, Algorithm):
        raise UserError(f"algorithm: {found.name} returned {type(made).__name__}, not a Rule or an Algorithm.")
    if found.name not in KINDS and algorithm.name in KINDS:
        raise UserError(
            f"algorithm: {found.name} calls its rule {algorithm.name!r}, as another is called; give it a name of its "
            "own."
        )
    rest = {option: value for option, value in given.items() if option not in own}
    return over(algorithm, [*asked(rest), *map(named, transforms)])


def accepted(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options among `given` that the algorithm called `name` takes."""
    found = KINDS.find(name)
    known = _options(found)
    return {
        option: value
        for option, value in given.items()
        if option in known or (option == "transforms" and _mixes(found))
    }


def spelled(name: str) -> str:
    """A name as the table of algorithms spells it. The name of a user's own function stays as it is."""
    return KINDS.find(name).name if KINDS.written(name) in KINDS else name


def check_together(names: Iterable[str]) -> None:
    """UserError if an option means different things in two of the algorithms `names`, or in one and a built-in one."""
    _refuse_other_meanings({**_built_in(), **{name: options(KINDS.find(name).kind.build) for name in names}})


def _built_in() -> dict[str, dict[str, Option]]:
    return {name: options(kind.build) for name, kind in KINDS.items()} | {"transforms": shared_options()}


def _options(found: Found[Kind]) -> dict[str, Option]:
    own = options(found.kind.build)
    return own if found.name in KINDS else {**shared_options(), **own}


def _mixes(found: Found[Kind]) -> bool:
    """Whether transforms may lie over the algorithm; the built-in ones without gossip take none."""
    return found.name not in KINDS or "messages" in options(found.kind.build)


def _not_taken(option: str, name: str, known: Iterable[str]) -> UserError:
    users = [other for other, kind in KINDS.items() if option in options(kind.build)]
    if users:
        return UserError(f"algorithm.{option}: {name} does not take this option; it belongs to {', '.join(users)}.")
    close = nearest(option, known)
    guess = f" Did you mean algorithm.{close[0]}?" if close else ""
    return UserError(f"algorithm.{option}: {name} does not take this option; no algorithm takes it.{guess}")


def _refuse_other_meanings(of: Mapping[str, Mapping[str, Option]]) -> None:
    """UserError if two algorithms have an option of one name and different types."""
    first: dict[str, tuple[str, Option]] = {}
    for name, known in of.items():
        for option in known.values():
            other, before = first.setdefault(option.name, (name, option))
            if _meaning(option) != _meaning(before):
                raise UserError(
                    f"algorithm.{option.name}: {name} takes {_shown(option)} and {other} {_shown(before)}; an option "
                    "means the same in every algorithm, so give it another name."
                )


def _meaning(option: Option) -> object:
    """The type of an option, to compare with another's: without None, and without which choices a Literal offers,
    since one algorithm may offer fewer than another."""
    parts = set(typing.get_args(option.type)) if _is_union(option.type) else {option.type}
    parts.discard(type(None))
    return frozenset("choices" if typing.get_origin(part) is Literal else part for part in parts)


def _is_union(kind: object) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _shown(option: Option) -> str:
    return getattr(option.type, "__name__", None) or str(option.type).replace("typing.", "")
