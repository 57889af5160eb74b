"""Core gossip (Fed-SB on a graph): A and B frozen, an r x r matrix R between them trained and mixed.

    W_i = W0 + s B R_i A        R_i <- sum_j Pi_ij R_j,  R_i = 0 at the start

The update is linear in R, so mixing R mixes the updates exactly under any matrix Pi, with neither interference nor
truncation, and the disagreement shrinks by sigma_2 a round. A message has r^2 numbers a layer, whatever the layer's
size.

Singhal, Ponkshe, Vartak, Varshney and Vepakomma (Fed-SB), arXiv 2502.15436, with a server; LoRA-SB, arXiv 2411.19557.
They take A and B from the singular vectors of the first gradient. Here the rows of A and the columns of B are random
and orthonormal, drawn by name and so equal everywhere, as a rule sees no model: an agent needs nothing from the
others before the first round. The price is that only a random r x r part of a layer can be learned; take a rank
several times as high as for the other rules, which bytes allow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from decaf_lora.adapters.adapter import Adapter, Factor
from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.contract import Order, Round, Rule, Setting
from decaf_lora.algorithms.rules.dlora import average_factors, with_moments
from decaf_lora.algorithms.transforms.chain import Algorithm
from decaf_lora.algorithms.transforms.table import Messages, with_options
from decaf_lora.errors import UserError
from decaf_lora.kinds import Kind
from decaf_lora.randomness import torch_generator

_TRAINED: frozenset[Factor] = frozenset({"core", "extras"})


def core(
    order: Order = "adapt-combine",
    moments: Literal["keep", "reset"] = "keep",
    tracking: bool = False,
    tracking_gamma: float = 1.0,
    quasi_global: float | None = None,
    messages: Messages = "full",
) -> Algorithm:
    """Gossip on cores between common frozen factors; arguments and errors as those of `dlora`.

    Raises:
        UserError: also at the start of a run whose agents differ in rank or scale.
    """

    def begin(adapter: Adapter, setting: Setting) -> Adapter:
        if adapter.ranks:
            raise UserError("lora.ranks: core needs one rank and scale for all agents; make them so, or use decaf.")
        a, b, cores = dict(adapter.A), dict(adapter.B), Tensors()
        for layer in adapter.layers:
            rank = a[layer].shape[1]
            a[layer] = _orthonormal(a[layer].mT, setting.seed, layer, "A").mT
            b[layer] = _orthonormal(b[layer], setting.seed, layer, "B")
            cores[layer] = b[layer].new_zeros(adapter.num_agents, rank, rank)
        return replace(adapter, A=a, B=b, core=cores)

    def message(adapter: Adapter, state: Tensors, round_: Round) -> Tensors:
        return adapter.message(_TRAINED)

    rule = Rule(
        "core",
        order=order,
        trains=lambda round_: _TRAINED,
        message=message,
        combine=average_factors,
        alike=True,
        begin=begin,
    )
    return with_options(
        with_moments(rule, moments),
        tracking=tracking,
        tracking_gamma=tracking_gamma,
        quasi_global=quasi_global,
        messages=messages,
    )


def _orthonormal(like: Tensor, seed: int, layer: str, factor: str) -> Tensor:
    """(n, d, r) the same orthonormal columns for all n agents, of the shape and type of `like`."""
    draw = torch.randn(like.shape[1:], generator=torch_generator(seed, "core", layer, factor), dtype=torch.float64)
    return torch.linalg.qr(draw)[0].to(like).expand(like.shape).contiguous()


KINDS = {"core": Kind(core, "A and B frozen, an r x r core between them mixed (Fed-SB)")}
