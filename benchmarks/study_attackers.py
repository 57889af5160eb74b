"""What does one lying agent in ten cost? The study behind docs/study-attackers.md, on the demo task.

    python benchmarks/study_attackers.py             # runs what is missing, prints the tables
    python benchmarks/study_attackers.py --table     # prints the tables only
    python benchmarks/study_attackers.py --page      # writes the tables into docs/study-attackers.md

Ten agents on a random 4-regular graph, Dirichlet(0.1), 30 rounds of 5 AdamW steps, batch 16, rank 2; agent 0 lies.
Every method meets every attack at the learning rate that is best there for the first seed on held-out training
examples (the range grows while its best rate is an end), then runs with three seeds on all of its training examples.
Scores are of the nine honest agents, on the test set. `absent` is the run without agent 0 and its examples. One
process, one thread, about 10 to 20 seconds a run. Finished runs are kept in --out; it may be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
RATES = (0.01, 0.02, 0.04)
LIAR = 0
METHODS: dict[str, dict[str, Any]] = {
    "DeCAF": {"name": "decaf"},
    "DeCAF, clipped": {"name": "decaf", "transforms": ["clipped"]},
    "DLoRA": {"name": "dlora"},
    "DLoRA, trimmed": {"name": "dlora", "transforms": ["trimmed:1"]},
    "DLoRA-FA, clipped": {"name": "dlora_fa", "transforms": ["clipped"]},
}
FASTER = {"DLoRA-FA, clipped": 4}
"""Method -> factor of its first rates: it trains B alone."""
ATTACKS: dict[str, dict[str, Any]] = {
    "none": {},
    "sign flip": {"kind": "sign-flip", "agents": [LIAR], "strength": 1},
    "noise": {"kind": "noise", "agents": [LIAR], "strength": 3},
    "label flip": {"kind": "label-flip", "agents": [LIAR]},
    "absent": {},
}
HELD_OUT = 0.2
Key = tuple[str, str, float, int, bool]
"""Method, attack, learning rate, seed, whether it is scored on held-out examples."""


def one(key: Key) -> dict[str, Any]:
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
        "validation_share": HELD_OUT if held_out else None,
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


class Study:
    """The finished runs in a file, and those that are missing.

    Args:
        out: the file, JSON lines.
        run: whether to run what is missing.
    """

    def __init__(self, out: Path, run: bool) -> None:
        lines = out.read_text().splitlines() if out.exists() else []
        self.done = {tuple(row["key"]): row for row in map(json.loads, filter(None, lines))}
        self.out, self.run = out, run

    def row(self, key: Key) -> dict[str, Any] | None:
        """The row of a run; None if it is missing."""
        if key not in self.done and self.run:
            row = one(key)
            with self.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.done[key] = row
            print(*key, f"{row['mean']:.3f}  {row['cpu_seconds']} s", flush=True)
        return self.done.get(key)

    def best_rate(self, method: str, attack: str) -> float | None:
        """The best learning rate on held-out examples; None while a run is missing."""
        rates = [float(f"{rate * FASTER.get(method, 1):.6g}") for rate in RATES]
        while True:
            rows = [self.row((method, attack, rate, SEEDS[0], True)) for rate in rates]
            if any(row is None for row in rows):
                return None
            scores = [row["mean"] for row in rows if row is not None]
            best = scores.index(max(scores))
            if 0 < best < len(rates) - 1 or len(rates) > len(RATES) + 3:
                return rates[best]
            more = float(f"{rates[best] * (2 if best else 0.5):.6g}")
            rates = [*rates, more] if best else [more, *rates]

    def cell(self, method: str, attack: str) -> tuple[float, list[dict[str, Any]]] | None:
        """The best rate, and the rows of all seeds there; None while a run is missing."""
        rate = self.best_rate(method, attack)
        if rate is None:
            return None
        rows = [self.row((method, attack, rate, seed, False)) for seed in SEEDS]
        return None if any(row is None for row in rows) else (rate, [row for row in rows if row is not None])


def tables(study: Study) -> str:
    """Markdown: scores, and what each attack costs, paired by seed."""
    heads = list(ATTACKS)
    scores = [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    costs = [f"| method | {' | '.join(heads[1:])} |", "|---" * len(heads) + "|"]
    for method in METHODS:
        cells = {attack: study.cell(method, attack) for attack in ATTACKS}
        shown, lost, calm = [], [], cells["none"]
        for cell in cells.values():
            if cell is None:
                shown.append("–")
                lost.append("–")
                continue
            means = [row["mean"] for row in cell[1]]
            shown.append(f"{statistics.fmean(means):.3f} ± {statistics.stdev(means):.3f} ({cell[0]:g})")
            if calm is None:
                lost.append("–")
                continue
            apart = [100 * (row["mean"] - mean) for row, mean in zip(calm[1], means, strict=True)]
            lost.append(f"{statistics.fmean(apart):+.1f} ({', '.join(f'{points:+.1f}' for points in apart)})")
        scores.append(f"| {method} | {' | '.join(shown)} |")
        costs.append(f"| {method} | {' | '.join(lost[1:])} |")
    return (
        "Accuracy of the nine honest agents, mean ± standard deviation over three seeds (learning rate):\n\n"
        + "\n".join(scores)
        + "\n\nPoints lost against the same method with ten honest agents, mean (each seed):\n\n"
        + "\n".join(costs)
    )


BEGIN, END = "<!-- made by benchmarks/study_attackers.py --page -->", "<!-- end -->"


def main() -> None:
    """Runs what is missing, and prints the tables or writes them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results_study_attackers.jsonl", help="finished runs")
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--page", action="store_true", help="write the tables into the page")
    arguments = parser.parse_args()
    study = Study(arguments.out, run=not (arguments.table or arguments.page))
    if study.run:
        for methods in (list(METHODS)[:2], list(METHODS)[2:4], list(METHODS)[4:]):
            for attack in ATTACKS:
                for method in methods:
                    study.cell(method, attack)
    made = tables(Study(arguments.out, run=False))
    if not arguments.page:
        print(made)
        return
    page = HERE.parent / "docs" / "study-attackers.md"
    front, _, rest = page.read_text().partition(BEGIN)
    _, _, back = rest.partition(END)
    page.write_text(f"{front}{BEGIN}\n\n{made}\n\n{END}{back}")


if __name__ == "__main__":
    main()
