"""What do ten agents gain by adapting a CLIP together to images that it cannot read? For docs/results/clip.md.

    python scripts/make_small_clip.py DATA                # once: the model, and the turned and inverted images
    python benchmarks/results_clip.py --out runs/clip     # search, tables and figures; goes on where it was stopped

clip.yaml, beside this file, says what is compared: 40 images a class in all, as in the paper (arXiv 2505.21382), dealt
evenly or by Dirichlet(0.1). One thread, all agents in one pass: the same numbers come out again.
"""

import argparse
from pathlib import Path

import torch

from best_rates import rates_table, search, table
from decaf_lora import config as configs
from decaf_lora.config import CompareConfig
from decaf_lora.records import to_markdown, write_json
from decaf_lora.report import write_figures

PARTITIONS = {"dirichlet": "shots:40/dirichlet:0.1", "iid": "shots:40"}
RATES = (0.01, 0.02, 0.04)
FASTER = {"dlora_fa": 4}


def config(partition: str) -> CompareConfig:
    """The comparison on a partition; `centralized` pools what either partition deals."""
    base = configs.load(CompareConfig, Path(__file__).with_name("clip.yaml"))
    assert isinstance(base, CompareConfig)
    methods = tuple(a for a in base.algorithms if a != "centralized" or partition == "dirichlet")
    return base.model_copy(update={"partition": PARTITIONS[partition], "algorithms": methods})


def main() -> None:
    """Search, table and figures of every partition."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--partitions", nargs="*", default=list(PARTITIONS), choices=list(PARTITIONS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for partition in arguments.partitions:
        folder, base = arguments.out.resolve() / partition, config(partition)
        found = search(base, RATES, folder / "search", FASTER)
        write_json(folder / "search.json", found)
        rows = table(base, found, folder / "table")
        write_figures(folder / "table", folder / "figures")
        print(f"\n{base.partition}\n\n{rates_table(found)}\n\n{to_markdown(rows)}", flush=True)


if __name__ == "__main__":
    main()
