"""One exchange of an algorithm without a run, and what its parts are given."""

import torch

from decaf_lora.algorithms import Round, Setting
from decaf_lora.engines import Simulate
from decaf_lora.exchange import Exchange
from decaf_lora.graphs import Schedule, as_schedule


def setting(adapter, period=1):
    """Of all the agents of `adapter` in one process."""
    n = adapter.num_agents
    return Setting(tuple(range(n)), n, period=period)


def begun(algorithm, adapter):
    """`adapter` as the algorithm begins with it; cores, which begin as 0, hold random numbers."""
    adapter = algorithm.begin(adapter, setting(adapter))
    draw = torch.Generator().manual_seed(1)
    cores = {f"core/{k}": torch.randn(t.shape, generator=draw, dtype=t.dtype) for k, t in adapter.core.items()}
    return adapter.with_tensors(cores)


def repeated(graph, period):
    """The schedule that starts again after `period` times the same graph."""
    return Schedule.cycle([graph] * period, graph.name)


def one_round(algorithm, adapter, graph, number=1, state=None):
    """(adapter, state) after the exchange of round `number` on a graph or schedule; `state` None: the first one."""
    if not getattr(graph, "connected", True):  # one round of a schedule
        schedule = Schedule(graph.name, graph.num_agents, lambda exchange: graph)
    else:
        schedule = as_schedule(graph)
    exchange = Exchange(algorithm, schedule, Simulate(adapter.num_agents))
    state = exchange.init(adapter) if state is None else state
    done = exchange.finish(adapter, exchange.start(adapter, state, number))
    return done.adapter, done.state


def sent(algorithm, adapter, state, number=1, period=1):
    """The message of a round."""
    return algorithm.send(adapter, state, Round(number, period))[0]


def mix(run, number):
    """The exchange of round `number` in a run, without its local steps."""
    done = run.exchange.finish(run.adapter, run.exchange.start(run.adapter, run.state, number))
    run.adapter, run.state = done.adapter, done.state
