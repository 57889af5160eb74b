"""The command as a user calls it, on a task of their own that is small, exact and fast."""

from pathlib import Path

from decaf_lora.cli import main

TOY = f"{Path(__file__).parent / 'toy.py'}:make_toy"
SMALL = (
    *("--task", TOY, "--agents", "3", "--rounds", "4", "--training.steps", "2", "--training.batch-size", "4"),
    *("--training.agents-per-pass", "3", "--partition", "iid", "--lora.lora-alpha", "4"),
    *("--checkpoint-every", "1", "--evaluate-every", "2"),
)


def decaf(*arguments) -> int:
    """Its exit code."""
    return main([str(a) for a in arguments])


def lines_of(capsys, *arguments, code: int) -> list[str]:
    """What it says on standard error; asserts the exit code, and that there is no traceback."""
    capsys.readouterr()
    assert decaf(*arguments) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith("decaf: ")]


def line_of(capsys, *arguments) -> str:
    """The one line that a mistake prints, with exit code 2."""
    (line,) = lines_of(capsys, *arguments, code=2)
    return line
