"""What does one lying agent in ten cost? The study behind docs/study-attackers.md, on the demo task.

    python benchmarks/study_attackers.py             # runs what is missing, prints the tables
    python benchmarks/study_attackers.py --table     # prints the tables only
    python benchmarks/study_attackers.py --page      # writes the tables into docs/study-attackers.md

Ten agents on a random 4-regular graph, Dirichlet(0.1), 30 rounds of 5 AdamW steps, batch 16, rank 2; agent 0 lies.
Every method meets every attack at its best learning rate there (cells.py). Scores are of the nine honest agents, on
the test set. `absent` is the run without agent 0 and its examples. One process, one thread, about 10 seconds of
processor time a run. Finished runs are kept in --out; it may be stopped at any time.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import cells

HERE = Path(__file__).parent
LIAR = 0
METHODS: dict[str, dict[str, Any]] = {
    "DeCAF": {"name": "decaf"},
    "DeCAF, clipped": {"name": "decaf", "transforms": ["clipped"]},
    "DLoRA": {"name": "dlora"},
    "DLoRA, trimmed": {"name": "dlora", "transforms": ["trimmed:1"]},
    "DLoRA-FA, clipped": {"name": "dlora_fa", "transforms": ["clipped"]},
}
FASTER = {"DLoRA-FA, clipped": 4}
"""It trains B alone."""
ATTACKS: dict[str, dict[str, Any]] = {
    "none": {},
    "sign flip": {"kind": "sign-flip", "agents": [LIAR], "strength": 1},
    "label flip": {"kind": "label-flip", "agents": [LIAR]},
    "noise": {"kind": "noise", "agents": [LIAR], "strength": 3},
    "absent": {},
}


def one(key: cells.Key) -> cells.Row:
    """One run; returns its row."""
    import numpy as np
    import torch

    from decaf_lora import partition
    from decaf_lora.config import RunConfig
    from decaf_lora.recipes import digits
    from decaf_lora.runs.build import build_run

    torch.set_num_threads(1)
    method, attack, rate, seed, held_out = key
    absent = attack == "absent"
    values = {k: v for k, v in digits().model_dump().items() if k in RunConfig.model_fields}
    values["training"] |= {"learning_rate": rate, "agents_per_pass": 10}
    values |= {
        "algorithm": METHODS[method],
        "graph": "random-regular:4",
        "seed": seed,
        "evaluate_every": 30,
        "measure_every": 30,
        "attackers": ATTACKS[attack],
        "validation_share": cells.HELD_OUT if held_out else None,
    }
    agents = values["agents"]

    def nine(task: Any) -> partition.Partition:
        ten = partition.parse(values["partition"], task.labels, agents, seed)
        return partition.Partition(tuple(np.delete(np.array(ten.shards, dtype=object), LIAR)), task.labels)

    config = RunConfig.model_validate(values | ({"agents": agents - 1} if absent else {}))
    started = time.process_time()
    with build_run(config, split=nine if absent else None) as run:
        *_, last = run.train()
    scores = last.scores if absent else [s for agent, s in enumerate(last.scores) if agent != LIAR]
    return {
        "key": list(key),
        "mean": statistics.fmean(scores),
        "worst": min(scores),
        "averaged": last.averaged_score,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


if __name__ == "__main__":
    groups = (list(METHODS)[:2], list(METHODS)[2:4], list(METHODS)[4:])
    cells.main(
        __doc__,
        HERE / "results_study_attackers.jsonl",
        HERE.parent / "docs" / "study-attackers.md",
        one,
        [(method, attack) for methods in groups for attack in ATTACKS for method in methods],
        faster=FASTER,
    )
