"""What should one use under drift and on sparse graphs? The study behind docs/study-consensus.md, on the demo task.

    python benchmarks/study_consensus.py bars --out study.jsonl       # runs what is missing of a part, prints its table
    python benchmarks/study_consensus.py settings --out study.jsonl
    python benchmarks/study_consensus.py bytes --out study.jsonl
    python benchmarks/study_consensus.py merging --out study.jsonl
    python benchmarks/study_consensus.py all --out study.jsonl
    python benchmarks/study_consensus.py minilm --out study.jsonl --data DIR    # DIR as for results_minilm.py

One factor at a time around the demo's setting: 10 agents, Dirichlet(0.1), 30 rounds of 5 AdamW steps, batch 16, rank
2, cosine, common start. A method counts at its own best learning rate, which `decaf_lora.tune` finds with the first
seeds (two in `bars`, one elsewhere) on held-out training examples; then it runs with all seeds. The page was made when
the search still ran on the test set: its file has the runs at all rates, and the best of these counts. One process, one
thread; a run of the demo's length takes 10 to 30 seconds. Finished runs are kept in --out, and searches beside it.

Bytes are those that an agent sends to its peers. FedAvg is counted as what it is without a server, an exchange on
the complete graph: N - 1 messages a round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import results_minilm
from decaf_lora import report, tune
from decaf_lora.config import RunConfig
from decaf_lora.recipes import digits

RATES = (0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.09, 0.13)
GRIDS = {"demo": RATES, "banking77": (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)}
"""Task -> learning rates of the runs in the file that the page was made from."""
FIRST = {"demo": RATES[2:6], "banking77": (0.005, 0.01, 0.02, 0.04)}
"""Task -> learning rates that a search begins with."""
MIXED = (2, 4, 8, 16, 2, 4, 8, 16, 2, 4)


@dataclass(frozen=True)
class Method:
    """An algorithm with its options, and how it exchanges; `graph` None takes the setting's."""

    algorithm: str
    options: dict[str, Any] = field(default_factory=dict)
    graph: str | None = None
    gossip_steps: int | str = 1


METHODS: dict[str, Method] = {
    "local": Method("local"),
    "DLoRA": Method("dlora"),
    "DeCAF": Method("decaf"),
    "FedAvg": Method("fedavg"),
    "centralized": Method("centralized"),
    "tracked": Method("decaf_tracked"),
    "tracked, quasi-global": Method("decaf_tracked", {"quasi_global": 0.0}),
    "tracked, 2 exchanges": Method("decaf_tracked", {"relay_rank": 2}, None, 2),
    "tracked, 4 exchanges": Method("decaf_tracked", {"relay_rank": 2}, None, 4),
    "tracked, exact": Method("decaf_tracked", {"relay_rank": 2}, "base:5", "period"),
    "tracked, exact, int8": Method("decaf_tracked", {"messages": "int8"}, "base:5", "period"),
    "DLoRA, complete, int8": Method("dlora", {"messages": "int8"}, "complete"),
}


@dataclass(frozen=True)
class Setting:
    """What a method meets; the defaults are the demo's."""

    task: str = "demo"
    """Or banking77: MiniLM and its data (results_minilm.py)."""
    agents: int = 10
    graph: str = "ring"
    partition: str = "dirichlet:0.1"
    steps: int = 5
    rounds: int = 30
    start: str = "common"
    ranks: tuple[int, ...] = (2,)
    """One for all, or each agent's."""
    brought: bool = False
    """Whether agents bring adapters that they trained alone, 30 rounds from starts of their own."""
    dtype: str | None = None
    """Of the frozen base; None: as the task's file says."""
    curve: bool = False
    """Whether the agents are evaluated on the way, as with seed 0 they always are; no other number depends on it."""


@dataclass(frozen=True)
class Key:
    """One run."""

    method: str
    setting: Setting
    rate: float
    seed: int

    def text(self) -> str:
        """The key of a finished run in the file: settings as far as they differ from the demo's."""
        default = asdict(Setting())
        setting = {k: v for k, v in asdict(self.setting).items() if v != default[k]}
        return json.dumps({**asdict(self), "setting": setting}, sort_keys=True)


def one(key: Key, data: Path | None = None) -> dict[str, Any]:
    """Runs it; returns its row. `data`: the folder of data sets that the demo does without."""
    with tempfile.TemporaryDirectory() as folder:
        start = trained_alone(key, Path(folder)) if key.setting.brought else None
        return run(key, start, data)


def trained_alone(key: Key, folder: Path) -> str:
    """The adapters of a local run; returns their places as `init_adapters` takes them."""
    from decaf_lora.runs.build import build_run

    setting = replace(key.setting, rounds=30, start="independent", brought=False)
    alone = build_run(configured(Key("local", setting, 0.02, key.seed)))
    try:
        list(alone.train())
        for agent in range(setting.agents):
            alone.save_adapter(folder / str(agent), agent)
    finally:
        alone.close()
    return str(folder / "{agent}")


def configured(key: Key, init_adapters: str | None = None, data: Path | None = None) -> RunConfig:
    """The configuration of a run."""
    method, setting = METHODS[key.method], key.setting
    if setting.task == "demo":
        base = digits()
    elif data is None:
        raise SystemExit(f"{setting.task}: give --data, the folder that holds its data set.")
    else:
        base = results_minilm.config(setting.task, "dirichlet", data.resolve(), data)
    values = {k: v for k, v in base.model_dump().items() if k in RunConfig.model_fields}
    values["training"] |= {"learning_rate": key.rate, "steps": setting.steps, "agents_per_pass": 10}
    if setting.dtype is not None:
        values["task"]["dtype"] = setting.dtype
    if setting.task == "demo":
        first = setting.ranks[0]
        # The scaling stays 1 at every rank.
        values["lora"] |= {"r": first, "lora_alpha": first, "ranks": setting.ranks if len(setting.ranks) > 1 else ()}
    values |= {
        "agents": setting.agents,
        "graph": method.graph or setting.graph,
        "gossip_steps": method.gossip_steps,
        "partition": setting.partition,
        "rounds": setting.rounds,
        "start": setting.start,
        "seed": key.seed,
        "algorithm": {"name": method.algorithm, **method.options},
        "evaluate_every": max(1, setting.rounds // 6) if key.seed == 0 or setting.curve else setting.rounds,
        "init_adapters": () if init_adapters is None else (init_adapters,),
    }
    if init_adapters is not None:
        values["lora"]["ranks"] = ()  # they follow the adapters
    return RunConfig.model_validate(values)


def run(key: Key, init_adapters: str | None, data: Path | None) -> dict[str, Any]:
    """Trains; returns the row."""
    from decaf_lora.runs.build import build_run

    started = time.process_time()
    training = build_run(configured(key, init_adapters, data))
    try:
        records = list(training.train())
    finally:
        training.close()
    last, sent = records[-1], 0.0
    factor = key.setting.agents - 1 if METHODS[key.method].algorithm == "fedavg" else 1
    curve = []
    for record in records:
        sent += record.bytes_sent * factor
        if record.scores:
            curve.append([record.round, sent, statistics.fmean(record.scores)])
    return {
        "key": key.text(),
        "mean": statistics.fmean(last.scores),
        "worst": min(last.scores),
        "averaged": last.averaged_score,
        "first": statistics.fmean(records[0].scores),
        "consensus_distance": last.consensus_distance,
        "tail": last.tail,
        "recompression": last.recompression,
        "bytes": sent,
        "curve": curve,
        "cpu_seconds": time.process_time() - started,
    }


class Study:
    """The finished runs in a file, and those that are missing."""

    def __init__(self, path: Path, may_run: bool, data: Path | None = None) -> None:
        self.path, self.may_run, self.data = path, may_run, data
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.rows = {row["key"]: row for row in rows}

    def row(self, key: Key) -> dict[str, Any] | None:
        """The row of a run, which is done now if it is missing."""
        text = key.text()
        if text not in self.rows and self.may_run:
            row = one(key, self.data)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.rows[text] = row
            what = f"{key.method}  lr {key.rate:g}  seed {key.seed}: {row['mean']:.3f}  {row['cpu_seconds']:.0f} s"
            print(what, key.setting, flush=True)
        return self.rows.get(text)

    def best(
        self, method: str, setting: Setting, seeds: tuple[int, ...], choosers: int = 1
    ) -> tuple[float, list[dict[str, Any]]] | None:
        """The learning rate of a method in a setting, and its rows, one a seed.

        Where the file has runs at several rates, the best of those that the first `choosers` seeds have all run at;
        otherwise the one that `decaf_lora.tune` finds with these seeds.
        """
        rate = self._recorded(method, setting, seeds[:choosers])
        if rate is None and self.may_run:
            rate = self._searched(method, setting, seeds[:choosers])
        if rate is None:
            return None
        rows = [self.row(Key(method, setting, rate, seed)) for seed in seeds]
        return (rate, [row for row in rows if row]) if all(rows) else None

    def _recorded(self, method: str, setting: Setting, choosers: tuple[int, ...]) -> float | None:
        tried = {}
        for rate in GRIDS[setting.task]:
            rows = [row for seed in choosers if (row := self.rows.get(Key(method, setting, rate, seed).text()))]
            if len(rows) == len(choosers):
                tried[rate] = statistics.fmean(row["mean"] for row in rows)
        return max(tried, key=tried.__getitem__) if len(tried) > self.may_run else None

    def _searched(self, method: str, setting: Setting, choosers: tuple[int, ...]) -> float:
        key = Key(method, setting, FIRST[setting.task][0], choosers[0])
        name = hashlib.sha256(key.text().encode()).hexdigest()[:16]
        folder = self.path.with_suffix(".searches") / name
        start = None
        started = (folder / "search" / "tune.yaml").exists()
        if setting.brought:
            start = str(folder / "brought" / "{agent}") if started else trained_alone(key, folder / "brought")
        found = tune.search(
            configured(key, start, self.data),
            {"training.learning_rate": FIRST[setting.task]},
            folder / "search",
            seeds=choosers,
            rungs=1,
            extensions=10,
            resume=started,
        )
        return float(found.values["training.learning_rate"])


def shown(rows: list[dict[str, Any]], column: str = "mean") -> str:
    """Mean and standard deviation over the rows."""
    values = [row[column] for row in rows]
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


# --- the parts ----------------------------------------------------------------------------------------------

BARS = ("FedAvg", "tracked, exact", "tracked, 4 exchanges", "DLoRA", "centralized", "tracked", "tracked, 2 exchanges")
BARS += ("DeCAF", "tracked, quasi-global", "tracked, exact, int8")


def bars(study: Study) -> Iterator[str]:
    """The demo's setting, five seeds; rates other than the best are shown with the mean over the two that chose."""
    seeds = (0, 1, 2, 3, 4)
    rates = " | ".join(f"lr {rate:g}" for rate in RATES)
    yield f"| method | {rates} | worst agent | averaged model | an agent sends |"
    yield "| --- |" + " ---: |" * (len(RATES) + 3)
    for method in BARS:
        best = study.best(method, Setting(), seeds, choosers=2)
        if best is None:
            continue
        cells = []
        for rate in RATES:
            some = [row["mean"] for k in seeds[:2] if (row := study.rows.get(Key(method, Setting(), rate, k).text()))]
            text = f"{statistics.fmean(some):.3f}" if len(some) == 2 else ""
            cells.append(f"**{shown(best[1])}**" if rate == best[0] else text)
        rows = best[1]
        cells += [shown(rows, "worst"), shown(rows, "averaged"), f"{rows[0]['bytes'] / 1e3:.0f} kB"]
        yield f"| {method} | {' | '.join(cells)} |"


COMPARED = ("DLoRA", "DeCAF", "tracked", "tracked, quasi-global", "tracked, 4 exchanges", "tracked, exact", "FedAvg")
SETTINGS: dict[str, tuple[Setting, tuple[str, ...]]] = {
    "the demo": (Setting(), COMPARED),
    "Base-3, an exchange a round": (Setting(graph="base:3"), COMPARED[:4]),
    "complete graph": (Setting(graph="complete"), COMPARED[:4]),
    "IID": (Setting(partition="iid"), COMPARED),
    "whole classes": (Setting(partition="by-class"), COMPARED),
    "independent starts": (Setting(start="independent"), COMPARED),
    "rank 7": (Setting(ranks=(7,)), ("DLoRA", *COMPARED[2:6])),
    "ranks 2, 4, 8, 16": (Setting(ranks=MIXED), ("DLoRA", *COMPARED[2:6])),
    "20 local steps": (Setting(steps=20), COMPARED),
    "50 agents": (Setting(agents=50), ("DLoRA", *COMPARED[2:])),
}


def settings(study: Study) -> Iterator[str]:
    """One factor at a time, three seeds; the learning rate is chosen on seed 0."""
    yield "| setting | " + " | ".join(COMPARED) + " |"
    yield "| --- |" + " ---: |" * len(COMPARED)
    for name, (setting, methods) in SETTINGS.items():
        cells = []
        for method in COMPARED:
            best = study.best(method, setting, (0, 1, 2)) if method in methods else None
            cells.append("" if best is None else f"{shown(best[1])} ({best[0]:g})")
        yield f"| {name} | {' | '.join(cells)} |"


BYTES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "DLoRA": ((30, 60, 150), (1, 5, 20)),
    "FedAvg": ((7, 15, 30), (1, 5, 20)),
    "tracked, exact": ((6, 12, 30), (1, 5, 20)),
    "tracked, exact, int8": ((13, 30, 65), (5, 20)),
    "DLoRA, complete, int8": ((30,), (5, 20)),
}
"""Method -> rounds and local steps: about a fifth, two fifths and all of the bytes of 30 rounds of the exact method;
with int8 messages, the last a quarter."""


def bytes_(study: Study) -> Iterator[str]:
    """Accuracy against the bytes that an agent sends, two seeds; the learning rate is chosen on seed 0."""
    yield "| method | rounds | local steps | an agent sends | accuracy | lr |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for method, (all_rounds, all_steps) in BYTES.items():
        for rounds in all_rounds:
            for steps in all_steps:
                setting = replace(Setting(), rounds=rounds, steps=steps)
                best = study.best(method, setting, (0, 1))
                if best is not None:
                    rate, rows = best
                    sent = f"{rows[0]['bytes'] / 1e3:.0f} kB"
                    yield f"| {method} | {rounds} | {steps} | {sent} | {shown(rows)} | {rate:g} |"


MERGED: dict[str, Setting] = {
    f"{rounds} rounds": Setting(rounds=rounds, ranks=MIXED, brought=True, steps=5) for rounds in (1, 5, 10)
}


def merging(study: Study) -> Iterator[str]:
    """Agents bring adapters of unequal ranks, trained alone; three seeds; the learning rate is chosen on seed 0."""
    yield "| method | as brought | " + " | ".join(f"after {name}" for name in MERGED) + " |"
    yield "| --- | ---: |" + " ---: |" * len(MERGED)
    for method in ("DLoRA", "DeCAF", "tracked, exact"):
        cells, first = [], ""
        for setting in MERGED.values():
            best = study.best(method, setting, (0, 1, 2))
            cells.append("" if best is None else f"{shown(best[1])} ({best[0]:g})")
            first = first if best is None else shown(best[1], "first")
        yield f"| {method} | {first} | {' | '.join(cells)} |"


MINILM = Setting(task="banking77", partition="shots:10/dirichlet:0.1", steps=3, rounds=40)
ENCODER: dict[str, tuple[Setting, tuple[str, ...]]] = {
    "10 agents": (
        MINILM,
        ("tracked", "tracked, quasi-global", "tracked, 4 exchanges", "tracked, exact", "tracked, exact, int8"),
    ),
    "50 agents": (replace(MINILM, agents=50, dtype="float32"), ("tracked", "tracked, exact", "FedAvg", "DLoRA")),
}


def minilm(study: Study) -> Iterator[str]:
    """MiniLM on banking77, Dirichlet(0.1), three seeds; two choose the learning rate of 10 agents, one of 50."""
    yield "| agents | method | accuracy | worst agent | averaged model | lr | an agent sends |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for name, (setting, methods) in ENCODER.items():
        for method in methods:
            best = study.best(method, setting, (0, 1, 2), choosers=2 if setting.agents == 10 else 1)
            if best is not None:
                rate, rows = best
                cells = [shown(rows), shown(rows, "worst"), shown(rows, "averaged"), f"{rate:g}"]
                yield f"| {name} | {method} | {' | '.join(cells)} | {rows[0]['bytes'] / 1e6:.1f} MB |"


CURVES = ("centralized", "FedAvg", "tracked, exact", "tracked, exact, int8", "tracked, 4 exchanges")
CURVES += ("tracked, quasi-global", "tracked", "DLoRA", "DeCAF")


def curves(study: Study) -> Iterator[str]:
    """The runs of `bars` at their best rates, evaluated on the way, for the figures."""
    yield "| method | lr | by round |"
    yield "| --- | ---: | --- |"
    for method in CURVES:
        if (found := curve(study, method)) is not None:
            rate, rounds, _, values = found
            means = ", ".join(f"{r:.0f}: {v:.3f}" for r, v in zip(rounds, values.mean(0), strict=True))
            yield f"| {method} | {rate:g} | {means} |"


def curve(study: Study, method: str) -> tuple[float, np.ndarray, np.ndarray, np.ndarray] | None:
    """Best rate, (points,) rounds and bytes, (seeds, points) scores."""
    seeds = (0, 1, 2, 3, 4)
    best = study.best(method, Setting(), seeds, choosers=2)
    if best is None:
        return None
    keys = [Key(method, Setting(curve=seed > 0), best[0], seed) for seed in seeds]
    rows = [row for key in keys if (row := study.row(key)) is not None]
    if len(rows) < len(seeds):
        return None
    if [row["mean"] for row in rows] != [row["mean"] for row in best[1]]:
        raise SystemExit(f"{method}: the scores at the end depend on whether agents are evaluated before it.")
    points = np.array([row["curve"] for row in rows])
    return best[0], points[0, :, 0], points[0, :, 1], points[:, :, 2]


def draw_rounds(study: Study, path: Path) -> None:
    """Accuracy by round and by bytes sent: mean and standard deviation over five seeds."""
    figure = report.new_figure(report.WHOLE, 4)
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    for method in CURVES:
        if (found := curve(study, method)) is None:
            continue
        _, rounds, sent, values = found
        mean, spread = values.mean(0), values.std(0, ddof=1)
        colour, marker = LOOKS[method]
        for axes, x in ((by_round, rounds), (by_bytes, sent / 1e3)):
            if axes is by_round or x[-1]:
                axes.plot(x, mean, color=colour, marker=marker, label=method)
                axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.13, linewidth=0)
    by_round.set(xlabel="round", ylabel="accuracy, mean of the agents")
    by_bytes.set(xlabel="kB that an agent has sent")
    report.legend(figure)
    figure.savefig(path, dpi=110)


def draw_bytes(study: Study, path: Path) -> None:
    """The part `bytes`: every cell, and the best that a method reaches with as many bytes or fewer."""
    figure = report.new_figure(8, 4.4)
    axes = figure.subplots()
    for method, (all_rounds, all_steps) in BYTES.items():
        points = []
        for rounds in all_rounds:
            for steps in all_steps:
                if best := study.best(method, Setting(rounds=rounds, steps=steps), (0, 1)):
                    points.append((best[1][0]["bytes"] / 1e3, statistics.fmean(row["mean"] for row in best[1])))
        if not points:
            continue
        colour, marker = LOOKS[method]
        x, y = np.array(sorted(points)).T
        axes.plot(x, y, marker, color=colour, alpha=0.35)
        last = [max(i for i, other in enumerate(x) if other == value) for value in dict.fromkeys(x)]
        top = np.maximum.accumulate(y)[last]
        axes.plot(x[last], top, color=colour, marker=marker, label=method)
    axes.axvline(737, color=report.INK, linestyle=":", linewidth=1)
    axes.set(
        xscale="log",
        xlabel="kB that an agent sends in the whole run (log scale)",
        ylabel="accuracy, mean of the agents",
    )
    ticks = (500, 1000, 2000, 4000)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    report.legend(figure)
    figure.savefig(path, dpi=110)


LOOKS = {
    "centralized": (report.INK, "*"),
    "FedAvg": ("#CC79A7", "v"),
    "tracked, exact": ("#D55E00", "o"),
    "tracked, exact, int8": ("#8A6FD1", "D"),
    "tracked, 4 exchanges": ("#E69F00", "P"),
    "tracked, quasi-global": ("#A0603A", "X"),
    "tracked": ("#009E73", "^"),
    "DLoRA": ("#0072B2", "s"),
    "DLoRA, complete, int8": ("#56B4E9", "<"),
    "DeCAF": ("#8C8C8C", "x"),
}
PARTS = {"bars": bars, "settings": settings, "bytes": bytes_, "merging": merging, "curves": curves, "minilm": minilm}
FIGURES = {"curves": (draw_rounds, "study-rounds.png"), "bytes": (draw_bytes, "study-bytes.png")}
NEED_DATA = ("minilm",)


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--out", type=Path, required=True, help="file of finished runs (JSON lines)")
    parser.add_argument("--data", type=Path, help="folder of banking77, for the part minilm")
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--figures", type=Path, help="folder for the figures of the parts curves and bytes")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    study = Study(arguments.out, not arguments.table, arguments.data)
    whole = [name for name in PARTS if name not in NEED_DATA or arguments.data is not None or arguments.table]
    for name in whole if arguments.part == "all" else [arguments.part]:
        lines = list(PARTS[name](study))
        print("\n".join(["", f"**{name}**", "", *lines]), flush=True)
        if arguments.figures is not None and name in FIGURES:
            draw, file = FIGURES[name]
            with matplotlib.rc_context(report.STYLE | {"savefig.facecolor": "white"}):
                draw(study, arguments.figures / file)


if __name__ == "__main__":
    main()
