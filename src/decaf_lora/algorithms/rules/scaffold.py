"""SCAFFOLD: FedAvg whose agents correct each gradient by how theirs differed from everybody's in the last round.

    each local step:    g <- g - c_i + c,   c = sum_j (n_j / n) c_j
    each round:         c_i <- mean raw gradient of agent i over its local steps ;   x <- sum_j (n_j / n) w_j

Karimireddy, Kale, Mohri, Reddi, Stich and Suresh, arXiv 1910.06378 (its option II, with plain SGD and all agents in
every round; the weights n_j / n instead of 1 / N are those of FedAvg here, so that the corrections belong to the loss
that FedAvg minimises). c - c_i is gradient tracking with gamma = 1 on a complete graph, so this is FedAvg with the
transform `tracking`. The server's c is not kept: every agent finds its own c - c_i from the one message of each,
which holds the gradient beside the adapter. Twice FedAvg's bytes.
"""

from decaf_lora.algorithms.rules.fedavg import fedavg
from decaf_lora.algorithms.transforms.chain import Algorithm, chain
from decaf_lora.algorithms.transforms.tracking import tracking
from decaf_lora.kinds import Kind


def scaffold() -> Algorithm:
    """Server averaging of both factors with control variates."""
    return chain(fedavg().rule._replace(name="scaffold"), tracking()._replace(suffix=""))


KINDS = {"scaffold": Kind(scaffold, "fedavg with control variates")}
