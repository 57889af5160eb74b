"""How does a configuration become a finished folder? Runs and comparisons on disk.

A run's folder holds config.yaml, environment.json, run.json, records.jsonl, checkpoints/, summary.json and
report.html; a comparison's holds one such folder a run and a summary and report over all. Both can be
interrupted at any time and go on with `resume`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from decaf_lora import config as configs
from decaf_lora.config import CompareConfig, RunConfig, TaskConfig
from decaf_lora.errors import TrainingError, UserError
from decaf_lora.records import (
    Record,
    RecordWriter,
    SummaryRow,
    environment,
    read_facts,
    read_summary,
    replace_text,
    summarise,
    write_json,
)

if TYPE_CHECKING:
    from decaf_lora.engines import Engine, Processes
    from decaf_lora.engines.wire import Wire


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The run was stopped by the user and has left a checkpoint; `directory` says where."""

    def __init__(self, directory: Path, round_: int) -> None:
        super().__init__(f"stopped in round {round_}; go on with --out {directory} --resume")
        self.directory, self.round = directory, round_

    def __reduce__(self) -> tuple[Any, ...]:  # it travels from worker processes
        return type(self), (self.directory, self.round)


class Event(NamedTuple):
    """Where a run stands: for progress displays."""

    key: str
    """Name of the run's folder."""
    round: int
    rounds: int
    fraction: float
    """Share of the run's local steps that are done, 0 to 1."""
    loss: float | None
    score: float | None


Watch = Callable[[Event], None]


def nobody(event: Event) -> None:
    """Watches nothing."""


# One run


def run(config: RunConfig, out: Path, *, resume: bool = False, watch: Watch = nobody) -> SummaryRow:
    """Runs `config` into the folder `out`, or goes on there with `resume`; returns its summary row.

    Raises UserError for any mistake before anything is written, Interrupted after Ctrl-C.
    """
    _check_folder(config, out, resume)
    engine = build(config)
    with contextlib.closing(engine):
        found = _found(out) if resume else None
        if found is not None:
            engine.restore(*found)
        return _write(config, out, engine, found is not None, watch)


def run_split(
    config: RunConfig,
    out: Path,
    processes: Processes,
    *,
    wire: Wire = "exact",
    resume: bool = False,
    watch: Watch = nobody,
) -> SummaryRow | None:
    """The same with the agents split over `processes`, all of which call this; the row is the main one's.

    The main process alone reads and writes `out`. After a restart by the launcher the run goes on by itself.

    Raises UserError in all processes if one of them meets a mistake, or is lost; Interrupted after Ctrl-C.
    """
    import torch

    from decaf_lora import __version__
    from decaf_lora.engines import Torchrun

    device = processes.device.partition(":")[0]
    setting = {"decaf-lora": __version__, "torch": torch.__version__, "wire": wire, "backend": processes.backend}
    processes.agree({**configs.flat(config), "device": device, **setting}, "config")
    resume = processes.share("resume", resume or (processes.launch.restarts > 0 and _started(out)))[0]
    with processes.together():
        if processes.is_main:
            _check_folder(config, out, resume)
        engine = build(config, functools.partial(Torchrun, processes=processes, wire=wire), processes.device)
    with contextlib.closing(engine):
        processes.agree(_data_seen(engine), "data")
        found = _found(out) if resume and processes.is_main else None
        values = processes.share("checkpoint", None if found is None else found[1])[0]
        if values is not None:
            engine.restore({} if found is None else found[0], values)
        if processes.is_main:
            return _write(config, out, engine, values is not None, watch, launched=True)
        _follow(config, out, engine)
        return None


def _started(out: Path) -> bool:
    return (out / "config.yaml").exists()


def _found(out: Path) -> tuple[Any, dict[str, Any]] | None:
    """The newest checkpoint of the run in `out`, if it has one."""
    from decaf_lora import checkpoint

    return checkpoint.load_latest(out / "checkpoints") if (out / "records.jsonl").exists() else None


def _data_seen(engine: Any) -> dict[str, Any]:
    """What all processes must have read alike: each reads model and data from its own machine."""
    labels = hashlib.blake2b(str(engine.task.labels.tolist()).encode(), digest_size=8).hexdigest()
    facts = {
        "labels (hash)": labels,
        "training examples": len(engine.task.labels),
        "test examples": engine.task.num_test,
    }
    return {**facts, "adapted layers": len(engine.attached.sites)}


def _due(config: RunConfig, round_: int) -> bool:
    return round_ > 0 and round_ % config.checkpoint_every == 0 and round_ < config.rounds


def _follow(config: RunConfig, out: Path, engine: Any) -> None:
    """What `_write` does, in a process that writes nothing."""
    with _ctrl_c(engine.stop, launched=True):
        for record in engine.train():
            if _due(config, record.round):
                engine.snapshot()
        engine.snapshot()
    if engine.round < config.rounds:
        raise Interrupted(out, engine.round + 1)


def _write(
    config: RunConfig, out: Path, engine: Any, resumed: bool, watch: Watch, launched: bool = False
) -> SummaryRow:
    """Trains, and writes the folder of the run."""
    from decaf_lora import checkpoint
    from decaf_lora.report import write_report

    with _disk(out):
        out.mkdir(parents=True, exist_ok=True)
        if not resumed or not (out / "run.json").exists():
            replace_text(out / "config.yaml", configs.dump(config))
            write_json(out / "environment.json", environment(str(engine.trainer.device)))
            write_json(out / "run.json", _facts(config, engine))
        # A run stopped before its first step starts again, with the record of the start.
        last = engine.round if resumed and (engine.round or engine.step_in_round) else None
        score: float | None = None
        with RecordWriter(out / "records.jsonl", last) as writer, _ctrl_c(engine.stop, launched):

            def on_step(round_: int, done: int, steps: int, losses: Any) -> None:
                fraction = (round_ - 1 + done / steps) / config.rounds
                watch(Event(out.name, round_, config.rounds, fraction, float(losses.mean()) / done, score))

            engine.on_step = on_step
            watch(Event(out.name, engine.round + 1, config.rounds, engine.round / config.rounds, None, None))
            for record in engine.train():
                writer.write(record)
                score = mean_score(record) if record.scores else score
                if _due(config, record.round):
                    checkpoint.save(out / "checkpoints", *engine.snapshot())
            checkpoint.save(out / "checkpoints", *engine.snapshot())
        if engine.round < config.rounds:
            raise Interrupted(out, engine.round + 1)
        row = summarise(out)
        write_json(out / "summary.json", [row])
        write_report(out)
        watch(Event(out.name, config.rounds, config.rounds, 1.0, None, row.mean_score))
    return row


def build(config: RunConfig, engine: Callable[[int], Engine] | None = None, device: str | None = None) -> Any:
    """The `Run` that a configuration describes; `device` goes before the configuration's."""
    from decaf_lora import algorithms, graphs, partition
    from decaf_lora.run import Run

    algorithm = algorithms.make(config.algorithm.name, **config.algorithm.options())
    graph = graphs.parse(config.graph, config.agents, config.seed)
    task = _task(config.task, device or config.device)
    shards = partition.parse(config.partition, task.labels, config.agents, config.seed)
    run = Run(
        task,
        algorithm,
        graph,
        shards,
        config.training,
        lora=lora_configs(config, task.default_lora()),
        rounds=config.rounds,
        seed=config.seed,
        common_start=config.start == "common",
        init_adapters=init_adapters(config) or None,
        gossip_steps=config.gossip_steps,
        evaluate_every=config.evaluate_every,
        measure_every=config.measure_every,
        eval_batch_size=config.task.eval_batch_size,
        **({} if engine is None else {"engine": engine}),
    )
    _warn_of_slow_bfloat16(config, run.trainer.device)  # last: a mistake is to be one line
    return run


def lora_configs(config: RunConfig, default: Any) -> Any:
    """The `peft.LoraConfig` of the options, or a list of one for each agent where they differ in rank or alpha."""
    options, own = config.lora, lora_config(config, default)
    for field, values in (("ranks", options.ranks), ("alphas", options.alphas)):
        if values and len(values) != config.agents:
            raise UserError(f"lora.{field}: {len(values)} given for {config.agents} agents; give one for each.")
    directories = init_adapters(config)
    if not (options.ranks or options.alphas or directories):
        return own
    configs = []
    for agent in range(config.agents):
        one = copy.deepcopy(own)
        if directories and directories[agent] is not None and not options.ranks:
            from decaf_lora.adapters import read_config

            saved = read_config(Path(directories[agent]))
            for field in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
                setattr(one, field, saved.get(field, getattr(one, field)))
        elif options.ranks:
            one.r = options.ranks[agent]
            ratio = one.r / own.r
            one.lora_alpha = own.lora_alpha * (ratio**0.5 if own.use_rslora else ratio)
        if options.alphas:
            one.lora_alpha = options.alphas[agent]
        configs.append(one)
    return configs


def init_adapters(config: RunConfig) -> list[Any]:
    """The PEFT directory that each agent starts from, None for a fresh start; empty if nobody has one."""
    given = config.init_adapters
    if not given:
        return []
    if len(given) == 1:
        given = tuple(given[0].replace("{agent}", str(agent)) for agent in range(config.agents))
    if len(given) != config.agents:
        raise UserError(
            f"init_adapters: {len(given)} given for {config.agents} agents; give one for each ('fresh' for none), or "
            "one for all."
        )
    return [None if path == "fresh" else str(Path(path).expanduser()) for path in given]


def lora_config(config: RunConfig, default: Any) -> Any:
    """The `peft.LoraConfig` of the options; unset targets and modules to save are the task's own."""
    from peft import LoraConfig

    values = config.lora.model_dump(exclude={"ranks", "alphas"})
    values["init_lora_weights"] = "gaussian" if values["init_lora_weights"] == "gaussian" else True
    for field in ("target_modules", "modules_to_save"):
        if values[field] is None:
            values[field] = getattr(default, field)
    values["fan_in_fan_out"] = values["fan_in_fan_out"] or default.fan_in_fan_out
    return LoraConfig(**values, task_type=default.task_type)


_tasks: dict[tuple[str, str], Any] = {}
_loading: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
"""Held while a task is loaded: of several processes the first preprocesses, the others find its cache."""


def _task(config: TaskConfig, device: str) -> Any:
    """The task, loaded once per process: the runs of a comparison share the model and the data."""
    from decaf_lora import tasks

    key = (config.model_dump_json(), device)
    if key not in _tasks:
        with _loading:
            task = tasks.make(config)
        task.model.to(_device(device))
        _tasks.clear()
        _tasks[key] = task
    return _tasks[key]


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]}).") from error


def _warn_of_slow_bfloat16(config: RunConfig, device: Any) -> None:
    """Says so if the run is to compute in bfloat16 on a processor that has to emulate it."""
    import torch

    fields = {"task.dtype": config.task.dtype, "training.precision": config.training.precision}
    names = [name for name, value in fields.items() if value == "bfloat16"]
    if device.type != "cpu" or not names:
        return
    has = torch.cpu.get_capabilities()
    if has.get("architecture") == "x86_64" and not (has.get("avx512_f") or has.get("avx_ne_convert")):
        warnings.warn(
            f"{' and '.join(names)}: this processor has no instructions for bfloat16 and computes in it many times "
            f"slower than in float32; use {' '.join(f'--{name} float32' for name in names)}.",
            stacklevel=3,
        )


def mean_score(record: Record) -> float | None:
    """Mean over agents of an evaluated round."""
    scores = [s for s in record.scores or [] if s is not None]
    return sum(scores) / len(scores) if scores else None


def _facts(config: RunConfig, engine: Any) -> dict[str, Any]:
    """What run.json says: the static facts of a run that its report needs."""
    from decaf_lora import graphs

    # The graph that was asked for, also of algorithms that do not use it: a comparison shows one.
    schedule = graphs.as_schedule(graphs.parse(config.graph, config.agents, config.seed))
    partition = engine.partition
    names = getattr(engine.task, "classes", None)
    classes = [names[c] if names else str(c) for c in partition.classes]
    return {
        "algorithm": engine.algorithm.name,
        "graph": {
            "name": config.graph,
            "weights": schedule.at(0).weights.tolist(),
            "sigma_2": None if schedule.period is None else schedule.sigma_2,
        },
        "partition": {
            "name": config.partition,
            "label_table": partition.label_table().tolist(),
            "classes": classes,
        },
        "agents": config.agents,
        "ranks": []
        if engine.attached.uniform
        else [max(s.rank for s in engine.attached.sites_of(i).values()) for i in range(config.agents)],
        "rounds": config.rounds,
        "seed": config.seed,
        "task": engine.task.name,
        "score_name": engine.task.score_name,
        "uses_graph": engine.algorithm.topology == "graph",
        "agents_per_pass": engine.trainer.agents_per_pass,
    }


def _check_folder(config: RunConfig, out: Path, resume: bool) -> None:
    """Refuses a folder that is in use, or to go on with a run of another configuration."""
    kind = type(config)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; give a folder.")
    saved = out / "config.yaml"
    if not saved.exists():
        if resume:
            raise UserError(f"resume: {out} holds no run (no config.yaml); leave out --resume to start one there.")
        if out.exists() and any(out.iterdir()):
            raise UserError(f"out: {out} is not empty; choose another folder.")
        return
    if not resume:
        raise UserError(f"out: {out} already holds a run; pass --resume to go on with it, or choose another folder.")
    different = configs.differences(configs.load(kind, saved), config)
    if different:
        raise UserError(
            f"resume: the run in {out} has another config; differing fields: {'; '.join(different)}. "
            "Give the same values, or choose another --out."
        )


@contextlib.contextmanager
def _disk(out: Path) -> Iterator[None]:
    """An error of the file system as one line that says what is kept."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"out: cannot write in {out} ({error.strerror or error}); free space or choose another --out. "
            "What is already there is kept; go on with --resume."
        ) from error


@contextlib.contextmanager
def _ctrl_c(stop: Callable[[], None], launched: bool = False) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) calls `stop`, a second one interrupts at once.

    Not where a launcher passes signals on: processes then get the first one several times.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: Any) -> None:
        stop()
        if not launched:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    if _stopped:  # while the task was loading
        stop()
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


# Several runs


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

    _check_folder(config, out, resume)
    todo = cells(config)
    with _disk(out):
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
    with _disk(out):
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
        with _disk(out):
            write_json(directory / "run.json", read_facts(directory) | {"diverged": str(error)})
            row = summarise(directory)
            write_json(directory / "summary.json", [row])
            write_report(directory)
        watch(Event(cell.name, cell.config.rounds, cell.config.rounds, 1.0, None, None))
        return row


_events: Any = None


def _start_worker(events: Any, loading: Any, threads: int) -> None:
    global _events, _loading
    _events, _loading = events, loading
    warnings.showwarning = _send_warning
    # Ctrl-C reaches every process of the terminal; one that is between two runs, or loads, has nothing to save.
    signal.signal(signal.SIGINT, _note_stop)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the live display may be on by then
    import torch

    torch.set_num_threads(threads)


def _send_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    _events.put((str(message), category))


_stopped = False


def _note_stop(number: int, frame: Any) -> None:
    global _stopped
    _stopped = True


def _run_in_worker(cell: Cell, out: Path) -> SummaryRow:
    if _stopped:
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


# What a run left


def export(directory: Path, agent: int | str, to: Path, *, merge: bool = False) -> Path:
    """Writes an agent's adapter, or the averaged model, of a run's newest checkpoint as a PEFT directory.

    With `merge` the whole model is written with the adapter folded in, to load without PEFT.
    """
    from decaf_lora import checkpoint

    if not (directory / "config.yaml").exists():
        raise UserError(f"export: {directory} holds no run (no config.yaml); give the folder of one run.")
    if not (directory / "run.json").exists():
        runs = sorted(p.parent.name for p in directory.glob("*/run.json"))
        some = f" It is a comparison; give one of its runs, e.g. {directory / runs[0]}." if runs else ""
        raise UserError(f"export: {directory} holds no run.{some}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"to: {to} is not an empty folder; choose another.")
    found = checkpoint.load_latest(directory / "checkpoints")
    if found is None:
        raise UserError(f"export: {directory} has no checkpoint yet; go on with the run first (--resume).")
    engine = build(configs.load(RunConfig, directory / "config.yaml"))
    with contextlib.closing(engine):
        engine.restore(*found)
        with _disk(to):
            engine.save_adapter(to, agent)
    if merge:
        _merge(engine.task, to)
    return to


def _merge(task: Any, to: Path) -> None:
    from peft import PeftModel

    # A copy: the task's model may serve other runs of this process.
    merged = PeftModel.from_pretrained(copy.deepcopy(task.model), str(to)).merge_and_unload()
    with _disk(to):
        for path in to.iterdir():
            path.unlink()
        merged.save_pretrained(to)
        tokenizer = getattr(task, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(to)
