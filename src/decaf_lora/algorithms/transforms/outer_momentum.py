"""Outer momentum (DiLoCo's): what a round of local steps has changed is a step of Nesterov's momentum. No extra bytes.

    x_i the agent's tensors after the last mixing, w_i after the local steps, b_i = 0 at the start
    D_i = x_i - w_i ;    b_i <- mu b_i + D_i ;    sent instead of w_i:   u_i = x_i - eta (D_i + mu b_i)

On the complete graph all x_i are equal, and u_i is linear in D_i and b_i: the mixed u is DiLoCo's x - eta (D + mu b),
with D and b the means over agents, exactly. So no buffer has to be sent. On a sparse graph every agent has momentum
of its own, which the mixing does not smooth; NoLoCo (arXiv 2506.10911) averages in pairs instead. Douillard et al.
(DiLoCo), arXiv 2311.08105: eta 0.7 and mu 0.9 there, with hundreds of local steps a round. eta = 1 and mu = 0 changes
nothing.

b_i has the frame of the factors and is turned with them (`Rule.turn`). What an agent does not send has no outer step.
"""

from __future__ import annotations

import torch

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors, put, take
from decaf_lora.algorithms.contract import Change, Round, Setting, Transform, turned
from decaf_lora.algorithms.transforms.kind import TransformKind
from decaf_lora.errors import UserError


def outer_momentum(mu: float = 0.9, rate: float = 0.7) -> Transform:
    """Outer Nesterov momentum. The state holds x_i as x/NAME and b_i as b/NAME, each (n, ...).

    Args:
        mu: in [0, 1), the decay of the buffer over rounds.
        rate: eta, above 0: the outer learning rate.

    Raises:
        UserError: an argument is out of range.
    """
    if not 0 <= mu < 1:
        raise UserError(f"algorithm.transforms: outer_momentum's mu = {mu:g} is not at least 0 and below 1.")
    if not rate > 0:
        raise UserError(f"algorithm.transforms: outer_momentum's rate = {rate:g} is not above 0.")

    def init(adapter: Adapter, trained: Tensors, message: Tensors, setting: Setting) -> Tensors:
        sent = {name: t for name, t in trained.items() if name in message}
        return put("x/", sent) | {f"b/{name}": torch.zeros_like(t) for name, t in sent.items()}

    def send(adapter: Adapter, state: Tensors, message: Tensors, round_: Round) -> tuple[Tensors, Tensors]:
        x, b = take("x/", state), take("b/", state)
        change = {name: t - message[name] for name, t in x.items()}
        b = {name: mu * t + change[name] for name, t in b.items()}
        stepped = {name: t - rate * (change[name] + mu * b[name]) for name, t in x.items()}
        return message | stepped, put("x/", x) | put("b/", b)

    def after(state: Tensors, change: Change, round_: Round) -> Tensors:
        b, now = turned(take("b/", state), change.frames), change.new.tensors()
        return {f"x/{name}": now[name] for name in b} | put("b/", b)

    return Transform("outer_momentum", init, send=send, after=after, same_factors=True)


KINDS = {
    "outer_momentum": TransformKind(
        outer_momentum, "Nesterov momentum over rounds (DiLoCo)", "outer_momentum:0.9", place=15
    )
}
