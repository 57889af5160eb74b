"""Clipped gossip: what a neighbour can move an agent by is bounded, whatever the neighbour sends.

    d_ij = distance of neighbour j's model to the agent's own;     t_i = tau, or the median of d_ij over the neighbours
    Pi'_ij = Pi_ij min(1, t_i / d_ij) for j != i;    the agent's own message gets the rest of the weight

He, Karimireddy and Jaggi, arXiv 2202.01545, where x_i + sum_j Pi_ij clip(x_j - x_i, t_i) is computed: the same, as a
reweighting. d_ij is the Frobenius norm over the products s B A of all layers (over what is sent of a layer, where
that is one factor or a core) and over the extras together. Mixing is linear in these, so before truncation an
exchange moves agent i by at most t_i sum_{j != i} Pi_ij. Rules that average both factors are refused: their average
can be moved without bound by a message whose product is near. The paper sets t_i from the share of liars and the
variance of the honest; here it is a number, or the median, for which fewer than half of an agent's neighbours may
lie. Pi' is not doubly stochastic, so the mean of the agents moves a little even when nobody lies. A message that is
not finite gets no weight.

Messages are needed one by one: with several exchanges in a round they are forwarded whole. No extra bytes otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decaf_lora import lowrank
from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors, factor_and_layer, owner
from decaf_lora.algorithms.contract import Round, Rule, Setting, Transform
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.algorithms.transforms.kind import TransformKind
from decaf_lora.errors import UserError
from decaf_lora.precision import double

MODEL = frozenset({"A", "B", "core", "extras", "scale"})
"""Owners of the tensors that a model consists of."""


def clipped(tau: float | None = None) -> Transform:
    """Clipped gossip.

    Args:
        tau: above 0, the largest distance that counts in full; None: for each agent the median of its neighbours.

    Raises:
        UserError: `tau` is out of range, or the rule has a server, relays, or averages both factors; at the start of a
            run also if a transform before this one sends what has no bound.
    """
    if tau is not None and not tau > 0:
        raise UserError(f"algorithm.transforms: clipped's tau = {tau:g} is not above 0.")

    def check(rule: Rule) -> None:
        refuse_unbounded(rule, "clipped")
        in_turn = (rule.trains(Round(number)) for number in range(1, 101))  # it may average one now, the other later
        if {"A", "B"} <= frozenset().union(*in_turn) - rule.personal and "A" not in rule.stacks:
            raise UserError(
                f"algorithm.transforms: {rule.name} averages A and B each, which no distance of models bounds; lay "
                "clipped over decaf, dlora_fa, fedsa or core, or use trimmed."
            )

    def init(adapter: Adapter, trained: Tensors, message: Tensors, setting: Setting) -> Tensors:
        refuse_more_than_models(message, "clipped")
        return {}

    def receive(adapter: Adapter, state: Tensors, inbox: Inbox, round_: Round) -> tuple[Inbox, Tensors]:
        rows = []
        for receiver, (senders, weights) in enumerate(inbox.rows()):
            own = inbox.own[receiver]
            others = senders[senders != own]
            apart = _distances(adapter, inbox, receiver, others)
            finite = apart.isfinite()
            others, apart = others[finite], apart[finite]
            bound = apart.new_tensor(tau) if tau is not None else apart.median() if len(apart) else apart.sum()
            share = weights[senders != own][finite] * torch.where(apart > bound, bound / apart, torch.ones_like(apart))
            rows.append((torch.cat([others, torch.tensor([own])]), torch.cat([share, 1 - share.sum()[None]])))
        return inbox.reweighted(rows), state

    return Transform("clipped", init, receive=receive, check=check, stacks=MODEL)


def refuse_unbounded(rule: Rule, name: str) -> None:
    """UserError for a rule that does not gossip, or whose agents hear mixtures of messages."""
    if rule.topology != "graph":
        raise UserError(f"algorithm.transforms: {name} bounds what neighbours send, and {rule.name} has none.")
    if rule.relay is not None:
        raise UserError(
            f"algorithm.transforms: {name} needs every neighbour's own message, but algorithm.relay_rank sends on what "
            "was mixed; leave relay_rank unset."
        )


def refuse_more_than_models(message: Tensors, name: str) -> None:
    """UserError if a message holds more than a model: what tracking adds up, one liar could move without bound."""
    if others := sorted({owner(key) for key in message} - MODEL):
        raise UserError(
            f"algorithm.transforms: {name} bounds models alone, and {others[0]} sends more, which one neighbour could "
            f"move without bound; leave {others[0]} out."
        )


def _distances(adapter: Adapter, inbox: Inbox, receiver: int, senders: Tensor) -> Tensor:
    """(m,) float64 distances of the models that `senders` sent to the receiver's own message."""
    own, squares = inbox.own[receiver], torch.zeros(len(senders), dtype=torch.float64)
    for name, sent in inbox.tensors.items():
        factor, layer = factor_and_layer(name)
        if factor == "scale" or (factor == "A" and f"B/{layer}" in inbox.tensors):
            continue  # with B
        scale = inbox.tensors.get(f"scale/{layer}")
        if factor in ("B", "core"):
            sent = sent * (adapter.scale[layer][receiver] if scale is None else scale[:, None, None])
        if factor == "B" and f"A/{layer}" in inbox.tensors:
            a = inbox.tensors[f"A/{layer}"]
            apart = lowrank.product_distance(a[senders], sent[senders], a[own], sent[own])
        else:
            apart = (double(sent[senders]) - double(sent[own])).flatten(1).norm(dim=1)
        squares += double(apart).square().cpu()
    return squares.sqrt()


KINDS = {"clipped": TransformKind(clipped, "clipped gossip, against neighbours that lie", "clipped", place=60)}
