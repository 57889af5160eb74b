"""A run's folder that was torn, cut, changed or is in use: right recovery that is told, or one line that names it."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from command import SMALL, TOY, decaf, line_of, lines_of
from decaf_lora import algorithms, graphs, partition
from decaf_lora.config import RunConfig, TrainingConfig, build
from decaf_lora.errors import UserError
from decaf_lora.records import read_records
from decaf_lora.run import Run
from decaf_lora.runs import Folder, Interrupted, Subscriber, checkpoint, follow
from decaf_lora.runs import folder as folders
from decaf_lora.runs.build import _tasks as tasks_of_process
from decaf_lora.runs.lock import LOCK, OWNER, FolderLock
from toy import Toy


def contents(out: Path) -> tuple[dict, list]:
    """Every tensor of the newest checkpoint, and the records but for their times."""
    tensors, _ = checkpoint.load_latest(out / "checkpoints")
    records = [dataclasses.replace(r, seconds={}) for r in read_records(out / "records.jsonl")]
    return tensors, records


def equal(ours: Path, theirs: Path) -> None:
    (a, mine), (b, other) = contents(ours), contents(theirs)
    assert a.keys() == b.keys()
    assert all((a[k] == b[k]).all() for k in a)
    assert mine == other


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run of 4 rounds with checkpoints of rounds 3 and 4."""
    out = tmp_path_factory.mktemp("base") / "run"
    assert decaf("run", "digits", *SMALL, "--out", out) == 0
    assert [p.name for p in checkpoint.all_of(out / "checkpoints")] == ["round-000003", "round-000004"]
    return out


@pytest.fixture
def torn(base, tmp_path):
    """A copy to tear."""
    shutil.copytree(base, tmp_path / "torn")
    return tmp_path / "torn"


def resume(out: Path) -> tuple:
    return ("run", "digits", *SMALL, "--out", out, "--resume")


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


# Torn and changed


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.VALUES, checkpoint.SUMS])
def test_a_flipped_bit_is_seen_and_the_older_checkpoint_used(file, torn, base, capsys):
    flip(torn / "checkpoints/round-000004" / file)
    (said,) = lines_of(capsys, *resume(torn), code=0)
    assert said.startswith("decaf: warning: checkpoint: ")
    assert "round-000004" in said
    assert said.endswith("the run goes back to the older round-000003.")
    equal(torn, base)


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.VALUES, checkpoint.SUMS])
def test_a_missing_file_of_a_checkpoint_is_named(file, torn, base, capsys):
    (torn / "checkpoints/round-000004" / file).unlink()
    (said,) = lines_of(capsys, *resume(torn), code=0)
    assert f"round-000004/{file} is missing" in said
    equal(torn, base)


def test_no_whole_checkpoint_is_one_line_and_loses_nothing(torn, tmp_path, capsys):
    for path in checkpoint.all_of(torn / "checkpoints"):
        (path / "values.json").write_text("{}")
    before = {p: p.read_bytes() for p in torn.rglob("*") if p.is_file()}
    for command in (resume(torn), ("export", torn, "--to", tmp_path / "x")):
        said = line_of(capsys, *command)
        assert "round-000004/values.json does not match its checksum" in said
        assert f"or remove {torn / 'checkpoints'}" in said
    assert {p: p.read_bytes() for p in torn.rglob("*") if p.is_file()} == before


def test_records_that_lack_rounds_go_back_to_a_checkpoint_they_cover(torn, base, capsys):
    kept = (torn / "records.jsonl").read_text().splitlines()[:4]  # rounds 0 to 3
    (torn / "records.jsonl").write_text("\n".join(kept) + "\n")
    (said,) = lines_of(capsys, *resume(torn), code=0)
    assert "records.jsonl ends with round 3, but" in said
    assert "round-000003" in said
    equal(torn, base)


@pytest.mark.parametrize("kept", [[0, 1], [0, 1, 3, 4], [], None])
def test_records_that_no_checkpoint_can_do_without(kept, torn, capsys):
    lines = (torn / "records.jsonl").read_text().splitlines()
    (torn / "records.jsonl").unlink()
    if kept is not None:
        (torn / "records.jsonl").write_text("".join(lines[k] + "\n" for k in kept))
    said = line_of(capsys, *resume(torn))
    expected = "is missing" if kept is None else {0: "is empty", 2: "ends with round 1", 4: "lacks round 2"}[len(kept)]
    assert f"{torn / 'records.jsonl'} {expected}, but {torn / 'checkpoints/round-000004'} relies on" in said


@pytest.mark.parametrize("tail", [b'{"round": 5, "bytes', b"\0" * 40 + b"\n", b"{}\n"])
def test_what_a_crash_left_after_the_last_checkpoint_is_dropped(tail, torn, base, capsys):
    path = torn / "records.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert lines_of(capsys, *resume(torn), code=0) == []
    equal(torn, base)


def test_a_run_without_a_checkpoint_starts_from_the_beginning(torn, base, capsys):
    shutil.rmtree(torn / "checkpoints")
    (said,) = lines_of(capsys, *resume(torn), code=0)
    assert "has no checkpoint yet; the run starts from the beginning" in said
    equal(torn, base)


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_only_a_temporary_file_is_left(options, base, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml.tmp").write_text("agen")
    lines = lines_of(capsys, "run", "digits", *SMALL, "--out", out, *options, code=0)
    assert len(lines) == len(options)
    assert all("starts from the beginning" in line for line in lines)
    equal(out, base)
    assert not list(out.rglob("*.tmp"))


def test_a_folder_of_something_else_stays_refused(tmp_path, capsys):
    (tmp_path / "thesis.tmp").write_text("x")
    assert "is not empty" in line_of(capsys, "run", "digits", *SMALL, "--out", tmp_path)


def test_a_configuration_in_another_encoding_is_named(torn, capsys):
    (torn / "config.yaml").write_bytes((torn / "config.yaml").read_bytes() + b"# B\xfcro\n")
    for command in (resume(torn), ("run", "--resume", torn)):
        assert f"config: {torn / 'config.yaml'} is not UTF-8" in line_of(capsys, *command)


@pytest.mark.parametrize("text", ["null", "[]", "", "{"])
def test_a_run_json_that_says_nothing(text, torn, base, capsys):
    (torn / "run.json").write_text(text)
    assert str(torn / "run.json") in line_of(capsys, "report", torn)
    assert lines_of(capsys, *resume(torn), code=0) == []  # it is made from the configuration again
    assert json.loads((torn / "run.json").read_text())["algorithm"] == "decaf"
    equal(torn, base)


def test_a_checkpoint_beyond_the_last_round(torn, base, capsys):
    """As after a copy of somebody else's checkpoint: whole, but not of this run."""
    tensors, values = checkpoint.load(torn / "checkpoints/round-000004")
    checkpoint.save(torn / "checkpoints", tensors, {**values, "round": 9})
    (said,) = lines_of(capsys, *resume(torn), code=0)
    assert "round-000009 is beyond the last round, 4" in said
    assert [r.round for r in read_records(torn / "records.jsonl")] == [0, 1, 2, 3, 4]


def test_checkpoints_are_ordered_by_number_from_round_a_million_on(tmp_path):
    for round_, step in ((999_999, 0), (1_000_000, 0), (1_000_000, 2), (1_000_000, 10)):
        checkpoint.save(tmp_path, {}, {"round": round_, "step_in_round": step})
    assert [p.name for p in checkpoint.all_of(tmp_path)] == ["round-1000000-step-000002", "round-1000000-step-000010"]
    assert checkpoint.load_latest(tmp_path)[1]["step_in_round"] == 10


def test_another_format_is_refused(torn, capsys):
    facts = json.loads((torn / "run.json").read_text())
    (torn / "run.json").write_text(json.dumps({**facts, "format": 99}))
    assert "run.json has format 99, this program goes on with 1 only" in line_of(capsys, *resume(torn))
    (torn / "run.json").write_text(json.dumps(facts))
    tensors, values = checkpoint.load(torn / "checkpoints/round-000004")
    checkpoint.save(torn / "checkpoints", tensors, {**values, "format": 99, "versions": {"decaf-lora": "7.0"}})
    assert "has format 99; this program reads 1. Use the program that wrote it (decaf-lora 7.0)." in line_of(
        capsys, *resume(torn)
    )
    newest = torn / "checkpoints/round-000004"
    (newest / checkpoint.SUMS).unlink()
    (newest / checkpoint.VALUES).write_text(json.dumps({k: v for k, v in values.items() if k != "format"}))
    assert f"{newest} has format none, from before there were checksums" in line_of(capsys, *resume(torn))


def test_another_version_is_one_line_and_goes_on(torn, base, capsys):
    tensors, values = checkpoint.load(torn / "checkpoints/round-000004")
    old = {**values["versions"], "torch": "2.0.0"}
    checkpoint.save(torn / "checkpoints", tensors, {**values, "versions": old})
    (said,) = lines_of(capsys, *resume(torn), code=0)
    assert 'other versions than at the checkpoint; torch: "2.0.0" -> ' in said
    equal(torn, base)


def test_a_checkpoint_of_another_shape_is_one_line(torn, capsys):
    tensors, values = checkpoint.load(torn / "checkpoints/round-000004")
    tensors.pop("steps_taken")
    checkpoint.save(torn / "checkpoints", tensors, values)
    assert "the checkpoint of round 4 in" in line_of(capsys, *resume(torn))


def test_the_same_moment_is_saved_again_without_a_gap(tmp_path, monkeypatch):
    """The program dies between the two renames: the checkpoint that was there is found."""
    values = {"round": 1, "step_in_round": 0}
    final = checkpoint.save(tmp_path, {}, values)
    replace = os.replace

    def dies(source, target):
        if Path(target) == final:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, {}, values)
    monkeypatch.undo()
    assert not final.exists()
    assert checkpoint.load_latest(tmp_path)[1]["round"] == 1


# What the run was made from


def test_data_that_changed_before_a_resume_are_refused(tmp_path, capsys):
    toy = (Path(TOY.rpartition(":")[0])).read_text()
    (tmp_path / "labels.txt").write_text("0")
    read = f"int(Path({str(tmp_path / 'labels.txt')!r}).read_text())"
    text = f"from pathlib import Path\n{toy}\n\ndef make():\n    return Toy(seed={read})\n"
    mine = tmp_path / "mine.py"
    mine.write_text(text)
    out, task = tmp_path / "run", ("--task", f"{mine}:make")
    assert decaf("run", "digits", *SMALL, *task, "--rounds", 2, "--out", out) == 0
    (tmp_path / "labels.txt").write_text("1")
    tasks_of_process.clear()
    said = line_of(capsys, *resume(out), *task, "--rounds", 2)
    assert f"resume: what the run in {out} was made from has changed; " in said
    assert "labels (hash)" in said
    assert "base model (hash)" in said
    (tmp_path / "labels.txt").write_text("0")
    tasks_of_process.clear()
    assert lines_of(capsys, *resume(out), *task, "--rounds", 2, code=0) == []
    mine.write_text(text + "\n# changed\n")
    said = line_of(capsys, *resume(out), *task, "--rounds", 2)
    assert f"resume: {mine} (task.name) has changed since this run was saved" in said


# Going on


def test_resume_and_a_folder_are_enough_but_own_code_is_named_again(torn, base, capsys):
    said = line_of(capsys, "run", "--resume", torn)
    assert said.endswith(f"{TOY}; to let it run, name it again: --task {TOY}")
    shutil.rmtree(torn / "checkpoints/round-000004")
    for form in (["--resume", torn], [f"--resume={torn}"], ["--out", torn, "--resume"]):
        assert lines_of(capsys, "run", *form, "--task", TOY, code=0) == []
        equal(torn, base)
    assert "give one of them" in line_of(capsys, "run", "--resume", torn, "--out", "elsewhere", "--task", TOY)
    assert "differing fields: seed: 0 -> 3, training.steps: 2 -> 9" in line_of(
        capsys, "run", "--resume", torn, "--task", TOY, "--seed", 3, "--training.steps", 9
    ).replace("; training", ", training")
    assert "holds one run; go on with it by `decaf run --resume" in line_of(capsys, "compare", "--resume", torn)
    assert "holds no run" in line_of(capsys, "run", "--resume", torn / "checkpoints")
    assert "resume: name the folder of the run" in line_of(capsys, "run", "digits", *SMALL, "--resume")


def test_rounds_may_grow_but_not_shrink(torn, tmp_path, capsys):
    constant = ("--training.schedule", "constant")
    short, long = tmp_path / "short", tmp_path / "long"
    assert decaf("run", "digits", *SMALL, *constant, "--out", short) == 0
    assert decaf("run", "digits", *SMALL, *constant, "--rounds", 7, "--out", long) == 0
    assert "rounds: 4 -> 3" in line_of(capsys, "run", "--resume", short, "--task", TOY, "--rounds", 3)
    assert lines_of(capsys, "run", "--resume", short, "--task", TOY, "--rounds", 7, code=0) == []
    (a, _), (b, _) = contents(short), contents(long)
    assert all((a[k] == b[k]).all() for k in a)
    assert yaml.safe_load((short / "config.yaml").read_text())["rounds"] == 7
    assert json.loads((short / "run.json").read_text())["rounds"] == 7
    # The default schedule is over all rounds: it is said that the first were taken on the old one.
    (said,) = lines_of(capsys, "run", "--resume", torn, "--task", TOY, "--rounds", 6, code=0)
    assert "rounds: 4 -> 6; training.schedule cosine is over all rounds" in said


# One folder, one run


def test_a_folder_in_use_is_refused_with_the_holder_and_its_machine(torn, tmp_path, capsys):
    code = (
        "import sys, time; from pathlib import Path; from decaf_lora.runs.lock import FolderLock; "
        "lock = FolderLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(torn)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        said = line_of(capsys, *resume(torn))
        assert f"out: {torn} is in use by process {holder.pid} on {socket.gethostname()} since 20" in said
        assert "choose another --out" in said
        # A living process of this machine is not taken over from.
        assert f"is in use by process {holder.pid}" in line_of(capsys, *resume(torn), "--take-over")
    finally:
        holder.kill()
        holder.wait()
    assert (torn / OWNER).exists()  # it died with it, and the lock with the process
    assert lines_of(capsys, *resume(torn), code=0) == []
    assert not {LOCK, OWNER} & {p.name for p in torn.iterdir()}


def owner(out: Path, **values) -> None:
    (out / OWNER).write_text(json.dumps({"pid": 12, "host": "node7", "started": "2026-01-01", **values}))


def test_another_machine_is_not_taken_over_from_without_a_word(torn, capsys):
    owner(torn)
    said = line_of(capsys, *resume(torn))
    assert "is in use by process 12 on node7 since 2026-01-01" in said
    assert "cannot see whether that still runs. If it does not, go on with --take-over" in said
    assert lines_of(capsys, *resume(torn), "--take-over", code=0) == []


def test_a_restart_by_the_launcher_takes_over_by_itself(torn, capsys, monkeypatch):
    """slurm's requeue on another machine: the former start of the same job is gone."""
    owner(torn, launch={"TORCHELASTIC_RUN_ID=none": 0, "SLURM_JOB_ID=7": 0})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert "--take-over" in line_of(capsys, *resume(torn))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert lines_of(capsys, *resume(torn), code=0) == []


def test_where_locks_do_not_work_the_owner_counts(tmp_path, monkeypatch):
    import errno
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match="is in use by a run of this very process"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner(tmp_path, host=socket.gethostname(), pid=gone.pid)
    second.acquire()  # it has ended on this machine
    second.release()
    owner(tmp_path, host=socket.gethostname(), pid=os.getppid())
    with pytest.raises(UserError, match=f"in use by process {os.getppid()}"):
        second.acquire()
    owner(tmp_path)
    with pytest.raises(UserError, match="--take-over"):
        second.acquire()
    second.acquire(take_over=True)
    second.release()
    (tmp_path / OWNER).write_text("{")
    with pytest.raises(UserError, match="in use by another process"):
        second.acquire()
    second.acquire(take_over=True)  # what nobody can read names nobody
    second.release()


def test_a_folder_named_by_the_clock_is_made_by_one_run_only(tmp_path, monkeypatch, capsys):
    """Runs that start in the same second."""
    monkeypatch.chdir(tmp_path)
    config = build(RunConfig, {"task": {"name": TOY}, "agents": 2, "rounds": 1, "partition": "iid"} | {
        "lora": {"target_modules": ["first"]}, "training": {"steps": 1, "agents_per_pass": 1}})  # fmt: skip
    folders_made = [folders.run(config, Path("runs/now"), unique=True)[1] for _ in range(3)]
    assert [str(p) for p in folders_made] == ["runs/now", "runs/now-2", "runs/now-3"]
    assert all((p / "summary.json").exists() for p in folders_made)


def test_the_second_of_two_that_both_saw_an_empty_folder(tmp_path, monkeypatch):
    """Both have passed the first check; the one that comes second to the lock looks again."""
    first, second = Folder(tmp_path / "run"), Folder(tmp_path / "run")
    first.open()
    with pytest.raises(UserError, match="in use by a run of this very process"):
        second.open()
    (tmp_path / "run/run.json").write_text("{}")
    first.__exit__(None, None, None)
    with pytest.raises(UserError, match="already holds a run"):
        second.open()


LAUNCHERS = {
    "torchrun": {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "0"},
    "srun": {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
    "mpiexec": {"PMI_SIZE": "4", "PMI_RANK": "0"},
    "a launcher": {"WORLD_SIZE": "4", "RANK": "0"},
}


@pytest.mark.parametrize("name", list(LAUNCHERS))
@pytest.mark.parametrize("command", ["run", "compare"])
def test_several_processes_that_would_each_simulate_all_agents(name, command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for key, value in LAUNCHERS[name].items():
        monkeypatch.setenv(key, value)
    said = line_of(capsys, command, "digits", *SMALL)
    assert f"engine: {name} has started 4 processes; `decaf run` shares them with --engine torchrun" in said
    for key, value in LAUNCHERS[name].items():
        monkeypatch.setenv(key, "1" if value == "0" else value)
    assert lines_of(capsys, command, "digits", *SMALL, code=2) == []  # rank 0 has said it
    assert not list(tmp_path.iterdir())


# A run made in a notebook


def notebook(rounds: int = 4) -> Run:
    task = Toy()
    shards = partition.iid(task.labels, 3, seed=0)
    training = TrainingConfig(steps=2, batch_size=4, learning_rate=0.02, agents_per_pass=3)
    return Run(task, algorithms.decaf(), graphs.ring(3), shards, training, rounds=rounds, evaluate_every=2)


def test_a_run_from_a_notebook_gets_a_folder_and_goes_on_in_it(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    records = list(follow(notebook(), Folder(whole)))
    assert [r.round for r in records] == [0, 1, 2, 3, 4]
    for record in follow(notebook(), Folder(cut)):
        if record.round == 2:
            break  # the generator is closed: a checkpoint is left
    assert checkpoint.load_latest(cut / "checkpoints")[1]["round"] == 2
    assert not (cut / "summary.json").exists()
    with pytest.raises(UserError, match="already holds a run"):
        next(follow(notebook(), Folder(cut)))
    assert [r.round for r in follow(notebook(), Folder(cut, resume=True))] == [3, 4]
    equal(cut, whole)
    assert decaf("report", cut) == 0
    assert (cut / "report.html").exists()
    assert decaf("export", cut, "--agent", 1, "--to", tmp_path / "adapter") == 0
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    other = notebook()
    other.seed = 5
    other.partition = partition.iid(other.task.labels, 3, seed=1)
    with pytest.raises(UserError, match=r"made from has changed; partition \(hash\)"):
        next(follow(other, Folder(cut, resume=True)))


class Heard(Subscriber):
    def __init__(self) -> None:
        self.calls: list = []

    def attach(self, run):
        self.calls.append("attach")

    def start(self, facts):
        self.calls.append(("start", facts["algorithm"], facts["rounds"]))

    def step(self, progress):
        self.calls.append(("step", progress.round, round(progress.fraction, 3)))

    def record(self, record):
        self.calls.append(("record", record.round))

    def close(self, error):
        self.calls.append(("close", error))


def test_subscribers_hear_everything_in_order():
    heard = Heard()
    list(follow(notebook(rounds=2), heard))
    assert heard.calls == [
        *("attach", ("start", "decaf", 2), ("record", 0)),
        *(("step", 1, 0.25), ("step", 1, 0.5), ("record", 1)),
        *(("step", 2, 0.75), ("step", 2, 1.0), ("record", 2), ("close", None)),
    ]


def test_all_subscribers_are_closed_when_one_fails(tmp_path):
    class Faulty(Heard):
        def record(self, record):
            if record.round == 1:
                raise RuntimeError("full")

    first, last = Heard(), Heard()
    with pytest.raises(RuntimeError, match="full"):
        list(follow(notebook(), first, Faulty(), last))
    for heard in (first, last):
        assert isinstance(heard.calls[-1][1], RuntimeError)
    assert ("record", 1) not in last.calls


def test_a_stop_is_no_finish(tmp_path):
    run = notebook()
    folder = Folder(tmp_path / "run")
    for record in follow(run, folder):
        if record.round == 1:
            run.stop()
    assert folder.row is None
    assert str(Interrupted(tmp_path, 2)).startswith("stopped in round 2")


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs/folders.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(first.replace("rounds=30", "rounds=2"), "docs/folders.md", "exec"), names)  # to save a minute
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 0.")
    assert (tmp_path / "runs/notebook/report.html").exists()
    exec(compile(second, "docs/folders.md", "exec"), names)
    best = names["Best"]()
    list(follow(notebook(rounds=2), best))
    assert 0 < best.score <= 1


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"x"', "[[]]", "[" * 5000])
def test_an_export_needs_no_environment(text, torn, tmp_path):
    """What environment.json holds only informs: an export without it is the same but for the versions."""
    (torn / "environment.json").write_text(text)
    assert decaf("export", torn, "--agent", "0", "--to", tmp_path / "out") == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
