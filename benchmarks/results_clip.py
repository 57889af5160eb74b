"""What do ten agents gain by adapting a CLIP together to images that it cannot read? For docs/results/clip.md.

    python scripts/make_small_clip.py DATA                  # once: the model, and the turned and inverted images
    python benchmarks/results_clip.py --out runs/clip       # search and tables; goes on where it was stopped

40 images a class in all, as in the paper (arXiv 2505.21382), dealt evenly or by Dirichlet(0.1), to agents on a ring;
rank 2 on q, k, v of both encoders. Every method first looks for its learning rate on either partition, with a seed
that is not in the tables. One thread, all agents in one pass: the same numbers come out again.
"""

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from decaf_lora import execute
from decaf_lora.config import CompareConfig, LoraOptions, TaskConfig, TrainingConfig
from decaf_lora.records import SummaryRow, to_markdown, write_json
from decaf_lora.report import write_figures

METHODS = ("local", "dlora", "dlora_fa", "decaf", "fedavg", "centralized")
PARTITIONS = {"iid": "shots:40", "dirichlet": "shots:40/dirichlet:0.1"}
RATES = (0.005, 0.01, 0.02)
RATES_FA = (0.02, 0.05, 0.12)
"""Of dlora_fa, which trains B alone."""
SEARCH_SEED = 3


def config(
    clip: Path, partition: str, rates: dict[str, float], *, seeds: Sequence[int] = (0, 1, 2), rounds: int = 30
) -> CompareConfig:
    """The methods in `rates`, each at its own learning rate; a round is 5 steps of 8 images, all that an agent has."""
    return CompareConfig(
        task=TaskConfig(name="image-text", model=str(clip / "model"), data=str(clip / "images"), max_test=1000),
        lora=LoraOptions(r=2, lora_alpha=2),
        training=TrainingConfig(steps=5, batch_size=8, schedule="cosine", agents_per_pass=10),
        algorithms=tuple(rates),
        learning_rates=rates,
        agents=10,
        graph="ring",
        partition=partition,
        seeds=tuple(seeds),
        rounds=rounds,
        evaluate_every=max(1, rounds // 3) if len(seeds) > 1 else rounds,
        checkpoint_every=rounds,
    )


def rates_of(method: str) -> tuple[float, ...]:
    """The learning rates that a method chooses from."""
    return RATES_FA if method == "dlora_fa" else RATES


def compare(config: CompareConfig, out: Path) -> list[SummaryRow]:
    """`execute.compare`, going on with what is there."""
    started = time.process_time()
    rows = execute.compare(config, out, resume=(out / "config.yaml").exists())
    print(f"{out}: {time.process_time() - started:.0f} s of processor time", flush=True)
    return rows


def search(clip: Path, partition: str, methods: Iterable[str], out: Path) -> dict[str, list[tuple[float, float]]]:
    """Method -> (learning rate, mean accuracy) of every rate that was tried, on SEARCH_SEED."""
    methods, found = list(methods), dict[str, list[tuple[float, float]]]()
    for i in range(len(RATES)):
        rates = {m: rates_of(m)[i] for m in methods}
        for row in compare(config(clip, partition, rates, seeds=[SEARCH_SEED]), out / f"rates-{i}"):
            assert row.mean_score is not None
            found.setdefault(row.algorithm, []).append((rates[row.algorithm], row.mean_score))
    return found


def main() -> None:
    """Search, tables and figures of both partitions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--clip", type=Path, default=Path("~/.cache/decaf-lora/small_clip"), help="what was made")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clip, out, rows = arguments.clip.expanduser().resolve(), arguments.out, list[SummaryRow]()
    for name, partition in PARTITIONS.items():
        methods = [m for m in METHODS if m != "centralized" or name == "iid"]  # it pools what either partition deals
        found = search(clip, partition, methods, out / name / "search")
        write_json(out / name / "search.json", found)
        print("\n| method |", " | ".join(["learning rate: accuracy"] * len(RATES)), "|\n|---|", "---|" * len(RATES))
        for method, tried in found.items():
            print(f"| {method} |", " | ".join(f"{rate:g}: {score:.3f}" for rate, score in tried), "|")
        best = {m: max(tried, key=lambda t: t[1])[0] for m, tried in found.items()}
        rows += compare(config(clip, partition, best), out / name / "table")
        write_figures(out / name / "table", out / name / "figures")
    print("\n" + to_markdown(rows))


if __name__ == "__main__":
    main()
