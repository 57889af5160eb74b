"""How do the moments of the script's own optimizer follow an exchange? In place, where an algorithm moves them."""

from __future__ import annotations

from typing import Any

import torch

from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.contract import Rule
from decaf_lora.algorithms.transforms.chain import Algorithm, State
from decaf_lora.errors import UserError
from decaf_lora.integrations.live import LiveAdapter

_NAMES = (("exp_avg", "exp_avg_sq"), ("momentum_buffer", ""))
"""Keys of the first and second moments in the states of torch's Adam and SGD."""


def moves(algorithm: Algorithm) -> bool:
    """Whether the algorithm changes moments at all."""
    kept = Rule("").moments
    return algorithm.rule.moments is not kept or any(t.moments is not None for t in algorithm.transforms)


def check(algorithm: Algorithm, optimizer: Any) -> None:
    """UserError for an optimizer whose moments the algorithm would have to change, and that has none known here."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    plain = type(inner) in (torch.optim.Adam, torch.optim.AdamW)
    momentum = type(inner) is torch.optim.SGD and all(group["momentum"] for group in inner.param_groups)
    if moves(algorithm) and not (plain or momentum):
        raise UserError(
            f"optim: {algorithm.name} with these options changes the optimizer's moments, and those of "
            f"{type(inner).__name__} are not known; use adamw_torch, or SGD with momentum, or leave the option out."
        )


@torch.no_grad()
def carry(algorithm: Algorithm, state: State, live: LiveAdapter, optimizer: Any) -> None:
    """Lets the algorithm carry the moments into the frame that its exchange has chosen."""
    if not moves(algorithm):
        return
    kept: Any = optimizer.state
    first_key, second_key = next((keys for keys in _NAMES if any(keys[0] in s for s in kept.values())), _NAMES[0])

    def read(key: str) -> Tensors:
        parameters = live.parameters if key else {}
        return {name: kept.get(p, {}).get(key, torch.zeros_like(p))[None] for name, p in parameters.items()}

    firsts, seconds = algorithm.moments(state, read(first_key), read(second_key))
    for key, tensors in ((first_key, firsts), (second_key, seconds)):
        for name, tensor in tensors.items():
            own = kept.get(live.parameters[name], {})
            if key in own:
                own[key].copy_(tensor[0].clone())
