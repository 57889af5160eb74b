"""What does privacy of every example cost? The study behind the table of docs/privacy.md, on the demo task.

    python benchmarks/study_privacy.py             # runs what is missing, prints the tables
    python benchmarks/study_privacy.py --table     # prints the tables only
    python benchmarks/study_privacy.py --page      # writes the tables into docs/privacy.md

Ten agents, Dirichlet(0.1), 30 rounds of 5 AdamW steps, batches of 16 (expected), rank 2, exact averages (base:5, whole
periods), at epsilon 8 and 3 with delta 1e-3, a sixth of one of the largest agent's 163 examples. Methods: DeCAF with
the balanced rotated gauge (plain) and with A orthonormal, and DLoRA-FA, which trains B alone. Every method counts at
its best learning rate at that epsilon (cells.py). Searching costs privacy that is not counted here. One process, one
thread, about 15 seconds of processor time a run, and 10 more for the first noise.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import cells

HERE = Path(__file__).parent
DELTA, CLIP = 1e-3, 1.0
METHODS: dict[str, dict[str, Any]] = {
    "DeCAF": {"name": "decaf", "gauge": "balanced-rotated"},
    "DeCAF, orthonormal A": {"name": "decaf", "gauge": "orthonormal-rotated"},
    "DLoRA-FA": {"name": "dlora_fa"},
}
FASTER = {"DLoRA-FA": 4}
CONDITIONS: dict[str, dict[str, Any]] = {
    "no privacy": {},
    "ε = 8": {"epsilon": 8, "delta": DELTA, "clip": CLIP},
    "ε = 3": {"epsilon": 3, "delta": DELTA, "clip": CLIP},
}


def one(key: cells.Key) -> cells.Row:
    """One run; returns its row."""
    import torch

    from decaf_lora.config import RunConfig
    from decaf_lora.recipes import digits
    from decaf_lora.runs.build import build_run

    torch.set_num_threads(1)
    method, condition, rate, seed, held_out = key
    values = {k: v for k, v in digits().model_dump().items() if k in RunConfig.model_fields}
    values["training"] |= {"learning_rate": rate, "agents_per_pass": 10}
    private = CONDITIONS[condition]
    values |= {
        "algorithm": METHODS[method],
        "graph": "base:5",
        "gossip_steps": "period",
        "seed": seed,
        "evaluate_every": 30,
        "measure_every": 30,
        "privacy": {**private, "seed": seed} if private else {},
        "validation_share": cells.HELD_OUT if held_out else None,
    }
    started = time.process_time()
    with build_run(RunConfig.model_validate(values)) as run:
        *_, last = run.train()
        told = run.account.told(run.rounds)
    return {
        "key": list(key),
        "mean": statistics.fmean(last.scores),
        "worst": min(last.scores),
        "averaged": last.averaged_score,
        "epsilon": last.epsilon,
        "privacy": told,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


if __name__ == "__main__":
    cells.main(
        __doc__,
        HERE / "results_study_privacy.jsonl",
        HERE.parent / "docs" / "privacy.md",
        one,
        [(method, condition) for method in METHODS for condition in CONDITIONS],
        faster=FASTER,
    )
