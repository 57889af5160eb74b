"""FedAdam (FedOpt): the server takes a step of Adam along the mean change of the agents.

    D = sum_j (n_j / n) w_j - x
    m <- beta_1 m + (1 - beta_1) D ;   v <- beta_2 v + (1 - beta_2) D^2 ;   x <- x + eta m / (sqrt(v) + tau)

m = 0 and v = tau^2 at the start. Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar and McMahan, arXiv 2003.00295
(algorithm 2, without bias correction).

Where the server's state lives: there is no process of a server, so every agent keeps x, m and v, as rows of the
rule's state, and makes the server's step itself. All hear the same messages, and sums run in the same order, so all
rows are equal, bit for bit. It costs three adapters of memory an agent, and no byte more on the wire than FedAvg.
"""

from __future__ import annotations

import torch

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors, put, take
from decaf_lora.algorithms.contract import Combined, Round, Rule, Setting
from decaf_lora.algorithms.inbox import Inbox, average_tensors
from decaf_lora.algorithms.rules.dlora import send_factors
from decaf_lora.algorithms.transforms.chain import Algorithm, chain
from decaf_lora.errors import UserError
from decaf_lora.kinds import Kind


def fedadam(
    server_learning_rate: float = 0.01,
    server_momentum: float = 0.9,
    server_beta_2: float = 0.99,
    server_epsilon: float = 1e-3,
) -> Algorithm:
    """Server averaging of both factors with Adam at the server.

    Args:
        server_learning_rate: eta, above 0.
        server_momentum: beta_1, in [0, 1).
        server_beta_2: in [0, 1).
        server_epsilon: tau, above 0: the changes far below it count as small.

    Raises:
        UserError: an option is out of range; names the field. At the start of a run: the agents are not alike.
    """
    for field, value in (("server_learning_rate", server_learning_rate), ("server_epsilon", server_epsilon)):
        if not value > 0:
            raise UserError(f"algorithm.{field}: {value:g} is not above 0.")
    for field, value in (("server_momentum", server_momentum), ("server_beta_2", server_beta_2)):
        if not 0 <= value < 1:
            raise UserError(f"algorithm.{field}: {value:g} is not at least 0 and below 1.")

    def init(adapter: Adapter, setting: Setting) -> Tensors:
        if adapter.ranks:
            raise UserError("lora.ranks: fedadam needs one rank and scale for all agents; make them so, or use decaf.")
        state = {}
        for name, t in adapter.tensors().items():
            state[f"x/{name}"], state[f"m/{name}"] = t, torch.zeros_like(t)
            state[f"v/{name}"] = torch.full_like(t, server_epsilon**2)
        return state

    def combine(adapter: Adapter, state: Tensors, inbox: Inbox, round_: Round) -> Combined:
        x, m, v = (take(f"{part}/", state) for part in "xmv")
        for name, average in average_tensors(adapter, inbox).items():
            change = average - x[name]
            m[name] = server_momentum * m[name] + (1 - server_momentum) * change
            v[name] = server_beta_2 * v[name] + (1 - server_beta_2) * change.square()
            x[name] = x[name] + server_learning_rate * m[name] / (v[name].sqrt() + server_epsilon)
        return Combined(adapter.with_tensors(x), put("x/", x) | put("m/", m) | put("v/", v))

    return chain(Rule("fedadam", topology="server", init=init, message=send_factors, combine=combine, alike=True))


KINDS = {"fedadam": Kind(fedadam, "a server steps along the mean change with Adam")}
