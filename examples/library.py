"""Compare algorithms from Python: ten agents, a ring, unlike data, one model.

    python examples/library.py                 # about a minute of two cores
    python examples/library.py --rounds 5      # to try it

Every algorithm gets the same model, the same shards and the same random draws: the difference is the algorithm's.
"""

import argparse

from rich.console import Console
from rich.table import Table

from decaf_lora import Run, TrainingConfig, algorithms, graphs, partition, tasks


def main(arguments=None):
    """Prints a table; returns, by algorithm, the scores of the agents at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--agents", type=int, default=10)
    given = parser.parse_args(arguments)

    task = tasks.digits()
    graph = graphs.ring(given.agents)
    shards = partition.dirichlet(task.labels, given.agents, alpha=0.1, seed=0)
    training = TrainingConfig(steps=5, batch_size=16, learning_rate=0.02)
    rules = {
        "on its own data alone": algorithms.local(),
        "DLoRA": algorithms.dlora(),
        "DeCAF": algorithms.decaf(),
        "DeCAF, tracked, int8": algorithms.decaf() | algorithms.tracking() | algorithms.int8(),
    }
    table = Table("", "mean", "worst", "sent", title=f"{given.agents} agents, sigma_2 = {graph.sigma_2:.3f}")
    scores = {}
    for name, rule in rules.items():
        with Run(task, rule, graph, shards, training, rounds=given.rounds) as run:
            records = list(run.train())
        scores[name] = last = records[-1].scores
        sent = sum(record.bytes_sent for record in records)  # by one agent, in all rounds
        table.add_row(name, f"{sum(last) / len(last):.3f}", f"{min(last):.3f}", f"{sent / 1e3:.0f} kB")
    Console().print(table)
    return scores


if __name__ == "__main__":
    main()
