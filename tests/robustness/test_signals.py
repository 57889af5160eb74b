"""Real processes and real signals: what is asked to end ends, with a checkpoint, and leaves nobody behind.

Every command here is forked from one process that has loaded everything, into a process group of its own; so are the
workers of a comparison, whose group it joins as they would a terminal's.
"""

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from command import SMALL, TOY, decaf
from decaf_lora.records import read_records
from decaf_lora.runs import checkpoint
from forked import CONTEXT, own_server

LONG = (
    *("--task", TOY, "--agents", "2", "--rounds", "100000", "--training.steps", "1", "--training.batch-size", "2"),
    *("--training.agents-per-pass", "2", "--partition", "iid", "--lora.lora-alpha", "4"),
    *("--checkpoint-every", "1000", "--evaluate-every", "100000", "--measure-every", "100000"),
)
FOUR = ("--algorithms", "local", "dlora", "--seeds", "0", "1", "--jobs", "2")
PATIENCE = 120
"""Seconds against a hang; a busy machine may need many."""


def _on_terminal(name, arguments):
    """In a session of its own, on a terminal that will go."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for descriptor in range(3):
        os.dup2(terminal, descriptor)
    own_server()
    os._exit(decaf(*arguments))


def _child(log, arguments):
    os.setpgid(0, 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    own_server()
    os._exit(decaf(*arguments))


class Command:
    """A command that goes on in a process of its own."""

    def __init__(self, folder: Path, *arguments) -> None:
        self.out, self.log = folder / "out", folder / "log"
        self.process = CONTEXT.Process(target=_child, args=(str(self.log), (*arguments, "--out", self.out)))
        self.process.start()
        self.pid = self.process.pid

    def begun(self) -> dict[str, int]:
        """Name of every run that has begun -> lines of its records."""
        return {p.parent.name: p.read_bytes().count(b"\n") for p in self.out.glob("**/records.jsonl")}

    def until(self, count: int) -> None:
        """Waits until `count` runs are on their way."""
        wait(lambda: sum(n > 2 for n in self.begun().values()) >= count or self.process.exitcode is not None)
        assert self.process.exitcode is None, self.said()

    def workers(self) -> list[int]:
        """The processes whose runs these are, by the folders' owners."""
        owners = [json.loads(p.read_text()) for p in self.out.glob("*/.owner.json")]
        return sorted({owner["pid"] for owner in owners} - {self.pid})

    def ended(self) -> int | None:
        self.process.join(timeout=PATIENCE)
        return self.process.exitcode

    def said(self) -> str:
        return self.log.read_text()


def wait(done) -> None:
    until = time.monotonic() + PATIENCE
    while not done() and time.monotonic() < until:
        time.sleep(0.02)
    assert done()


def alive(pid: int) -> bool:
    """Whether a process still runs; one that nobody has asked about yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def begin(tmp_path):
    started = []

    def go(*arguments):
        started.append(Command(tmp_path, *arguments))
        return started[-1]

    yield go
    for command in started:
        for pid in (command.pid, *command.workers()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        command.process.join()


def whole(out: Path) -> None:
    """The newest checkpoint is of the last record."""
    assert checkpoint.load_latest(out / "checkpoints")[1]["round"] == read_records(out / "records.jsonl")[-1].round
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_asked_to_end_leaves_a_checkpoint(number, begin):
    command = begin("run", "digits", *LONG)
    command.until(1)
    os.kill(command.pid, number)
    assert command.ended() == 130
    assert f"Go on with: decaf run --resume {command.out} --task {TOY}" in command.said()
    assert "Traceback" not in command.said()
    whole(command.out)


def _signalled(log, number, where, arguments):
    """Gets a signal when it first opens a file to write whose name holds `where`."""
    left = [number]

    def hook(event, values):
        if event == "open" and left and where in str(values[0]) and (values[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            os.kill(os.getpid(), left.pop())

    sys.addaudithook(hook)
    _child(log, arguments)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("config.yaml", signal.SIGTERM),
        ("environment.json", signal.SIGHUP),
        ("summary.json", signal.SIGTERM),
        ("report.html", signal.SIGTERM),
        ("report.html", signal.SIGINT),
    ],
)
def test_a_signal_while_a_file_is_written_costs_nothing(where, number, tmp_path):
    """One that comes after the last round changes nothing any more."""
    out, log = tmp_path / "out", tmp_path / "log"
    words = ("run", "digits", *SMALL, "--out", out)
    process = CONTEXT.Process(target=_signalled, args=(str(log), number, where, words))
    process.start()
    process.join(timeout=PATIENCE)
    assert process.exitcode == (0 if where in ("summary.json", "report.html") else 130), log.read_text()
    assert "Traceback" not in log.read_text()
    if process.exitcode:
        assert decaf(*words, *(("--resume",) if (out / "config.yaml").exists() else ())) == 0
    assert read_records(out / "records.jsonl")[-1].round == 4
    assert json.loads((out / "summary.json").read_text())
    assert (out / "report.html").read_text().rstrip().endswith("</html>")
    assert not [p.name for p in out.iterdir() if p.name.startswith(".") or p.suffix == ".tmp"]


@pytest.mark.parametrize(
    "command", [("run", "digits", *LONG), ("compare", "digits", *LONG, *FOUR)], ids=["run", "compare"]
)
def test_a_terminal_that_goes_costs_no_checkpoint(command, tmp_path, request):
    """The window is closed: SIGHUP, and every further word to the live display is an error."""
    ours, theirs = pty.openpty()
    out = tmp_path / "out"
    process = CONTEXT.Process(target=_on_terminal, args=(os.ttyname(theirs), (*command, "--out", out)))
    process.start()
    request.addfinalizer(process.kill)
    os.set_blocking(ours, False)

    def begun():
        with contextlib.suppress(BlockingIOError):  # a terminal that nobody reads fills up
            os.read(ours, 65536)
        return len([p for p in out.glob("**/records.jsonl") if p.read_bytes().count(b"\n") > 2])

    wait(lambda: begun() >= (2 if "compare" in command else 1))
    os.close(theirs)
    os.close(ours)
    process.join(timeout=PATIENCE)
    assert process.exitcode == 130
    for path in out.glob("**/records.jsonl"):
        whole(path.parent)


def test_a_run_below_nohup_outlives_its_terminal(begin, tmp_path):
    """SIGHUP is ignored there, and stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        from decaf_lora.runs.signals import stopping

        with stopping(lambda: pytest.fail("it was stopped")):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_workers_leave_the_programs_own_processes_alone(tmp_path):
    """They share one server that forks processes, which passes on what it holds back."""
    program = """
import multiprocessing, signal
from decaf_lora.runs.workers import Workers

def held(pipe):
    pipe.send(signal.pthread_sigmask(signal.SIG_BLOCK, []))

if __name__ == "__main__":
    with Workers(1, 1, print):
        pass
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=held, args=(theirs,))
    process.start()
    print(ours.recv())
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "set()\n", done.stderr


def test_a_second_ctrl_c_interrupts_only_where_the_first_would_have():
    """A worker, which ignores Ctrl-C, gets its parent's SIGTERM and the terminal's SIGINT in any order."""
    from decaf_lora.runs.signals import stopping

    def stops(*numbers):
        stopped = []
        with stopping(lambda: stopped.append(1)):
            for number in numbers:
                os.kill(os.getpid(), number)
        return len(stopped)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert stops(signal.SIGTERM, signal.SIGINT, signal.SIGINT) == 3
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            stops(signal.SIGTERM, signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_comparison_ends_and_begins_no_further_run(number, times, begin):
    command = begin("compare", "digits", *LONG, *FOUR)
    command.until(2)
    workers, before = command.workers(), set(command.begun())
    assert len(workers) == 2
    for _ in range(times):
        for pid in (command.pid, *workers):  # as a terminal does, to all of them
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.05)
    # The second may come when the program has said its line, and is about to leave.
    assert command.ended() in ((130,) if times == 1 else (130, -number))
    wait(lambda: not any(map(alive, workers)))
    assert set(command.begun()) == before
    assert not (command.out / "summary.json").exists()
    if times == 1:
        assert "Traceback" not in command.said()
        assert f"Go on with: decaf compare --resume {command.out} --task {TOY}" in command.said()
        for name in before:
            whole(command.out / name)


def test_an_interrupt_after_the_last_word_is_no_traceback():
    """While Python itself ends: torch's clean-up used to be interrupted, with a traceback."""
    code = (
        "import atexit, os, signal, sys; from decaf_lora.cli import main; sys.argv = ['decaf', 'nonsense']; "
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert "decaf: command: 'nonsense' is not known" in done.stderr
    assert "Traceback" not in done.stderr


def test_workers_end_with_a_checkpoint_when_their_parent_is_killed(begin):
    command = begin("compare", "digits", *LONG, *FOUR)
    command.until(2)
    workers, before = command.workers(), set(command.begun())
    os.kill(command.pid, signal.SIGKILL)
    wait(lambda: not any(map(alive, workers)))
    assert set(command.begun()) == before
    for name in before:
        whole(command.out / name)


def test_a_worker_that_is_killed_is_one_line_and_the_others_go_on(begin):
    short = [*LONG, "--rounds", "800"]
    command = begin("compare", "digits", *short, *FOUR)
    command.until(2)
    (first, *_), before = command.workers(), set(command.begun())
    (lost,) = [p.parent.name for p in command.out.glob("*/.owner.json") if json.loads(p.read_text())["pid"] == first]
    os.kill(first, signal.SIGKILL)
    assert command.ended() == 2
    lines = [line for line in command.said().splitlines() if line.startswith("decaf: ")]
    assert lines == [
        f"decaf: compare: 1 of 4 runs was lost, {lost}: its process was killed by SIGKILL, perhaps for want of memory. "
        "The others have finished; go on with --resume, perhaps with fewer --jobs."
    ]
    assert len(before) == 2
    assert {p.parent.name for p in command.out.glob("*/summary.json")} == set(command.begun()) - {lost}
    assert len(command.begun()) == 4
    assert begin("compare", "digits", *short, *FOUR, "--resume").ended() == 0
    assert len(json.loads((command.out / "summary.json").read_text())) == 4


def test_a_signal_while_the_workers_load_is_not_lost(begin, tmp_path):
    """No run starts after it."""
    toy = Path(TOY.rpartition(":")[0]).read_text()
    mark = tmp_path / "loading"
    slow = f"    Path({str(mark)!r}).touch()\n    time.sleep(2)\n    return Toy()\n"
    (tmp_path / "slow.py").write_text(f"import time\nfrom pathlib import Path\n\n{toy}\n\ndef make():\n{slow}")
    command = begin("compare", "digits", *LONG, "--task", f"{tmp_path / 'slow.py'}:make", *FOUR)
    wait(mark.exists)
    os.kill(command.pid, signal.SIGINT)
    assert command.ended() == 130
    assert command.said().splitlines()[-1] == "decaf: stopped before anything was written."
    assert "Traceback" not in command.said()
    assert not command.out.exists()
