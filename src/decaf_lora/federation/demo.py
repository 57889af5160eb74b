"""What does a federation look like? Five agents on this machine, each a process; one is killed and comes back.

The processes talk over TLS with keys of their own, as on five machines. The modules are imported once and the processes
forked, so that five agents start in a second.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from decaf_lora import recipes
from decaf_lora.config import AlgorithmConfig, RunConfig
from decaf_lora.errors import UserError
from decaf_lora.federation import agent, commands, file, keys, status
from decaf_lora.federation.site import Site

NAMES = ("alice", "bob", "carol", "dave", "erin")
KILLED = "carol"

_LIMIT = 900.0
"""Seconds after which the demo ends what still runs."""

_AWAY = 3
"""Rounds that the others go on before the killed agent is started again."""


@dataclass
class Happened:
    """Something that a person should see in the report."""

    at: float
    """Seconds since the start."""
    what: str


def prepare(out: Path, rounds: int, names: Sequence[str] = NAMES) -> Path:
    """Makes keys, requests and the sealed file of a federation on this machine, as its people would; the file."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"out: {out} is not empty; choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    base = recipes.get("digits")
    values = {name: getattr(base, name) for name in RunConfig.model_fields}
    algorithm = AlgorithmConfig(name="decaf_tracked", messages="int8")
    config = RunConfig.model_validate({**values, "algorithm": algorithm, "agents": len(names), "rounds": rounds})
    path = out / "demo.yaml"
    commands.init(path, config, names, "complete", limits=file.Limits(patience=10, give_up=60))
    addresses = zip(names, free_addresses(len(names)), strict=True)
    requests = [commands.request(path, name, address)[0] for name, address in addresses]
    commands.seal(path, requests)
    return path


def run(out: Path, *, rounds: int = 30, show: Callable[[RenderableType], None] = lambda _: None) -> int:
    """Runs the demo into the folder `out`; 0 only if all five ended well and the killed one came back.

    Args:
        out: a new folder.
        rounds: of the federation.
        show: draws the table of the agents, twice a second.
    """
    import peft  # noqa: F401 - for all agents, see below

    path = prepare(out, rounds)
    told = keys.fingerprint(file.read_signed(path).organiser)
    # A fork inherits the modules, peft among them; other systems start anew and import again.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    began, story = time.monotonic(), list[Happened]()

    def start(name: str) -> BaseProcess:
        process: BaseProcess = context.Process(target=_agent, args=(path, name, told), name=name)
        process.start()
        return process

    def happened(what: str) -> None:
        story.append(Happened(time.monotonic() - began, what))

    with ExitStack() as leave:
        processes: dict[str, BaseProcess] = {}
        leave.callback(_kill, processes)
        for name in NAMES:
            processes[name] = start(name)
        happened("five agents started, each a process with its own key and data")
        killed_at: int | None = None
        back: int | None = None
        away = False
        while time.monotonic() - began < _LIMIT:
            said = {name: _read(path, name) for name in NAMES}
            show(table(said, story))
            others = max((s.round for n, s in said.items() if s and n != KILLED), default=0)
            mine = said[KILLED]
            if killed_at is None and mine is not None and mine.round >= rounds // 3:
                processes[KILLED].kill()
                processes[KILLED].join()
                killed_at, away = mine.round, True
                happened(f"{KILLED} killed (SIGKILL) after round {killed_at}")
            elif away and killed_at is not None and others >= min(killed_at + _AWAY, rounds - 2):
                processes[KILLED] = start(KILLED)
                away = False
                happened(f"{KILLED} started again; the others have done {others} rounds")
            elif back is None and mine is not None and mine.returned is not None:
                back = mine.returned
                happened(f"{KILLED} is back, in round {back}")
            if not away and not any(process.is_alive() for process in processes.values()):
                break
            time.sleep(0.5)
        codes = {name: process.exitcode for name, process in processes.items()}
    said = {name: _read(path, name) for name in NAMES}
    last = said[KILLED]
    if back is None and last is not None and last.returned is not None:
        back = last.returned
        happened(f"{KILLED} is back, in round {back}")
    good = killed_at is not None and back is not None and all(code == 0 for code in codes.values())
    happened("all five ended well" if good else f"exit codes: {', '.join(f'{n} {c}' for n, c in codes.items())}")
    show(table(said, story))
    (out / "report.md").write_text(_report(said, story, codes))
    return 0 if good else 1


def table(said: dict[str, status.AgentStatus | None], story: Sequence[Happened]) -> RenderableType:
    """The agents side by side, and what has happened."""
    made = Table(show_edge=False, pad_edge=False)
    for title in ("agent", "state", "round", "score", "at the start", "missed", "links up"):
        made.add_column(title, justify="left" if title in ("agent", "state") else "right")
    for name, one in said.items():
        made.add_row(*(_row(name, one)))
    return Group(made, *(Text(f"{event.at:5.0f} s  {event.what}") for event in story))


def _row(name: str, one: status.AgentStatus | None) -> tuple[str, ...]:
    if one is None:
        return name, "starting", "", "", "", "", ""
    return (
        name,
        one.state,
        f"{one.round}/{one.rounds}",
        "" if one.score is None else f"{one.score:.3f}",
        "" if one.score_at_start is None else f"{one.score_at_start:.3f}",
        str(sum(edge.missed for edge in one.neighbours)),
        f"{sum(edge.up for edge in one.neighbours)}/{len(one.neighbours)}",
    )


def _report(said: dict[str, status.AgentStatus | None], story: Sequence[Happened], codes: dict[str, int | None]) -> str:
    lines = ["# A federation of five on one machine", ""]
    lines += [f"- {event.at:.0f} s: {event.what}" for event in story]
    lines += ["", "| agent | exit code | state | round | score | at the start | rounds missed | bytes sent |"]
    lines += ["|---|---:|---|---:|---:|---:|---:|---:|"]
    for name, one in said.items():
        *cells, _ = _row(name, one)
        sent = "" if one is None else f"{sum(edge.sent for edge in one.neighbours):,}"
        lines.append("| " + " | ".join([cells[0], str(codes[name]), *cells[1:], sent]) + " |")
    lines += ["", "An agent misses a round once for each neighbour whose message was not there."]
    lines += ["", "Each agent's folder holds its adapter, records and report; NAME.log is what it printed."]
    return "\n".join(lines) + "\n"


def _read(path: Path, name: str) -> status.AgentStatus | None:
    try:
        return status.read(status.file_of(path, name))
    except UserError:
        return None


def free_addresses(count: int) -> list[str]:
    """Addresses on this machine at which nobody listens."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in found]


def _agent(path: Path, name: str, told: str) -> None:
    """One agent's process; what it prints goes to its log."""
    log = os.open(path.with_name(f"{name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    import torch

    torch.set_num_threads(1)  # five processes share the machine
    address = next(m.address for m in file.read_signed(path).agents if m.name == name)
    site = Site(path, name, path.with_name(name), told=told, bind=address, share=True, alone=False)
    sys.exit(agent.run(site))


def _kill(processes: dict[str, BaseProcess]) -> None:
    for process in processes.values():
        process.kill()
