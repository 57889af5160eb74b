"""The algorithms: what is sent, and what becomes of what arrives? One file a rule, its formula on top.

Transforms lie over any of the rules that gossip: `decaf() | tracking() | int8()`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.algorithms.contract import Change, Combined, Round, Rule, Setting, Transform
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.algorithms.rules.centralized import centralized
from decaf_lora.algorithms.rules.decaf import GAUGES, decaf, decaf_tracked
from decaf_lora.algorithms.rules.dlora import dlora
from decaf_lora.algorithms.rules.dlora_fa import dlora_fa
from decaf_lora.algorithms.rules.fedavg import fedavg
from decaf_lora.algorithms.rules.local import local
from decaf_lora.algorithms.transforms.chain import Algorithm, Mixed, State, chain
from decaf_lora.algorithms.transforms.feedback import feedback
from decaf_lora.algorithms.transforms.int8 import int8
from decaf_lora.algorithms.transforms.quasi_global import quasi_global
from decaf_lora.algorithms.transforms.tracking import tracking
from decaf_lora.errors import UserError, unknown

__all__ = [
    "ALGORITHMS",
    "GAUGES",
    "Adapter",
    "Algorithm",
    "Change",
    "Combined",
    "Inbox",
    "Mixed",
    "Round",
    "Rule",
    "Setting",
    "State",
    "Transform",
    "accepted",
    "centralized",
    "chain",
    "decaf",
    "decaf_tracked",
    "dlora",
    "dlora_fa",
    "fedavg",
    "feedback",
    "int8",
    "local",
    "make",
    "quasi_global",
    "tracking",
]

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "local": local,
    "dlora": dlora,
    "dlora_fa": dlora_fa,
    "decaf": decaf,
    "decaf_tracked": decaf_tracked,
    "fedavg": fedavg,
    "centralized": centralized,
}


def make(name: str, **options: Any) -> Algorithm:
    """The algorithm called `name`. An option it does not take is an error that names those which do."""
    factory = _factory(name)
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            users = [k for k, f in ALGORITHMS.items() if option in inspect.signature(f).parameters]
            remedy = f"it belongs to {', '.join(users)}" if users else "no algorithm takes it"
            raise UserError(f"algorithm.{option}: {name} does not take this option; {remedy}.")
    return factory(**options)


def accepted(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of `options` that the algorithm called `name` takes."""
    known = inspect.signature(_factory(name)).parameters
    return {option: value for option, value in options.items() if option in known}


def _factory(name: str) -> Callable[..., Algorithm]:
    key = name.replace("-", "_")
    if key not in ALGORITHMS:
        raise unknown("algorithm", name, ALGORITHMS)
    return ALGORITHMS[key]
