"""Several real processes on loopback against the one that simulates: bit-equal, and one line for every fault."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ranks
from decaf_lora.cli import main
from decaf_lora.engines import Simulate
from decaf_lora.runs import checkpoint

HERE = Path(__file__).parent / "helpers"
TOY = f"{HERE / 'toy.py'}:make_toy"
SMALL = [
    *("run", "digits", "--agents", "4", "--rounds", "6", "--training.steps", "3", "--training.batch-size", "4"),
    *("--training.agents-per-pass", "1", "--partition", "iid", "--lora.lora-alpha", "4", "--checkpoint-every", "2"),
]
SPLIT = [*SMALL, "--task", TOY, "--engine", "torchrun"]


# Equality


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    ended = ranks.start(folder, 1, ranks.reference, folder / "simulate.pt")
    assert ended.codes == {0: 0}, ended.output
    return folder / "simulate.pt"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_adapters_moments_and_records_are_bit_equal_to_simulate(world, reference, tmp_path):
    """Every algorithm, four graphs, N = 2, 3, 5, 8; and each message crosses once per rank that needs it."""
    ended = ranks.start(tmp_path, world, ranks.equals, reference, world)
    assert ended.codes == dict.fromkeys(range(world), 0), ended.output
    assert ended.lines == []


@pytest.mark.parametrize("world", [2, 4])
def test_options_are_bit_equal_to_simulate(world, reference, tmp_path):
    """Every value of every option of every algorithm, also of those that are to come."""
    ended = ranks.start(tmp_path, world, ranks.equals_with_options, reference)
    assert ended.codes == dict.fromkeys(range(world), 0), ended.output
    assert ended.lines == []


@pytest.mark.parametrize("world", [2, 3, 5])
def test_gather_and_scatter_of_uneven_blocks(world, tmp_path):
    ended = ranks.start(tmp_path, world, ranks.moves_tensors)
    assert ended.codes == dict.fromkeys(range(world), 0), ended.output


@pytest.mark.parametrize("world", [2, 3])
def test_messages_fly_while_the_ranks_do_other_things(world, tmp_path):
    ended = ranks.start(tmp_path, world, ranks.flies)
    assert ended.codes == dict.fromkeys(range(world), 0), ended.output


@pytest.mark.parametrize("wire", ["exact", "bfloat16"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_wire_rounds_only_what_crosses(world, wire, tmp_path):
    ended = ranks.start(tmp_path, world, ranks.rounds_on_the_wire, wire)
    assert ended.codes == dict.fromkeys(range(world), 0), ended.output


@pytest.mark.parametrize("wire", ["exact", "bfloat16"])
@pytest.mark.parametrize("world", [2, 3])
def test_of_unequal_agents_only_their_own_part_crosses(world, wire, tmp_path):
    ended = ranks.start(tmp_path, world, ranks.sends_own_sizes, wire)
    assert ended.codes == dict.fromkeys(range(world), 0), ended.output


def test_with_one_agent_a_rank_what_crosses_is_what_the_algorithm_sends(tmp_path):
    ended = ranks.start(tmp_path, 3, ranks.agents_apart)
    assert ended.codes == dict.fromkeys(range(3), 0), ended.output


# Checkpoints and faults


@pytest.mark.parametrize(
    ("order", "moment"),
    [("adapt-combine", (3, 2)), ("combine-adapt", (3, 2)), ("combine-adapt", (2, 0))],
    ids=["within a round", "within a round of the other order", "with the next exchange under way"],
)
def test_a_stop_on_one_rank_stops_all_in_the_same_step_and_other_world_sizes_go_on(order, moment, tmp_path):
    folder = tmp_path / "checkpoints"
    ended = ranks.start(tmp_path, 2, ranks.stops, folder, order, moment)
    assert ended.codes == {0: 0, 1: 0}, ended.output
    expected = ranks.outcome(ranks.long_run(Simulate, order))
    for world in (1, 3):
        ended = ranks.start(tmp_path, world, ranks.goes_on, folder, tmp_path / "out.pt", order)
        assert ended.codes == dict.fromkeys(range(world), 0), ended.output
        got = torch.load(tmp_path / "out.pt", weights_only=False)
        expected["records"] = expected["records"][-len(got["records"]) :]
        assert [r["round"] for r in got["records"]] == [3, 4]
        assert ranks.same(got, expected)
    resumed = ranks.long_run(Simulate, order)
    resumed.restore(*checkpoint.load_latest(folder))
    assert ranks.same(ranks.outcome(resumed), expected)


@pytest.mark.parametrize(
    ("doom", "order", "saved"), [("Doomed", "adapt-combine", 2), ("DoomedInFlight", "combine-adapt", 4)]
)
def test_a_killed_rank_ends_the_others_with_one_line_and_a_usable_checkpoint(doom, order, saved, tmp_path):
    out = tmp_path / "run"
    small = [*SMALL, "--algorithm.order", order]
    doomed = [*small, "--task", f"{HERE / 'faulty.py'}:{doom}", "--out", out]
    ended = ranks.start(tmp_path, 4, ranks.decaf, *doomed, "--engine", "torchrun")
    assert ended.codes == {0: 2, 1: -signal.SIGKILL, 2: 2, 3: 2}, ended.output
    assert len(ended.lines) == 1, ended.lines
    (line,) = ended.lines
    assert line == (
        "decaf: ranks: rank 1 of 4 is gone. What was saved is kept; go on from the last checkpoint with --resume."
    )
    assert checkpoint.load_latest(out / "checkpoints")[1]["round"] == saved
    # In one process RANK is not 1, so nobody dies.
    assert main([*map(str, doomed), "--resume"]) == 0
    whole = [*small, "--task", TOY, "--out", tmp_path / "whole"]
    assert main([*map(str, whole)]) == 0
    assert same_runs(out, tmp_path / "whole")


def test_max_restarts_goes_on_by_itself_and_equals_the_uninterrupted_run(tmp_path, capsys):
    """The real launcher: rank 1 dies by SIGKILL in mid-round, and comes back."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "decaf_lora"]
    task = f"{HERE / 'faulty.py'}:Doomed"
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [*launcher, *SMALL, "--task", task, "--engine", "torchrun", "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 1
    assert done.stderr.count("decaf: ") == done.stderr.count("rank 1 of 2 is gone") == 1
    assert main([*SMALL, "--task", TOY, "--out", str(whole)]) == 0
    assert same_runs(out, whole)
    for folder in (out, whole):
        assert main(["export", str(folder), "--agent", "3", "--to", str(folder / "adapter")]) == 0
    name = Path("adapter") / "adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def same_runs(ours, theirs):
    """The same files, the same tensors in the last checkpoint, the same records but for times and processes."""

    def records(out):
        rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
        return [{**row, "seconds": None, "wire_bytes": None} for row in rows]

    a, b = (checkpoint.load_latest(out / "checkpoints")[0] for out in (ours, theirs))
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert records(ours) == records(theirs)
    return True


def test_sigterm_to_one_rank_stops_all_in_that_step_and_leaves_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    terminated = [*SMALL, "--task", f"{HERE / 'faulty.py'}:Terminated", "--engine", "torchrun", "--out", out]
    ended = ranks.start(tmp_path, 2, ranks.decaf, *terminated)
    assert ended.codes == {0: 130, 1: 130}, ended.output
    assert len(ended.lines) == 1, ended.lines
    (line,) = ended.lines
    assert "stopped in round 4" in line
    assert "Go on with: torchrun ... -m decaf_lora run --engine torchrun --resume" in line
    values = checkpoint.load_latest(out / "checkpoints")[1]
    assert (values["round"], values["step_in_round"]) == (3, 2)


def test_a_loss_that_is_not_finite_ends_all_ranks_with_one_line(tmp_path):
    blow_up = ["--training.optimizer", "sgd", "--lr", "1e9", "--training.schedule", "constant"]
    ended = ranks.start(tmp_path, 2, ranks.decaf, *SPLIT, *blow_up, "--out", tmp_path / "run")
    assert ended.codes == {0: 2, 1: 2}, ended.output
    assert len(ended.lines) == 1, ended.lines
    (line,) = ended.lines
    assert "is not finite in round" in line


def test_a_silent_rank_is_named_by_the_time_out(tmp_path):
    silent = [*SMALL, "--task", f"{HERE / 'faulty.py'}:Silent", "--engine", "torchrun", "--timeout", "8"]
    ended = ranks.start(tmp_path, 2, ranks.decaf, *silent, "--out", tmp_path / "run")
    assert ended.codes[0] == 2, ended.output
    lines = ended.output[0].splitlines()
    assert len(lines) == 1, lines
    assert "ranks: rank 1 of 2 did not answer within 8 s" in lines[0]


# Mistakes: one line for all ranks, exit code 2


def fails(tmp_path, world, *arguments, **options):
    """The one line of all ranks together."""
    out = tmp_path / "run"
    ended = ranks.start(tmp_path, world, ranks.decaf, *SPLIT, *arguments, "--out", out, **options)
    assert set(ended.codes.values()) == {2}, ended.output
    assert len(ended.lines) == 1, ended.lines
    (line,) = ended.lines
    assert line.startswith("decaf: ")
    assert not out.exists()
    return line


def test_more_ranks_than_agents(tmp_path):
    line = fails(tmp_path, 3, "--agents", 2)
    assert line.startswith("decaf: engine: 3 processes share 2 agents, so some would have none; start at most 2")
    assert "2 processes share 1 agent," in fails(tmp_path, 2, "--algorithm", "centralized")


def test_backends_that_are_not_built_in(tmp_path):
    assert "backend: 'nonsense' is not built into this torch" in fails(tmp_path, 1, "--backend", "nonsense")
    if not torch.distributed.is_nccl_available():
        line = fails(tmp_path, 1, "--backend", "nccl")
        assert "backend: 'nccl' is not built into this torch" in line
        assert "choose auto or one of: gloo" in line


def test_ranks_that_disagree_on_the_config_name_the_field_on_all_of_them(tmp_path):
    own = {0: [{"training.steps": 3, "seed": 0}], 1: [{"training.steps": 4, "seed": 0}], 2: [{"seed": 0}]}
    ended = ranks.start(tmp_path, 3, ranks.disagrees, by_rank=own)
    assert ended.codes == {0: 2, 1: 3, 2: 3}
    for text in ended.output.values():
        assert text.startswith(
            "config: the ranks disagree; training.steps is 3 on rank 0, 4 on rank 1, null on rank 2."
        )
    own = {0: ["--lr", "0.1"], 1: ["--lr", "0.2"]}
    assert "training.learning_rate is 0.1 on rank 0, 0.2 on rank 1" in fails(tmp_path, 2, by_rank=own)


def test_ranks_that_read_other_data(tmp_path):
    line = fails(tmp_path, 2, "--task", f"{HERE / 'faulty.py'}:other_data")
    assert line.startswith("decaf: data: the ranks disagree; labels (hash) is ")
    assert "test examples" not in line


def test_a_mistake_on_one_rank_ends_all(tmp_path):
    ended = ranks.start(tmp_path, 3, ranks.fails_together, 1)
    assert set(ended.codes.values()) == {99}
    assert all("file: missing. (on rank 1 of 3)" in text for text in ended.output.values())


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails(tmp_path, 2, ranks=[0], port=port)
    assert f"port: rank 0 cannot listen on 127.0.0.1:{port} (address already in use)" in line


def test_a_rank_that_never_arrives_is_named(tmp_path):
    line = fails(tmp_path, 3, "--timeout", 12, ranks=[0, 1])
    assert "ranks: 2 of 3 arrived within 12 s; missing: rank 2." in line
    line = fails(tmp_path, 2, "--timeout", 2, ranks=[1])
    assert "rank 1 cannot reach rank 0 at 127.0.0.1:" in line


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        ("int8", "wire: int8 between processes would have no error feedback; use --algorithm.messages int8"),
        ("bfloat", "wire: 'bfloat' is not known. Did you mean 'bfloat16'"),
    ],
)
def test_a_wire_that_there_is_none_of_is_one_line(tmp_path, wire, message):
    words = [*SMALL, "--task", TOY, "--engine", "torchrun", "--wire", wire, "--out", tmp_path / "run"]
    ended = ranks.start(tmp_path, 2, ranks.decaf, *words)
    assert ended.codes == {0: 2, 1: 2}
    assert len(ended.lines) == 1, ended.lines
    (line,) = ended.lines
    assert message in line
    assert not (tmp_path / "run").exists()


def test_without_a_launcher_and_under_one_by_mistake(tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "run")]
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main([*SPLIT, *out]) == 2
    assert "torchrun needs a launcher (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set)" in capsys.readouterr().err
    assert main(["compare", *SPLIT[1:], *out]) == 2
    assert "engine: compare simulates its runs" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert main([*SMALL, "--task", TOY, *out]) == 2
    assert "torchrun has started 4 processes" in capsys.readouterr().err
    line = fails(tmp_path, 1, environment={"TORCHELASTIC_MAX_RESTARTS": 1, "TORCHELASTIC_RESTART_COUNT": "x"})
    assert "TORCHELASTIC_RESTART_COUNT is 'x', not a number" in line
