"""What did a check find? One line for each thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from decaf_lora.errors import UserError

Verdict = Literal["right", "odd", "open", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    """What was looked at."""
    verdict: Verdict
    """`right`; `wrong`: it cannot work so; `odd`: it works, and may not be what is meant; `open`: nothing is wrong
    here, but something else is missing."""
    said: str
    """What was found, and what to do if it is not right."""


def look(what: str, check: Callable[[], str]) -> Finding:
    """The finding of a check, which returns what it found in words, or raises UserError."""
    try:
        return Finding(what, "right", check())
    except UserError as error:
        return Finding(what, "wrong", str(error))


def summary(findings: Sequence[Finding], ready: str) -> str:
    """All findings in one sentence; `ready` says what may be done if nothing is wrong."""
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in ("wrong", "odd", "open")}
    if counts["wrong"]:
        return f"{_things(counts['wrong'])} wrong: mend what the lines say, and check again."
    odd = f" {_things(counts['odd'])} odd: have a look whether that is meant." if counts["odd"] else ""
    missing = f" {_things(counts['open'])} open: it can begin once the others are there." if counts["open"] else ""
    return f"Nothing is wrong.{odd}{missing} {ready}"


def _things(count: int) -> str:
    return "1 thing is" if count == 1 else f"{count} things are"
