"""How do several runs become one comparison? A folder a run, side by side in processes, and a report over all.

A comparison's folder holds config.yaml, the folder of each run, summary.json, tables and report.html.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from decaf_lora import config as configs
from decaf_lora.config import CompareConfig, RunConfig
from decaf_lora.errors import TrainingError
from decaf_lora.records import SummaryRow, read_facts, read_summary, replace_text, summarise, write_json
from decaf_lora.runs import build, signals
from decaf_lora.runs.events import Event, Interrupted, Watch, nobody
from decaf_lora.runs.folder import check_folder, disk, run


def default_jobs(device: str) -> int:
    """Runs at a time unless the user says: one on a GPU, which one model may fill; else one a core."""
    import torch

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return 1 if on_gpu else os.cpu_count() or 1


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: the name of its folder, its configuration, and the graphs that it stands for."""

    name: str
    config: RunConfig
    graphs: tuple[str, ...]


def cells(config: CompareConfig) -> list[Cell]:
    """The runs of a comparison: graphs x partitions x seeds x algorithms.

    An algorithm that does not use the graph (local, centralized, fedavg) runs once for all graphs.
    """
    from decaf_lora import algorithms

    out = []
    graphs = config.graphs or (config.graph,)
    for graph, partition, seed, name in itertools.product(
        graphs, config.partitions or (config.partition,), config.seeds, config.algorithms
    ):
        key = name.replace("-", "_")
        options = algorithms.accepted(key, config.algorithm.options())
        shared = len(graphs) > 1 and algorithms.make(key, **options).topology != "graph"
        if shared and graph != graphs[0]:
            continue
        values = {k: getattr(config, k) for k in RunConfig.model_fields}
        learning_rate = config.learning_rates.get(key, config.training.learning_rate)
        values |= {
            "graph": graph,
            "partition": partition,
            "seed": seed,
            "algorithm": {"name": key, **options},
            "training": config.training.model_copy(update={"learning_rate": learning_rate}),
        }
        parts = [key, partition, f"seed{seed}"] if shared else [key, graph, partition, f"seed{seed}"]
        folder = "-".join(parts).replace("/", "_").replace(":", "-")
        out.append(Cell(folder, RunConfig.model_validate(values), graphs if shared else (graph,)))
    return out


def compare(
    config: CompareConfig, out: Path, *, resume: bool = False, jobs: int = 1, watch: Watch = nobody
) -> list[SummaryRow]:
    """Runs every cell of a comparison below `out`, `jobs` at a time; finished ones are kept with `resume`.

    Writes summary.json, tables and the report over all; a run that stands for several graphs has a row under each.
    A run whose training diverges has a row that says so, without scores; the others go on.
    Raises Interrupted after Ctrl-C.
    """
    from decaf_lora.records import tables
    from decaf_lora.report import write_report

    check_folder(config, out, resume)
    todo = cells(config)
    with disk(out):
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / "config.yaml", configs.dump(config))
    rows: dict[str, SummaryRow] = {}
    left = []
    for cell in todo:
        if resume and (out / cell.name / "summary.json").exists():
            rows[cell.name] = read_summary(out / cell.name / "summary.json")[0]
            rounds = cell.config.rounds
            watch(Event(cell.name, rounds, rounds, 1.0, None, rows[cell.name].mean_score))
        else:
            left.append(cell)
    rows |= _run_all(left, out, jobs, watch)
    graphs = dict.fromkeys(graph for cell in todo for graph in cell.graphs)
    ordered = [replace(rows[cell.name], graph=graph) for graph in graphs for cell in todo if graph in cell.graphs]
    with disk(out):
        write_json(out / "summary.json", [asdict(row) for row in ordered])
        for name, text in tables(ordered).items():
            replace_text(out / name, text)
        write_report(out)
    return ordered


def _run_all(left: list[Cell], out: Path, jobs: int, watch: Watch) -> dict[str, SummaryRow]:
    if jobs == 1 or len(left) < 2:
        return {cell.name: _run_cell(cell, out, watch) for cell in left}
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        events = manager.Queue()
        threads = max(1, (os.cpu_count() or 1) // jobs)
        rows = {}
        with ProcessPoolExecutor(
            min(jobs, len(left)),
            mp_context=context,
            initializer=_start_worker,
            initargs=(events, manager.Lock(), threads),
        ) as pool:
            futures = {pool.submit(_run_in_worker, cell, out): cell for cell in left}
            drain = threading.Thread(target=_forward, args=(events, watch), daemon=True)
            drain.start()
            try:
                for future in as_completed(futures):
                    rows[futures[future].name] = future.result()
            except (KeyboardInterrupt, Interrupted):
                pool.shutdown(wait=True, cancel_futures=True)
                raise Interrupted(out, 0) from None
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            finally:
                with contextlib.suppress(EOFError, OSError):
                    events.put(None)
                drain.join(timeout=2)
        return rows


def _run_cell(cell: Cell, out: Path, watch: Watch) -> SummaryRow:
    from decaf_lora.report import write_report

    directory = out / cell.name
    try:
        return run(cell.config, directory, resume=(directory / "config.yaml").exists(), watch=watch)
    except Interrupted as stop:
        raise Interrupted(out, stop.round) from None
    except TrainingError as error:  # a result, too: the other runs go on, and --resume does not run it again
        with disk(out):
            write_json(directory / "run.json", read_facts(directory) | {"diverged": str(error)})
            row = summarise(directory)
            write_json(directory / "summary.json", [row])
            write_report(directory)
        watch(Event(cell.name, cell.config.rounds, cell.config.rounds, 1.0, None, None))
        return row


_events: Any = None


def _start_worker(events: Any, loading: Any, threads: int) -> None:
    global _events
    _events, build._loading = events, loading
    warnings.showwarning = _send_warning
    # Ctrl-C reaches every process of the terminal; one that is between two runs, or loads, has nothing to save.
    signal.signal(signal.SIGINT, signals.note_stop)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the live display may be on by then
    import torch

    torch.set_num_threads(threads)


def _send_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    _events.put((str(message), category))


def _run_in_worker(cell: Cell, out: Path) -> SummaryRow:
    if signals._stopped:
        raise Interrupted(out, 0)
    return _run_cell(cell, out, _events.put)


def _forward(events: Any, watch: Watch) -> None:
    """Hands on what workers send, until None: events to `watch`, and warnings, which are so said once for all runs."""
    with contextlib.suppress(EOFError, OSError):  # the queue's process is gone
        for item in iter(events.get, None):
            if isinstance(item, Event):
                watch(item)
            else:
                message, category = item
                warnings.warn(message, category, stacklevel=1)
