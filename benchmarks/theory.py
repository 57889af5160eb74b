"""What theory says, measured: one page of figures, theory.html, and the numbers, theory.json.

    python benchmarks/theory.py --out theory            # about 2 minutes of one core
    python benchmarks/theory.py --out theory --digits   # and 50 agents on the demo task: ten runs of 66 s

The measurements are those that tests/test_theory.py and tests/test_tracking.py make assertions about, over more
graphs, ranks and rounds. What is finished is kept in the folder and not measured again. One thread. --figures
writes every figure as a PNG file too. docs/theory.md holds the statements and the results.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from decaf_lora import Run, TrainingConfig, algorithms, graphs, partition, records, report, tasks
from decaf_lora.report import HALF, INK, LOOKS, STYLE, WHOLE, Plot

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the problems and measurements of the tests
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
import test_theory as tests
from quadratic import Quadratic, many_agents, slope, square_gradients, train, windows

SIZES = (4, 16, 64)
HORIZONS = (50, 100, 200, 400, 800)
SPECS = ("ring", "line", "star", "torus:2x4", "bipartite:6+2", "complete-bipartite:4+4", "hypercube")
SCHEDULES = ("ring", "complete", "base:2", "base:3", "one-peer-exponential", "random-matching")
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
AGENTS = (5, 10, 20, 50, 100)
DIGITS = [
    case
    for seed in (0, 1, 2)
    for case in (
        *(("server", name, 0.04, seed) for name in ("fedavg", "decaf")),
        *(("ring", name, 0.02, seed) for name in ("dlora", "decaf") if seed < 2),
    )
]
"""Graph, algorithm, learning rate (FedAvg's and DLoRA's best on 10 agents), seed."""

Numbers = dict[str, Any]
Row = tuple[str, str, str, bool]
"""Statement, what was measured, the bar, whether it holds."""


# --- what is measured ---------------------------------------------------------------------------------------


def mixing() -> Numbers:
    """sigma_2 and the measured contraction of graphs of 8 agents and of rings; disagreement by round on schedules."""
    graphs_ = [graphs.parse(spec, 8, 0) for spec in SPECS] + [graphs.ring(n) for n in (4, 6, 10, 16)]
    contraction = [(f"{g.name} ({g.num_agents})", g.sigma_2, tests.contraction(g, 400)) for g in graphs_]
    apart = np.random.default_rng(0).normal(size=(10, 200))
    apart -= apart.mean(0)
    disagreement = {}
    for spec in SCHEDULES:
        schedule, x = graphs.as_schedule(graphs.parse(spec, 10, 0)), apart
        left = [1.0]
        for number in range(12):
            x = schedule.at(number).weights @ x
            left.append(float(np.linalg.norm(x) / np.linalg.norm(apart)))
        disagreement[spec] = left
    small = [graphs.parse(spec, 8, 0) for spec in SPECS]
    for rule in ("core", "fedsa"):
        contraction += [
            (f"{g.name} ({g.num_agents}), {rule}", g.sigma_2, tests.contraction(g, 400, rule)) for g in small
        ]
    return {"contraction": contraction, "disagreement": disagreement}


def clipped() -> Numbers:
    """How far one liar takes clipped gossip from honest gossip, against the bound; distances from 0.3 to 100."""
    distances = np.logspace(-0.5, 2, 11).tolist()
    found: Numbers = {"distances": distances, "share": [], "on_a_line": []}
    for tau in distances:
        errors, bounds, _ = tests.clipped_gossip(tau)
        near = bounds > 1e-6  # the others do not hear the liar, and nothing is clipped
        found["share"].append(float((errors[near] / bounds[near]).max()))
        errors, bounds, _ = tests.clipped_gossip(tau, line=True)
        found["on_a_line"].append(float((errors / bounds).max()))
    errors, _, papers = tests.clipped_gossip(None)
    found["papers_share"] = float((errors[papers > 0] / papers[papers > 0]).max())
    return found


def mean_and_tail() -> Numbers:
    """How far mixing moves the network's mean: of the factors (DLoRA), of the product (DeCAF against its tail)."""
    factors, residuals, unexplained = [], [], []
    for n in (2, 3, 6, 12):
        graph, adapter = graphs.ring(n), tests.make_adapter(n)
        mixed, _ = tests.one_round(algorithms.dlora(), adapter, graph)
        for key, tensor in adapter.tensors().items():
            factors.append(float((mixed.tensors()[key].mean(0) - tensor.mean(0)).norm() / tensor.mean(0).norm()))
        out, _ = tests.one_round(algorithms.decaf(), adapter, graph)
        for layer, (rank, _, _) in tests.LAYERS.items():
            z = tests.mixed_products(adapter, graph, layer)
            residual = z - tests.products(out, layer)
            tail = torch.linalg.svdvals(z)[:, rank:].norm(dim=1)
            residuals += list(zip(tail.tolist(), residual.flatten(1).norm(dim=1).tolist(), strict=True))
            moved = tests.products(adapter, layer).mean(0) - tests.products(out, layer).mean(0) - residual.mean(0)
            unexplained.append(float(moved.norm()))
    return {"factor_mean_moved": max(factors), "tail_and_residual": residuals, "unexplained": max(unexplained)}


def factors_or_products() -> Numbers:
    """Interference by disagreement, against its closed form; what separates DLoRA and DeCAF by rank."""
    sizes, layer = np.logspace(-3, 0, 13).tolist(), next(iter(tests.LAYERS))
    both = [tests.interference_of(layer, size) for size in sizes]
    truncated, difference, gaps, apart, interference = tests.by_rank()
    return {
        "sizes": sizes,
        "interference": [float(measured.norm()) for _, _, measured in both],
        "closed_form": [float(closed.norm()) for _, closed, _ in both],
        "closed_form_error": max(float((lost - closed).abs().max()) for lost, closed, _ in both),
        "ranks": list(range(1, len(gaps) + 1)),
        "truncated": truncated,
        "difference": difference,
        "gap_common_a": gaps,
        "gap": apart,
        "gap_interference": interference,
    }


def convergence(n: int) -> Numbers:
    """Of n agents: mean square gradient by horizon (steps 1 / sqrt(T), ring); norm by round (steps 2 / (t + 20))."""
    found: Numbers = {}
    for name in ("dlora", "decaf"):
        algorithm = algorithms.make(name)
        runs = [square_gradients(algorithm, graphs.ring(n), T, 1 / math.sqrt(T)) for T in HORIZONS]
        squares = [[float(run[:, seed].mean()) for run in runs] for seed in range(5)]
        norms = [[float(np.sqrt(run[:, seed]).mean()) for run in runs] for seed in range(5)]
        found[name] = {
            "mean_squares": squares,
            "slopes": [slope(HORIZONS, values) for values in squares],
            "slopes_of_norm": [slope(HORIZONS, values) for values in norms],
        }
        for spec in ("torus", "ring"):
            run = square_gradients(algorithm, graphs.parse(spec, n, 0), 3200, lambda t: 2 / (t + 20))
            middles, means = windows(np.sqrt(run).mean(1))
            found[name][spec] = {"rounds": middles, "norms": means, "slope": slope(middles, means)}
    return found


def tracking(n: int = 6, rounds: int = 400) -> Numbers:
    """The largest distance of an agent's product to the optimum, by round: constant step, ring."""
    errors: dict[str, list[float]] = {}
    for name in ("dlora", "dlora_fa", "decaf"):
        for tracked in (False, True):
            problem, values = Quadratic(n, spread=0.5), []

            def keep(round_: int, adapter: Any, state: Any, problem: Any = problem, values: Any = values) -> None:
                values.append(problem.error(adapter))

            train(problem, algorithms.make(name, tracking=tracked), graphs.ring(n), rounds, each_round=keep)
            errors[name + ("_tracked" if tracked else "")] = values
    return {"errors": errors}


def fifty_agents() -> Numbers:
    """Relative distance to the optimum after training, by number of agents: three seeds each."""
    errors = {
        f"{weighing} {start} {name}": [
            [many_agents(name, n, weighing, start == "independent", seed) for seed in range(3)] for n in AGENTS
        ]
        for weighing in ("server", "ring")
        for start in ("common", "independent")
        for name in ("dlora", "decaf")
    }
    errors["server common anchored"] = [
        [many_agents("decaf", n, "server", False, seed, gauge="anchored") for seed in range(3)] for n in AGENTS
    ]
    return {"agents": AGENTS, "errors": errors}


def digits(path: Path) -> list[Numbers]:
    """Runs those of `DIGITS` that are not in `path` yet, and returns all."""
    done = read(path)
    for case in DIGITS:
        if case in done:
            continue
        graph, name, learning_rate, seed = case
        algorithm = algorithms.make(name)
        if graph == "server":
            algorithm = algorithms.chain(
                algorithm.rule._replace(topology="server")
            )  # decaf on it is FlexLoRA with DeCAF's gauge
        task, started = tasks.digits(), time.process_time()
        run = Run(
            task,
            algorithm,
            graphs.ring(50),
            partition.dirichlet(task.labels, 50, alpha=0.1, seed=seed),
            TrainingConfig(steps=5, batch_size=16, learning_rate=learning_rate, agents_per_pass=10),
            rounds=30,
            seed=seed,
            evaluate_every=10,
        )
        rows = [
            [r.round, r.scores and sum(r.scores) / 50, r.averaged_score, r.consensus_distance, r.interference, r.tail]
            for r in run.train()
        ]
        run.close()
        with path.open("a") as file:
            file.write(json.dumps({"key": case, "rows": rows, "seconds": time.process_time() - started}) + "\n")
        print(*case, f"{rows[-1][1]:.3f}", flush=True)
    return list(read(path).values())


def read(path: Path) -> dict[tuple[Any, ...], Numbers]:
    """Finished runs by key."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {tuple(row["key"]): row for row in rows}


# --- what is said of it -------------------------------------------------------------------------------------


def statements(found: Numbers) -> list[Row]:
    """The page's table."""
    error = max(abs(measured - sigma) for _, sigma, measured in found["mixing"]["contraction"])
    clipped_, mean, products = found["clipped"], found["mean_and_tail"], found["factors_or_products"]
    residual = max(abs(tail - norm) for tail, norm in mean["tail_and_residual"])
    runs = [found[f"convergence {n}"][name] for n in SIZES for name in ("dlora", "decaf")]
    slopes = [float(np.mean(run["slopes"])) for run in runs]
    of_norm = [float(np.mean(run["slopes_of_norm"])) for run in runs]
    torus = [run["torus"]["slope"] for run in runs]
    ring = [run["ring"]["slope"] for run in runs[-2:]]
    ends = {name: values[-1] for name, values in found["tracking"]["errors"].items()}
    untracked = [v for k, v in ends.items() if not k.endswith("tracked")]
    tracked = [v for k, v in ends.items() if k.endswith("tracked")]
    exact = found["mixing"]["disagreement"]
    errors, at = found["fifty_agents"]["errors"], found["fifty_agents"]["agents"].index(50)
    fifty = {key: float(np.mean(values[at])) for key, values in errors.items()}
    ten = {key: float(np.mean(values[found["fifty_agents"]["agents"].index(10)])) for key, values in errors.items()}

    def lost(weighing: str) -> list[float]:
        starts = ("common", "independent")
        return [fifty[f"{weighing} {start} decaf"] - fifty[f"{weighing} {start} dlora"] for start in starts]

    def near(values: list[float]) -> bool:
        return all(abs(value + 0.5) <= 0.1 for value in values)

    rows = [
        (
            "a round leaves σ₂ of the disagreement",
            f"{len(found['mixing']['contraction'])} graphs, largest error {error:.1e}",
            "1e-6",
            error < 1e-6,
        ),
        (
            "clipped gossip strays from honest gossip by its bound at most",
            f"{min(clipped_['share']):.2f} to {max(clipped_['share']):.2f} of it; on a line "
            f"{min(clipped_['on_a_line']):.6f}",
            "1, on a line equal",
            max(clipped_["share"]) <= 1 + 1e-9 and max(abs(x - 1) for x in clipped_["on_a_line"]) < 1e-9,
        ),
        (
            "at the paper's distance by 2 √(δ Σ Π d²) at most",
            f"{clipped_['papers_share']:.2f} of it",
            "1",
            clipped_["papers_share"] <= 1,
        ),
        (
            "Base-(k+1) averages exactly",
            f"10 agents: {exact['base:2'][6]:.0e} left after 6 rounds, k = 1; {exact['base:3'][4]:.0e} after 4, k = 2",
            "1e-12",
            max(exact["base:2"][6], exact["base:3"][4]) < 1e-12,
        ),
        (
            "mixing factors conserves their mean",
            f"moved by {mean['factor_mean_moved']:.0e} of it",
            "1e-12",
            mean["factor_mean_moved"] < 1e-12,
        ),
        (
            "TSVD loses exactly the tail",
            f"norms differ by {residual:.0e}; mean moved otherwise by {mean['unexplained']:.0e}",
            "1e-9",
            max(residual, mean["unexplained"]) < 1e-9,
        ),
        (
            "interference equals its closed form",
            f"largest entry differs by {products['closed_form_error']:.0e}",
            "1e-12",
            products["closed_form_error"] < 1e-12,
        ),
        (
            "interference is of second order",
            f"slope {slope(products['sizes'], products['interference']):.6f} in the disagreement",
            "2",
            abs(slope(products["sizes"], products["interference"]) - 2) < 1e-6,
        ),
        (
            "DLoRA - DeCAF vanishes at full rank",
            f"{products['difference'][2]:.2f} of the product at rank 3, {products['difference'][-1]:.0e} at full rank",
            "1e-9",
            products["difference"][-1] < 1e-9,
        ),
        (
            "from one A in common they agree",
            f"difference {max(products['gap_common_a']):.0e} at every rank",
            "1e-9",
            max(products["gap_common_a"]) < 1e-9,
        ),
        (
            "from A's apart interference is left at full rank",
            f"difference {products['gap'][-1]:.4f}, interference {products['gap_interference'][-1]:.4f}",
            "equal",
            math.isclose(products["gap"][-1], products["gap_interference"][-1], rel_tol=1e-6),
        ),
        (
            "mean of ‖∇f‖² like 1/√T, steps 1/√T, ring",
            f"slopes {min(slopes):.2f} to {max(slopes):.2f} (of ‖∇f‖: {min(of_norm):.2f} to {max(of_norm):.2f})",
            "-0.5 ± 0.1",
            near(slopes),
        ),
        (
            "‖∇f‖ like 1/√t, steps 2/(t + 20), torus",
            f"slopes {min(torus):.2f} to {max(torus):.2f} (ring of 64: {min(ring):.2f} to {max(ring):.2f})",
            "-0.5 ± 0.1",
            near(torus),
        ),
        (
            "gossip with a constant step misses the optimum",
            f"ends {min(untracked):.3f} to {max(untracked):.3f} away",
            "above 5e-3",
            min(untracked) > 5e-3,
        ),
        (
            "tracking reaches it",
            f"ends at most {max(tracked):.0e} away",
            "1e-9",
            max(tracked) < 1e-9,
        ),
        (
            "TSVD of 50 agents does not collapse, server",
            f"error {fifty['server common decaf']:.3f} (10 agents: {ten['server common decaf']:.3f}), "
            f"FedAvg {fifty['server common dlora']:.3f}; untrained 1",
            "FedAvg + 0.05",
            max(lost("server")) < 0.05,
        ),
        (
            "nor on a ring",
            f"error {fifty['ring common decaf']:.3f}, DLoRA {fifty['ring common dlora']:.3f}; independent starts "
            f"{fifty['ring independent decaf']:.3f}, {fifty['ring independent dlora']:.3f}",
            "DLoRA + 0.05",
            max(lost("ring")) < 0.05,
        ),
    ]
    for graph, rival in (("server", "fedavg"), ("ring", "dlora")):
        ends = {tuple(run["key"][:2] + run["key"][3:]): run["rows"][-1][1] for run in found["digits"]}
        seeds = [seed for seed in range(3) if {(graph, rival, seed), (graph, "decaf", seed)} <= set(ends)]
        if seeds:
            ours, theirs = (np.mean([ends[graph, name, seed] for seed in seeds]) for name in ("decaf", rival))
            rows.append(
                (
                    f"the same on digits, {graph}",
                    f"DeCAF {ours:.3f}, {rival} {theirs:.3f} (mean accuracy, {len(seeds)} seeds)",
                    f"{rival} - 0.05",
                    bool(ours > theirs - 0.05),
                )
            )
    return rows


# --- figures ------------------------------------------------------------------------------------------------


def line(axes: Any, x: Any, y: Any, label: str, index: int, **style: Any) -> None:
    axes.plot(x, y, label=label, color=COLOURS[index], marker=MARKERS[index], **style)


def guide(axes: Any, x: Any, y: Any, label: str) -> None:
    """A dashed line: what theory says."""
    axes.plot(x, y, "--", color=INK, linewidth=1.2, label=label)


def log_log(axes: Any, x: str, y: str, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    report.log_axis(axes)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def contraction_plot(found: Numbers) -> Plot:
    figure = report.new_figure()
    axes = figure.add_subplot()
    rows = found["mixing"]["contraction"]
    guide(axes, [0, 1], [0, 1], "σ₂")
    axes.plot([s for _, s, _ in rows], [m for _, _, m in rows], "o", color=COLOURS[1], label="measured")
    axes.set_xlabel("σ₂ of the mixing matrix")
    axes.set_ylabel("share of disagreement left by a round")
    report.legend(figure)
    names = ", ".join(name for name, _, _ in rows)
    caption = f"Consensus distance after a round over that before it, in the long run: {names}."
    return Plot("Contraction equals σ₂", caption, "Scatter plot of measured contraction against sigma_2.", figure)


def disagreement_plot(found: Numbers) -> Plot:
    figure = report.new_figure()
    axes = figure.add_subplot()
    for index, (spec, left) in enumerate(found["mixing"]["disagreement"].items()):
        exact = next((number for number, value in enumerate(left) if value < 1e-13), len(left))
        shown = [*left[:exact], 1e-9][: len(left)]  # what is exact falls off the axis
        line(axes, range(len(shown)), shown, spec, index)
    axes.set_xlabel("rounds")
    axes.set_ylabel("disagreement left (log scale)")
    report.log_axis(axes)
    axes.set_ylim(1e-3, 1.5)
    report.legend(figure)
    caption = (
        "10 agents. A curve that falls off the figure has reached the exact average: complete after 1, base:3 after 4, "
        "base:2 after 6 rounds, with at most 2 and 1 neighbours. One-peer exponential is exact for powers of 2 only."
    )
    return Plot("Graphs over time", caption, "Line chart of disagreement by round for six graphs.", figure)


def tail_plot(found: Numbers) -> Plot:
    figure = report.new_figure()
    axes = figure.add_subplot()
    tails, residuals = np.array(found["mean_and_tail"]["tail_and_residual"]).T
    ends = [tails.min(), tails.max()]
    guide(axes, ends, ends, "(sum of σₗ², l > r)^½")
    axes.plot(tails, residuals, "o", color=COLOURS[0], label="measured", alpha=0.7)
    axes.set_xlabel("singular values of the mixed product beyond the rank, norm")
    axes.set_ylabel("‖Z - TSVD(Z)‖")
    report.legend(figure)
    caption = "Every agent and layer of random adapters on rings of 2, 3, 6 and 12: DeCAF's loss is the tail."
    return Plot("Truncation loses the tail", caption, "Scatter plot of truncation loss against tail.", figure)


def interference_plot(found: Numbers) -> Plot:
    figure = report.new_figure()
    axes = figure.add_subplot()
    numbers = found["factors_or_products"]
    line(axes, numbers["sizes"], numbers["interference"], "measured", 1, linestyle="")
    guide(axes, numbers["sizes"], numbers["closed_form"], "closed form")
    log_log(axes, "disagreement of the factors", "interference, Frobenius norm", (0.001, 0.01, 0.1, 1))
    report.legend(figure)
    caption = "Five agents on a star whose factors move apart: what averaging factors loses is of second order."
    return Plot("Interference", caption, "Log-log plot of interference against disagreement.", figure)


def rank_plot(found: Numbers) -> Plot:
    figure = report.new_figure()
    axes = figure.add_subplot()
    numbers = found["factors_or_products"]
    line(axes, numbers["ranks"], numbers["difference"], "DLoRA in a common frame minus DeCAF", 0)
    line(axes, numbers["ranks"], numbers["truncated"], "truncation", 4)
    axes.set_xlabel("rank (full: 7)")
    axes.set_ylabel("share of the mixed product")
    axes.set_ylim(bottom=0)
    report.legend(figure)
    caption = (
        "Six agents on a ring, each with a target of its own, after one consensus. DLoRA's agents fit it in the frame "
        "of one A, DeCAF's as well as the rank allows: the difference and the truncation vanish at full rank. From the "
        f"same adapters with one A the rules are equal at every rank (difference {max(numbers['gap_common_a']):.0e}); "
        f"where A's differ, interference is left at full rank ({numbers['gap'][-1]:.2f} of it, in Frobenius norm)."
    )
    return Plot("DLoRA and DeCAF by rank", caption, "Line chart of consensus differences by rank.", figure)


def convergence_plot(found: Numbers) -> Plot:
    figure = report.new_figure(WHOLE, 4.2)
    left, middle, right = figure.subplots(1, 3)
    colours = {n: COLOURS[index] for index, n in enumerate(SIZES)}
    styles = {"dlora": ("s", "-"), "decaf": ("o", ":")}
    for n in SIZES:
        for name, (marker, dashes) in styles.items():
            run = found[f"convergence {n}"][name]
            style: dict[str, Any] = {
                "color": colours[n],
                "marker": marker,
                "linestyle": dashes,
                "label": f"{name}, {n}",
            }
            left.plot(HORIZONS, np.mean(run["mean_squares"], axis=0), **style)
            for axes, spec in ((middle, "torus"), (right, "ring")):
                axes.plot(run[spec]["rounds"], run[spec]["norms"], **style)
    largest = found["convergence 4"]["decaf"]
    root = np.array(HORIZONS) ** -0.5
    guide(left, HORIZONS, 1.5 * root / root[0] * np.mean(largest["mean_squares"], axis=0)[0], "slope -½")
    for axes, spec in ((middle, "torus"), (right, "ring")):
        x = np.array(largest[spec]["rounds"])
        guide(axes, x, 1.5 * largest[spec]["norms"][0] * (x / x[0]) ** -0.5, "slope -½")
        axes.set_title(f"norm by round, {spec}", fontsize=10)
        log_log(axes, "round t", "‖∇f‖", (200, 500, 1000, 2000))
    left.set_title("mean square by horizon, ring", fontsize=10)
    log_log(left, "rounds T", "‖∇f‖², mean over T rounds", HORIZONS)
    report.legend(figure)
    caption = (
        "Noisy gradients on a smooth problem with a known optimum, 5 seeds; DLoRA solid, DeCAF dotted; 4, 16, 64 "
        "agents. Left: constant steps 1/√T, the theorem's setting: the mean square has slope -½ (the norm itself "
        "about -0.3). Middle: steps 2/(t + 20): the norm itself has slope -½. Right: on a ring of 64, σ₂ = 0.997, "
        "mixing lags behind these steps, and the slope is not reached in 3200 rounds."
    )
    return Plot("Convergence", caption, "Log-log plots of gradient norms for DLoRA and DeCAF.", figure)


def tracking_plot(found: Numbers) -> Plot:
    figure = report.new_figure()
    axes = figure.add_subplot()
    for name, values in found["tracking"]["errors"].items():
        colour, marker = LOOKS[name.removesuffix("_tracked")]
        dashes = "-" if name.endswith("tracked") else ":"
        axes.plot(range(1, len(values) + 1), values, dashes, color=colour, marker=marker, markevery=40, label=name)
    axes.set_xlabel("round")
    axes.set_ylabel("distance to the optimum")
    report.log_axis(axes)
    report.legend(figure)
    caption = (
        "Six agents on a ring fit different quadratics with exact gradients and a constant step, 5 local steps a "
        "round. Without tracking the local steps pull every agent off the optimum; with it all reach it."
    )
    return Plot("Tracking removes drift", caption, "Line chart of the distance to the optimum by round.", figure)


def fifty_plot(found: Numbers, weighing: str) -> Plot:
    figure = report.new_figure()
    axes = figure.add_subplot()
    rival = "fedavg" if weighing == "server" else "dlora"
    for start, dashes in (("common", "-"), ("independent", ":")):
        for name, shown in (("dlora", rival), ("decaf", "decaf")):
            values = np.array(found["fifty_agents"]["errors"][f"{weighing} {start} {name}"])
            colour, marker = LOOKS[shown]
            axes.plot(AGENTS, values.mean(1), dashes, color=colour, marker=marker, label=f"{shown}, {start}")
            axes.fill_between(AGENTS, values.min(1), values.max(1), color=colour, alpha=0.12, linewidth=0)
    if weighing == "server":
        means = np.mean(found["fifty_agents"]["errors"]["server common anchored"], axis=1)
        line(axes, AGENTS, means, "decaf, anchored gauge", 4, linestyle="--")
    axes.set_xscale("log")
    axes.set_xticks(AGENTS, [str(n) for n in AGENTS])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_xlabel("agents")
    axes.set_ylabel("relative distance to the optimum")
    report.legend(figure)
    where = "Server: complete graph, sample-size weights." if weighing == "server" else "Ring."
    caption = (
        f"{where} Rank 4, layers 20 x 24, targets far apart, 60 rounds of 20 steps; RMS over agents, 3 seeds, A in "
        "common or independent at the start; untrained agents have 1. A collapse of the truncation would lift DeCAF "
        "towards 1 as agents are added."
    )
    title = f"Many agents, {weighing}"
    return Plot(title, caption, f"Line chart of the distance to the optimum by agents, {weighing}.", figure)


def digits_plot(found: Numbers) -> Plot:
    figure = report.new_figure(HALF, 3.8)
    axes = figure.add_subplot()
    for graph, dashes in (("server", "-"), ("ring", ":")):
        for name in ("fedavg", "dlora", "decaf"):
            runs = [run["rows"] for run in found["digits"] if run["key"][:2] == [graph, name]]
            if not runs:
                continue
            scored = [[row for row in rows if row[1] is not None] for rows in runs]
            rounds, values = [row[0] for row in scored[0]], np.array([[row[1] for row in rows] for rows in scored])
            colour, marker = LOOKS[name]
            axes.plot(rounds, values.mean(0), dashes, color=colour, marker=marker, label=f"{name}, {graph}")
            axes.fill_between(rounds, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("round")
    axes.set_ylabel("mean accuracy")
    axes.set_ylim(0, 1)
    report.legend(figure)
    tails = {
        number: np.mean([run["rows"][number][5] for run in found["digits"] if run["key"][:2] == ["server", "decaf"]])
        for number in (1, 10, 20)
    }
    caption = (
        "The demo task with 50 agents, Dirichlet(0.1), 30 rounds of 5 steps; server: lr 0.04, sample-size weights; "
        "ring: lr 0.02. Bands: lowest to highest seed. DeCAF's truncation tail under the server is "
        f"{tails[1]:.2f} in round 1, {tails[10]:.2f} in round 10 and {tails[20]:.2g} in round 20 (the learning rate "
        "falls to 0)."
    )
    return Plot("50 agents on digits", caption, "Line chart of accuracy by round of 50 agents.", figure)


def plots(found: Numbers) -> list[tuple[str, list[Plot]]]:
    """The page's sections."""
    many = [fifty_plot(found, "server"), fifty_plot(found, "ring")]
    if found["digits"]:
        many.append(digits_plot(found))
    return [
        ("Mixing", [contraction_plot(found), disagreement_plot(found)]),
        ("Factors or products", [tail_plot(found), interference_plot(found), rank_plot(found)]),
        ("Convergence", [convergence_plot(found), tracking_plot(found)]),
        ("Many agents", many),
    ]


def write(found: Numbers, out: Path) -> list[tuple[str, list[Plot]]]:
    """theory.json and theory.html; returns the figures."""
    rows = statements(found)
    facts = {
        "Statements": f"{sum(holds for *_, holds in rows)} of {len(rows)} hold",
        "CPU": f"{found['seconds']:.0f} s of one core",
    }
    columns = ["statement", "measured", "bar", "holds"]
    cells = [
        [(s, False), (measured, False), (bar, False), ("yes" if holds else "no", holds)]
        for s, measured, bar, holds in rows
    ]
    table = {"columns": columns, "groups": [("", cells)], "note": "The same measurements are asserted by the tests."}
    with matplotlib.rc_context(STYLE):
        sections = plots(found)
    shown = {key: str(value) for key, value in found["environment"].items() if value is not None}
    command = {"command": "python benchmarks/theory.py --out theory --digits"}
    report.write_page(out / "theory.html", "Theory, measured", facts, table, sections, command, shown)
    records.write_json(out / "theory.json", {**found, "statements": rows})
    return sections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the page, the numbers and finished runs")
    parser.add_argument("--digits", action="store_true", help="run what is missing of 50 agents on the demo task")
    parser.add_argument("--figures", type=Path, help="folder for every figure as a PNG file")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], Numbers]] = {
        "mixing": mixing,
        "clipped": clipped,
        "mean_and_tail": mean_and_tail,
        "factors_or_products": factors_or_products,
        **{f"convergence {n}": functools.partial(convergence, n) for n in SIZES},
        "tracking": tracking,
        "fifty_agents": fifty_agents,
    }
    kept = out / "theory.json"
    found: Numbers = json.loads(kept.read_text()) if kept.exists() else {"seconds": 0.0}
    for name, measure in parts.items():
        if name not in found:
            started = time.process_time()
            found[name] = measure()
            found["seconds"] += time.process_time() - started
            found["environment"] = records.environment()
            records.write_json(kept, found)
            print(f"{name}: {time.process_time() - started:.0f} s", flush=True)
    path = out / "digits.jsonl"
    found["digits"] = digits(path) if arguments.digits else list(read(path).values())
    sections = write(found, out)
    for statement, measured, bar, holds in statements(found):
        print(f"{'holds' if holds else 'FAILS'}  {statement}: {measured} (bar: {bar})")
    if arguments.figures is not None:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE | {"savefig.facecolor": "white"}):
            for _, members in sections:
                for plot in members:
                    name = plot.title.lower().replace("σ₂", "sigma-2").replace(",", "").replace(" ", "-")
                    plot.figure.savefig(arguments.figures / f"theory-{name}.png", dpi=110)
    print(out / "theory.html")


if __name__ == "__main__":
    main()
