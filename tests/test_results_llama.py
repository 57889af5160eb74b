"""The benchmark on a real LLaMA: its model and data, and its search for learning rates."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from decaf_lora.runs.build import build_run
from decaf_lora.runs.compare import cells

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("DECAF_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"needs real data in {DATA}; set DECAF_DATA")


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import results_llama
    finally:
        sys.path.pop(0)
    return results_llama


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.02, [0.02, 0.04, 0.01]),
        (0.04, [0.02, 0.04, 0.08]),
        (0.16, [0.02, 0.04, 0.08, 0.16, 0.32]),
        (0.0025, [0.02, 0.04, 0.01, 0.005, 0.0025, 0.00125]),
    ],
)
def test_the_search_ends_with_the_best_rate_between_two_others(benchmark, best, tried):
    found = {}
    while (rate := benchmark.next_rate(found, 0.02)) is not None:
        found[rate] = abs(np.log(rate / best))
    assert list(found) == pytest.approx(tried)


@needs_data
def test_the_model_reads_text_and_scores_answers(benchmark, tmp_path):
    model = benchmark.story_teller(DATA, tmp_path / "model")
    text = benchmark.text(model, DATA / "banking77" / "train.csv", algorithms=("local",), seeds=(0,))
    (cell,) = cells(text)
    run = build_run(cell.config)
    assert sum(p.numel() for p in run.task.model.parameters()) == pytest.approx(260_000, rel=0.01)
    assert len(run.task.classes) == 77
    assert {site.rpartition(".")[2] for site in run.attached.sites} == {"q_proj", "v_proj"}
    assert {s.rank for s in run.attached.sites.values()} == {4}
    assert run.task._train.tokens.lengths.max() == 64
    run.close()
    for name, train in (("BoolQ", 2191), ("WiC", 427)):
        (cell, *_) = cells(benchmark.answers(model, DATA, name))
        run = build_run(cell.config)
        assert (run.task.classes, run.task.score_name) == (["false", "true"], "F1 (true)")
        assert (len(run.task.labels), run.task.num_test) == (train, 80)
        run.close()
