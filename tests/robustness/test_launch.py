"""Processes of one launch of which the first falls silent: `--timeout` holds also where rank 0 keeps the store."""

import os
import signal
import socket
import time

import pytest

import faulty
import ranks
from command import SMALL

TASK = f"{faulty.__file__}:Stopped"


def begin(folder, rank, world, port, *arguments):
    """A rank of `decaf run`, from a process that has loaded everything; where it writes."""
    log = folder / f"{rank}.log"
    variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCH_CPP_LOG_LEVEL": "FATAL"}
    command = ("run", "digits", *SMALL, "--engine", "torchrun", *arguments)
    process = ranks.CONTEXT.Process(target=ranks._child, args=(log, variables, ranks.decaf, command, ()))
    process.start()
    return process, log


def said(log):
    return [line for line in log.read_text().splitlines() if line.startswith("decaf: ")]


@pytest.fixture
def finish():
    """Ends what a test has started."""
    started = []
    yield started
    for process in started:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()


def test_ranks_do_not_wait_for_ever_for_a_rank_0_that_is_stopped(tmp_path, finish):
    port, out = ranks.free_port(), tmp_path / "run"
    options = ("--task", TASK, "--timeout", 20, "--out", out)
    begun = [begin(tmp_path, rank, 3, port, *options) for rank in range(3)]
    finish += [process for process, _ in begun]
    for process, _ in begun[1:]:
        process.join(timeout=150)  # against a hang; they need about 20 + 3 s after the stop
    assert [process.exitcode for process, _ in begun] == [None, 2, 2]
    (line,) = [line for _, log in begun for line in said(log)]
    assert line.startswith("decaf: ranks: rank 0 of 3 did not answer within 20 s; --timeout waits longer.")
    assert "Traceback" not in "".join(log.read_text() for _, log in begun)


def test_another_program_on_the_port_is_one_line(tmp_path, finish):
    """It accepts, and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        process, log = begin(tmp_path, 1, 2, listener.getsockname()[1], "--timeout", 4, "--out", tmp_path / "run")
        finish.append(process)
        until = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < until:
            time.sleep(0.1)
    assert process.exitcode == 2
    (line,) = said(log)
    assert "does not answer as rank 0 of this run within 4 s; is the port another program's?" in line
