"""Rules and transforms of one's own: what they may do, what is refused, and that nothing needs their file later."""

import json

import numpy as np
import pytest
import torch

from decaf_lora import algorithms, graphs, kinds, partition
from decaf_lora.algorithms.transforms import table
from decaf_lora.algorithms.transforms.kind import TransformKind
from decaf_lora.cli import main
from decaf_lora.config import AlgorithmConfig, TrainingConfig
from decaf_lora.errors import UserError
from decaf_lora.run import Run
from toy import Toy

MINE = """
import torch
from typing import Literal
from decaf_lora.algorithms import Rule, Transform, average_factors, send_factors

def in_turn(period: int = 1):
    def trained(round_):
        return frozenset({"BA"[(round_.number - 1) // period % 2], "extras"})
    def message(adapter, state, round_):
        return adapter.message(trained(round_))
    return Rule("in_turn", trains=trained, message=message, combine=average_factors)

def plain(): return Rule("plain", message=send_factors, combine=average_factors)
def impostor(): return Rule("dlora", message=send_factors, combine=average_factors)
def nothing(): return 3
def other_order(order: int = 1): return plain()
def fewer_choices(moments: Literal["keep"] = "keep"): return plain()
def scaled(factor: float = 1.0):
    def send(adapter, state, message, round_):
        return {name: factor * t for name, t in message.items()}, state
    return Transform("scaled", send=send)
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def trained(algorithm, rounds, **options):
    task = Toy()
    training = TrainingConfig(steps=2, batch_size=4, learning_rate=0.05, agents_per_pass=2)
    run = Run(task, algorithm, graphs.complete(3), partition.iid(task.labels, 3, 0), training, rounds=rounds, **options)
    start = run.adapter.tensors()
    records = list(run.train())
    run.close()
    return start, run.adapter.tensors(), records


@pytest.mark.parametrize(("rounds", "period", "moves"), [(1, 1, "B"), (2, 2, "B"), (2, 1, "BA"), (3, 2, "BA")])
def test_the_rule_in_turn_trains_and_sends_one_factor_at_a_time(mine, rounds, period, moves):
    start, end, records = trained(algorithms.make(f"{mine}:in_turn", period=period), rounds)
    _, _, both = trained(algorithms.dlora(), rounds)
    for name, tensor in end.items():
        if name[0] in "AB":
            assert torch.equal(tensor, start[name]) == (name[0] not in moves)
    assert 0 < records[1].bytes_sent < both[1].bytes_sent


def test_a_plain_rule_of_ones_own_is_dlora_bit_by_bit(mine):
    """With the options that lie over any rule, too."""
    for options in ({}, {"tracking": True}, {"messages": "int8"}, {"quasi_global": 0.5, "tracking": True}):
        _, ours, _ = trained(algorithms.make(f"{mine}:plain", **options), 3)
        _, theirs, _ = trained(algorithms.make("dlora", **options), 3)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_transform_of_ones_own_lies_within_int8(mine):
    made = algorithms.make("dlora", transforms=[f"{mine}:scaled:0.5"], tracking=True, messages="int8")
    assert [transform.name for transform in made.transforms] == ["tracking", "scaled", "int8"]
    assert [t.name for t in algorithms.make("dlora", transforms=["int8", "tracking:0.5"]).transforms] == [
        "tracking",
        "int8",
    ]
    start, end, _ = trained(algorithms.make("dlora", transforms=[f"{mine}:scaled:factor=0"]), 1)
    assert all(not end[name].any() for name in start)  # what arrives is 0 times what was sent


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("MINE:nothing", {}, r"algorithm: .*:nothing returned int, not a Rule or an Algorithm"),
        ("MINE:impostor", {}, r"algorithm: .*:impostor calls its rule 'dlora', as another is called"),
        (
            "MINE:other_order",
            {},
            r"algorithm\.order: .*:other_order takes int and .* Literal.*; an option means",
        ),
        (
            "MINE:in_turn",
            {"perod": 2},
            r"algorithm\.perod: .* takes it\. Did you mean algorithm\.period",
        ),
        ("MINE:in_turn", {"period": "x"}, r"algorithm\.period: input should be a valid integer"),
        ("MINE:in_turn", {"gauge": "rotated"}, r"algorithm\.gauge: .* it belongs to decaf, decaf_tracked"),
        ("MINE:in_turn", {"tracking": True}, r"algorithm\.tracking: in_turn trains other factors in round 2"),
        ("MINE:plain", {"truncation_feedback": 1.0}, r"algorithm\.truncation_feedback: plain truncates nothing"),
        ("MINE:plain", {"transforms": ["MINE:nothing"]}, r"algorithm\.transforms: .* returned int, not a Transform"),
        ("MINE:plain", {"transforms": ["MINE:scaled:factr=2"]}, r"Did you mean 'factor'"),
        (
            "MINE:plain",
            {"transforms": ["trackng"]},
            r"'trackng' is not known\. Did you mean 'tracking'",
        ),
        ("MINE:plain", {"transforms": ["tracking"], "tracking": True}, r"algorithm: tracking lies over plain twice"),
        ("fedavg", {"transforms": ["int8"]}, r"algorithm\.transforms: fedavg mixes nothing among neighbours"),
        ("MINE:in_trn", {}, r"has no function 'in_trn'\. Did you mean 'in_turn'"),
    ],
)
def test_what_is_refused(mine, name, options, message):
    options = dict(options)
    if "transforms" in options:
        options["transforms"] = [spec.replace("MINE", mine) for spec in options["transforms"]]
    with pytest.raises(UserError, match=message):
        algorithms.make(name.replace("MINE", mine), **options)


def test_an_option_with_fewer_choices_means_the_same(mine):
    assert algorithms.make(f"{mine}:fewer_choices", moments="keep").name == "plain"


def test_the_built_in_algorithms_share_the_meaning_of_their_options():
    algorithms.check_together(algorithms.KINDS)
    fields = set(AlgorithmConfig.model_fields) - {"name", "own", "transforms"}
    for name, kind in algorithms.KINDS.items():
        assert set(kinds.options(kind.build)) <= fields, name
    assert set(table.shared_options()) <= fields
    assert {name.replace("_", "-") for name in algorithms.KINDS} == AlgorithmConfig.described


def test_a_new_file_is_a_new_rule_and_a_new_transform(tmp_path, monkeypatch):
    """Adding one is one file: the tables are what the files of the rooms list."""
    from decaf_lora.algorithms import rules, transforms
    from decaf_lora.algorithms.discovery import discovered

    (tmp_path / "plain.py").write_text(
        MINE + 'from decaf_lora.kinds import Kind\nKINDS = {"plain": Kind(plain, "x")}\n'
    )
    for room in (rules, transforms):
        before = set(discovered(room))
        monkeypatch.setattr(room, "__path__", [*room.__path__, str(tmp_path)])
        assert set(discovered(room)) - before == {"plain"}


def test_an_installed_package_adds_algorithms_and_transforms(tmp_path, monkeypatch):
    (tmp_path / "rules_pkg.py").write_text(MINE)
    info = tmp_path / "rules_pkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rules_pkg\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[decaf_lora.algorithms]\nin_turn = rules_pkg:in_turn\n[decaf_lora.transforms]\nscaled = rules_pkg:scaled\n"
    )
    kinds.installed.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)
    made = algorithms.make("in_turn", transforms=["scaled:0.5"], period=2)
    assert (made.name, [t.name for t in made.transforms]) == ("in_turn", ["scaled"])
    assert AlgorithmConfig.model_validate({"name": "in_turn", "period": 2}).options() == {"period": 2}
    kinds.installed.cache_clear()


def test_a_kind_of_a_package_may_say_its_place(mine, monkeypatch):
    scaled = kinds.own_function(f"{mine}:scaled", "x")[0]
    monkeypatch.setitem(table.KINDS._built_in, "scaled", TransformKind(scaled, "scales", place=95))
    made = algorithms.make("dlora", transforms=["scaled"], messages="int8")
    assert [t.name for t in made.transforms] == ["int8", "scaled"]


def test_runs_are_compared_reported_and_exported_without_the_file(mine, tmp_path, capsys):
    shared = ["--rounds", 1, "--training.steps", 1, "--training.batch_size", 2, "--task.eval_batch_size", 64]
    both = ["compare", "digits", "--algorithms", "dlora", f"{mine}:in_turn", "--algorithm.period", 2, "--seeds", 0]
    out = tmp_path / "both"
    assert main([*map(str, [*both, *shared, "--agents", 2, "--jobs", 1, "--out", out])]) == 0, capsys.readouterr().err
    rows = json.loads((out / "summary.json").read_text())
    assert [row["algorithm"] for row in rows] == ["dlora", "in_turn"]
    (tmp_path / "mine.py").unlink()
    run = next(path.parent for path in out.glob("*/run.json") if "in_turn" in path.parent.name)
    assert json.loads((run / "run.json").read_text())["algorithm"] == "in_turn"
    assert main(["report", str(out)]) == 0
    assert main(["report", str(run)]) == 0
    assert main(["export", str(run), "--agent", "1", "--to", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "adapter_model.safetensors").exists()
    assert np.isfinite(rows[1]["mean_score"])
    capsys.readouterr()
    assert main([*map(str, [*both, *shared, "--agents", 2, "--jobs", 1, "--out", out, "--resume"])]) == 2
    assert "mine.py does not exist" in capsys.readouterr().err
