"""What do two processes under torchrun bring, and what crosses between them?

Sixteen agents train a stack of linear layers of width 768 on random points; the rank of the adapters says how large a
message is. speed-up: seconds of a round in one process of one thread, over those of two ranks of one thread each; the
launches take turns. bytes: what the loopback interface counts in an exchange, TCP headers included, over the bytes of
the factors that have to cross.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import fmean
from typing import Any

from .cells import Bar, Found, Scope
from .machine import available
from .timing import ratio, shown, spread

QUESTION = "What do two ranks bring, and what crosses between them?"
AGAINST = "one process of one thread; the bytes of the factors"
WHY = {
    "speed-up": "both ranks share the machine's memory and caches, and wait for the slower of the two in every "
    "exchange",
    "bytes": "",
}
LAYERS, WIDTH = 48, 768


def cells(scope: Scope, device: str) -> list[dict[str, Any]]:
    if scope == "quick":
        return [{"rank": 1, "agents": 2, "ranks": 1, "turns": 1, "small": True}]
    world = 1 if device.startswith("cuda") else 2
    ranks = (4, 32, 160) if scope == "full" else (8,)  # messages of 1.2, 9.4 and 47 MB; 2.4 MB
    return [{"rank": rank, "agents": 16, "ranks": world, "turns": 3} for rank in ranks]


def measure(device: str, rank: int, agents: int, ranks: int, turns: int, small: bool = False) -> dict[str, Any]:
    layers, width = (2, 16) if small else (LAYERS, WIDTH)
    given = json.dumps({"device": device, "layers": layers, "width": width, "rank": rank, "agents": agents})
    message = layers * rank * 2 * width * 4
    # Factors, gradients, two moments, packed copies and messages of all agents.
    if 12 * message * agents > available("cpu"):
        return {"left_out": f"{agents} agents with messages of {message / 1e6:.0f} MB need more memory than there is"}
    if small:
        found = _work(json.loads(given), None)
        return {"message": message, "seconds": {"one": found["round"]}}
    seconds: dict[str, list[float]] = {"one": [], "ranks": []}
    for turn in range(turns):
        for name in ("one", "ranks") if turn % 2 == 0 else ("ranks", "one"):
            answer = _launch(ranks if name == "ranks" else 0, given)
            seconds[name].append(answer["round"])
            if name == "ranks":
                last = answer
    figures: dict[str, Any] = {"message": message, "seconds": {name: spread(v) for name, v in seconds.items()}}
    figures["speed-up"] = ratio(seconds["one"], seconds["ranks"])
    if last["factors"]:
        figures |= {"payload": last["payload"] / last["factors"], "traffic": last["traffic"] / last["factors"]}
    return figures


def _launch(ranks: int, given: str) -> dict[str, Any]:
    """What a process says that is started alone (0 ranks), or so many by torchrun; each with one thread."""
    from benchmarks.torchrun import launch

    try:
        return json.loads(launch(ranks, "-m", f"{__package__}.ranks", given).splitlines()[-1])
    except subprocess.CalledProcessError as error:
        raise RuntimeError("\n".join((error.stderr or error.stdout).splitlines()[-12:])) from None


def _work(given: dict[str, Any], processes: Any) -> dict[str, Any]:
    """In a process of the launch, or alone: three rounds, and what an exchange moves."""
    import functools

    from decaf_lora import Run, TrainingConfig, algorithms, graphs, partition
    from decaf_lora.engines import Simulate, Torchrun

    from . import models

    agents = given["agents"]
    task = models.Points(16 * agents, given["layers"], given["width"], given["rank"], length=16)
    task.model.to(given["device"] if processes is None else processes.device)
    engine = Simulate if processes is None else functools.partial(Torchrun, processes=processes)
    run = Run(
        task,
        algorithms.dlora(),
        graphs.ring(agents),
        partition.iid(task.labels, agents, seed=0),
        TrainingConfig(steps=1, batch_size=4, agents_per_pass=4),
        rounds=4,
        evaluate_every=5,
        measure_every=5,
        engine=engine,
    )
    records = list(run.train())
    phases = ("train", "exchange", "combine")
    rounds = [sum(r.seconds.get(phase, 0.0) for phase in phases) for r in records[2:-1]]
    answer: dict[str, Any] = {"round": fmean(rounds), "factors": 0}
    if processes is not None and processes.world_size > 1:
        answer |= _crossed(run, processes)
    run.close()
    return answer


def _crossed(run: Any, processes: Any) -> dict[str, Any]:
    """Bytes of an exchange: of the factors that have to cross, as sent, and as the loopback counts."""
    from benchmarks.torchrun import on_the_loopback

    message, engine = run.adapter.tensors(), run.engine
    mixing = run.schedule.at(0)
    traffic = []
    for _ in range(4):
        engine.anyone_stops(False)
        before, sent = on_the_loopback(), engine.bytes_sent
        engine.start(message, mixing, 1).wait()
        engine.anyone_stops(False)
        traffic.append(on_the_loopback() - before)
        payload = sum(processes.share("sent", engine.bytes_sent - sent))
    homes = {agent: rank for rank, block in enumerate(engine.blocks) for agent in block}
    # Each message crosses once to every rank that needs it.
    pairs = {(j, homes[i]) for i in homes for j in homes if mixing.weights[i, j] and homes[i] != homes[j]}
    each = sum(t[0].numel() * t.element_size() for t in message.values())
    return {"factors": len(pairs) * each, "payload": payload, "traffic": min(traffic)}


def _main(given: dict[str, Any]) -> None:
    import torch

    from decaf_lora.engines import connect

    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        print(json.dumps(_work(given, None)))
        return
    with connect(device=given["device"]) as processes:
        answer = _work(given, processes)
        if processes.is_main:
            print(json.dumps(answer))


def bars(found: list[Found]) -> list[Bar]:
    real = [f for f in found if f.settings["ranks"] > 1 and "speed-up" in f.figures]
    if not real:
        return []
    worst = min(real, key=lambda f: f.figures["speed-up"]["median"])
    most = max(real, key=lambda f: f.figures["traffic"])
    value, traffic = worst.figures["speed-up"], most.figures["traffic"]
    where = f"{worst.figures['message'] / 1e6:.1f} MB"
    return [
        Bar("speed-up", ">= 1.85", f"{shown(value)} at messages of {where}", value["median"] >= 1.85),
        Bar("bytes", "<= 1.02", f"{traffic:.4f}", traffic <= 1.02),
    ]


def table(found: list[Found]) -> str:
    lines = [
        "| message, MB | agents | ranks | one process, s a round | ranks, s a round | speed-up | traffic / factors |"
    ]
    lines.append("| ---: |" + " ---: |" * 6)
    for settings, figures in found:
        start = f"| {figures.get('message', 0) / 1e6:.1f} | {settings['agents']} | {settings['ranks']} |"
        if "left_out" in figures:
            lines.append(f"{start} left out: {figures['left_out']} | | | |")
            continue
        times = [shown(figures["seconds"][name]) for name in ("one", "ranks")]
        traffic = figures.get("traffic")
        share = "-" if traffic is None else f"{traffic:.4f}"
        lines.append(f"{start} {' | '.join(times)} | {shown(figures['speed-up'])} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
