"""What do lying agents send? A transform for simulations, next to the network, so that no defence knows of it.

    sign-flip:  the opposite of the agent's model, times the strength: -k B A (the factor B, or what is sent of a layer)
    noise:      every tensor plus Gaussian noise of k times the tensor's own root mean square

What tracking and other transforms add to a message is flipped, or gets noise, too. An attacker wants a good model to
start its lies from: on a graph it mixes its own honest model with what it hears. The members of a server all get the
server's one average.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors, factor_and_layer, owner, put, take
from decaf_lora.algorithms.contract import Change, Round, Rule, Topology, Transform
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.errors import UserError
from decaf_lora.randomness import torch_generator

PLACE = 85
"""In a chain: over all transforms but int8, which codes what the liars say."""


def attack(
    kind: Literal["sign-flip", "noise"], agents: tuple[int, ...], strength: float, seed: int, topology: Topology
) -> Transform:
    """The lies of some agents of a process that holds all agents.

    Args:
        kind: what they send.
        agents: their numbers.
        strength: k, above 0.
        seed: of the run; noise is drawn by name.
        topology: of the rule beneath.

    Raises:
        UserError: the rule sends on what was mixed.
    """
    liars = torch.tensor(agents)

    def check(rule: Rule) -> None:
        if rule.relay is not None:
            raise UserError(
                "attackers: with algorithm.relay_rank agents send on what was mixed, so a lie is not the liar's alone; "
                "leave relay_rank unset."
            )

    def send(adapter: Adapter, state: Tensors, message: Tensors, round_: Round) -> tuple[Tensors, Tensors]:
        told = dict(message)
        for name in _lied_about(message, kind):
            told[name] = message[name].clone()
            for agent in agents:
                honest = message[name][agent]
                told[name][agent] = -strength * honest if kind == "sign-flip" else _noisy(honest, name, agent, round_)
        # Until the exchange is made the state holds what the liars have; a checkpoint never sees it.
        return told, put("honest/", {name: t[liars] for name, t in message.items()})

    def _noisy(tensor: Tensor, name: str, agent: int, round_: Round) -> Tensor:
        generator = torch_generator(seed, "attack", agent, round_.number, name)
        drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
        return tensor + strength * tensor.square().mean().sqrt() * drawn

    def receive(adapter: Adapter, state: Tensors, inbox: Inbox, round_: Round) -> tuple[Inbox, Tensors]:
        honest = take("honest/", state)
        if topology != "graph":
            return inbox, {}
        count = len(inbox.senders)
        place = {agent: count + k for k, agent in enumerate(agents)}
        own = tuple(place.get(agent, p) for agent, p in enumerate(inbox.own))
        tensors = {name: torch.cat([t, honest[name]]) for name, t in inbox.tensors.items()}
        rows = [
            (torch.where(senders == inbox.own[agent], own[agent], senders), weights)
            for agent, (senders, weights) in enumerate(inbox.rows())
        ]
        extended = replace(inbox, tensors=tensors, senders=(*inbox.senders, *agents), own=own)
        return extended.reweighted(rows), {}

    def after(state: Tensors, change: Change, round_: Round) -> Tensors:
        return {}

    return Transform("attack", send=send, receive=receive, after=after, check=check)


def _lied_about(message: Tensors, kind: str) -> list[str]:
    """Names of the tensors that attackers change. Of a product B A only B is flipped: two flips would be none."""
    names = [name for name, t in message.items() if t.is_floating_point() and owner(name) != "scale"]
    if kind == "noise":
        return names
    both = {name for name in names if owner(name) == "A" and f"B/{factor_and_layer(name)[1]}" in message}
    return [name for name in names if name not in both]
