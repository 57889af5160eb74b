"""How long does a round take with more processes, and what crosses between them?

    python benchmarks/torchrun.py [--agents 4 8 16] [--ranks 1 2] [--repeats N] [--json FILE] [--only overlap]

Rounds: the command itself, `decaf run digits` (a CLIP with 0.2 million parameters, rank 2, ring, 5 steps of 16
examples), simulated and under torchrun; the table shows each phase's fastest round of all repeats, since other work on
the machine only ever adds. Every process computes with one thread. Wire: exchanges of factors as large as those of
rank 8 on 48 layers of width 768; payload is what the engine sends, traffic what the loopback interface counts,
TCP headers included, against the bytes of the factors that have to cross. Overlap: runs of 6 rounds with messages of
that size (dlora, combine-adapt, complete graph, evaluated every round), in turn by an engine that waits for what it has
started at once and by the one that does not; over the loopback as it is, and slowed down to a network of 1 Gbit/s by
`tc` in a network namespace of its own (Linux, where `unshare -rn` is allowed).
"""

import argparse
import functools
import json
import os
import statistics
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


SLOWED = 'ip link set lo up && tc qdisc add dev lo root tbf rate {} burst 512kb latency 1s && exec "$@"'


def launch(ranks: int, *arguments: str, network: str = "") -> str:
    """Standard output of `python ARGUMENTS` in so many processes; 0: without torchrun.

    `network`: a rate such as 1gbit to which a loopback of their own is slowed down.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "127.0.0.1:0"]
    command = ["unshare", "-rn", "bash", "-c", SLOWED.format(network), "--"] if network else []
    command += [sys.executable, *(launcher if ranks else []), *arguments]
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
            engine.anyone_stops(False)
            before, sent, started = on_the_loopback(), engine.bytes_sent, time.perf_counter()
            engine.start(message, mixing, 1).wait()
            seconds.append(time.perf_counter() - started)
            engine.anyone_stops(False)
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


def overlap(agents: int, rounds: int, repeats: int) -> None:
    """In a process of torchrun: rank 0 prints the seconds of whole runs, waiting and overlapped in turn."""
    from decaf_lora import Run, TrainingConfig, algorithms, graphs, partition
    from decaf_lora.adapters.adapter import Tensors
    from decaf_lora.engines import Pending, Torchrun, connect
    from decaf_lora.graphs import Graph
    from suite.models import Points

    class Waiting(Torchrun):
        """Waits for what it starts."""

        def start(self, message: Tensors, graph: Graph, exchange: int, sizes: Any = None) -> Pending[Any]:
            inbox = super().start(message, graph, exchange, sizes).wait()
            return Pending(lambda: inbox)

        def collect(self, tensors: Tensors) -> Pending[Tensors]:
            collected = super().collect(tensors).wait()
            return Pending(lambda: collected)

    with connect(device="cpu") as processes:
        seconds: dict[str, list[float]] = {"waiting": [], "overlapped": []}
        exposed: dict[str, list[float]] = {"waiting": [], "overlapped": []}
        task = Points(16 * agents, LAYERS, WIDTH, RANK, tests=48)
        shards = partition.iid(task.labels, agents, seed=0)
        training = TrainingConfig(steps=1, batch_size=2, agents_per_pass=4)
        for _ in range(repeats):
            for name, kind in (("waiting", Waiting), ("overlapped", Torchrun)):
                run = Run(
                    task,
                    algorithms.dlora(order="combine-adapt"),
                    graphs.complete(agents),
                    shards,
                    training,
                    rounds=rounds,
                    evaluate_every=1,
                    measure_every=rounds + 1,
                    common_start=False,
                    engine=functools.partial(kind, processes=processes),
                )
                run.engine.anyone_stops(False)  # together
                started = time.perf_counter()
                records = list(run.train())
                run.engine.anyone_stops(False)
                seconds[name].append(time.perf_counter() - started)
                exposed[name].append(sum(record.seconds.get("exchange", 0.0) for record in records))
                run.close()
        if processes.is_main:
            print(json.dumps({"agents": agents, "rounds": rounds, "seconds": seconds, "exchange": exposed}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=("rounds", "exchanges", "overlap"))
    parser.add_argument("--exchange", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--overlap", nargs=3, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.overlap:
        overlap(*given.overlap)
        return
    if given.exchange:
        exchange(int(given.exchange[0]), *given.exchange[1:])
        return
    parts = (given.only,) if given.only else ("rounds", "exchanges", "overlap")
    ranks = max(given.ranks)
    results: dict[str, Any] = {}
    console = Console(highlight=False, width=100)
    if "rounds" in parts:
        results["rounds"] = time_rounds(given.agents, given.ranks, given.repeats, given.rounds)
        console.print(rounds_table(results["rounds"]))
    if "exchanges" in parts and ranks > 1:
        results["exchanges"] = [
            json.loads(launch(ranks, __file__, "--exchange", "8", graph, wire))
            for graph, wire in (("ring", "exact"), ("complete", "exact"), ("ring", "bfloat16"))
        ]
        console.print(exchanges_table(results["exchanges"]))
    if "overlap" in parts and ranks > 1:
        results["overlap"] = []
        for network in ("", "1gbit"):
            repeats = str(2 * given.repeats)
            try:
                got = json.loads(launch(ranks, __file__, "--overlap", "8", "6", repeats, network=network))
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                print(f"no overlap over {network or 'loopback'}: {error}", file=sys.stderr)
                continue
            load = os.getloadavg()[0]
            results["overlap"].append({"network": network or "loopback", "ranks": ranks, "load": load, **got})
        console.print(overlap_table(results["overlap"]))
    if given.json:
        from decaf_lora.records import environment

        given.json.write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def rounds_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("seconds a round", "agents", "ranks", *PHASES, "round")
    for row in rows:
        ranks = str(row["ranks"]) if row["ranks"] else "simulate"
        table.add_row(str(row["agents"]), ranks, *(f"{row[key]:.3f}" for key in (*PHASES, "round")))
    return table


def exchanges_table(rows: list[dict[str, Any]]) -> Table:
    columns = ("ranks", "graph", "wire", "factors (MB)", "payload / factors", "traffic / factors", "seconds")
    table = _table("an exchange of 8 agents", *columns)
    for row in rows:
        shares = (f"{row[key] / row['factors']:.4f}" for key in ("payload", "traffic"))
        size = f"{row['factors'] / 1e6:.1f}"
        table.add_row(str(row["ranks"]), row["graph"], row["wire"], size, *shares, f"{row['seconds']:.3f}")
    return table


def overlap_table(rows: list[dict[str, Any]]) -> Table:
    """Seconds a round; hidden: the difference of the fastest runs, and the median of the pairs' differences."""
    columns = ("network", "waiting", "overlapped", "hidden", "hidden (median)", "waits for messages", "load")
    table = _table("seconds a round, 8 agents, complete graph", *columns)
    for row in rows:
        waiting, overlapped = (row["seconds"][key] for key in ("waiting", "overlapped"))
        pairs = statistics.median(a - b for a, b in zip(waiting, overlapped, strict=True))
        numbers = [min(waiting), min(overlapped), min(waiting) - min(overlapped), pairs]
        shown = [f"{number / row['rounds']:.3f}" for number in numbers]
        exposed = [f"{min(row['exchange'][key]) / row['rounds']:.3f}" for key in ("waiting", "overlapped")]
        table.add_row(row["network"], *shown, " / ".join(exposed), f"{row['load']:.1f}")
    return table


if __name__ == "__main__":
    main()
