"""How long does a round take with more processes, and what crosses between them?

    python benchmarks/torchrun.py [--agents 4 8 16] [--ranks 1 2] [--repeats N] [--json FILE]

Rounds: the command itself, `decaf run digits` (a CLIP with 0.2 million parameters, rank 2, ring, 5 steps of 16
examples), simulated and under torchrun; the table shows each phase's fastest round of all repeats, since other work on
the machine only ever adds. Every process computes with one thread. Wire: exchanges of factors as large as those of
rank 8 on 48 layers of width 768; payload is what the engine sends, traffic what the loopback interface counts,
TCP headers included, against the bytes of the factors that have to cross.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PHASES = ("train", "exchange", "combine", "measure")
LAYERS, RANK, WIDTH = 48, 8, 768


def launch(ranks: int, *arguments: str) -> str:
    """Standard output of `python ARGUMENTS` in so many processes; 0: without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "127.0.0.1:0"]
    command = [sys.executable, *(launcher if ranks else []), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def one_round(agents: int, ranks: int, rounds: int) -> dict[str, float]:
    """Phase -> seconds of its fastest round; ranks 0: simulated."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--agents", str(agents), "--rounds", str(rounds), "--evaluate-every", str(rounds)]
        options += ["--partition", "iid", "--checkpoint-every", str(rounds), "--out", f"{folder}/run"]
        options += ["--engine", "torchrun"] if ranks else []
        launch(ranks, "-m", "decaf_lora", "run", "digits", *options)
        records = [json.loads(line) for line in Path(folder, "run", "records.jsonl").read_text().splitlines()]
    return {phase: min(r["seconds"][phase] for r in records[1:]) for phase in PHASES}


def time_rounds(agents: list[int], ranks: list[int], repeats: int, rounds: int) -> list[dict[str, Any]]:
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for _ in range(repeats):  # in turn, so that a busy machine slows all alike
        for n in agents:
            for world in (0, *ranks):
                got = one_round(n, world, rounds)
                best = rows.setdefault((n, world), {"agents": n, "ranks": world, **got})
                best |= {phase: min(best[phase], got[phase]) for phase in PHASES}
    return [{**row, "round": sum(row[phase] for phase in PHASES)} for row in rows.values()]


def on_the_loopback() -> int:
    """Bytes that the loopback interface has received."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def exchange(agents: int, graph: str, wire: str) -> None:
    """In a process of torchrun: rank 0 prints what an exchange costs."""
    import torch

    from decaf_lora import graphs
    from decaf_lora.engines import Torchrun, connect

    with connect(device="cpu") as processes:
        engine = Torchrun(agents, processes, wire)  # type: ignore[arg-type]
        mixing = graphs.as_schedule(graphs.parse(graph, agents, 0)).at(0)
        n = len(engine.agents)
        message = {f"A/{k}": torch.randn(n, RANK, WIDTH) for k in range(LAYERS)}
        message |= {f"B/{k}": torch.randn(n, WIDTH, RANK) for k in range(LAYERS)}
        seconds, traffic, payload = [], [], []
        for _ in range(8):
            engine.any(False)
            before, sent, started = on_the_loopback(), engine.bytes_sent, time.perf_counter()
            engine.start(message, mixing, 1).wait()
            seconds.append(time.perf_counter() - started)
            engine.any(False)
            traffic.append(on_the_loopback() - before)
            payload.append(sum(processes.share("sent", engine.bytes_sent - sent)))
        homes = {agent: rank for rank, block in enumerate(engine.blocks) for agent in block}
        pairs = {
            (j, homes[i]) for i in homes for j in homes if mixing.weights[i, j] and homes[i] != homes[j]
        }  # each message once per rank that needs it
        factors = len(pairs) * LAYERS * RANK * 2 * WIDTH * 4
        if processes.is_main:
            facts = {"agents": agents, "ranks": processes.world_size, "graph": graph, "wire": wire, "factors": factors}
            print(json.dumps({**facts, "payload": payload[0], "traffic": min(traffic), "seconds": min(seconds)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--exchange", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.exchange:
        exchange(int(given.exchange[0]), *given.exchange[1:])
        return
    rounds = time_rounds(given.agents, given.ranks, given.repeats, given.rounds)
    wires = [
        json.loads(launch(max(given.ranks), __file__, "--exchange", "8", graph, wire))
        for graph, wire in (("ring", "exact"), ("complete", "exact"), ("ring", "bfloat16"), ("ring", "int8"))
        if max(given.ranks) > 1
    ]
    console = Console(highlight=False, width=100)
    table = Table(title="seconds a round")
    for column in ("agents", "ranks", *PHASES, "round"):
        table.add_column(column, justify="right")
    for row in rounds:
        ranks = str(row["ranks"]) if row["ranks"] else "simulate"
        table.add_row(str(row["agents"]), ranks, *(f"{row[key]:.3f}" for key in (*PHASES, "round")))
    console.print(table)
    table = Table(title="an exchange of 8 agents")
    for column in ("ranks", "graph", "wire", "factors (MB)", "payload / factors", "traffic / factors", "seconds"):
        table.add_column(column, justify="right")
    for row in wires:
        shares = (f"{row[key] / row['factors']:.4f}" for key in ("payload", "traffic"))
        size = f"{row['factors'] / 1e6:.1f}"
        table.add_row(str(row["ranks"]), row["graph"], row["wire"], size, *shares, f"{row['seconds']:.3f}")
    console.print(table)
    if given.json:
        from decaf_lora.records import environment

        facts = {"environment": environment(), "rounds": rounds, "exchanges": wires}
        given.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
