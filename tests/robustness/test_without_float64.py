"""A device without float64, such as Apple's GPUs, runs everything; a stand-in refuses what such a device refuses.

Tensors on it have shapes and no memory (PyTorch's FakeTensorMode knows the device type without the hardware), so every
line of a round runs, and one that asks the device for float64 fails as it would there.
"""

import functools
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_map_only

from decaf_lora import algorithms, consensus, graphs, lowrank, optimizers, partition, precision
from decaf_lora.adapters import Adapter
from decaf_lora.config import TrainingConfig
from decaf_lora.plan.dry_run import DryRun
from decaf_lora.run import Run
from decaf_lora.tasks.scores import ClassScore
from toy import Toy

DEVICE = "lazy"
"""A type of device that PyTorch knows without any hardware, and of whose tensors Python may take parts."""


@pytest.fixture(autouse=True)
def _has_none(monkeypatch):
    assert "mps" in precision.WITHOUT_FLOAT64
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {DEVICE})


class WithoutFloat64(DryRun):
    """A dry run in which models lie on the stand-in, and no tensor there may be of float64."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def fake_module(self, module):
        with self._fake:
            for part in module.modules():
                for name, p in part._parameters.items():
                    if p is not None:
                        part._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, device=f"{DEVICE}:0"), False)

    def _compute(self, func, args, kwargs, tensors):
        """Numbers that are known are computed on the CPU: there is no such device here."""
        if func.overloadpacket is torch.ops.aten.index and args[0].device.type == DEVICE:
            return None  # so that what is taken of a tensor stays on its device
        cpu = torch.device("cpu")
        args, kwargs = tree_map_only(torch.device, lambda _: cpu, (args, kwargs))
        return super()._compute(func, args, kwargs, tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == DEVICE:
                self.seen += 1
                if tensor.dtype == torch.float64:
                    raise TypeError(f"{func}: no float64 on this device")
        return out


@pytest.fixture
def device():
    with WithoutFloat64() as mode:
        yield mode
    assert mode.seen > 0


def drawn(*shape):
    return torch.randn(*shape, device=DEVICE)


def test_the_stand_in_refuses(device):
    x = drawn(2, 3)
    for wrong in (
        x.double,
        lambda: x.sum(dtype=torch.float64),
        lambda: torch.ones(2, dtype=torch.float64).to(x.device),
    ):
        with pytest.raises(TypeError, match="float64"):
            wrong()
    assert precision.double(x).device.type == "cpu"
    assert precision.work_device(torch.device("cpu")).type == "cpu"
    assert precision.work_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("gauge", "method"),
    [("balanced_rotated", "gram"), ("orthonormal", "qr"), ("orthonormal_rotated", "gram"), ("anchored", "qr")],
)
def test_low_rank_products(device, gauge, method):
    a, b, weights = drawn(2, 3, 2, 9), drawn(2, 3, 7, 2), torch.full((2, 3), 1 / 3, device=DEVICE)
    out = lowrank.mix_truncate(a, b, weights, 2, gauge=gauge, method=method, carried=(a[:, 0], b[:, 0]), rest=1)
    assert {x.device.type for x in out} == {DEVICE}
    pair = a[:, 0], b[:, 0], a[:, 1], b[:, 1]
    results = [
        lowrank.product_norm(a, b),
        lowrank.product_inner(*pair),
        lowrank.product_distance(*pair),
        lowrank.interference(a, b, weights),
        lowrank.frame_change(*pair),
        lowrank.polar(drawn(2, 2)),
    ]
    assert {x.device.type for x in results} == {DEVICE}
    assert {x.dtype for x in results} == {torch.float32}


@pytest.mark.parametrize("d", [4, 40])  # by the dense mean, by the factors
def test_consensus(device, d):
    scale = torch.ones(5, device=DEVICE)
    adapter = Adapter({"x": drawn(5, 2, d)}, {"x": drawn(5, d, 2)}, {"x": scale}, {"y": drawn(5, 3)})
    assert isinstance(consensus.distance(adapter), float)
    assert consensus.averaged(adapter).A["x"].device.type == DEVICE


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_optimizer_step(device, optimizer):
    config = TrainingConfig(optimizer=optimizer)
    x, active = drawn(3, 8), torch.ones(3, dtype=torch.bool, device=DEVICE)
    optimizers.step(x, drawn(3, 8), optimizers.Moments.zeros(x, config), config, 0.1, active)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "macro-f1"])
def test_scores(device, metric):
    score = ClassScore(metric, ["no", "yes"])
    statistics = score.statistics(drawn(6, 2), torch.zeros(6, dtype=torch.long, device=DEVICE), 2)
    assert score.score(statistics).shape == (2,)


RULES = {
    "dlora": {"tracking": True},
    "dlora_fa": {},
    "decaf relayed": {"relay_rank": 3},
    "decaf with all": {"tracking": True, "truncation_feedback": 1.0, "quasi_global": 0.5, "messages": "int8"},
    "decaf transported": {"moments": "transport"},
    "fedavg": {},
    "centralized": {},
}


@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_trains_measures_and_evaluates(name):
    task = Toy(examples=24, tests=4, extras=True)
    mode = WithoutFloat64()
    mode.fake_module(task.model)
    training = TrainingConfig(steps=1, batch_size=2, agents_per_pass=3, clip_norm=1.0)
    relayed = name == "decaf relayed"
    graph = graphs.parse("base:2" if relayed else "ring", 3, 0)
    make = functools.partial(algorithms.make, name.split()[0], **RULES[name])
    # What data a task makes are real, as in a plan.
    batches = {key: getattr(task, key) for key in ("train_batch", "test_batch")}

    def real(key, indices):
        with torch.utils._python_dispatch._disable_current_modes():
            batch = batches[key](indices)
        return {k: mode.fake(t) for k, t in batch.items()}

    for key in batches:
        setattr(task, key, functools.partial(real, key))
    with mode, mock.patch("transformers.utils.import_utils.is_fake_tensor", return_value=False):
        run = Run(
            task,
            make(),
            graph,
            partition.iid(task.labels, 3, 0),
            training,
            rounds=1,
            gossip_steps="period" if relayed else 1,
            evaluate_every=1,
        )
        assert run.trainer.device.type == DEVICE
        records = list(run.train())
    assert len(records) == 2
    assert mode.seen > 100
