"""How does a configuration become a run? Task, graph, partition, algorithm and adapters are put together."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decaf_lora.config import RunConfig, TaskConfig
from decaf_lora.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

    from decaf_lora.engines import Engine
    from decaf_lora.graphs import Graph, Schedule
    from decaf_lora.partition import Own, Partition
    from decaf_lora.run import Run
    from decaf_lora.tasks.base import Task


def build_run(
    config: RunConfig,
    engine: Callable[[int], Engine] | None = None,
    device: str | None = None,
    *,
    graph: Graph | Schedule | None = None,
    split: Callable[[Task], Partition | Own] | None = None,
) -> Run:
    """The `Run` that a configuration describes.

    Args:
        config: what to run.
        engine: makes, from the number of agents, the engine that they live in; None: all live in this process.
        device: takes the place of the configuration's device.
        graph: takes the place of the graph that the configuration names.
        split: makes the partition from the task, in place of the one that the configuration names. Its agents are in
            the order of the graph's.

    Raises:
        UserError: something in the configuration cannot be run; names the field.
    """
    from decaf_lora import algorithms, graphs, partition
    from decaf_lora.engines import Simulate
    from decaf_lora.run import Run

    _ = config.training.peak  # refuses auto before anything is loaded
    if config.privacy.on and config.task.packing:
        raise UserError("task.packing: a block holds several texts, and privacy is of one example; leave it out.")
    algorithm = algorithms.make(config.algorithm.name, **config.algorithm.options())
    graph = graph or graphs.parse(config.graph, config.agents, config.seed)
    task = _task(config.task, device or config.device)
    shards: Partition | Own
    if split is not None:
        shards = split(task)
    else:
        _refuse_moved_rows(config)
        shards = partition.parse(config.partition, task.labels, config.agents, config.seed, task.column)
    if config.validation_share is not None:
        from decaf_lora.tasks.held_out import hold_out

        task, shards = hold_out(task, shards, config.validation_share, config.seed)
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
        test=config.test,
        evaluate_every=config.evaluate_every,
        measure_every=config.measure_every,
        eval_batch_size=config.task.eval_batch_size,
        attackers=config.attackers,
        privacy=config.privacy,
        engine=engine or Simulate,
    )
    _warn_of_slow_bfloat16(config, run.trainer.device)  # last: a mistake is then one line, without a warning before it
    return run


def _refuse_moved_rows(config: RunConfig) -> None:
    """Raises UserError if the partition names rows of the training split, but an option of the task moves the rows."""
    if not re.search(r"(^|/)indices:", config.partition):
        return
    task = config.task
    for field, moves in (("test_share", task.test_share), ("max_train", task.max_train), ("skip_bad", task.skip_bad)):
        if moves:
            raise UserError(
                f"task.{field}: it takes rows out of the training split, so the numbers in {config.partition} would "
                "mean others; give a split of your own instead (task.test_split), or name the sites in a column."
            )
    if task.packing:
        raise UserError(f"task.packing: it joins rows, so the numbers in {config.partition} mean none; leave it out.")


def lora_configs(config: RunConfig, default: LoraConfig) -> LoraConfig | list[LoraConfig]:
    """The `peft.LoraConfig` of the options; a list of one for each agent if agents may differ in rank or alpha."""
    options, own = config.lora, lora_config(config, default)
    for field, values in (("ranks", options.ranks), ("alphas", options.alphas)):
        if values and len(values) != config.agents:
            raise UserError(f"lora.{field}: {len(values)} given for {config.agents} agents; give one for each.")
    directories = init_adapters(config)
    if not (options.ranks or options.alphas or directories):
        return own
    configs = []
    for agent in range(config.agents):
        one, fields = copy.deepcopy(own), dict[str, Any]()
        directory = directories[agent] if directories else None
        if directory is not None and not options.ranks:
            from decaf_lora.adapters import rank_fields

            fields = rank_fields(Path(directory))
        elif options.ranks:
            ratio = options.ranks[agent] / own.r
            alpha = own.lora_alpha * (ratio**0.5 if own.use_rslora else ratio)
            fields = {"r": options.ranks[agent], "lora_alpha": alpha}
        if options.alphas:
            fields["lora_alpha"] = options.alphas[agent]
        for field, value in fields.items():
            setattr(one, field, value)
        configs.append(one)
    return configs


def init_adapters(config: RunConfig) -> list[str | None]:
    """The PEFT directory that each agent starts from, None for a fresh start; [] if no agent has one."""
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


def lora_config(config: RunConfig, default: LoraConfig) -> LoraConfig:
    """The `peft.LoraConfig` of the options. Unset targets are those of `default`, whose new layers always train."""
    from peft import LoraConfig

    values = config.lora.model_dump(exclude={"ranks", "alphas"})
    values["init_lora_weights"] = "gaussian" if values["init_lora_weights"] == "gaussian" else True
    for field in ("target_modules", "exclude_modules"):
        name = values[field]
        if isinstance(name, str) and re.fullmatch(r"[\w.]+", name):  # one name, no pattern; all-linear has a dash
            values[field] = [name]
    if values["target_modules"] is None:
        values["target_modules"] = default.target_modules
    # Without the task's own modules a new head would keep its random weights, and would not be exported.
    values["modules_to_save"] = (
        list(dict.fromkeys([*(values["modules_to_save"] or []), *(default.modules_to_save or [])])) or None
    )
    values["fan_in_fan_out"] = values["fan_in_fan_out"] or default.fan_in_fan_out
    try:
        return LoraConfig(**values, task_type=default.task_type)
    except (ValueError, TypeError) as error:
        raise UserError(f"lora: {' '.join(str(error).split())}") from error


_tasks: dict[tuple[str, str, str], Task] = {}
_loading: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
"""Held while a task is loaded. Of several processes the first preprocesses; the others then find its cache."""


def _task(config: TaskConfig, device: str) -> Task:
    """The task, loaded once in a process, since the runs of a comparison share model and data.

    The task is loaded again if one of its files has changed.
    """
    from decaf_lora import tasks

    key = (config.model_dump_json(), device, tasks.files_state(config))
    if key not in _tasks:
        with _loading:
            task = tasks.make(config)
        task.model.to(device_of(device))
        _tasks.clear()
        _tasks[key] = task
    return _tasks[key]


def device_of(name: str) -> torch.device:
    """The device that a configuration names; UserError if it cannot be used here."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
        torch.ones(1, device=device).item()  # `meta` takes tensors but holds no numbers
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]}).") from error


def _warn_of_slow_bfloat16(config: RunConfig, device: Any) -> None:
    """Warns if the run computes in bfloat16 on a processor that has to emulate bfloat16."""
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
