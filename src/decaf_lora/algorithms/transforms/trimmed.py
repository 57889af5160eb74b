"""Trimmed mean: in every coordinate the highest and the lowest of the neighbours' values count for nothing.

    in every entry of every tensor: sort the neighbours' values, drop the k lowest and the k highest,
    and take the plain mean of the rest and of the agent's own value

Yin, Chen, Ramchandran and Bartlett, arXiv 1803.01498, at a server; Fang, Yang and Bajwa (BRIDGE), arXiv 1908.08098,
on a graph, which always keeps the agent's own value. Up to k neighbours may lie: each entry then lies between values
of honest agents. An agent needs more than 2 k neighbours. With k as large as that allows it is nearly the median. The
weights of the graph are not used, and the mean of the agents moves even when nobody lies. The result is one value for
each factor, so rules that mix products get nothing from it and are refused. A number that is not finite counts as the
highest.

Messages are needed one by one: with several exchanges in a round they are forwarded whole. No extra bytes otherwise.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.contract import Round, Rule, Setting, Transform
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.algorithms.transforms.clipped import MODEL, refuse_more_than_models, refuse_unbounded
from decaf_lora.algorithms.transforms.kind import TransformKind
from decaf_lora.errors import UserError


def trimmed(count: int = 1) -> Transform:
    """Coordinate-wise trimmed mean.

    Args:
        count: k, at least 1.

    Raises:
        UserError: `count` is out of range, or the rule has a server, relays or mixes products. At the start of a run:
            agents differ in rank, or a transform before this one sends more than a model. At an exchange between agents
            that keep step: an agent has too few neighbours. (Where neighbours may be missing, it keeps its own values.)
    """
    if count < 1:
        raise UserError(f"algorithm.transforms: trimmed's count = {count} is below 1.")

    def check(rule: Rule) -> None:
        refuse_unbounded(rule, "trimmed")
        if rule.stacks:
            raise UserError(f"algorithm.transforms: {rule.name} mixes products, not factors; use clipped over it.")

    def init(adapter: Adapter, trained: Tensors, message: Tensors, setting: Setting) -> Tensors:
        refuse_more_than_models(message, "trimmed")
        if adapter.ranks:
            raise UserError("algorithm.transforms: trimmed needs agents of one rank and scale; use clipped over decaf.")
        return {}

    def receive(adapter: Adapter, state: Tensors, inbox: Inbox, round_: Round) -> tuple[Inbox, Tensors]:
        heard = []
        for receiver, (senders, _) in enumerate(inbox.rows()):
            others = senders[senders != inbox.own[receiver]]
            if len(others) <= 2 * count and not inbox.waited:
                raise UserError(
                    f"algorithm.transforms: trimmed drops {2 * count} of {len(others)} neighbours and leaves none; "
                    f"use a graph with at least {2 * count + 1} neighbours for each agent, such as random-regular:"
                    f"{2 * count + 2}."
                )
            heard.append(others)
        tensors = {
            name: torch.stack([_mean(t[inbox.own[i]], t[others], count) for i, others in enumerate(heard)])
            for name, t in inbox.tensors.items()
        }
        agents = [inbox.senders[place] for place in inbox.own]
        eye = np.eye(max(agents) + 1)
        return Inbox.from_weights(tensors, eye, agents, agents, inbox.exchange), state

    return Transform("trimmed", init, receive=receive, check=check, stacks=MODEL)


def _mean(own: Tensor, others: Tensor, count: int) -> Tensor:
    """The mean (...) of `own` (...) and of `others` (m, ...) without the `count` lowest and highest in each entry."""
    if len(others) <= 2 * count:
        return own
    ordered = torch.nan_to_num(others, nan=torch.inf).sort(0).values
    return torch.cat([own[None], ordered[count : len(others) - count]]).mean(0)


KINDS = {"trimmed": TransformKind(trimmed, "trimmed mean, against neighbours that lie", "trimmed:1", place=60)}
