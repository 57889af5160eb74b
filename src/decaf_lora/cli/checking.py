"""`decaf check`: is everything ready for a run? And how findings are shown, also those of `decaf federation check`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console

from decaf_lora.cli.options import Checking, configured
from decaf_lora.config import RunConfig

if TYPE_CHECKING:
    from decaf_lora.check import Finding


def check_command(args: list[str]) -> int:
    """`decaf check`."""
    config, options, name = configured(RunConfig, "check", args, Checking)
    from decaf_lora import check

    return show(check.check(config, name), options.json, f"Next: `decaf run {args[0]}`.")


def show(findings: Iterable[Finding], as_json: bool, ready: str) -> int:
    """Prints each finding as soon as it is there, or all as JSON; exit code 2 if something is wrong.

    Args:
        findings: what is found.
        as_json: whether to print JSON.
        ready: what may be done if nothing is wrong.
    """
    from decaf_lora.check import summary

    console = Console(highlight=False)
    found = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            line = f"{finding.verdict:6} {finding.what}: {finding.said}"
            console.print(line, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps([vars(finding) for finding in found], indent=2, ensure_ascii=False))
    else:
        console.print(f"\n{summary(found, ready)}", markup=False, soft_wrap=True)
    return 2 if any(finding.verdict == "wrong" for finding in found) else 0
