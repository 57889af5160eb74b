"""Which setting should a federation use, by its number of sites? For docs/mesh.md, on the demo task.

    python benchmarks/federation_settings.py --out benchmarks/results_federation_settings.jsonl   # runs what is missing

`decaf_tracked` on the complete graph with int8 messages and one exchange a round, against a ring with 2 and 4
exchanges of float32 messages (relay_rank is the adapters' rank), with 4, 8 and 16 sites: the demo's 30 rounds of 5
steps, Dirichlet(0.1), three seeds, learning rate 0.03 for all. Simulated: without faults a federation is equal bit for
bit. `averaged` is the score of the averaged model: rounds of exchange alone at the end, a cooldown, could bring every
site at most there. One process, one thread; finished runs are kept in --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from decaf_lora import recipes
from decaf_lora.config import AlgorithmConfig, RunConfig
from decaf_lora.runs.build import build_run

SITES, SEEDS = (4, 8, 16), (0, 1, 2)
RATE = 0.03
SETTINGS: dict[str, dict[str, Any]] = {
    "complete graph, int8, 1 exchange": {"graph": "complete", "algorithm": {"messages": "int8"}},
    "ring, float32, 4 exchanges": {"graph": "ring", "gossip_steps": 4, "algorithm": {"relay_rank": 2}},
    "ring, float32, 2 exchanges": {"graph": "ring", "gossip_steps": 2, "algorithm": {"relay_rank": 2}},
}


def config(setting: str, sites: int, seed: int) -> RunConfig:
    base, changes = recipes.get("digits"), dict(SETTINGS[setting])
    values = {name: getattr(base, name) for name in RunConfig.model_fields}
    algorithm = AlgorithmConfig(name="decaf_tracked", **changes.pop("algorithm"))
    training = base.training.model_copy(update={"learning_rate": RATE})
    values |= {"agents": sites, "seed": seed, "algorithm": algorithm, "training": training, "evaluate_every": 30}
    return RunConfig.model_validate({**values, **changes})


def result(setting: str, sites: int, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    with build_run(config(setting, sites, seed)) as run:
        records = list(run.train())
    last = records[-1]
    assert last.scores is not None
    return {
        "setting": setting,
        "sites": sites,
        "seed": seed,
        "mean": statistics.mean(last.scores),
        "worst": min(last.scores),
        "averaged": last.averaged_score,
        "bytes_sent": sum(record.bytes_sent for record in records),
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| sites | setting | mean score | worst site | averaged model | a site sends |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for sites in SITES:
        for setting in SETTINGS:
            found = [row for row in rows if (row["setting"], row["sites"]) == (setting, sites)]
            if len(found) < len(SEEDS):
                continue
            cells = [_spread([row[name] for row in found]) for name in ("mean", "worst", "averaged")]
            lines.append(f"| {sites} | {setting} | {' | '.join(cells)} | {found[0]['bytes_sent'] / 1000:.0f} kB |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["setting"], row["sites"], row["seed"]) for row in rows}
    for setting, sites, seed in itertools.product(SETTINGS, SITES, SEEDS):
        if (setting, sites, seed) not in done:
            rows.append(result(setting, sites, seed))
            with out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
