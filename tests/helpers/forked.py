"""Processes forked from one server that has loaded everything: a start costs milliseconds, a cold one 5 s of CPU time.

Each is a real process, with a process group, signals, limits and an exit code of its own. The server computes nothing.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path

from command import decaf

PATIENCE = 300
"""Seconds against a hang; a busy machine may need many."""

CONTEXT = multiprocessing.get_context("forkserver")
# Modules of installed packages alone: the server of Python 3.11 does not know where the tests are, and says nothing.
CONTEXT.set_forkserver_preload(
    [
        *("decaf_lora.runs.compare", "decaf_lora.runs.several", "decaf_lora.runs.launched", "decaf_lora.runs.folder"),
        *("decaf_lora.report", "decaf_lora.tasks", "peft", "transformers.models.bert.modeling_bert", "filelock"),
        *("decaf_lora.integrations.trainer", "decaf_lora.integrations.federated", "decaf_lora.cli", "pytest"),
    ]
)


def begin(log: Path) -> None:
    """Starts the server, which loads while this process goes on. What it and all that it forks say goes to `log`."""
    kept = {number: os.dup(number) for number in (1, 2)}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for number in kept:
            os.dup2(file, number)
        forkserver.ensure_running()
    finally:
        for number, before in kept.items():
            os.dup2(before, number)
            os.close(before)
        os.close(file)


class Command:
    """`decaf` in a process and a process group of its own; what it says is in the files `out` and `err` of `folder`.

    Args:
        folder: made if it is not there.
        arguments: of the command.
        before: a function of a module, called in the process before the command.
    """

    def __init__(self, folder: Path, *arguments, before=None) -> None:
        folder.mkdir(exist_ok=True)
        self.out, self.err = folder / "out", folder / "err"
        self.process = CONTEXT.Process(target=_command, args=(self.out, self.err, before, arguments))
        self.process.start()

    def ended(self) -> tuple[int, str]:
        """The exit code, and what it has said on standard error."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode, self.err.read_text()


def _command(out, err, before, arguments):
    os.setpgid(0, 0)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    own_server()
    if before is not None:
        before()
    sys.exit(decaf(*arguments))


def own_server() -> None:
    """Makes a forked process like one that a shell has started, with a fork server of its own for what it starts.

    The workers of a comparison come from that server, which is in the process group of the command. Without this call
    a process that was forked would start a server that loads everything again; this one is forked as well.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server that has forked this process ignores it
    before = util.spawnv_passfds
    util.spawnv_passfds = _fork_server
    try:
        forkserver.ensure_running()
    finally:
        util.spawnv_passfds = before


def _fork_server(path, args, passed) -> int:
    """In place of starting Python: multiprocessing's resource tracker is started, its fork server is forked."""
    if "multiprocessing.forkserver" not in args[-1]:
        return _start(path, args, passed)
    if pid := os.fork():
        return pid
    code = 1
    try:
        kept = {0, 1, 2, *passed}
        for number in [int(name) for name in os.listdir("/proc/self/fd")]:
            if number not in kept:
                with contextlib.suppress(OSError):  # that of the list itself
                    os.close(number)
        forkserver._forkserver._lock = threading.Lock()  # held while the server is started
        resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
        exec(args[-1], {})
    except SystemExit:
        code = 0
    finally:
        os._exit(code)


_start = util.spawnv_passfds
