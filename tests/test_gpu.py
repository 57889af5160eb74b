"""On a GPU: the same results as on the CPU but for rounding, the same bits again and after a resume, ranks over NCCL.

The CPU is the reference, since every other test checks it against independent truth. All of this is skipped where
there is no GPU. DECAF_TEST_DEVICE=cpu runs what a CPU can, to see that the tests themselves are right.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification

import ranks
import tiny
from decaf_lora import lowrank
from decaf_lora.cli import main
from decaf_lora.config import RunConfig
from decaf_lora.engines import Simulate
from decaf_lora.integrations import GossipCallback
from decaf_lora.records import read_records
from decaf_lora.runs import checkpoint
from decaf_lora.runs.build import build_run
from trainer_scripts import make_trainer, values

DEVICE = os.environ.get("DECAF_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]
OPTIONS = [*ranks.option_cases(), *ranks.COMBINED]


def products(run) -> dict[str, torch.Tensor]:
    """Layer -> (n, out, in) every agent's product B A, in float64 on the CPU; and what is trained beside."""
    adapter = run.adapter
    found = {name: adapter.B[name].double().cpu() @ adapter.A[name].double().cpu() for name in adapter.A}
    return found | {f"extras {name}": t.double().cpu() for name, t in adapter.extras.items()}


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each tensor to `tolerance` of its norm."""
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        error = (ours[name] - wanted).norm() / wanted.norm().clamp(min=1e-6)
        assert error <= tolerance, f"{name}: {error:.2g}"


# The same results as on the CPU


def compared(make, case) -> tuple[list, list]:
    """The records on the GPU and on the CPU. Products may differ by 30 times what rounding of the inputs changes.

    AdamW divides by the size of the gradient. So where a gradient is all rounding, as in directions that an average
    has just left at zero, a run is far more sensitive than its arithmetic; a fixed tolerance would be too wide for
    all others. A code of 8 bits may round to the other side.
    """
    runs = [make(case, device) for device in (DEVICE, "cpu", "cpu")]
    draw = torch.Generator().manual_seed(1)
    runs[2].task.x = runs[2].task.x * (1 + torch.finfo().eps * torch.randn(runs[2].task.x.shape, generator=draw))
    records = [list(run.train()) for run in runs]
    assert runs[0].task.model.first.weight.device.type == DEVICE
    here, there, moved = map(products, runs)
    assert here.keys() == there.keys()
    for name, wanted in there.items():
        size = wanted.norm().clamp(min=1e-6)
        error, change = ((other[name] - wanted).norm() / size for other in (here, moved))
        assert error <= (0.03 if "int8" in str(case) else 1e-4) + 30 * change, (
            f"{name}: {error:.2g}, where rounding of the inputs changes {change:.2g}"
        )
    return records[0], records[1]


@pytest.mark.parametrize("case", ranks.cases(), ids=str)
def test_every_rule_ends_as_on_the_cpu(case):
    records = compared(lambda case, device: ranks.make_run(case, Simulate, ranks.small_task(device)), case)
    for ours, theirs in zip(*records, strict=True):
        assert ours.bytes_sent == theirs.bytes_sent
        assert ours.consensus_distance == pytest.approx(theirs.consensus_distance, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_every_option_ends_as_on_the_cpu(case):
    compared(lambda case, device: ranks.run_with_options(case, Simulate, device), case)


@pytest.mark.parametrize("method", ["qr", "gram"])
@pytest.mark.parametrize(
    ("d_in", "d_out", "rank", "m"), [(17, 13, 2, 3), (300, 700, 8, 10), (5, 5, 4, 2), (40, 9, 1, 1)]
)
def test_the_truncated_svd_is_that_of_the_dense_sum(method, d_in, d_out, rank, m):
    draw = torch.Generator().manual_seed(d_in)
    A, B = torch.randn(m, rank, d_in, generator=draw), torch.randn(m, d_out, rank, generator=draw)
    weights = torch.rand(m, generator=draw).double()
    dense = torch.einsum("m,moi->oi", weights, B.double() @ A.double())
    U, S, V = torch.linalg.svd(dense, full_matrices=False)
    wanted = U[:, :rank] * S[:rank] @ V[:rank]
    found = lowrank.mix_truncate(A.to(DEVICE), B.to(DEVICE), weights.to(DEVICE), rank, method=method)
    assert found.A.device.type == DEVICE
    error = (found.B.double() @ found.A.double()).cpu() - wanted
    assert error.norm() <= 1e-5 * dense.norm()


# The same bits


@pytest.mark.parametrize("order", ["adapt-combine", "combine-adapt"])
def test_a_run_gives_the_same_bits_again_and_after_a_stop_within_a_round(order, tmp_path):
    whole = ranks.outcome(ranks.long_run(Simulate, order, DEVICE))
    assert ranks.same(ranks.outcome(ranks.long_run(Simulate, order, DEVICE)), whole)
    run = ranks.long_run(Simulate, order, DEVICE)
    run.on_step = lambda round_, done, steps, losses: run.stop() if (round_, done % steps) == (3, 2) else None
    list(run.train())
    checkpoint.save(tmp_path, *run.snapshot())
    resumed = ranks.long_run(Simulate, order, DEVICE)
    resumed.restore(*checkpoint.load_latest(tmp_path))
    rest = ranks.outcome(resumed)
    whole["records"] = whole["records"][-len(rest["records"]) :]
    assert ranks.same(rest, whole)


def test_a_run_goes_on_on_the_cpu(tmp_path):
    """A checkpoint names no device."""
    there = ranks.long_run(Simulate, device=DEVICE)
    there.on_step = lambda round_, done, steps, losses: there.stop() if (round_, done % steps) == (2, 0) else None
    list(there.train())
    checkpoint.save(tmp_path, *there.snapshot())
    here = ranks.long_run(Simulate)
    here.restore(*checkpoint.load_latest(tmp_path))
    assert [record.round for record in here.train()] == [3, 4]


# Real architectures, and what is exported


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    rows = [f"the {colour} {animal} {verb},{name}" for colour in ("red", "blue", "old") for animal in ("cat", "dog")
            for verb, name in (("sat", "calm"), ("ran", "quick"), ("flew", "quick"), ("is", "calm"))]  # fmt: skip
    (folder / "data.csv").write_text("text,label\n" + "\n".join(rows * 3) + "\n")
    return folder


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "llama", "qwen2", "gpt2"])
def test_text_models_train_export_and_predict(family, precision, table, tmp_path):
    model, out = tiny.write(family, tmp_path / "model"), tmp_path / "run"
    task = "sequence-classification" if family in tiny.ENCODERS else "causal-lm"
    more = [] if family in tiny.ENCODERS else ["--task.answers", "yes", "no", "--task.templates", "{text} ?"]
    short = ["--agents", "3", "--rounds", "3", "--training.steps", "4", "--training.batch_size", "4", "--lr", "0.02"]
    command = [
        "run",
        "digits",
        "--task.name",
        task,
        "--task.model",
        model,
        "--task.data",
        table / "data.csv",
        *more,
        *short,
    ]
    command += ["--task.test_share", 0.3]
    assert main([*map(str, command), "--device", DEVICE, "--training.precision", precision, "--out", str(out)]) == 0
    assert all(score is not None for score in read_records(out / "records.jsonl")[-1].scores)
    assert main(["export", str(out), "--to", str(tmp_path / "export")]) == 0
    assert (tmp_path / "export" / "adapter_model.safetensors").exists()
    if task == "sequence-classification" and precision == "float32":
        loaded = [AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "export") for _ in range(2)]
        ids = torch.tensor([[1, 5, 9, 12, 3]])
        one, two = loaded[0].eval()(input_ids=ids).logits, loaded[1].eval().to(DEVICE)(input_ids=ids.to(DEVICE)).logits
        torch.testing.assert_close(two.cpu(), one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("algorithm", ["recommended", "decaf", "dlora", "fedavg"])
def test_the_demo_scores_as_on_the_cpu(algorithm):
    """30 rounds: the paths part by rounding, so scores agree to a few test examples."""
    from decaf_lora import recipes

    recipe = recipes.get("digits")
    base = {field: getattr(recipe, field) for field in RunConfig.model_fields}
    name = recipe.algorithm if algorithm == "recommended" else {"name": algorithm}
    scores = []
    for device in (DEVICE, "cpu"):
        config = RunConfig.model_validate(base | {"algorithm": name, "device": device, "evaluate_every": 30})
        with build_run(config) as run:
            *_, last = run.train()
        scores.append(sum(last.scores) / len(last.scores))
    assert scores[0] == pytest.approx(scores[1], abs=0.03)


def test_privacy_draws_the_same_batches_and_noise():
    from decaf_lora import recipes

    recipe = recipes.get("digits")
    base = {field: getattr(recipe, field) for field in RunConfig.model_fields}
    base |= {"rounds": 2, "privacy": {"noise": 1.0, "delta": 1e-3, "clip": 1.0, "seed": 5}, "evaluate_every": 2}
    found = []
    for device in (DEVICE, "cpu"):
        with build_run(RunConfig.model_validate(base | {"device": device})) as run:
            *_, last = run.train()
            found.append((products(run), last.epsilon))
    assert found[0][1] == found[1][1]
    assert_near(found[0][0], found[1][0], 1e-2)


# Ranks


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_on_a_gpu_are_those_of_simulate_there(world, tmp_path):
    """One rank speaks NCCL to itself; two share the GPU, over gloo. Equal to rounding, as docs/cluster.md says."""
    device = f"{DEVICE}:0" if DEVICE == "cuda" else DEVICE
    path = tmp_path / "simulate.pt"
    ended = ranks.start(tmp_path, 1, ranks.reference, path, device)
    assert ended.codes == {0: 0}, ended.output
    ended = ranks.start(tmp_path, world, ranks.equals, path, world, DEVICE)
    assert ended.codes == dict.fromkeys(range(world), 0), ended.output
    assert ended.lines == []


def test_torchrun_takes_the_gpu_by_itself(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        "-m",
        "decaf_lora",
    ]
    command += ["run", "digits", "--rounds", "2", "--evaluate-every", "2", "--engine", "torchrun"]
    ended = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert DEVICE in json.loads((tmp_path / "run" / "environment.json").read_text())["device"]


# A Trainer


def test_trainers_on_a_gpu_exchange_as_on_the_cpu(tmp_path):
    ended = []
    for cpu in (False, True):
        folder = tmp_path / str(cpu)
        trainers = [make_trainer(Path(folder), agent, use_cpu=cpu or DEVICE == "cpu") for agent in range(2)]
        GossipCallback.simulate(trainers, every=2, algorithm="decaf", graph="ring")
        if not cpu:
            assert trainers[0].args.device.type == DEVICE
        ended.append([values(trainer.model) for trainer in trainers])
    for ours, theirs in zip(*ended, strict=True):
        for name in theirs:
            if "lora_A" in name:
                up = name.replace("lora_A", "lora_B")
                one = ours[up].double().cpu() @ ours[name].double().cpu()
                torch.testing.assert_close(one, theirs[up].double() @ theirs[name].double(), rtol=1e-3, atol=1e-5)
