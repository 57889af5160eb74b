"""Which choices should DeCAF make by default? The study behind docs/study-decaf.md, on the demo task.

    python benchmarks/study_decaf.py --out study.jsonl            # runs what is missing, prints the tables
    python benchmarks/study_decaf.py --out study.jsonl --table    # prints the tables only

Every method at every learning rate, IID and Dirichlet(0.1), three seeds: 10 agents on a ring, 30 rounds of 5
AdamW steps, batch 16, rank 2, cosine. A method counts at its own best learning rate (by mean score over the
seeds). Runs go two at a time, one thread each; a run takes about ten seconds. Finished runs are kept in --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

LEARNING_RATES = (0.01, 0.02, 0.04)
PARTITIONS = ("iid", "dirichlet:0.1")
SEEDS = (0, 1, 2)
GAUGES = ("balanced", "balanced-rotated", "orthonormal", "orthonormal-rotated", "anchored")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local", {}),
    "dlora": ("dlora", {}),
    "dlora_fa": ("dlora_fa", {}),
    "fedavg": ("fedavg", {}),
    "centralized": ("centralized", {}),
    **{f"decaf {g}": ("decaf", {"gauge": g}) for g in GAUGES},
    **{
        f"decaf {g}, moments {m}": ("decaf", {"gauge": g, "moments": m})
        for g in ("balanced-rotated",)
        for m in ("reset", "transport")
    },
    "decaf balanced-rotated, own frame": ("decaf", {"gauge": "balanced-rotated", "reference": "own"}),
    "decaf balanced-rotated, combine-adapt": ("decaf", {"gauge": "balanced-rotated", "order": "combine-adapt"}),
    "dlora, moments reset": ("dlora", {"moments": "reset"}),
    "dlora combine-adapt": ("dlora", {"order": "combine-adapt"}),
}


Methods = dict[str, tuple[str, dict[str, Any]]]


def one(key: tuple[str, str, float, int], start: str, methods: Methods = METHODS) -> dict[str, Any]:
    """One run of one of `methods`; returns its row."""
    import torch

    torch.set_num_threads(1)
    from decaf_lora.config import RunConfig
    from decaf_lora.recipes import digits
    from decaf_lora.runs.build import build_run

    method, partition, learning_rate, seed = key
    name, options = methods[method]
    base = digits().model_dump()
    base = {k: v for k, v in base.items() if k in RunConfig.model_fields}
    base["training"] |= {"learning_rate": learning_rate, "agents_per_pass": 10}
    base |= {
        "partition": partition,
        "seed": seed,
        "start": start,
        "algorithm": {"name": name, **options},
        "evaluate_every": 30,
    }
    started = time.perf_counter()
    run = build_run(RunConfig.model_validate(base))
    try:
        *_, last = run.train()
    finally:
        run.close()
    return {
        "key": list(key),
        "start": start,
        "mean": statistics.fmean(last.scores),
        "worst": min(last.scores),
        "averaged": last.averaged_score,
        "consensus_distance": last.consensus_distance,
        "interference": last.interference,
        "tail": last.tail,
        "bytes_sent": last.bytes_sent,
        "seconds": time.perf_counter() - started,
    }


def read(path: Path) -> dict[tuple, dict[str, Any]]:
    """Finished runs by key."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {(*row["key"], row["start"]): row for row in rows}


def tables(done: dict[tuple, dict[str, Any]], start: str) -> str:
    """Markdown: mean +- standard deviation over seeds at every learning rate, the best one bold."""
    rates = sorted({k[2] for k in done if k[4] == start})
    lines = []
    for partition in PARTITIONS:
        lines += [
            f"\n**{partition}**, {start} start\n",
            f"| method | {' | '.join(f'lr {r:g}' for r in rates)} |",
        ]
        lines.append("| --- |" + " --- |" * len(rates))
        for method in METHODS:
            cells = {}
            for rate in rates:
                scores = [done[k]["mean"] for s in SEEDS if (k := (method, partition, rate, s, start)) in done]
                if len(scores) == len(SEEDS):
                    cells[rate] = (statistics.fmean(scores), statistics.stdev(scores))
            if not cells:
                continue
            best = max(cells, key=lambda r: cells[r][0])
            shown = []
            for rate in rates:
                text = f"{cells[rate][0]:.3f} ± {cells[rate][1]:.3f}" if rate in cells else ""
                shown.append(f"**{text}**" if rate == best else text)
            lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of finished runs (JSON lines)")
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="some of the methods")
    parser.add_argument("--rates", nargs="*", type=float, default=list(LEARNING_RATES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--partitions", nargs="*", default=list(PARTITIONS))
    parser.add_argument("--start", default="common", choices=["common", "independent"])
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    done = read(arguments.out)
    if not arguments.table:
        keys = itertools.product(arguments.methods, arguments.partitions, arguments.rates, arguments.seeds)
        keys = [k for k in keys if (*k, arguments.start) not in done]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
            futures = [pool.submit(one, key, arguments.start) for key in keys]
            for count, future in enumerate(as_completed(futures), 1):
                row = future.result()
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"[{count}/{len(keys)}]",
                    *row["key"],
                    f"{row['mean']:.3f}  {row['seconds']:.1f} s",
                    flush=True,
                )
        done = read(arguments.out)
    print(tables(done, arguments.start))


if __name__ == "__main__":
    main()
