"""The contract: what is sent, and what becomes of what arrives?

An algorithm is a NamedTuple of pure functions. It sees adapters and messages, never a model, an engine or a
network. Every tensor has the agents of this process on its leading axis n: N in a simulation, a share of N
under torchrun, 1 in a mesh. The state is a flat dict of such tensors, so it can be checkpointed, moved
between processes and compared without knowing what it means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from decaf_lora.adapters.adapter import ALL_FACTORS, Adapter, Factor, Tensors
from decaf_lora.algorithms.inbox import Inbox

State = dict[str, Tensor]


def turned(tensors: Tensors, frames: Tensors) -> Tensors:
    """Factors (n, ...), or gradients of factors, in the frame that `frames`, layer -> (n, r, r), turn to.

    Names end as in `Adapter.tensors()`.
    """
    out = {}
    for key, tensor in tensors.items():
        *_, group, name = key.split("/")
        if group == "A" and name in frames:
            tensor = frames[name] @ tensor
        elif group == "B" and name in frames:
            tensor = tensor @ frames[name].mT
        out[key] = tensor
    return out


def _no_state(adapter: Adapter) -> State:
    return {}


def _train_all(round_: int) -> frozenset[Factor]:
    return ALL_FACTORS


def _no_message(adapter: Adapter, state: State, round_: int) -> Tensors:
    return {}


def _keep(adapter: Adapter, state: State, inbox: Inbox, round_: int) -> tuple[Adapter, State]:
    return adapter, state


def _as_it_is(inbox: Inbox) -> Inbox:
    return inbox


def _no_steer(state: State, gradients: Tensors, round_: int) -> tuple[Tensors, State]:
    return gradients, state


def _keep_moments(state: State, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
    return first, second


def reset_moments(state: State, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
    """The moments of A and B start at 0 again after every mixing; the optimizer's step count goes on."""

    def zeros(moments: Tensors) -> Tensors:
        return {k: t if k.startswith("extras/") else torch.zeros_like(t) for k, t in moments.items()}

    return zeros(first), zeros(second)


class Algorithm(NamedTuple):
    """A decentralized LoRA algorithm as pure functions (in the manner of optax).

    `topology` says who talks: "graph" (the run's mixing matrix), "server" (the complete graph with
    sample-size weights), "none" (nobody), "pooled" (one agent that holds all data).
    `order` is the order of a round: "adapt-combine" trains, then mixes; "combine-adapt" mixes, then trains.
    """

    name: str
    topology: Literal["graph", "server", "none", "pooled"] = "graph"
    order: Literal["adapt-combine", "combine-adapt"] = "adapt-combine"
    init: Callable[[Adapter], State] = _no_state
    """adapter -> state."""
    trains: Callable[[int], frozenset[Factor]] = _train_all
    """round -> which factors the local steps may change."""
    message: Callable[[Adapter, State, int], Tensors] = _no_message
    """(adapter, state, round) -> name -> (n, ...): what every agent sends."""
    combine: Callable[[Adapter, State, Inbox, int], tuple[Adapter, State]] = _keep
    """(adapter, state, inbox, round) -> (adapter, state)."""
    steer: Callable[[State, Tensors, int], tuple[Tensors, State]] = _no_steer
    """(state, raw gradients, round) -> (gradients, state), before every optimizer step."""
    moments: Callable[[State, Tensors, Tensors], tuple[Tensors, Tensors]] = _keep_moments
    """(state, first, second) -> what becomes of the optimizer's moments after `combine`; names as in
    `Adapter.tensors()`; SGD passes its momentum as `first` and an empty `second`."""
    decode: Callable[[Inbox], Inbox] = _as_it_is
    """What arrived, as the factors and other tensors that it stands for: `combine` begins with it."""
    stacks: frozenset[str] = frozenset()
    """What `combine` needs from every sender apart, not only as the weighted average: with several exchanges
    in a round it is forwarded whole, while the rest of a message is averaged on the way."""
    relay: Callable[[Adapter, Inbox, int], tuple[Tensors, Tensor]] | None = None
    """(adapter, inbox, round) -> the message of the next of several exchanges in a round, and (n,) the norm of
    what it leaves out. None: nothing is left out, and the exchanges are done as one (`graphs.compose`)."""
    turn: Callable[[Adapter, Inbox, Adapter], Tensors] | None = None
    """(old adapter, inbox, new adapter) -> layer -> (n, r, r) the orthogonal P that takes the frame of the plain
    factor average to that of the new factors, A' ~ P A, B' ~ B P^T. None: the frame is that of the average."""
    paced: Callable[[int], Algorithm] | None = None
    """rounds -> the same algorithm on a schedule that takes as many rounds to reach everybody."""
