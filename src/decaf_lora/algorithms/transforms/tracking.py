"""Gradient tracking in factor coordinates: what every local step lacks to be a step of the whole network.

    G_i = mean raw gradient of agent i over its local steps;      c_i = 0 at the start
    each local step:    g <- g + c_i                                      (before clipping and the optimizer)
    each round:         send d_i = G_i + c_i ;    c_i <- (1 - gamma) c_i + gamma (sum_j Pi_ij d_j - G_i)

Pi is doubly stochastic, so sum_i c_i = 0 for ever. gamma = 1 is gradient tracking with local steps (Di Lorenzo
and Scutari, arXiv 1602.00591; Qu and Li, arXiv 1605.07112; with local steps Liu, Lin, Koloskova and Stich,
arXiv 2301.01313); on a complete graph c_i = mean_j G_j - G_i, the control variates of SCAFFOLD (Karimireddy et
al., arXiv 1910.06378). Here G and c have the shape of the trained tensors and are mixed with the same weights:
one more message tensor for each of them. What differs from those papers: the coordinates are LoRA factors, an
optimizer such as AdamW follows, and

- time. On a schedule that takes T rounds to reach everybody, c is updated once in T rounds: d_i is made in the
  first, of all gradients since it was last made, mixed in each, and c_i <- (1 - gamma) c_i + gamma (mixed d_i -
  G_i) in the last. On exact schedules this is the update of a complete graph. (On the demo task, one-peer
  hypercube, updating every round from one neighbour lost most of the gain; so did G_i of one round only.)
- steps. Agents may take unequal numbers of local steps. An agent that rests has a zero gradient; G_i is the
  mean over the steps in which it has any other.
- scales and ranks. Where agents differ in them, the gradients of s_i B_i A_i by a factor carry the own s_i: d_i / s_i
  is sent and what arrives is multiplied by s_i. What lies beyond an agent's rank it cannot use; its part of sum_i
  c_i is lost.
- frames. A product can be split in many ways, so factors, and gradients with them, have a frame (A' = P A,
  B' = B P^T). Messages are mixed as the plain factor average is mixed, that is in the frames they were sent
  in, which the sums above take for one. Where a rule moves on from the average's frame (`Algorithm.turn`) c
  and what is in transit are turned by the same P. Frames of neighbours that differ cost accuracy of c; the
  sum over agents stays 0 as long as no P differs from another.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from decaf_lora.adapters.adapter import Adapter, Tensors
from decaf_lora.adapters.names import leave, put, take
from decaf_lora.algorithms.contract import Algorithm, State, turned
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.errors import UserError

PREFIX = "track/"
"""Of the names of state and messages here: track/c/NAME, track/sum/NAME, track/steps; d travels as track/NAME."""


def tracked(algorithm: Algorithm, gamma: float = 1.0, period: int = 1) -> Algorithm:
    """`algorithm` with gradient tracking.

    gamma in (0, 1]: how far c moves at an update. period: T, the rounds from one update to the next; a run sets
    it to what its schedule takes. The algorithm must train the same factors in every round.
    """
    if not 0 < gamma <= 1:
        raise UserError(f"algorithm.tracking_gamma: {gamma:g} is not above 0 and at most 1.")

    def init(adapter: Adapter) -> State:
        trained = adapter.tensors(algorithm.trains(1))
        kinds = ("c", "sum") if period == 1 else ("c", "sum", "own", "mixing")
        zeros = {f"{kind}/{name}": torch.zeros_like(t) for kind in kinds for name, t in trained.items()}
        steps = next(iter(trained.values())).new_zeros(adapter.num_agents)
        return algorithm.init(adapter) | put(PREFIX, zeros | {"steps": steps})

    def steer(state: State, gradients: Tensors, round_: int) -> tuple[Tensors, State]:
        gradients, inner = algorithm.steer(leave(PREFIX, state), gradients, round_)
        works = torch.stack([g.flatten(1).any(1) for g in gradients.values()]).any(0)
        sums = {f"sum/{name}": state[f"{PREFIX}sum/{name}"] + g for name, g in gradients.items()}
        steered = {name: g + state[f"{PREFIX}c/{name}"] for name, g in gradients.items()}
        steps = state[PREFIX + "steps"]
        return steered, state | inner | put(PREFIX, sums | {"steps": steps + works.to(steps)})

    def message(adapter: Adapter, state: State, round_: int) -> Tensors:
        if _first(round_):
            correction = take(PREFIX + "c/", state)
            d = {name: g + correction[name] for name, g in _means(state).items()}
            d = _over_scale(adapter, d, -1)
        else:
            d = take(PREFIX + "mixing/", state)
        return algorithm.message(adapter, leave(PREFIX, state), round_) | put(PREFIX, d)

    def combine(adapter: Adapter, state: State, inbox: Inbox, round_: int) -> tuple[Adapter, State]:
        rest = replace(inbox, tensors=leave(PREFIX, inbox.tensors))
        new, inner = algorithm.combine(adapter, leave(PREFIX, state), rest, round_)
        frames = algorithm.turn(adapter, rest, new) if algorithm.turn is not None else {}
        c, own = take(PREFIX + "c/", state), _means(state) if _first(round_) else take(PREFIX + "own/", state)
        mixed = {name: inbox.average(PREFIX + name) for name in c}
        if round_ % period == 0:
            news = _over_scale(adapter, mixed, 1)
            c = {name: (1 - gamma) * t + gamma * (news[name] - own[name]) for name, t in c.items()}
            c = adapter.trim(c)
        sums, steps = take(PREFIX + "sum/", state), state[PREFIX + "steps"]
        if _first(round_):  # they have just been sent
            sums, steps = {name: torch.zeros_like(t) for name, t in sums.items()}, torch.zeros_like(steps)
        parts = {"c": c, "sum": sums} | ({"own": own, "mixing": mixed} if period > 1 else {})
        named = {f"{kind}/{k}": t for kind, part in parts.items() for k, t in part.items()}
        return new, inner | put(PREFIX, turned(named, frames) | {"steps": steps})

    def relay(adapter: Adapter, inbox: Inbox, round_: int) -> tuple[Tensors, Tensor]:
        assert algorithm.relay is not None
        sent, cut = algorithm.relay(adapter, replace(inbox, tensors=leave(PREFIX, inbox.tensors)), round_)
        return sent | {k: inbox.average(k) for k in inbox.tensors if k.startswith(PREFIX)}, cut

    def moments(state: State, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
        return algorithm.moments(leave(PREFIX, state), first, second)

    def _first(round_: int) -> bool:
        return (round_ - 1) % period == 0

    return algorithm._replace(
        name=f"{algorithm.name}_tracked",
        init=init,
        steer=steer,
        message=message,
        combine=combine,
        relay=None if algorithm.relay is None else relay,
        moments=moments,
        paced=lambda rounds: tracked(algorithm, gamma, rounds),
    )


def _means(state: State) -> Tensors:
    """name -> (n, ...) G, the mean gradient since it was last sent; 0 before the first step."""
    steps = state[PREFIX + "steps"].clamp_min(1)
    return {name: t / steps.view(-1, *[1] * (t.dim() - 1)) for name, t in take(PREFIX + "sum/", state).items()}


def _over_scale(adapter: Adapter, gradients: Tensors, power: int) -> Tensors:
    """Gradients of the factors times s_i^power, where agents differ in scale."""
    if not adapter.ranks:
        return gradients
    scales = {f"{group}/{k}": s.pow(power)[:, None, None] for group in "AB" for k, s in adapter.scale.items()}
    return {name: g * scales[name] if name in scales else g for name, g in gradients.items()}
