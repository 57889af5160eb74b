"""A smooth problem with a known optimum: agents fit different matrices, weighted differently.

    f_i(A, B) = 1/2 || (B A - T_i) D_i ||_F^2,    D_i diagonal;    W* = (sum_i T_i D_i^2) (sum_i D_i^2)^-1

minimises sum_i f_i over all matrices. The T_i are made so that W* has the adapters' rank, and W* = B* A_0, so
that frozen, averaged and truncated factors can all reach it. Gradients are exact; steps are plain SGD.
"""

import torch

from decaf_lora.algorithms.base import Adapter, Inbox
from decaf_lora.graphs import as_schedule

LAYER = "w"


class Quadratic:
    """n agents, W (d_out, d_in) of rank r; `spread` is the size of what sets the agents' targets apart."""

    def __init__(self, n, seed=0, rank=2, d_in=5, d_out=4, spread=1.0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        a, b = draw(rank, d_in), draw(d_out, rank)
        a, b = torch.linalg.qr(a.mT)[0].mT, torch.linalg.qr(b)[0]
        self.optimum = b @ a
        self.squares = 0.5 + torch.rand(n, 1, d_in, generator=generator, dtype=torch.float64)  # D_i^2
        apart = spread * draw(n, d_out, d_in)
        apart -= (apart * self.squares).sum(0) / self.squares.sum(0)  # sum_i E_i D_i^2 = 0
        self.targets = self.optimum + apart
        one = torch.ones(n, dtype=torch.float64)
        self.start = Adapter({LAYER: a.repeat(n, 1, 1)}, {LAYER: 0 * b.repeat(n, 1, 1)}, {LAYER: one}, extras={})

    def gradients(self, adapter, trained):
        a, b = adapter.A[LAYER], adapter.B[LAYER]
        residual = (b @ a - self.targets) * self.squares
        both = {f"A/{LAYER}": b.mT @ residual, f"B/{LAYER}": residual @ a.mT}
        return {k: g for k, g in both.items() if k[0] in trained}

    def error(self, adapter):
        """The largest distance of an agent's product to the optimum."""
        products = adapter.B[LAYER] @ adapter.A[LAYER]
        return float((products - self.optimum).flatten(1).norm(dim=1).max())


def train(problem, algorithm, graph, rounds, steps=5, learning_rate=0.05, each_round=None, window=1):
    """`rounds` of `steps` SGD steps, message and combine; `learning_rate` may be a function of the round."""
    adapter, schedule = problem.start, as_schedule(graph)
    if algorithm.paced is not None:
        algorithm = algorithm.paced(schedule.pace)
    state, n = algorithm.init(adapter), adapter.num_agents
    for round_ in range(1, rounds + 1):
        lr = learning_rate(round_) if callable(learning_rate) else learning_rate
        for _ in range(steps):
            gradients = problem.gradients(adapter, algorithm.trains(round_))
            gradients, state = algorithm.steer(state, gradients, round_)
            values = adapter.tensors()
            adapter = adapter.with_tensors({k: values[k] - lr * g for k, g in gradients.items()})
        inbox = Inbox.from_weights(
            algorithm.message(adapter, state, round_), schedule.at(round_ - 1).weights, range(n), range(n)
        )
        adapter, state = algorithm.combine(adapter, state, inbox, round_)
        if each_round is not None:
            each_round(round_, adapter, state)
    return adapter, state
