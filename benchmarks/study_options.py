"""What do the options of the gossip rules bring? The study behind docs/study-options.md, on the demo task.

    python benchmarks/study_options.py --out options.jsonl            # runs what is missing, prints the tables
    python benchmarks/study_options.py --out options.jsonl --table    # prints the tables only

Dirichlet(0.1), 10 agents on a ring, 30 rounds of 5 AdamW steps, batch 16, rank 2, cosine, common start, as in
study_decaf.py. Every method runs at every learning rate with the first seed, then at its best one with the other
seeds. One run at a time, in one thread. Finished runs are kept in --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import study_decaf
from study_decaf import LEARNING_RATES, SEEDS, Methods, read

PARTITION = "dirichlet:0.1"
RULES = ("dlora", "decaf", "decaf_tracked")
OPTIONS = {
    "": {},
    ", quasi-global 0": {"quasi_global": 0.0},
    ", int8": {"messages": "int8"},
    ", quasi-global 0, int8": {"quasi_global": 0.0, "messages": "int8"},
    ", feedback 1": {"truncation_feedback": 1.0},
    ", quasi-global 0.5": {"quasi_global": 0.5},
    ", feedback 0.5": {"truncation_feedback": 0.5},
    ", quasi-global 0.9": {"quasi_global": 0.9},
}
METHODS: Methods = {
    rule + name: (rule, options)
    for name, options in OPTIONS.items()
    for rule in RULES
    if rule != "dlora" or "truncation_feedback" not in options
}


def table(done: dict[tuple, dict[str, Any]], start: str) -> str:
    """Markdown: the search with the first seed, then mean +- standard deviation over the seeds at the best rate."""
    heads = [f"lr {rate:g}" for rate in LEARNING_RATES]
    lines = [f"| method | {' | '.join(heads)} | all seeds at the best | worst agent | kB a round |", "| --- |"]
    lines[1] += " --- |" * (len(heads) + 3)
    for method in METHODS:
        rows = {k[2:4]: row for k, row in done.items() if k[0] == method and k[4] == start}
        searched = {rate: rows[rate, SEEDS[0]]["mean"] for rate in LEARNING_RATES if (rate, SEEDS[0]) in rows}
        if len(searched) < len(LEARNING_RATES):
            continue
        best = max(searched, key=searched.__getitem__)
        found = [rows[best, seed] for seed in SEEDS if (best, seed) in rows]
        if len(found) < len(SEEDS):
            continue
        mean, worst, size = ([row[key] for row in found] for key in ("mean", "worst", "bytes_sent"))
        cells = [f"**{score:.3f}**" if rate == best else f"{score:.3f}" for rate, score in searched.items()]
        cells += [f"**{statistics.fmean(mean):.3f} ± {statistics.stdev(mean):.3f}**", f"{statistics.fmean(worst):.3f}"]
        lines.append(f"| {method} | {' | '.join(cells)} | {size[0] / 1e3:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of finished runs (JSON lines)")
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="some of the methods")
    parser.add_argument("--start", default="common", choices=["common", "independent"])
    arguments = parser.parse_args()
    done = read(arguments.out)

    def score(method: str, rate: float, seed: int) -> float:
        key = (method, PARTITION, rate, seed)
        if (*key, arguments.start) not in done:
            row = study_decaf.one(key, arguments.start, METHODS)
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            done[(*key, arguments.start)] = row
            print(*key, f"{row['mean']:.3f}  {row['seconds']:.1f} s", flush=True)
        return float(done[(*key, arguments.start)]["mean"])

    if not arguments.table:
        for method in arguments.methods:
            searched = {rate: score(method, rate, SEEDS[0]) for rate in LEARNING_RATES}
            best = max(searched, key=searched.__getitem__)
            scores = [score(method, best, seed) for seed in SEEDS]
            print(f"{method}: {statistics.fmean(scores):.3f} at {best:g}", flush=True)
    print(table(done, arguments.start))


if __name__ == "__main__":
    main()
