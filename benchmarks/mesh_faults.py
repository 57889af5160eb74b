"""What does a federation lose to faults? Four real agents in a ring, over mutual TLS, each in a network namespace.

    python benchmarks/mesh_faults.py                  # what is missing of results_mesh_faults.json; an hour and a half
    python benchmarks/mesh_faults.py killed cut       # these scenarios
    python benchmarks/mesh_faults.py --table          # the table of docs/mesh.md, from the records

Task: the demo's digits, `decaf_tracked`, 30 rounds, 3 seeds. Faults come and go by the number of a round, and last for
at most 6 of the 30, for which the others are held in between (tests/helpers/held.py). Namespaces need root, iproute2
and nftables; without them the scenarios that need none run over loopback. The kernel may lack netem, so packets are
lost by nftables, at each machine that they reach.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from decaf_lora import recipes  # noqa: E402
from decaf_lora.config import AlgorithmConfig, RunConfig, TaskConfig  # noqa: E402
from decaf_lora.federation import file  # noqa: E402
from forwarder import forwarding  # noqa: E402
from lab import PORT, DiedError, Federation  # noqa: E402
from network import Network, why_not  # noqa: E402
from sites import Program  # noqa: E402

RESULTS = Path(__file__).with_name("results_mesh_faults.json")
NAMES = ("alice", "bob", "carol", "dave")
ROUNDS, STEPS, SEEDS = 30, 5, (0, 1, 2)
BEGINS, ENDS = 12, 18  # of a fault, in rounds: 20 % of the run
PATIENCE, GIVE_UP = 20.0, 90.0  # D is far above a round on a busy machine
POINTS = 0.02


@dataclass
class Lab:
    """What a scenario may use."""

    federation: Federation
    network: Network | None
    story: list[str] = field(default_factory=list)

    def reach(self, round_: int, *names: str) -> None:
        self.federation.reach(round_, *names, limit=900)

    @contextlib.contextmanager
    def held(self, round_: int, names: Sequence[str]) -> Iterator[None]:
        """No step of these agents after so many rounds begins while the block lasts. Outages count in rounds, so the
        others must not run on while a busy machine starts a process."""
        for name in names:
            self.federation.hold(name, round_ * STEPS)
        yield
        self.federation.release(*names)

    def tell(self, what: str) -> None:
        rounds = ", ".join(f"{name} {self.federation.round(name)}" for name in self.federation.names)
        self.story.append(f"{what}; rounds done: {rounds}")


def none(lab: Lab) -> None:
    """no faults"""


def killed(lab: Lab) -> None:
    """carol: SIGKILL in round 13, started again in round 18"""
    _killed(lab, "carol")


def two_killed(lab: Lab) -> None:
    """bob and carol, neighbours: SIGKILL at once in round 13, started again in round 18"""
    _killed(lab, "bob", "carol")


def _killed(lab: Lab, *lost: str) -> None:
    others = [name for name in NAMES if name not in lost]
    with lab.held(ENDS - 1, others):
        lab.reach(BEGINS, *lost)
        lab.federation.kill(*lost)
        lab.tell(f"killed {' and '.join(lost)}")
        lab.federation.held(*others)
        lab.federation.start(*lost)
        lab.federation.joined(*NAMES)
        lab.tell(f"started {' and '.join(lost)} again")


def organiser_off(lab: Lab) -> None:
    """the organiser's machine, which runs no agent: gone in round 13"""
    lab.reach(BEGINS, "alice")
    shutil.rmtree(lab.federation.organiser)
    lab.tell("removed the organiser's key and file")


def organiser_gone(lab: Lab) -> None:
    """alice, who is the organiser too: SIGKILL in round 25, her disk with key, file and data gone, never back"""
    lab.reach(24, "alice")
    lab.federation.kill("alice")
    lab.tell("killed alice")
    kept = lab.federation.out("alice") / "records.jsonl"  # to look at afterwards; nobody else reads it
    text = kept.read_text()
    shutil.rmtree(lab.federation.folder / "alice")
    shutil.rmtree(lab.federation.organiser)
    lab.federation.out("alice").mkdir(parents=True)
    kept.write_text(text)


def stopped(lab: Lab) -> None:
    """carol: SIGSTOP from round 13 to 18"""
    others = [name for name in NAMES if name != "carol"]
    with lab.held(ENDS - 1, others):
        lab.reach(BEGINS, "carol")
        lab.federation.stop("carol")
        lab.tell("stopped carol")
        lab.federation.held(*others)
        lab.federation.go_on("carol")
        lab.federation.joined(*NAMES)
        lab.tell("carol goes on")


def cut(lab: Lab) -> None:
    """the link of alice and bob: every packet dropped from round 13 to 18"""
    assert lab.network is not None
    with lab.held(ENDS, NAMES):
        lab.reach(BEGINS, "alice", "bob")
        lab.network.cut("alice", "bob")
        lab.tell("cut alice-bob")
        lab.federation.held(*NAMES)
        lab.network.mend("alice", "bob")
        lab.federation.joined(*NAMES)
        lab.tell("mended alice-bob")


def loss(lab: Lab) -> None:
    """5 % of all packets lost, in each direction"""
    assert lab.network is not None
    lab.network.lose(5)


def slow(lab: Lab) -> None:
    """carol computes 5 times slower"""


def dial_only(lab: Lab) -> None:
    """carol can only dial out: her firewall lets no connection in"""


def forwarder(lab: Lab) -> None:
    """no agent can be dialled: alice and carol are reached through a forwarder"""


SCENARIOS: dict[str, Callable[[Lab], None]] = {
    f.__name__: f
    for f in (none, killed, two_killed, organiser_off, organiser_gone, stopped, cut, loss, slow, dial_only, forwarder)
}
LOST = {"killed": ["carol"], "two_killed": ["bob", "carol"], "organiser_gone": ["alice"], "stopped": ["carol"]}
GONE = {"organiser_gone": ["alice"]}
EXACT = (
    "organiser_off",
    "loss",
    "slow",
    "dial_only",
    "forwarder",
)  # nothing is missed, so the result is that without faults
NEEDS_NETWORK = ("cut", "loss", "dial_only", "forwarder")


def config_of(seed: int) -> RunConfig:
    base = recipes.get("digits")
    values = {name: getattr(base, name) for name in RunConfig.model_fields}
    task = TaskConfig(name=f"{ROOT / 'tests' / 'helpers' / 'paced.py'}:make_digits")
    changes = {"algorithm": AlgorithmConfig(name="decaf_tracked"), "agents": len(NAMES), "rounds": ROUNDS}
    return RunConfig.model_validate({**values, **changes, "seed": seed, "task": task})


def measure(scenario: str, seed: int, program: Program) -> dict[str, Any]:
    """Runs one scenario to its end; what happened, in JSON's types."""
    forwarded = {"alice": 7001, "carol": 7003} if scenario == "forwarder" else {}
    closed = {"forwarder": NAMES, "dial_only": ("carol",)}.get(scenario, ())
    with contextlib.ExitStack() as leave:
        folder = Path(leave.enter_context(tempfile.TemporaryDirectory()))
        network = None if why_not() else leave.enter_context(Network([*NAMES, "forwarder"]))
        federation = leave.enter_context(
            Federation(
                folder / "sites",
                config_of(seed),
                NAMES,
                program,
                network=network,
                dial_only=[name for name in closed if name not in forwarded],
                addresses={name: f"{network.address('forwarder')}:{port}" for name, port in forwarded.items()}
                if network
                else {},
                limits=file.Limits(patience=PATIENCE, give_up=GIVE_UP),
                options=["--partition", "dirichlet:0.1", "--evaluate-every", str(ROUNDS), "--agents-per-pass", "1"],
            )
        )
        lab = Lab(federation, network)
        if network is not None:
            for name in closed:
                network.close(name)
            if forwarded:
                leave.enter_context(forwarding(network, "forwarder", PORT, forwarded))
        if scenario == "slow":
            federation.variables["carol"].append("@PACE=5")
        began, load = time.monotonic(), os.getloadavg()[0]
        for name in NAMES:
            federation.hold(name, 0)
        federation.start()
        federation.joined(*NAMES)  # on a busy machine, the first might begin before the last is in reach
        federation.release(*NAMES)
        wrong = None
        try:
            SCENARIOS[scenario](lab)
        except DiedError as error:
            wrong = str(error)
        codes = federation.end()
        seconds = time.monotonic() - began
        lost, gone = LOST.get(scenario, []), GONE.get(scenario, [])
        ledger = federation.ledger()
        scores = {name: score for name, score in ledger.scores().items() if name not in gone}
        said = {name: federation.said(name) for name in NAMES if name not in gone}
        return {
            "scenario": scenario,
            "seed": seed,
            "agents": len(NAMES),
            "rounds": ROUNDS,
            "patience": PATIENCE,
            "transport": "mTLS between network namespaces" if network else f"mTLS over loopback: {why_not()}",
            "seconds": round(seconds, 1),
            "load average": [round(load, 1), round(os.getloadavg()[0], 1)],
            "story": lab.story,
            "wrong": wrong,
            "exit codes": codes,
            "rounds done": {name: one.round for name, one in said.items()},
            "came back in round": {name: said[name].returned for name in lost if name not in gone},
            "used in its last round": {name: sorted(ledger.used(NAMES.index(name), ROUNDS) or ()) for name in said},
            "rounds missed": {name: ledger.missed(name) for name in lost},
            "edge rounds missed": {name: sum(edge.missed for edge in one.neighbours) for name, one in said.items()},
            "scores": {name: round(score, 4) for name, score in scores.items()},
            "cost of the lost, s": {
                name: {other: round(s, 2) for other, s in ledger.cost(name).items() if other not in lost}
                for name in lost
            },
            "edges used": ledger.uses(),
        }


def against(row: dict[str, Any], bases: dict[int, dict[str, Any]]) -> dict[str, float]:
    """The scores of the same agents without faults, of the same seed."""
    return {name: bases[row["seed"]]["scores"][name] for name in row["scores"]}


def bars(scenario: str, rows: list[dict[str, Any]], bases: dict[int, dict[str, Any]]) -> dict[str, bool]:
    """Bar -> whether it is held by the records of a scenario. Bars of scores are for the means over the seeds."""
    lost, gone = LOST.get(scenario, []), GONE.get(scenario, [])
    back = [name for name in lost if name not in gone]

    def falls(of: Callable[[Any], float]) -> float:
        return statistics.fmean(of(against(row, bases).values()) - of(row["scores"].values()) for row in rows)

    def ended(row: dict[str, Any]) -> set[str]:
        codes, done = row["exit codes"], row["rounds done"]
        return {name for name in NAMES if codes.get(name) == 0 and done.get(name) == ROUNDS}

    held = {
        "all others finish": all(row["wrong"] is None and ended(row) >= set(NAMES) - set(lost) for row in rows),
        "the lost one is back": all(
            name in ended(row) and len(row["used in its last round"][name]) == 2 for row in rows for name in back
        ),
        "mean": falls(statistics.fmean) <= POINTS,
        "worst": falls(min) <= POINTS,
        "a lost one costs at most 2 D": all(seconds <= 2 * row["patience"] for row in rows for seconds in costs(row)),
        "one-sided only in the window": all(row["edges used"]["wrong"] == 0 for row in rows),
    }
    if scenario in EXACT:
        held["as without faults"] = all(row["scores"] == against(row, bases) for row in rows)
    return held


def costs(row: dict[str, Any]) -> list[float]:
    """Seconds that each neighbour has waited for each lost agent."""
    return [seconds for of in row["cost of the lost, s"].values() for seconds in of.values()]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a scenario, means over its seeds."""
    lines = [
        "| | mean score | worst score | cost of the lost | one-sided uses | load average | bars not held |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    bases = {row["seed"]: row for row in rows if row["scenario"] == "none"}
    for name, scenario in SCENARIOS.items():
        own = [row for row in rows if row["scenario"] == name and row["seed"] in bases]
        if not own:
            continue

        def compared(of: Callable[[Any], float], name: str = name, own: list[dict[str, Any]] = own) -> str:
            score = statistics.fmean(of(row["scores"].values()) for row in own)
            more = [of(row["scores"].values()) - of(against(row, bases).values()) for row in own]
            return f"{score:.3f}" + ("" if name == "none" else f" ({100 * min(more):+.1f} to {100 * max(more):+.1f})")

        waited = [seconds for row in own for seconds in costs(row)]
        uses = {kind: sum(row["edges used"][kind] for row in own) for kind in ("window", "crash", "wrong")}
        loads = [load for row in own for load in row["load average"]]
        failed = sorted(bar for bar, held in bars(name, own, bases).items() if not held)
        cells = [
            (scenario.__doc__ or "") + ("" if len(own) == len(SEEDS) else f" ({len(own)} of {len(SEEDS)} seeds)"),
            compared(statistics.fmean),
            compared(min),
            f"{max(waited):.1f} s" if waited else "",
            ", ".join(f"{count} {kind}" for kind, count in uses.items() if count) or "0",
            f"{min(loads):.0f} to {max(loads):.0f}",
            ", ".join(failed) or "none",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if arguments == ["--table"]:
        print(table(rows))
        return 0
    chosen = arguments or list(SCENARIOS)
    if unknown := set(chosen) - set(SCENARIOS):
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
        return 2
    reason = why_not()
    if reason:
        print(f"over loopback, without {', '.join(NEEDS_NETWORK)}: {reason}")
    program = Program()
    for seed in SEEDS:
        for scenario in chosen:
            if (reason and scenario in NEEDS_NETWORK) or any(
                (row["scenario"], row["seed"]) == (scenario, seed) for row in rows
            ):
                continue
            rows.append(measure(scenario, seed, program))
            print(json.dumps(rows[-1]), flush=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    program.close()
    print(table(rows))
    bases = {row["seed"]: row for row in rows if row["scenario"] == "none"}
    done = [row for row in rows if row["seed"] in bases]
    by_scenario = {name: [row for row in done if row["scenario"] == name] for name in SCENARIOS}
    return int(not all(all(bars(name, own, bases).values()) for name, own in by_scenario.items() if own))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
