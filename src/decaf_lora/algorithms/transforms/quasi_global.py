"""Quasi-global momentum: the momentum follows the change of the mixed model, not the own gradients. No extra bytes.

    x_i(t) = trained tensors of agent i after the mixing of round t
    each round:   d_i = x_i(t - 1) - x_i(t)             (local steps and mixing together)
                  q_i <- mu q_i + (1 - mu) d_i          (q_i = 0 at the start)
    after mixing, in each tensor, with Adam's moments m, v (SGD: v = 1):
                  m_i <- ||m_i|| p / ||p||,   p = sqrt(v_i) q_i       (m_i is kept where q_i or v_i is 0)

Lin, Karimireddy, Stich and Jaggi, arXiv 2102.04761: the buffer q is fed by the difference of the model between two
rounds. That difference holds the neighbours' progress, and where agents' data differ it is smoother than local
gradients. Unlike in the paper a round has several local steps, in which the optimizer's own momentum goes on from the
new buffer. A step of AdamW is -lr m / sqrt(v), so the first moment that would step along q is sqrt(v) q. Its norm is
taken from m, since a difference of factors has the scale of the learning rate and not of gradients. The second moment
stays the agent's own. x_i(t - 1) and q_i are turned with the factors where their frame changes (`Rule.turn`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors, put, take
from decaf_lora.algorithms.contract import (
    Change,
    Round,
    Rule,
    Setting,
    Transform,
    reset_moments,
    turned,
)
from decaf_lora.algorithms.transforms.kind import TransformKind
from decaf_lora.errors import UserError


def quasi_global(mu: float = 0.9) -> Transform:
    """Quasi-global momentum. The state holds x_i(t - 1) as last/NAME and q_i as q/NAME, each (n, ...).

    Args:
        mu: in [0, 1), the decay of the buffer over rounds: 0 uses the last round only, 0.9 a long average.

    Raises:
        UserError: `mu` is out of range, or the rule resets the moments.
    """
    if not 0 <= mu < 1:
        raise UserError(f"algorithm.quasi_global: {mu:g} is not at least 0 and below 1.")

    def check(rule: Rule) -> None:
        if rule.moments is reset_moments:
            raise UserError(
                "algorithm.quasi_global: it needs the moments that algorithm.moments = reset empties; choose another."
            )

    def init(adapter: Adapter, trained: Tensors, message: Tensors, setting: Setting) -> Tensors:
        trained = {name: t for name, t in trained.items() if name in message}
        return put("last/", trained) | {f"q/{name}": torch.zeros_like(t) for name, t in trained.items()}

    def after(state: Tensors, change: Change, round_: Round) -> Tensors:
        state, now = turned(state, change.frames), change.new.tensors()
        last, q = take("last/", state), take("q/", state)
        q = {name: mu * t + (1 - mu) * (last[name] - now[name]) for name, t in q.items()}
        return {f"last/{name}": now[name] for name in q} | put("q/", q)

    def moments(state: Tensors, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
        q = take("q/", state)
        return {k: _along(q[k], m, second.get(k)) if k in q else m for k, m in first.items()}, second

    return Transform("quasi_global", init, after=after, moments=moments, check=check, same_factors=True)


def _along(q: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    """(n, ...) first moments with the norms of `first` and the directions sqrt(second) q."""
    p = q if second is None else q * second.sqrt()
    size, norm = (x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1)) for x in (first, p))
    return torch.where(norm > 0, p * (size / torch.where(norm > 0, norm, 1.0)), first)


_quasi_global = quasi_global


def _asked(quasi_global: float | None = None) -> Transform | None:
    return None if quasi_global is None else _quasi_global(quasi_global)


KINDS = {
    "quasi_global": TransformKind(quasi_global, "quasi-global momentum", "quasi_global:0.9", place=20, asked=_asked)
}
