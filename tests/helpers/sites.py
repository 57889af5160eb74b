"""Sites of a federation on this machine: each agent a process, forked from one that has imported everything.

As a program it does what its standard input says, one line each: `start FOLDER NAME OPTION...`, `kill FOLDER NAME`,
`term FOLDER NAME`, `stop FOLDER NAME` (SIGSTOP), `continue FOLDER NAME`, `alive FOLDER NAME`, `wait FOLDER NAME`. It
answers each line, a start with the process's number, a wait with the exit code. An option @NAME=VALUE of a start sets
an environment variable; @NAMESPACE is the network namespace to run in.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import network

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP, "continue": signal.SIGCONT}

WAIT = 300.0
"""Seconds until a test stops to wait for a process."""


class Program:
    """The program below, for many federations."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout.readline() == "ready\n"

    def close(self):
        self.process.stdin.close()
        self.process.wait(WAIT)


class Sites:
    """The sites of the federation in a folder."""

    def __init__(self, program, folder):
        self.program, self.folder = program.process, folder

    def __call__(self, what, name, *options):
        self.program.stdin.write(" ".join(map(str, (what, self.folder, name, *options))) + "\n")
        self.program.stdin.flush()
        return self.program.stdout.readline().strip()

    def wait(self, *names):
        """Exit codes."""
        return {name: int(self("wait", name)) for name in names}

    def brake(self, name, steps):
        """From now on, `name` takes no step of training after its first `steps` in a process: see held.py."""
        part = self.folder / f"{name}.part"
        part.write_text(str(steps))
        part.rename(self.folder / f"{name}.brake")

    def held(self, name):
        """Whether it stands where `brake` has said."""
        held, brake = self.folder / f"{name}.held", self.folder / f"{name}.brake"
        return held.exists() and int(held.read_text()) >= int(brake.read_text())

    def release(self, name):
        (self.folder / f"{name}.brake").unlink(missing_ok=True)

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()


def _child(folder, name, options):
    for setting in [option[1:] for option in options if option.startswith("@")]:
        variable, _, value = setting.partition("=")
        if variable == "NAMESPACE":
            network.enter(value)
        else:
            os.environ[variable] = value
    options = [option for option in options if not option.startswith("@")]
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(0)
    os.environ["BRAKE"] = str(folder / f"{name}.brake")
    from decaf_lora.cli import main

    sys.exit(main(["agent", str(folder / "fed.yaml"), "--name", name, "--out", str(folder / name), *options]))


def _serve():
    import peft  # noqa: F401 - these once, for all
    import torch

    import decaf_lora.federation.agent
    import decaf_lora.report  # noqa: F401

    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    running = {}
    print("ready", flush=True)
    for line in sys.stdin:
        what, folder, name, *options = line.split()
        if what == "start":
            process = context.Process(target=_child, args=(Path(folder), name, options))
            process.start()
            running[folder, name] = process
            print(process.pid, flush=True)
        elif what in SIGNALS:
            alive = running[folder, name].is_alive()
            if alive:
                os.kill(running[folder, name].pid, SIGNALS[what])
            print("sent" if alive else "has ended", flush=True)
        elif what == "alive":
            print("yes" if running[folder, name].is_alive() else "no", flush=True)
        else:
            running[folder, name].join(WAIT)
            code = running[folder, name].exitcode
            print(-1000 if code is None else code, flush=True)
    for process in running.values():
        process.kill()


if __name__ == "__main__":
    _serve()
