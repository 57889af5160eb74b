"""Real processes on loopback for the tests of the torchrun engine, and what they do there.

They are forked from a server that has imported torch once, so that a dozen starts cost seconds.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch

from decaf_lora import algorithms, graphs, partition
from decaf_lora.algorithms import GAUGES
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.cli import main
from decaf_lora.config import AlgorithmConfig, TrainingConfig
from decaf_lora.engines import Simulate, Torchrun, connect
from decaf_lora.errors import UserError
from decaf_lora.run import Run
from decaf_lora.runs import checkpoint
from forked import CONTEXT
from rounds import sent
from toy import Toy


@dataclass
class Ended:
    """How the started ranks ended, by rank."""

    codes: dict[int, int]
    output: dict[int, str]

    @property
    def lines(self) -> list[str]:
        """Everything that was printed, by all ranks, line by line."""
        return [line for text in self.output.values() for line in text.splitlines() if line.strip()]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(folder: Path, world: int, work, *arguments, ranks=None, port=None, environment=None, by_rank=None) -> Ended:
    """Runs `work(*arguments)` in `ranks` (all by default) of `world` processes; the exit code is what it returns.

    `by_rank`: rank -> further arguments of that rank alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, ranks = port or free_port(), range(world) if ranks is None else ranks
    children = {}
    for rank in ranks:
        variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(environment or {})}
        own = (by_rank or {}).get(rank, ())
        children[rank] = CONTEXT.Process(target=_child, args=(folder / f"{rank}.log", variables, work, arguments, own))
        children[rank].start()
    for child in children.values():
        child.join(timeout=600)  # against a hang; a busy machine may well take minutes
        if child.is_alive():
            child.kill()
            child.join()
    logs = {rank: folder / f"{rank}.log" for rank in ranks}
    return Ended({r: c.exitcode for r, c in children.items()}, {r: p.read_text() for r, p in logs.items()})


def _child(log, variables, work, arguments, own):
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({k: str(v) for k, v in variables.items()})
    torch.set_num_threads(1)
    try:
        code = work(*arguments, *own)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def decaf(*arguments) -> int:
    """The command in a rank."""
    return main([str(a) for a in arguments])


# --- equality with simulate ---------------------------------------------------------------------------------

GRAPHS = ("ring", "complete", "star", "erdos-renyi:0.6")
COVERING = ("centralized", "decaf", "decaf_tracked", "dlora", "dlora_fa", "fedavg", "local")
"""Algorithms that run on every graph, at every N, and with every value of every option. Between them they use every way
in which a message is mixed and forwarded, and every transform that an option asks for. The others combine by the
same functions, so each runs once, on 5 agents over the star, and with its own options alone."""


def cases(world: int = 1) -> list[tuple[str, str, int]]:
    """(algorithm, graph, N): the graph matters only to algorithms that use it."""
    out = []
    for name, kind in algorithms.KINDS.items():
        topology = kind.build().topology
        if name not in COVERING:
            out.append((name, "star", 5))
            continue
        for graph in GRAPHS if topology == "graph" else GRAPHS[:1]:
            for n in (2, 3, 5, 8):
                if (1 if topology == "pooled" else n) >= world:
                    out.append((name, graph, n))
    return out


def small_task(device="cpu") -> Toy:
    """What all these runs train on."""
    task = Toy(examples=60, tests=12, extras=True)
    task.model.to(device)
    return task


def make_run(case, engine, task=None, options=None, **values) -> Run:
    name, graph, n = case
    task = task or small_task()
    shards = partition.dirichlet(task.labels, n, alpha=0.5, seed=1)
    training = TrainingConfig(epochs=0.2, batch_size=3, learning_rate=0.02, agents_per_pass=1)
    values = {"rounds": 2, "evaluate_every": 2, "training": training, **values}
    return Run(
        task, algorithms.make(name, **(options or {})), graphs.parse(graph, n, 0), shards, engine=engine, **values
    )


def outcome(run: Run) -> dict:
    """Adapters of all agents, optimizer moments and records, without what may differ between engines."""
    whole = list(run.train())
    run.told = sum(record.wire_bytes or 0 for record in whole)
    records = [{**vars(record), "seconds": None, "wire_bytes": None} for record in whole]
    return {"tensors": run.snapshot()[0], "records": records}


def same(ours: dict, theirs: dict) -> bool:
    a, b = ours["tensors"], theirs["tensors"]
    equal = a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
    return equal and ours["records"] == theirs["records"]


def near(ours: dict, theirs: dict) -> bool:
    """The same products and extras to 1e-3 of their norm, and the same bytes: on a GPU kernels depend on the batch."""
    found = []
    for told in (ours, theirs):
        tensors = {name: t.double().cpu() for name, t in told["tensors"].items()}
        layers = [name.removeprefix("adapter/A/") for name in tensors if name.startswith("adapter/A/")]
        found.append({layer: tensors[f"adapter/B/{layer}"] @ tensors[f"adapter/A/{layer}"] for layer in layers})
        found[-1] |= {name: t for name, t in tensors.items() if name.startswith("adapter/extras/")}
    one, two = found
    alike = one.keys() == two.keys() and all(
        float((one[k] - two[k]).norm()) <= 1e-3 * float(two[k].norm()) for k in two
    )
    sent = [[record["bytes_sent"] for record in told["records"]] for told in (ours, theirs)]
    return alike and sent[0] == sent[1]


def reference(path: Path, device="cpu") -> None:
    """What simulate gives for every case; with options on the CPU alone."""
    found = {case: outcome(make_run(case, Simulate, small_task(device))) for case in cases()}
    if device == "cpu":
        found |= {str(case): outcome(run_with_options(case, Simulate)) for case in (*option_cases(), *COMBINED)}
    torch.save(found, path)


def equals(path: Path, world: int, device="cpu") -> int:
    """Prints the cases that differ from the reference, and those whose bytes on the wire are miscounted."""
    expected = torch.load(path, weights_only=False)
    with connect(device=device, timeout=60) as processes:
        for case in cases(world):
            engine = functools.partial(Torchrun, processes=processes)
            run = make_run(case, engine, small_task(processes.device))
            got = outcome(run)
            sent = sum(processes.share("sent", run.engine.bytes_sent))
            if not processes.is_main:
                continue
            if not (same if device == "cpu" else near)(got, expected[case]):
                print("differs:", case)
            if sent != _crossing(run):
                print("bytes:", case, sent, _crossing(run))
    return 0


COMBINED = [
    ("decaf", {}, "base:3", "period"),
    ("dlora", {"tracking": True}, "ring", 2),
    ("decaf", {"order": "combine-adapt", "moments": "transport"}, "star", 1),
    ("decaf", {"order": "combine-adapt", "relay_rank": 4}, "ring", 3),
    ("decaf", {"tracking": True}, "ring", 1, (1, 4, 2, 3, 2, 8)),
    ("decaf", {"order": "combine-adapt"}, "ring", 1, (1, 4, 2, 3, 2, 8)),
    ("dlora_fa", {}, "star", 1, (1, 4, 2, 3, 2, 8)),
    ("decaf", {"relay_rank": 8}, "base:3", "period", (1, 4, 2, 3, 2, 8)),
    ("dlora", {"messages": "int8", "quasi_global": 0.9}, "base:3", "period"),
    ("decaf_tracked", {"messages": "int8", "truncation_feedback": 1.0}, "ring", 2, (1, 4, 2, 3, 2, 8)),
    ("decaf", {"quasi_global": 0.5, "gauge": "balanced", "truncation_feedback": 0.9}, "star", 1),
    ("core", {"tracking": True, "messages": "int8"}, "ring", 2),
    ("fedsa", {"tracking": True, "transforms": ["personal_head", "outer_momentum"]}, "star", 1),
    ("flexlora", {}, "ring", 1, (1, 4, 2, 3, 2, 8)),
    ("decaf", {"transforms": ["clipped"]}, "ring", 2, (1, 4, 2, 3, 2, 8)),
    ("dlora", {"transforms": ["trimmed"]}, "complete", 1),
]
"""Algorithm, its options, graph, exchanges a round, and the agents' ranks where they differ."""
VALUES = {
    "gauge": GAUGES,
    "relay_rank": (4,),
    "tracking_gamma": (0.5,),
    "truncation_feedback": (1.0, 0.5),
    "quasi_global": (0.0, 0.9),
    "interval": (2, "auto"),
    "proximal": (0.5,),
    "server_learning_rate": (0.1,),
    "server_momentum": (0.0,),
    "server_beta_2": (0.5,),
    "server_epsilon": (0.1,),
}
"""Values to try of the options that are not a choice among few."""


def option_cases() -> list[tuple[str, dict, str, int | str]]:
    """(algorithm, options, graph, gossip steps): every algorithm with every value of every option, one at a time."""
    out, covered = [], {p for name in COVERING for p in inspect.signature(algorithms.KINDS[name].build).parameters}
    for name, kind in algorithms.KINDS.items():
        for option, parameter in inspect.signature(kind.build).parameters.items():
            if name not in COVERING and option in covered:
                continue
            values = VALUES.get(option) or _choices(AlgorithmConfig.model_fields[option].annotation)
            assert values, f"ranks.VALUES says no value of {option}"
            gossip_steps = 3 if option == "relay_rank" else 1
            taken = [v for v in values if v != parameter.default and _takes(name, option, v)]
            out += [(name, {option: value}, "ring", gossip_steps) for value in taken]
    return out


def _takes(name: str, option: str, value) -> bool:
    with contextlib.suppress(UserError):
        return bool(algorithms.make(name, **{option: value}))
    return False


def _choices(annotation) -> tuple:
    """Values of a Literal or a bool, also as part of a union."""
    if annotation is bool:
        return (True, False)
    parts = get_args(annotation)
    return parts if get_origin(annotation) is Literal else tuple(v for part in parts for v in _choices(part))


def run_with_options(case, engine, device="cpu") -> Run:
    name, options, graph, gossip_steps, *ranks = case
    task = small_task(device)
    shards = partition.iid(task.labels, 6, seed=0)
    training = TrainingConfig(steps=2, batch_size=4, agents_per_pass=1)
    algorithm, links = algorithms.make(name, **options), graphs.parse(graph, 6, 0)
    values = {"rounds": 3, "evaluate_every": 2, "measure_every": 2, "gossip_steps": gossip_steps, "engine": engine}
    if ranks:
        values["lora"] = [dataclasses.replace(task.default_lora(), r=r, lora_alpha=r + 1) for r in ranks[0]]
    return Run(task, algorithm, links, shards, training, **values)


def equals_with_options(path: Path) -> int:
    """Every option of every algorithm, and several exchanges in a round: prints what differs from the reference."""
    expected = torch.load(path, weights_only=False)
    with connect(device="cpu", timeout=60) as processes:
        for case in (*option_cases(), *COMBINED):
            run = run_with_options(case, functools.partial(Torchrun, processes=processes))
            got = outcome(run)
            sent = sum(processes.share("sent", run.engine.bytes_sent))
            if processes.is_main and not same(got, expected[str(case)]):
                print("differs:", case)
            if processes.is_main and sent != pytest.approx(run.told * 6):
                print("bytes:", case, sent, run.told * 6)
    return 0


def _crossing(run: Run) -> int:
    """Bytes that have to cross between ranks in all rounds, counted one by one."""
    if run.algorithm.topology not in ("graph", "server"):
        return 0
    messages = [sent(run.algorithm, run.adapter, run.state, number) for number in range(1, run.rounds + 1)]
    size = sum(t[0].numel() * t.element_size() for message in messages for t in message.values())
    weights, blocks = run.schedule.at(0).weights, run.engine.blocks
    home = {agent: rank for rank, block in enumerate(blocks) for agent in block}
    pairs = {
        (sender, home[listener])
        for sender in home
        for listener in home
        if weights[listener, sender] and home[sender] != home[listener]
    }
    return len(pairs) * size


# --- the engine by itself -----------------------------------------------------------------------------------


def moves_tensors() -> int:
    """gather, scatter and anyone_stops, with blocks of unequal size, and tensors of every kind."""
    with connect(device="cpu", timeout=60) as processes:
        engine = Torchrun(5, processes)
        everything = {
            "float": torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0)),
            "double": torch.arange(5.0, dtype=torch.float64),
            "bool": torch.tensor([True, False, True, True, False]),
            "long": torch.arange(15).view(5, 3),
            "half": torch.arange(5).to(torch.bfloat16)[:, None],
            "nothing": torch.zeros(5, 0),
        }
        mine = {k: t[engine.agents] for k, t in everything.items()}

        def check(got, wanted):
            assert got.keys() == wanted.keys()
            assert all(got[k].dtype == wanted[k].dtype and torch.equal(got[k], wanted[k]) for k in wanted)

        check(engine.gather(mine), everything)
        check(engine.collect(mine).wait(), everything if processes.is_main else {})
        check(engine.scatter(everything if processes.is_main else {}), mine)
        assert engine.anyone_stops(processes.rank == 1)
        assert not engine.anyone_stops(False)
    return 0


def flies() -> int:
    """Exchanges and collections are under way together while the ranks do other things, and are waited for in any
    order."""
    with connect(device="cpu", timeout=60) as processes:
        engine, simulate = Torchrun(5, processes), Simulate(5)
        message = {"x": torch.randn(5, 300, 40, generator=torch.Generator().manual_seed(0))}
        mine = {k: t[engine.agents] for k, t in message.items()}
        ring, complete = graphs.ring(5), graphs.complete(5)
        if not processes.is_main:
            processes.share("started", None)  # the main one's have started when nobody else has posted anything
        pending = [engine.start(mine, ring, 1), engine.collect(mine), engine.start(mine, complete, 2)]
        if processes.is_main:
            processes.share("started", None)
        assert engine.anyone_stops(processes.rank == 1)
        assert torch.equal(engine.gather(mine)["x"], message["x"])
        pending.append(engine.collect({"x": -mine["x"]}))
        order = [(processes.rank + k) % 4 for k in range(4)]
        got = {k: pending[k].wait() for k in order}
        for k, graph in ((0, ring), (2, complete)):
            expected = simulate.start(message, graph, 1).wait()
            assert torch.equal(got[k].average("x"), expected.average("x")[engine.agents])
        assert torch.equal(got[1]["x"], message["x"]) if processes.is_main else got[1] == {}
        assert torch.equal(got[3]["x"], -message["x"]) if processes.is_main else got[3] == {}
    return 0


def rounds_on_the_wire(wire: str) -> int:
    """What arrives from other ranks is rounded, what is here is exact, and what is not finite stays so."""
    with connect(device="cpu", timeout=60) as processes:
        engine = Torchrun(3, processes, wire)
        x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
        message = {"x": x, "zero": torch.zeros(3, 2), "whole": torch.arange(3), "nan": x[:, 0].clone()}
        message["nan"][:, 1] = torch.inf if processes.rank else torch.nan
        graph = graphs.complete(3)
        mine = {k: t[engine.agents] for k, t in message.items()}
        inbox = engine.start(mine, graph, 1).wait()
        assert isinstance(inbox, Inbox)
        width = {"exact": 4, "bfloat16": 2}[wire]
        each = (20 + 2 + 5) * width + 8
        crossing = {2: 3, 3: 6}[processes.world_size]
        assert engine.wire_bytes(mine, graph) == each * crossing / 3
        for agent in range(3):
            got = {k: t[agent] for k, t in inbox.tensors.items()}
            assert torch.equal(got["zero"], torch.zeros(2))
            assert got["whole"] == agent
            assert not torch.isfinite(got["nan"]).all()
            if agent in engine.agents or wire == "exact":
                assert torch.equal(got["x"], x[agent])
            else:
                assert torch.equal(got["x"], x[agent].bfloat16().float())
    return 0


def sends_own_sizes(wire: str) -> int:
    """Of tensors that are larger than an agent's own size only that part crosses, and zeros arrive for the rest."""
    with connect(device="cpu", timeout=60) as processes:
        engine, simulate = Torchrun(5, processes, wire), Simulate(5)
        generator = torch.Generator().manual_seed(0)
        sizes = {"A": (1, [1, 3, 2, 3, 1]), "B": (2, [1, 3, 2, 3, 1])}
        message = {"A": torch.randn(5, 3, 7, generator=generator), "B": torch.randn(5, 4, 3, generator=generator)}
        for name, (axis, own) in sizes.items():
            for agent, size in enumerate(own):
                message[name][agent].narrow(axis - 1, size, 3 - size).zero_()
        message["whole"] = torch.randn(5, 6, generator=generator)
        graph = graphs.ring(5)
        mine = {k: t[engine.agents] for k, t in message.items()}
        got = engine.start(mine, graph, 1, sizes).wait()
        expected = simulate.start(message, graph, 1).wait()
        for name in message:
            ours, theirs = got.average(name), expected.average(name)[engine.agents]
            assert torch.equal(ours, theirs) if wire == "exact" else torch.allclose(ours, theirs, atol=0.05)
        home = {agent: rank for rank, block in enumerate(engine.blocks) for agent in block}
        pairs = {(j, home[i]) for i in home for j in ((i - 1) % 5, (i + 1) % 5) if home[i] != home[j]}
        width = {"exact": 4, "bfloat16": 2}[wire]
        crossing = sum(sizes["A"][1][j] * (7 + 4) * width + 6 * width for j, _ in pairs)
        assert sum(processes.share("sent", engine.bytes_sent)) == crossing
        assert engine.wire_bytes(mine, graph, sizes) == pytest.approx(crossing / 5)
    return 0


def agents_apart() -> int:
    """One agent a rank: what crosses is what the algorithm sends, also where ranks are unequal."""
    with connect(device="cpu", timeout=60) as processes:
        for name, options in (("decaf", {}), ("dlora", {"tracking": True}), ("dlora_fa", {})):
            task = Toy(examples=60, tests=12, extras=True)
            lora = [dataclasses.replace(task.default_lora(), r=r, lora_alpha=r) for r in (1, 4, 2)]
            shards = partition.iid(task.labels, 3, seed=0)
            engine = functools.partial(Torchrun, processes=processes)
            run = Run(
                task, algorithms.make(name, **options), graphs.star(3), shards, lora=lora, rounds=1, engine=engine
            )
            *_, last = run.train()
            assert last.wire_bytes == pytest.approx(last.bytes_sent), (name, last.wire_bytes, last.bytes_sent)
    return 0


def disagrees(values: dict) -> int:
    """Prints the error that this rank sees."""
    with connect(device="cpu", timeout=60) as processes:
        try:
            processes.agree({"same": [1, 2], **values}, "config")
        except UserError as error:
            print(error)
            return 2 if not error.quiet else 3
    return 0


def fails_together(rank: int) -> int:
    """One rank meets a mistake while the others do not."""
    with connect(device="cpu", timeout=60) as processes, processes.together():
        if processes.rank == rank:
            raise UserError("file: missing.")
    return 0


# --- checkpoints --------------------------------------------------------------------------------------------

LONG = ("decaf", "ring", 5)


def long_run(engine, order="adapt-combine", device="cpu") -> Run:
    """Unequal local steps, clipping and dropout, to be stopped within a round."""
    task = small_task(device)
    lora = task.default_lora()
    lora.lora_dropout = 0.3
    training = TrainingConfig(epochs=0.7, batch_size=3, learning_rate=0.02, agents_per_pass=1, clip_norm=0.5)
    return make_run(LONG, engine, task, lora=lora, training=training, rounds=4, options={"order": order})


def stops(folder: Path, order: str, moment: tuple[int, int]) -> int:
    """Rank 1 alone asks to stop after a round's step (0: its last); all stop there, and rank 0 writes a checkpoint."""
    with connect(device="cpu", timeout=60) as processes:
        run = long_run(functools.partial(Torchrun, processes=processes), order)
        if processes.rank == 1:
            run.on_step = lambda round_, done, steps, losses: run.stop() if (round_, done % steps) == moment else None
        list(run.train())
        assert (run.round, run.step_in_round) == (2, moment[1])
        tensors, values = run.snapshot()
        if processes.is_main:
            checkpoint.save(folder, tensors, values)
        else:
            assert tensors == {}
    return 0


def goes_on(folder: Path, path: Path, order: str) -> int:
    """Finishes the stopped run with another number of ranks; rank 0 saves what comes out."""
    with connect(device="cpu", timeout=60) as processes:
        run = long_run(functools.partial(Torchrun, processes=processes), order)
        tensors, values = checkpoint.load_latest(folder)
        run.restore(tensors if processes.is_main else {}, values)
        got = outcome(run)
        if processes.is_main:
            torch.save(got, path)
    return 0
