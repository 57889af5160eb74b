"""FedProx: FedAvg whose agents are held near the server's model while they train.

    agent i minimises f_i(w) + (mu / 2) || w - x ||^2,  x the server's model at the start of the round
    x <- sum_j (n_j / n) w_j

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, arXiv 1812.06127. It is FedAvg with the transform `proximal`
(transforms/proximal.py), which lies over gossip rules, too.
"""

from decaf_lora.algorithms.rules.fedavg import fedavg
from decaf_lora.algorithms.transforms.chain import Algorithm, chain
from decaf_lora.algorithms.transforms.proximal import proximal as _proximal
from decaf_lora.kinds import Kind


def fedprox(proximal: float = 0.01) -> Algorithm:
    """Server averaging of both factors with a proximal term.

    Args:
        proximal: mu, at least 0.

    Raises:
        UserError: mu is negative.
    """
    return chain(fedavg().rule._replace(name="fedprox"), _proximal(proximal))


KINDS = {"fedprox": Kind(fedprox, "fedavg, and a proximal term in the local loss")}
