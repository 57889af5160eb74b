"""An algorithm of one's own: train and send B in one round, A in the next.

    python examples/own_algorithm.py
    decaf run digits --algorithm examples/own_algorithm.py:alternating --algorithm.period 2 --rounds 20

A rule is a handful of pure functions over tensors. It does not know the model, the network or the other machines, so
the same rule runs in one process, under torchrun and between organisations.
"""

import argparse

from decaf_lora import Run, TrainingConfig, algorithms, graphs, partition, tasks
from decaf_lora.algorithms import Rule, average_factors


def alternating(period: int = 1):
    """Trains and sends B for `period` rounds, then A for as many. B first: it starts at 0 and gives A no gradient."""

    def trained(round_):
        return frozenset({"BA"[(round_.number - 1) // period % 2], "extras"})

    def message(adapter, state, round_):
        return adapter.message(trained(round_))

    return Rule("alternating", trains=trained, message=message, combine=average_factors)


def main(arguments=None):
    """Prints a line a round; returns the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--agents", type=int, default=10)
    given = parser.parse_args(arguments)

    task = tasks.digits()
    shards = partition.dirichlet(task.labels, given.agents, alpha=0.1, seed=0)
    training = TrainingConfig(steps=5, batch_size=16, learning_rate=0.02)
    rule = algorithms.chain(alternating(period=2), algorithms.int8())  # what lies over any rule lies over this one, too
    with Run(task, rule, graphs.ring(given.agents), shards, training, rounds=given.rounds) as run:
        records = []
        for record in run.train():
            records.append(record)
            if record.scores:
                mean = sum(record.scores) / len(record.scores)
                print(f"round {record.round:3}: mean {mean:.3f}, each agent sent {record.bytes_sent:,.0f} bytes")
    return records


if __name__ == "__main__":
    main()
