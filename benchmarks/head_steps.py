"""How far do an agent's local steps move the rows of a new head whose classes it does not hold? For docs/methods.md.

    python benchmarks/head_steps.py --data DIR

DIR as for results_minilm.py; half a minute of one core. The run is study_methods.py's on banking77, Dirichlet(0.1),
with fedavg, whose agents have equal models at the start of a round: AdamW's usual epsilon, and the one that the study
found. Printed is the root mean square of what the three steps of a round change in an entry of the head's weight, in
the rows of the classes that an agent holds and in the others, mean over the agents.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import study_methods
import study_runs
from decaf_lora import Run
from decaf_lora.runs.build import build_run
from decaf_lora.tune.axes import with_values

ROUNDS = (5, 20)
EPSILONS = (1e-8, 0.01)


def changes(run: Run) -> dict[int, tuple[float, float]]:
    """Round -> root mean square of the change of an entry, in rows of an agent's own classes, and in the others."""
    labels = np.asarray(run.task.labels)
    classes = len(set(labels.tolist()))
    shards = [stream.shard for stream in run.trainer.streams]
    own = torch.stack([torch.from_numpy(np.isin(np.arange(classes), labels[shard])) for shard in shards])
    inner, found, number = run.trainer.train_round, {}, 0

    def watched(adapter, *more):
        nonlocal number
        number += 1
        ended = inner(adapter, *more)
        (name,) = [name for name, tensor in adapter.extras.items() if tensor.dim() == 3]  # (n, classes, width)
        squares = (ended[0].extras[name] - adapter.extras[name]).double().square().mean(-1)
        parts = [[squares[i][rows[i]].mean().sqrt() for i in range(len(squares))] for rows in (own, ~own)]
        found[number] = tuple(float(torch.stack(part).mean()) for part in parts)
        return ended

    run.trainer.train_round = watched
    for record in run.train():
        if record.round == max(ROUNDS):
            break
    return {number: found[number] for number in ROUNDS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    base = study_methods.base("banking77", parser.parse_args().data.resolve())
    torch.set_num_threads(1)
    cell = study_methods.cell("banking77", "dirichlet", "fedavg", "server")
    print("| epsilon | round | own classes | others | ratio |\n| ---: | ---: | ---: | ---: | ---: |")
    for epsilon in EPSILONS:
        values = {study_runs.RATE: 0.02, study_methods.HEAD_RATIO: 16, study_runs.EPSILON: epsilon}
        with build_run(with_values(base, {**cell.values, **values, "seed": 0})) as run:
            for number, (own, others) in changes(run).items():
                print(f"| {epsilon:g} | {number} | {own:.2g} | {others:.2g} | {others / own:.2f} |", flush=True)
