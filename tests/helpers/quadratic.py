"""A smooth problem with a known optimum: agents fit different matrices, weighted differently.

    f_i(A, B) = 1/2 || (B A - T_i) D_i ||_F^2,    D_i diagonal;    W* = (sum_i p_i T_i D_i^2) (sum_i p_i D_i^2)^-1

minimises sum_i p_i f_i over all matrices; the shares p_i are 1/n, or those of a server that weighs by samples.
The T_i are made so that W* has the adapters' rank, and W* = B* A_0, so that frozen, averaged and truncated factors
can all reach it. Gradients are exact unless said otherwise; steps are plain SGD.
"""

import numpy as np
import torch

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.algorithms import make
from decaf_lora.engines import Simulate
from decaf_lora.exchange import Exchange
from decaf_lora.graphs import Graph, Schedule, as_schedule, ring

LAYER = "w"


class Quadratic:
    """n agents, W (d_out, d_in) of rank r; `spread` is the size of what sets the agents' targets apart.

    All start from the optimum's own A, or with `independent` from rows of A's of their own. `shares` (n,) sum to 1.
    """

    def __init__(self, n, seed=0, rank=2, d_in=5, d_out=4, spread=1.0, independent=False, shares=None):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        a, b = draw(rank, d_in), draw(d_out, rank)
        a, b = torch.linalg.qr(a.mT)[0].mT, torch.linalg.qr(b)[0]
        self.optimum = b @ a
        self.squares = 0.5 + torch.rand(n, 1, d_in, generator=generator, dtype=torch.float64)  # D_i^2
        apart = spread * draw(n, d_out, d_in)
        p = torch.full((n,), 1 / n, dtype=torch.float64) if shares is None else torch.as_tensor(shares)
        weighted = p.view(-1, 1, 1) * self.squares
        apart -= (apart * weighted).sum(0) / weighted.sum(0)  # sum_i p_i E_i D_i^2 = 0
        self.targets = self.optimum + apart
        starts = torch.linalg.qr(draw(n, d_in, rank))[0].mT if independent else a.repeat(n, 1, 1)
        self.start = _adapter(starts, 0 * b.repeat(n, 1, 1))

    def gradients(self, adapter, trained):
        a, b = adapter.A[LAYER], adapter.B[LAYER]
        residual = (b @ a - self.targets) * self.squares
        both = {f"A/{LAYER}": b.mT @ residual, f"B/{LAYER}": residual @ a.mT}
        return {k: g for k, g in both.items() if k[0] in trained}

    def error(self, adapter):
        """The largest distance of an agent's product to the optimum."""
        products = adapter.B[LAYER] @ adapter.A[LAYER]
        return float((products - self.optimum).flatten(1).norm(dim=1).max())


def train(problem, algorithm, graph, rounds, steps=5, learning_rate=0.05, each_round=None):
    """`rounds` of `steps` SGD steps and an exchange; `learning_rate` may be a function of the round's number."""
    adapter = problem.start
    exchange = Exchange(algorithm, as_schedule(graph), Simulate(adapter.num_agents))
    algorithm, state = exchange.algorithm, exchange.init(adapter)
    for number in range(1, rounds + 1):
        round_ = exchange.round(number)
        lr = learning_rate(number) if callable(learning_rate) else learning_rate
        for _ in range(steps):
            gradients = problem.gradients(adapter, algorithm.trains(round_))
            values = adapter.tensors()
            gradients, state = algorithm.steer(state, gradients, round_, values)
            adapter = adapter.with_tensors({k: values[k] - lr * g for k, g in gradients.items()})
        done = exchange.finish(adapter, exchange.start(adapter, state, number))
        adapter, state = done.adapter, done.state
        if each_round is not None:
            each_round(number, adapter, state)
    return adapter, state


class Noisy(Quadratic):
    """Several seeds side by side, each its own network of n agents, whose gradients have noise of their own."""

    def __init__(self, n, seeds=5):
        parts = [Quadratic(n, seed, spread=0.3) for seed in range(seeds)]
        self.n, self.seeds = n, seeds
        self.targets = torch.cat([p.targets for p in parts])
        self.squares = torch.cat([p.squares for p in parts])
        starts = [torch.cat([getattr(p.start, factor)[LAYER] for p in parts]) for factor in "AB"]
        self.start = _adapter(*starts)
        self.generator = torch.Generator().manual_seed(0)

    def gradients(self, adapter, trained):
        exact = super().gradients(adapter, trained)
        return {k: g + 0.5 * torch.randn(g.shape, generator=self.generator, dtype=g.dtype) for k, g in exact.items()}

    def square_gradient(self, adapter):
        """(seeds,) || grad of sum_i f_i / n ||^2 at the mean factors of each network."""
        mean = [x[LAYER].unflatten(0, (self.seeds, self.n)).mean(1) for x in (adapter.A, adapter.B)]
        whole = super().gradients(_adapter(*(x.repeat_interleave(self.n, 0) for x in mean)), {"A", "B"}).values()
        return sum(g.unflatten(0, (self.seeds, self.n)).mean(1).square().flatten(1).sum(1) for g in whole)


def square_gradients(algorithm, graph, rounds, learning_rate, seeds=5):
    """(rounds, seeds) of `square_gradient`, one noisy step and one exchange on `graph` a round."""
    problem, squares = Noisy(graph.num_agents, seeds), []
    networks = Graph(np.kron(np.eye(seeds), graph.weights), connected=False)
    schedule = Schedule("networks", networks.num_agents, lambda round: networks)

    def keep(round_, adapter, state):
        squares.append(problem.square_gradient(adapter))

    train(problem, algorithm, schedule, rounds, 1, learning_rate, keep)
    return torch.stack(squares).numpy()


def many_agents(name, n, weighing, independent, seed=0, **options):
    """Root mean square over agents of || W_i - W* || / || W* || after 60 rounds of 20 steps: untrained agents have 1.

    weighing: "server" (complete graph, unequal shares of samples) or "ring".
    """
    counts = np.random.default_rng(seed).integers(5, 60, n)
    shares = counts / counts.sum() if weighing == "server" else None
    graph = Graph.server(counts) if weighing == "server" else ring(n)
    problem = Quadratic(n, seed, rank=4, d_in=24, d_out=20, spread=0.2, independent=independent, shares=shares)
    adapter, _ = train(problem, make(name, **options), graph, rounds=60, steps=20, learning_rate=0.03)
    apart = adapter.B[LAYER] @ adapter.A[LAYER] - problem.optimum
    return float((apart.square().sum((1, 2)).mean() / problem.optimum.square().sum()).sqrt())


def slope(x, y):
    """Of the straight line through (log x, log y)."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def windows(values, first=100):
    """Means of values[t], t = 0, 1, ..., over [first, 2 first), [2 first, 4 first) ...; their middles and the means."""
    starts = [first * 2**k for k in range(20) if first * 2 ** (k + 1) <= len(values)]
    return [2**0.5 * t for t in starts], [float(values[t : 2 * t].mean()) for t in starts]


def _adapter(a, b):
    return Adapter({LAYER: a}, {LAYER: b}, {LAYER: torch.ones(len(a), dtype=a.dtype)}, extras={})
