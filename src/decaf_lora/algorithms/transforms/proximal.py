"""A proximal term: each agent is held near the model with which the round began.

    each local step:    g <- g + mu (w - x_i),    x_i the agent's tensors after the last mixing

It is the gradient of (mu / 2) || w - x_i ||^2. Li et al. (FedProx), arXiv 1812.06127, where x is the server's model;
on a graph x_i is what the agent has mixed. What an agent does not send has no x, and is left alone. No extra bytes.
"""

from __future__ import annotations

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.contract import Change, Round, Setting, Transform
from decaf_lora.algorithms.transforms.kind import TransformKind
from decaf_lora.errors import UserError


def proximal(mu: float = 0.01) -> Transform:
    """A proximal term in the local loss. The state holds x_i by NAME, (n, ...).

    Args:
        mu: at least 0, the weight.

    Raises:
        UserError: `mu` is negative.
    """
    if not mu >= 0:
        raise UserError(f"algorithm.proximal: {mu:g} is not at least 0.")

    def init(adapter: Adapter, trained: Tensors, message: Tensors, setting: Setting) -> Tensors:
        return {name: t for name, t in trained.items() if name in message}

    def penalty(state: Tensors, values: Tensors, round_: Round) -> Tensors:
        return {name: mu * (values[name] - x) for name, x in state.items()}

    def after(state: Tensors, change: Change, round_: Round) -> Tensors:
        now = change.new.tensors()
        return {name: now[name] for name in state}

    return Transform("proximal", init, penalty=penalty, after=after, same_factors=True)


KINDS = {"proximal": TransformKind(proximal, "a proximal term (FedProx)", "proximal:0.01", place=40)}
