"""Gradient tracking in factor coordinates: a correction makes each local step follow the gradient of all agents.

    G_i = mean raw gradient of agent i over its local steps;      c_i = 0 at the start
    each local step:    g <- g + c_i                                      (before clipping and the optimizer)
    each round:         send d_i = G_i + c_i ;    c_i <- (1 - gamma) c_i + gamma (sum_j Pi_ij d_j - G_i)

Pi is doubly stochastic, so sum_i c_i = 0 for ever. gamma = 1 is gradient tracking with local steps (Di Lorenzo
and Scutari, arXiv 1602.00591; Qu and Li, arXiv 1605.07112; with local steps Liu, Lin, Koloskova and Stich,
arXiv 2301.01313); on a complete graph c_i = mean_j G_j - G_i, the control variates of SCAFFOLD (Karimireddy et
al., arXiv 1910.06378). Here G and c have the shapes of the trained tensors, and d is mixed with the same weights as
these: each trained tensor has a second tensor in the message. Unlike in those papers the coordinates are LoRA factors
and an optimizer such as AdamW follows. Further differences:

- time. On a schedule that takes T rounds to reach everybody, c is updated once in T rounds. In the first of them d_i
  is made, from all gradients since it was last made; in each of them d_i is mixed; in the last of them
  c_i <- (1 - gamma) c_i + gamma (mixed d_i - G_i). On exact schedules this is the update of a complete graph. (On the
  demo task with the one-peer hypercube, updating every round from one neighbour lost most of the gain; so did a G_i
  of one round only.)
- steps. Agents may take unequal numbers of local steps. An agent that rests has a zero gradient; G_i is the mean over
  the steps whose gradient is not zero.
- scales and ranks. Where agents differ in scale, the gradient of a factor of s_i B_i A_i carries the agent's own s_i.
  So d_i / s_i is sent, and what arrives is multiplied by the receiver's s_i. Where agents differ in rank, a receiver
  cannot use what lies beyond its own rank; that part of sum_i c_i is lost.
- frames. A product can be split in many ways, so factors, and their gradients, have a frame (A' = P A, B' = B P^T).
  Messages are mixed as the plain factor average is, in the frames in which they were sent; the sums above assume that
  these agree. Where a rule leaves the frame of that average (`Rule.turn`), c and the d in transit are turned by the
  same P. Where neighbours' frames differ, c loses accuracy; its sum over agents stays 0 as long as all P are equal.
- misses. In a mesh agents may miss each other. One end of an edge may then add an exchange that the other end has not
  added, and sum_i c_i would stay off 0 for ever. So c is also kept by edge,

      c_i = sum_j f_ij,    f_ij <- f_ij + gamma Pi_ij (d_j - d_i) = -f_ji.

  Where the ends of an edge find that they did not add the same exchanges (`Inbox.forget`), both take f out of c and
  begin anew. Memory: one adapter for each neighbour.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors, leave, put, take
from decaf_lora.algorithms.contract import Change, Round, Setting, Transform, turned
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.algorithms.transforms.kind import TransformKind
from decaf_lora.errors import UserError

PREFIX = "tracking/"
"""Prefix of names in a message: d travels as tracking/NAME. The state holds c/NAME, sum/NAME (of gradients) and steps;
over a period also own/NAME (G) and mixing/NAME (d in transit); in a mesh also f/NEIGHBOUR/NAME."""


def tracking(gamma: float = 1.0) -> Transform:
    """Gradient tracking.

    Args:
        gamma: in (0, 1], how far c moves at an update.

    Raises:
        UserError: `gamma` is out of range.
    """
    if not 0 < gamma <= 1:
        raise UserError(f"algorithm.tracking_gamma: {gamma:g} is not above 0 and at most 1.")

    def init(adapter: Adapter, trained: Tensors, message: Tensors, setting: Setting) -> Tensors:
        trained = {name: t for name, t in trained.items() if name in message}  # what stays with the agent has no drift
        kinds = ("c", "sum") if setting.period == 1 else ("c", "sum", "own", "mixing")
        zeros = {f"{kind}/{name}": torch.zeros_like(t) for kind in kinds for name, t in trained.items()}
        zeros |= {f"f/{j}/{name}": torch.zeros_like(t) for j in setting.neighbours for name, t in trained.items()}
        return zeros | {"steps": next(iter(trained.values())).new_zeros(adapter.num_agents)}

    def steer(state: Tensors, gradients: Tensors, round_: Round) -> tuple[Tensors, Tensors]:
        correction, sums = take("c/", state), take("sum/", state)
        works = torch.stack([g.flatten(1).any(1) for g in gradients.values()]).any(0)
        sums = {name: t + gradients[name] for name, t in sums.items()}
        steered = {name: g + correction[name] if name in correction else g for name, g in gradients.items()}
        return steered, state | put("sum/", sums) | {"steps": state["steps"] + works.to(state["steps"])}

    def send(adapter: Adapter, state: Tensors, message: Tensors, round_: Round) -> tuple[Tensors, Tensors]:
        if not round_.opens:
            return message | put(PREFIX, take("mixing/", state)), state
        correction, own = take("c/", state), _means(state)
        d = _over_scale(adapter, {name: g + correction[name] for name, g in own.items()}, -1)
        since = {name: torch.zeros_like(t) for name, t in state.items() if name == "steps" or name.startswith("sum/")}
        return message | put(PREFIX, d), state | since | put("own/", own)

    def receive(adapter: Adapter, state: Tensors, inbox: Inbox, round_: Round) -> tuple[Inbox, Tensors]:
        mixed = take(PREFIX, inbox.averages(PREFIX + name for name in take("c/", state)))
        state = relayed(adapter, state, inbox, round_)
        return replace(inbox, tensors=leave(PREFIX, inbox.tensors)), state | put("mixing/", mixed)

    def relayed(adapter: Adapter, state: Tensors, inbox: Inbox, round_: Round) -> Tensors:
        return _booked(adapter, state, inbox, gamma) if any(name.startswith("f/") for name in state) else state

    def after(state: Tensors, change: Change, round_: Round) -> Tensors:
        if round_.closes:
            c, own = take("c/", state), take("own/", state)
            news = _over_scale(change.old, take("mixing/", state), 1)
            c = {name: (1 - gamma) * t + gamma * (news[name] - own[name]) for name, t in c.items()}
            state = state | put("c/", change.old.trim(c))
        if round_.period == 1:  # no d is in transit between rounds
            state = leave("own/", leave("mixing/", state))
        return turned(state, change.frames)

    return Transform(
        "tracking", init, steer, send, receive, relayed, after, same_factors=True, periodic=True, suffix="_tracked"
    )


def _booked(adapter: Adapter, state: Tensors, inbox: Inbox, gamma: float) -> Tensors:
    """The state of one agent with the accounts f of its edges brought up to date after an exchange.

    An account that is emptied must leave c, too. `after` computes c_i from -gamma G_i and terms without G_i, so adding
    f / gamma to G_i takes f out of c_i.
    """
    state = dict(state)
    for j in sorted(inbox.forget):
        for name, f in take(f"f/{j}/", state).items():
            state[f"own/{name}"] = state[f"own/{name}"] + f / gamma
            state[f"f/{j}/{name}"] = torch.zeros_like(f)
    position, own = {str(j): k for k, j in enumerate(inbox.senders)}, inbox.own[0]
    for neighbour, weight in inbox.weights_of_first().items():
        k = position[neighbour]
        sent = {name: inbox.tensors[PREFIX + name] for name in take(f"f/{neighbour}/", state)}
        news = {name: gamma * weight * (d[k : k + 1] - d[own : own + 1]) for name, d in sent.items()}
        for name, added in adapter.trim(_over_scale(adapter, news, 1)).items():
            state[f"f/{neighbour}/{name}"] = state[f"f/{neighbour}/{name}"] + added
    return state


def _means(state: Tensors) -> Tensors:
    """G: name -> (n, ...), the mean gradient since d was last made; 0 before the first step."""
    steps = state["steps"].clamp_min(1)
    return {name: t / steps.view(-1, *[1] * (t.dim() - 1)) for name, t in take("sum/", state).items()}


def _over_scale(adapter: Adapter, gradients: Tensors, power: int) -> Tensors:
    """Gradients of the factors times s_i^power where agents differ in rank or scale; else as they are."""
    if not adapter.ranks:
        return gradients
    scales = {f"{group}/{k}": s.pow(power)[:, None, None] for group in "AB" for k, s in adapter.scale.items()}
    return {name: g * scales[name] if name in scales else g for name, g in gradients.items()}


_tracking = tracking


def _asked(tracking: bool = False, tracking_gamma: float = 1.0) -> Transform | None:
    return _tracking(tracking_gamma) if tracking else None


KINDS = {"tracking": TransformKind(tracking, "gradient tracking", "tracking:0.5", place=30, asked=_asked)}
