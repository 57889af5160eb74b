"""Quasi-global momentum: the momentum follows where the network went, not the agent's own gradients. No extra bytes.

    x_i(t) = trained tensors of agent i after the mixing of round t
    each round:   d_i = x_i(t - 1) - x_i(t)             (local steps and mixing together)
                  q_i <- mu q_i + (1 - mu) d_i          (q_i = 0 at the start)
    after mixing, in each tensor, with Adam's moments m, v (SGD: v = 1):
                  m_i <- ||m_i|| p / ||p||,   p = sqrt(v_i) q_i       (m_i is kept where q_i or v_i is 0)

Lin, Karimireddy, Stich and Jaggi, arXiv 2102.04761: the buffer is fed by the difference of the model between two
rounds, which holds the neighbours' progress and is smoother than local gradients on data that differ. What differs
from the paper: a round has several local steps, in which the optimizer's own momentum goes on from the new buffer. A
step of AdamW is -lr m / sqrt(v), so sqrt(v) q is the first moment that would step along q; its norm is taken from m,
since a difference of factors has the scale of the learning rate and not of gradients. The second moment stays the
agent's own. x_i(t - 1) and q_i are turned with the factors where their frame changes (`Algorithm.turn`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from decaf_lora.adapters.adapter import Adapter, Tensors
from decaf_lora.adapters.names import leave, put, take
from decaf_lora.algorithms.contract import Algorithm, State, reset_moments, turned
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.errors import UserError

PREFIX = "quasi/"
"""Of the names in the state: quasi/last/NAME is x_i(t - 1), quasi/q/NAME is q_i."""


def quasi_global_momentum(algorithm: Algorithm, mu: float = 0.9) -> Algorithm:
    """`algorithm` with quasi-global momentum; mu in [0, 1) is how much of the buffer a round keeps.

    The algorithm must train the same factors in every round.
    """
    if not 0 <= mu < 1:
        raise UserError(f"algorithm.quasi_global: {mu:g} is not at least 0 and below 1.")
    if algorithm.moments is reset_moments:
        raise UserError(
            "algorithm.quasi_global: it needs the moments that algorithm.moments = reset empties; choose another."
        )

    def init(adapter: Adapter) -> State:
        trained = adapter.tensors(algorithm.trains(1))
        q = {k: torch.zeros_like(t) for k, t in trained.items()}
        return algorithm.init(adapter) | put(PREFIX + "last/", trained) | put(PREFIX + "q/", q)

    def combine(adapter: Adapter, state: State, inbox: Inbox, round_: int) -> tuple[Adapter, State]:
        new, inner = algorithm.combine(adapter, leave(PREFIX, state), inbox, round_)
        frames = algorithm.turn(adapter, inbox, new) if algorithm.turn is not None else {}
        last, q = (turned(take(f"{PREFIX}{kind}/", state), frames) for kind in ("last", "q"))
        now = new.tensors(algorithm.trains(1))
        q = {k: mu * t + (1 - mu) * (last[k] - now[k]) for k, t in q.items()}
        return new, inner | put(PREFIX + "last/", now) | put(PREFIX + "q/", q)

    def message(adapter: Adapter, state: State, round_: int) -> Tensors:
        return algorithm.message(adapter, leave(PREFIX, state), round_)

    def steer(state: State, gradients: Tensors, round_: int) -> tuple[Tensors, State]:
        gradients, inner = algorithm.steer(leave(PREFIX, state), gradients, round_)
        return gradients, state | inner

    def moments(state: State, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
        first, second = algorithm.moments(leave(PREFIX, state), first, second)
        q = take(PREFIX + "q/", state)
        return {k: _along(q[k], m, second.get(k)) if k in q else m for k, m in first.items()}, second

    paced = algorithm.paced
    return algorithm._replace(
        init=init,
        combine=combine,
        message=message,
        steer=steer,
        moments=moments,
        paced=None if paced is None else lambda rounds: quasi_global_momentum(paced(rounds), mu),
    )


def _along(q: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    """(n, ...) first moments with the norms of `first` and the directions sqrt(second) q."""
    p = q if second is None else q * second.sqrt()
    size, norm = (x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1)) for x in (first, p))
    return torch.where(norm > 0, p * (size / torch.where(norm > 0, norm, 1.0)), first)
