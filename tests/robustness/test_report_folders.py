"""Reports of folders that are torn, edited or cannot be written: one line that names the file, or a report."""

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decaf_lora.cli import main

RUN = {
    "algorithm": "decaf",
    "graph": {"name": "ring", "weights": [[0.5, 0.5], [0.5, 0.5]], "sigma_2": 0.0},
    "partition": {"name": "iid", "label_table": [[3, 1], [2, 2]], "classes": ["a", "b"]},
    "agents": 2,
    "rounds": 1,
    "seed": 0,
    "task": "digits",
    "score_name": "accuracy",
}
ROUND = {"round": 0, "scores": [0.1, 0.2], "bytes_sent": 0.0, "learning_rate": 0.1, "seconds": {"train": 0.1}}


def write(directory: Path) -> Path:
    """A finished run of two agents, by hand."""
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps(RUN))
    rounds = [ROUND, ROUND | {"round": 1, "scores": [0.5, 0.6], "losses": [0.1, 0.2], "averaged_score": 0.6}]
    (directory / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))
    (directory / "environment.json").write_text('{"torch": "2"}')
    (directory / "config.yaml").write_text("agents: 2\n")
    return directory


def edited(key: str, value: Any, of: str | None = None) -> Callable[[Path], object]:
    facts = RUN | ({key: value} if of is None else {of: {**RUN[of], key: value}})  # type: ignore[dict-item]
    return lambda run: (run / "run.json").write_text(json.dumps(facts))


def records(*lines: Any) -> Callable[[Path], object]:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return lambda run: (run / "records.jsonl").write_text(text)


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "null": (lambda run: (run / "run.json").write_text("null"), "run.json"),
    "a list": (lambda run: (run / "run.json").write_text("[1]"), "run.json"),
    "torn": (lambda run: (run / "run.json").write_text('{"algorithm'), "run.json"),
    "not text": (lambda run: (run / "run.json").write_bytes(b"\xff\xfe\x00"), "run.json"),
    "a folder": (lambda run: (run / "run.json").unlink() or (run / "run.json").mkdir(), "run.json"),  # type: ignore[func-returns-value]
    "graph is a name": (edited("graph", "ring"), "graph"),
    "no name": (edited("partition", {}), "partition.name"),
    "a seed in words": (edited("seed", "one"), "seed"),
    "ragged weights": (edited("weights", [[1.0], [1.0, 2.0]], "graph"), "graph.weights"),
    "ragged labels": (edited("label_table", [[1], [1, 2]], "partition"), "partition.label_table"),
    "labels of nobody": (edited("classes", 3, "partition"), "partition.classes"),
    "ranks in words": (edited("ranks", ["a"]), "ranks"),
    "records are missing": (lambda run: (run / "records.jsonl").unlink(), "records.jsonl"),
    "a record of another kind": (records({"a": 1}), "records.jsonl, line 1"),
    "a torn record within": (records("{", ROUND), "records.jsonl, line 1"),
    "agents that come and go": (records(ROUND, ROUND | {"round": 1, "scores": [1.0]}), "2 agents"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
    run = write(tmp_path / "run")
    spoil, named = MISTAKES[mistake]
    spoil(run)
    assert named in line_of(capsys, "report", run)
    assert not (run / "report.html").exists()


def line_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("decaf: ")
    assert err.count("\n") == 0, err
    return err


@pytest.mark.parametrize(
    ("name", "content"),
    [("environment.json", b""), ("environment.json", b"[1]"), ("config.yaml", "# Büro".encode("latin-1"))],
)
def test_what_only_informs_is_left_out_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    run = write(tmp_path / "run")
    (run / name).write_bytes(content)
    assert main(["report", str(run)]) == 0
    assert f"{run / name} is left out" in capsys.readouterr().err
    assert "0.550" in (run / "report.html").read_text()


def test_odd_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert "report: " in line_of(capsys, "report", "a" * 300)
    assert "holds no run" in line_of(capsys, "report", tmp_path / "nowhere")
    assert "holds no run" in line_of(capsys, "report", tmp_path / "file")
    for figures in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("n" * 300)):
        assert "report: cannot write" in line_of(capsys, "report", run, "--figures", figures)


def test_a_full_disk_keeps_the_old_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The limit on the size of files stands for a disk that is full: the operating system refuses half-way."""
    run = write(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    before = (run / "report.html").read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        assert "report: cannot write" in line_of(capsys, "report", run)
        assert "report: cannot write" in line_of(capsys, "report", run, "--figures", tmp_path / "figures")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (run / "report.html").read_bytes() == before
    assert not (run / "report.html.tmp").exists()
