"""Terminals without colour or UTF-8, paths with blanks and umlauts, and Windows."""

import os
import subprocess
import sys

import pytest

from command import TOY
from decaf_lora import errors
from decaf_lora.cli import main

PLAIN = {"TERM": "dumb", "NO_COLOR": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "80"}


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_terminal_without_colour_or_letters_of_its_own_gets_every_line(encoding, tmp_path):
    command = [sys.executable, "-m", "decaf_lora", "graph", "base:3", "-n", "5"]
    environment = os.environ | PLAIN | {"PYTHONIOENCODING": encoding}
    ended = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    text = ended.stdout.decode(encoding)  # nothing that the encoding lacks
    assert "\x1b" not in text
    assert "round 2: 6 messages, 0-1 0-2 1-2" in text
    assert ended.stderr == b""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_mistake_is_one_line_there_too(encoding, tmp_path):
    command = [sys.executable, "-m", "decaf_lora", "run", "no/süch – file.yaml"]
    environment = os.environ | PLAIN | {"PYTHONIOENCODING": encoding}
    ended = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    assert ended.returncode == 2
    (line,) = ended.stderr.decode(encoding).splitlines()
    assert line.startswith("decaf: ")


@pytest.mark.filterwarnings("ignore")
def test_a_path_with_blanks_and_umlauts(tmp_path, capsys):
    out = tmp_path / "Läufe von heute" / "erster Lauf"
    small = ["--task", TOY, "--agents", "2", "--rounds", "1", "--training.steps", "1", "--training.batch-size", "2"]
    assert main(["run", "digits", *small, "--partition", "iid", "--out", str(out)]) == 0, capsys.readouterr().err
    assert (out / "report.html").exists()
    assert main(["export", str(out), "--agent", "0", "--to", str(tmp_path / "für Änne")]) == 0
    assert (tmp_path / "für Änne" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["run", "digits", "--engine", "torchrun"],
        ["agent", "f.yaml", "--name", "a", "--out", "x"],
        ["federation", "demo"],
    ],
)
def test_windows_has_the_simulation_alone(command, monkeypatch, capsys):
    monkeypatch.setattr(errors, "_WINDOWS", True)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "works on Linux and macOS; on Windows there is the simulation" in line
