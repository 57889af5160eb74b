"""The benchmark on a real LLaMA: its model and data, and its search for learning rates."""

import os
import sys
from pathlib import Path

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


@needs_data
def test_the_model_reads_text_and_scores_answers(benchmark, tmp_path):
    model = benchmark.story_teller(DATA, tmp_path / "model")
    text = benchmark.text(model, DATA / "banking77", algorithms=("local",), seeds=(0,))
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


@needs_data
def test_the_search_is_on_held_out_questions(benchmark, tmp_path, monkeypatch):
    """Every method at its own rates, scored by the perplexity of training questions; none of the test set's."""
    model = benchmark.story_teller(DATA, tmp_path / "model")
    text = benchmark.text
    monkeypatch.setattr(benchmark, "text", lambda *args, **more: shorter(text(*args, **more)))
    monkeypatch.setattr(benchmark, "ALGORITHMS", ("local", "dlora_fa"))
    monkeypatch.setattr(benchmark, "RATES", (1e-6, 0.02))
    found = benchmark.search(model, DATA, tmp_path, "iid")
    assert {1e-6, 0.02} <= set(found["local"])
    assert {4e-6, 0.08} <= set(found["dlora_fa"])
    for scores in found.values():
        assert 1 < min(scores.values()) < scores[min(scores)]  # it learns at a rate at which something can be learnt


def shorter(config):
    training = config.training.model_copy(update={"steps": 1})
    task = config.task.model_copy(update={"max_train": 300})
    return config.model_copy(update={"rounds": 1, "training": training, "task": task})
