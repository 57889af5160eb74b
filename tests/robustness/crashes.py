"""Runs that are killed at a write, and what is left then.

Every time that a run opens a file of its folder to write, or makes, renames or removes one, it can die. `dying` runs in
a process that is killed by SIGKILL before the k-th such moment; `power_failed` then takes from the files what was never
synced, as a machine does that loses power. A run that goes on must end bit-equal to one that was never killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

from command import SMALL, decaf
from decaf_lora.records import read_records
from decaf_lora.runs import checkpoint
from forked import CONTEXT

WRITES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link"}


def command(out: Path, *more) -> tuple:
    return ("run", "digits", *SMALL, "--rounds", 3, "--out", out, *more)


def reference(out: Path) -> None:
    """The run that is never killed."""
    assert dying(out, out.parent / "reference.json", None) == 0


def moments(folder: Path) -> int:
    """How many moments to die at a run has, and a resume of it in its last round."""
    dying(folder / "counted", folder / "count.json", None)
    return json.loads((folder / "count.json").read_text())["count"]


def dying(out: Path, ledger: Path, moment: int | None, *more) -> int | None:
    """Runs into `out` until `moment` (None: to its end), and notes in `ledger` what was synced; the exit code."""
    process = CONTEXT.Process(target=_child, args=(str(out), str(ledger), moment, command(out, *more)))
    process.start()
    process.join()
    return process.exitcode


def _child(out: str, ledger: str, moment: int | None, arguments: tuple) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    state = {"count": 0, "synced": {}, "before": None}

    def note() -> None:
        descriptor = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, json.dumps(state).encode())
        os.close(descriptor)

    def hook(event: str, values: tuple) -> None:
        if not (event in WRITES or (event == "open" and (values[2] or 0) & (os.O_WRONLY | os.O_RDWR))):
            return
        path = os.fsdecode(values[0]) if isinstance(values[0], str | bytes | os.PathLike) else ""
        if event in ("os.remove", "os.rmdir") and values[1] != -1:  # below an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{values[1]}"), path)
        if not path.startswith(out):
            return
        state["count"] += 1
        if event == "os.rename" and path in state["synced"]:
            state["synced"][os.fsdecode(values[1])] = state["synced"].pop(path)
        if state["count"] == moment:
            state["before"] = f"{event} {os.path.relpath(path, out)}"
            note()
            os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        with contextlib.suppress(OSError):
            state["synced"][os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    os.fsync = synced
    sys.addaudithook(hook)
    code = decaf(*arguments)
    note()
    os._exit(code)


def power_failed(out: Path, ledger: Path) -> None:
    """Cuts the records to what was synced."""
    synced = json.loads(ledger.read_text())["synced"]
    path = out / "records.jsonl"
    if path.exists():
        os.truncate(path, min(synced.get(str(path), 0), path.stat().st_size))


def outcome(out: Path) -> tuple[dict, list]:
    """Every tensor of the last checkpoint, and the records but for their times."""
    tensors, values = checkpoint.load_latest(out / "checkpoints")
    assert values["round"] == 3
    return tensors, [dataclasses.replace(r, seconds={}) for r in read_records(out / "records.jsonl")]


def same(ours: Path, theirs: Path) -> bool:
    (a, mine), (b, other) = outcome(ours), outcome(theirs)
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a) and mine == other


def survives(folder: Path, whole: Path, moment: int, power: bool) -> tuple[str | None, str]:
    """Kills at `moment` (and loses power), goes on, and compares; what is wrong (None: nothing), and what was next."""
    out, ledger = folder / "run", folder / "ledger.json"
    if (code := dying(out, ledger, moment)) != -signal.SIGKILL:
        return f"it ended with exit code {code} instead of being killed", ""
    before = json.loads(ledger.read_text())["before"]
    if power:
        power_failed(out, ledger)
    return _gone_on(out, ledger, whole), before


def _gone_on(out: Path, ledger: Path, whole: Path) -> str | None:
    more = (
        ("--resume",)
        if out.exists() and any(not p.name.startswith((".lock", ".owner.json")) for p in out.iterdir())
        else ()
    )
    if (code := dying(out, ledger, None, *more)) != 0:
        return f"going on with {more} ended with exit code {code}; {sorted(p.name for p in out.iterdir())}"
    if not same(out, whole):
        return "it ended with other numbers"
    if left := [p.name for p in out.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"]:
        return f"it left {left}"
    return None
