"""Every command that README and site show: the option is there, the file too, and what runs in seconds is run."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from decaf_lora.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("decaf", "python", "make", "pip", "torchrun", "hf")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("datasets_cache")]


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command of a page; prompts, comments and the path of a virtual environment are cut."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    found = []
    for line in lines:
        line = re.sub(r"^\w+\$\s+|^sudo -u \w+ ", "", line)
        program = re.match(r"(?:[\w./-]*/)?(\w*)(?=\s|$)", line)
        if program and program[1] in PROGRAMS:
            found.append([program[1], *shlex.split(line, comments=True)[1:]])
    return found


EVERY = [(page, words) for page in PAGES for words in commands_of(page)]


def named(pair):
    page, words = pair
    return f"{page.stem}: {shlex.join(words)}"


def test_commands_are_found():
    assert len(EVERY) > 100
    assert {words[0] for _, words in EVERY} == set(PROGRAMS)


def help_of(words: list[str], capsys) -> str:
    """The help of a `decaf` command with its options before it; a mistake in one fails the test."""
    capsys.readouterr()
    try:
        code = main([*words, "--help"])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert not code, err
    return out


@pytest.mark.parametrize("pair", EVERY, ids=named)
def test_a_command_is_as_the_program_has_it(pair, tmp_path, monkeypatch, capsys):
    _, (program, *words) = pair
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    if program == "make":
        for target in words:
            assert re.search(rf"^{target.split('=')[0]}\b", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        (asked,) = re.findall(r"decaf-lora(?:\[(.*)\])?", words[-1])
        assert not asked or set(asked.split(",")) <= extras.keys()
    elif program == "hf":
        told = subprocess.run([Path(sys.executable).parent / "hf", words[0], "--help"], capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
    elif program == "python" and words[0] != "-m":
        assert (ROOT / words[0]).is_file()
        shared = [ROOT / "benchmarks" / "study_runs.py", ROOT / "benchmarks" / "cells.py"]
        known = "".join(path.read_text() for path in (ROOT / words[0], *shared))
        assert {option for option in options if f'"{option}"' not in known} == set()
    elif program == "python" and words[1] != "decaf_lora":
        known = (ROOT / words[1].replace(".", "/") / "__main__.py").read_text()
        assert {option for option in options if f'"{option}"' not in known} == set()
    else:
        if "decaf_lora" in words:
            words = words[words.index("decaf_lora") + 1 :]
        monkeypatch.chdir(tmp_path)
        for word in words:  # what a command reads before it shows its help
            if word.endswith(".yaml") and not (ROOT / word).exists():
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                Path(word).write_text("task: {name: digits}\n")
            elif word.endswith(".yaml"):
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                Path(word).write_text((ROOT / word).read_text())
        if "--resume" in words:
            words = ["compare" if words[0] == "compare" else "run", "digits", *words[3:]]
            options.remove("--resume")
        shown = help_of(words, capsys)
        if words[0] == "federation":
            assert {option for option in options if option not in shown} == set()
