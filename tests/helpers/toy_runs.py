"""Runs of the toy task with plain SGD, and how two of them compare."""

import dataclasses

import torch

from decaf_lora import algorithms, graphs, partition
from decaf_lora.adapters.names import take
from decaf_lora.config import TrainingConfig
from decaf_lora.run import Run
from toy import Toy

SGD = TrainingConfig(steps=3, batch_size=5, learning_rate=0.02, agents_per_pass=4)


def make_run(algorithm, n=4, graph=None, rounds=4, training=SGD, gossip_steps=1, **options):
    task = Toy(extras=True)
    lora = dataclasses.replace(task.default_lora(), lora_alpha=2)
    shards = partition.dirichlet(task.labels, n, alpha=0.5, seed=1)
    return Run(
        task,
        algorithms.make(algorithm, **options),
        graph or graphs.ring(n),
        shards,
        training,
        lora=lora,
        rounds=rounds,
        evaluate_every=rounds,
        gossip_steps=gossip_steps,
    )


def finished(*args, **options):
    run = make_run(*args, **options)
    records = list(run.train())
    return run, records


def corrections(state):
    return take("c/", state["tracking"])


def assert_near(one, two, tolerance=1e-5):
    for key, tensor in one.adapter.tensors().items():
        torch.testing.assert_close(two.adapter.tensors()[key], tensor, rtol=0, atol=tolerance)
