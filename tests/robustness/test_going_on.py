"""A run that is gone on with: by several at once, after its test data changed, in a folder that nobody may write."""

import ctypes
import json
import os
import shutil
from pathlib import Path

import pytest

from command import SMALL, decaf, line_of
from decaf_lora.records import read_records
from forked import CONTEXT
from inputs import ROWS, album, lines, model, table
from inputs import SMALL as FEW

pytestmark = [pytest.mark.usefixtures("datasets_cache"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run of four rounds that lacks the last one."""
    out = tmp_path_factory.mktemp("unfinished") / "run"
    assert decaf("run", "digits", *SMALL, "--out", out) == 0
    shutil.rmtree(out / "checkpoints" / "round-000004")
    (out / "summary.json").unlink()
    (out / "report.html").unlink()
    return out


def _child(log: str, lawful: bool, words: tuple) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if lawful:
        obey_modes()
    os._exit(decaf(*words))


def obey_modes() -> None:
    """Takes from root the right to write where modes forbid it (the capabilities 1 and 2 of Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, sets) == 0
    sets[0] &= ~0b110
    assert libc.capset(head, sets) == 0


def begin(log: Path, *words, lawful=False):
    process = CONTEXT.Process(target=_child, args=(str(log), lawful, words))
    process.start()
    return process


def test_of_several_that_go_on_at_once_one_does(unfinished, tmp_path):
    """The others are refused, or find the run finished, depending on how fast it is."""
    out = shutil.copytree(unfinished, tmp_path / "run")
    logs = [tmp_path / f"log-{k}" for k in range(4)]
    processes = [begin(log, "run", "digits", *SMALL, "--out", out, "--resume") for log in logs]
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert set(codes) <= {0, 2}
    assert 0 in codes
    for code, log in zip(codes, logs, strict=True):
        assert code == 0 or f"decaf: out: {out} is in use by process " in log.read_text()
    assert [record.round for record in read_records(out / "records.jsonl")] == [0, 1, 2, 3, 4]
    assert json.loads((out / "summary.json").read_text())
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


# A folder that nobody may write


def told(log: Path, *words) -> tuple[int, list[str]]:
    """The exit code of a command that modes bind, and its lines."""
    process = begin(log, *words, lawful=True)
    process.join()
    text = log.read_text()
    assert "Traceback" not in text
    return process.exitcode, [line for line in text.splitlines() if line.startswith("decaf: ")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def locked(unfinished, tmp_path):
    out = shutil.copytree(unfinished, tmp_path / "locked")
    paths = [out, *out.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield out
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("run", "digits", *SMALL, "--resume", "--out"), "out"),
        (("report",), "report"),
        (("export", "--to", "INSIDE"), "to"),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line_and_stays(words, field, locked, tmp_path):
    before = contents(locked)
    given = [locked / "export" if word == "INSIDE" else word for word in words]
    code, said = told(tmp_path / "log", *given, locked)
    assert (code, len(said)) == (2, 1)
    assert said[0].startswith(f"decaf: {field}: cannot write ")
    assert "(Permission denied); make it writable" in said[0]
    assert contents(locked) == before


def test_a_folder_that_cannot_be_written_is_exported_to_elsewhere(locked, tmp_path):
    assert told(tmp_path / "log", "export", locked, "--to", tmp_path / "to") == (0, [])
    assert (tmp_path / "to" / "adapter_config.json").exists()


def test_checkpoints_that_cannot_be_written_keep_the_earlier_ones(unfinished, tmp_path):
    out = shutil.copytree(unfinished, tmp_path / "run")
    (out / "checkpoints").chmod(0o555)
    code, said = told(tmp_path / "log", "run", "digits", *SMALL, "--out", out, "--resume")
    (out / "checkpoints").chmod(0o755)
    assert code == 2
    assert "checkpoint: cannot write" in said[-1]
    assert "make it writable" in said[-1]
    assert decaf("run", "digits", *SMALL, "--out", out, "--resume") == 0


# Test data


def rows_of(folder: Path, kind: str, test) -> None:
    if kind == "csv":
        table(folder / "train.csv")
        table(folder / "test.csv", test)
    else:
        lines(folder / "train.jsonl", [{"text": text} for text, _ in ROWS])
        lines(folder / "test.jsonl", [{"text": text} for text, _ in test])


CHANGES = {
    "a text": [*ROWS[:7], ("the bird is old", ROWS[7][1])],
    "a label": [*ROWS[:7], (ROWS[7][0], {"no": "yes", "yes": "no"}[ROWS[7][1]])],
    "the order": ROWS[:8][::-1],
    "a row more": ROWS[:9],
}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_test_set_that_changed_before_a_resume_is_refused(kind, tmp_path, capsys):
    """Scores before and after would be of different examples."""
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    rows_of(data, kind, ROWS[:8])
    name, family = ("sequence-classification", "bert") if kind == "csv" else ("causal-lm", "llama")
    task = ("--task", name, "--task.model", model(family, tmp_path), "--task.data", data, "--task.test_split", "test")
    words = ("run", "digits", *task, *FEW, "--out", out)
    assert decaf(*words) == 0
    for what, rows in list(CHANGES.items())[: 4 if kind == "csv" else 1]:
        rows_of(data, kind, rows)
        said = line_of(capsys, *words, "--rounds", 2, "--resume")
        assert f"resume: what the run in {out} was made from has changed; " in said, what
        assert "data (hash)" in said, what
    rows_of(data, kind, ROWS[:8])
    assert decaf(*words, "--rounds", 2, "--resume") == 0


def test_a_test_image_that_changed_before_a_resume_is_refused(tmp_path, capsys):
    data, out = album(tmp_path / "data"), tmp_path / "run"
    task = ("--task", "image-text", "--task.model", model("clip", tmp_path), "--task.data", data)
    words = ("run", "digits", *task, *FEW, "--out", out)
    assert decaf(*words) == 0
    shutil.copyfile(data / "test/cat/cat0.png", data / "test/dog/dog0.png")
    said = line_of(capsys, *words, "--rounds", 2, "--resume")
    assert f"resume: what the run in {out} was made from has changed; data (hash)" in said
