"""Does a federation last? Five real agents, 500 rounds, a random fault every ten rounds; memory and descriptors.

    python benchmarks/mesh_soak.py [SEED]    # into benchmarks/results_mesh_soak.json; ten minutes and more

Complete graph, `decaf_tracked` with int8, the small task of the tests, mutual TLS; each agent in a network namespace if
there can be some (root, iproute2, nftables), else over loopback and without cut links. alice and bob are never killed,
so that their processes last from the first round to the last.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from decaf_lora.config import AlgorithmConfig, RunConfig, build  # noqa: E402
from decaf_lora.federation import file  # noqa: E402
from lab import Federation  # noqa: E402
from network import Network, why_not  # noqa: E402
from sites import Program  # noqa: E402

RESULTS = Path(__file__).with_name("results_mesh_soak.json")
NAMES = ("alice", "bob", "carol", "dave", "erin")
MORTAL = ("carol", "dave", "erin")
ROUNDS, EVERY, QUIET = 500, 10, 20
PATIENCE = 5.0
STUCK = 600.0
"""Seconds without a round of anybody after which the soak has failed."""
MEMORY, DESCRIPTORS = 0.02, 2.0
"""Flat: over the second half of the rounds, memory grows by at most this share along its least-squares line, and the
mean number of descriptors from the third to the last quarter by at most so many. What comes after the last round, the
report, does not count."""


def config() -> RunConfig:
    values = {
        "task": {"name": f"{ROOT / 'tests' / 'helpers' / 'held.py'}:make_held"},
        "lora": {"r": 2, "lora_alpha": 4},
        "algorithm": AlgorithmConfig(name="decaf_tracked", messages="int8"),
        "training": {"steps": 2, "batch_size": 4, "agents_per_pass": 1},
        "agents": len(NAMES),
        "rounds": ROUNDS,
    }
    return build(RunConfig, values)


def sample(process: int) -> tuple[int, int]:
    """Resident bytes, and number of open descriptors."""
    resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir(f"/proc/{process}/fd"))


class Faults:
    """One random fault at a time, from one round of the foremost agent to another."""

    def __init__(self, federation: Federation, network: Network | None, seed: int) -> None:
        self.federation, self.network, self.random = federation, network, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._undo: tuple[int, Any] | None = None
        self._next = EVERY

    def go_on(self, front: int) -> None:
        """Begins or ends what is due once somebody has done so many rounds."""
        if self._undo is not None and (front >= self._undo[0] or front >= ROUNDS):
            self._undo[1]()
            self._undo, self._next = None, front + self.random.randint(1, EVERY)
        elif self._undo is None and self._next <= front <= ROUNDS - QUIET:
            self._undo = front + self.random.randint(2, 8), self._begin()

    def _begin(self) -> Any:
        kinds = ["kill", "stop"] + (["cut"] if self.network else [])
        kind = self.random.choice(kinds)
        self.counts[kind] += 1
        if kind == "kill":
            name = self.random.choice(MORTAL)
            self.federation.kill(name)
            return lambda: self.federation.start(name)
        if kind == "stop":
            name = self.random.choice(NAMES[1:])
            self.federation.stop(name)
            return lambda: self.federation.go_on(name)
        one, other = self.random.sample(NAMES, 2)
        assert self.network is not None
        network = self.network
        network.cut(one, other)
        return lambda: network.mend(one, other)


def flat(life: list[list[int]]) -> dict[str, Any]:
    """Of samples (round, bytes, descriptors) of one life: how they change over its second half."""
    life = [one for one in life if ROUNDS / 2 <= one[0] < ROUNDS]
    rounds, resident, descriptors = np.array(life, dtype=float).T
    slope = np.polyfit(rounds, resident, 1)[0]
    grown = slope * (rounds[-1] - rounds[0])
    middle = len(rounds) // 2
    more = descriptors[middle:].mean() - descriptors[:middle].mean()
    return {
        "rounds": [int(rounds[0]), int(rounds[-1])],
        "memory, MB": round(resident.mean() / 1e6, 1),
        "memory grown, MB": round(grown / 1e6, 2),
        "descriptors": [int(descriptors.min()), int(descriptors.max())],
        "descriptors grown": round(more, 2),
        "flat": bool(grown <= MEMORY * resident.mean() and more <= DESCRIPTORS),
    }


def soak(seed: int) -> dict[str, Any]:
    with ExitStack() as leave:
        program = Program()
        leave.callback(program.close)
        folder = Path(leave.enter_context(tempfile.TemporaryDirectory()))
        network = None if why_not() else leave.enter_context(Network(NAMES))
        federation = leave.enter_context(
            Federation(
                folder / "sites",
                config(),
                NAMES,
                program,
                network=network,
                graph="complete",
                limits=file.Limits(patience=PATIENCE, give_up=300),
                options=["--partition", "iid", "--evaluate-every", "100", "--agents-per-pass", "1"],
            )
        )
        began = time.monotonic()
        federation.start()
        faults = Faults(federation, network, seed)
        samples: dict[str, list[list[int]]] = {name: [] for name in NAMES}
        front, moved, sampled = 0, began, 0.0
        stuck = False
        while federation.running() and not stuck:
            now = time.monotonic()
            before, front = front, max(map(federation.round, NAMES))
            if front > before:
                moved = now
            stuck = now - moved > STUCK
            faults.go_on(front)
            if now - sampled > 1:
                sampled = now
                for name in federation.running():
                    try:
                        samples[name].append([federation.round(name), *sample(federation.processes[name])])
                    except OSError:  # it has just ended
                        continue
            time.sleep(0.02)
        codes = {} if stuck else federation.end(*NAMES)
        ledger = federation.ledger()
        kept = {name: flat(samples[name]) for name in NAMES if name not in MORTAL}
        result = {
            "seed": seed,
            "agents": len(NAMES),
            "rounds": ROUNDS,
            "patience": PATIENCE,
            "transport": "mTLS between network namespaces" if network else f"mTLS over loopback: {why_not()}",
            "seconds": round(time.monotonic() - began, 1),
            "load average": round(os.getloadavg()[0], 1),
            "faults": dict(faults.counts),
            "exit codes": codes,
            "rounds done": {name: federation.said(name).round for name in NAMES},
            "rounds missed": {name: ledger.missed(name) for name in NAMES},
            "edges used": ledger.uses(),
            "never killed": kept,
            "samples: round, MB, descriptors": {
                name: [[r, round(b / 1e6, 1), d] for r, b, d in samples[name][:: max(1, len(samples[name]) // 40)]]
                for name in kept
            },
        }
        result["ends well"] = (
            codes == dict.fromkeys(NAMES, 0)
            and set(result["rounds done"].values()) == {ROUNDS}
            and ledger.uses()["wrong"] == 0
            and all(one["flat"] for one in kept.values())
        )
        return result


if __name__ == "__main__":
    found = soak(int(sys.argv[1]) if sys.argv[1:] else 0)
    print(json.dumps(found, indent=1))
    text = json.dumps(found, indent=1)
    text = re.sub(r"\[\s+(\d+),\s+([\d.]+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text)  # a sample a line
    RESULTS.write_text(text + "\n")
    sys.exit(0 if found["ends well"] else 1)
