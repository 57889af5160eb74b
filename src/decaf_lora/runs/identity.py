"""What must be the same for a run to go on? Facts of a run, for its report, and hashes of what it was made from.

A checkpoint holds adapters and moments, but not the base model, the data, or the user's own Python. The checkpoint has
a hash of each instead. A run that would go on with something else under the same name is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from decaf_lora import graphs, partition
from decaf_lora.config import RunConfig, flat
from decaf_lora.errors import UserError

if TYPE_CHECKING:
    from decaf_lora.run import Run

MANY = 1000
"""From so many agents on, run.json has the rows of the mixing matrix in place of the matrix, and no sigma_2."""

SAMPLES = 512
"""Number of values of each parameter that go into the hash of the base model."""


def facts_of(run: Run, config: RunConfig | None = None) -> dict[str, Any]:
    """What run.json says: the facts of a run that its report needs, as JSON values.

    Args:
        run: a run, before or after training.
        config: the configuration that it was made from, for the names that the user gave to graph and partition.
    """
    schedule = run.schedule
    if config is not None:
        # The graph that was asked for, also of algorithms that do not use it: a comparison shows one.
        schedule = graphs.as_schedule(graphs.parse(config.graph, config.agents, config.seed))
    split, task = run.partition, run.task
    if config is not None and split.names:
        schedule = schedule.arranged(split.names)
    agents = split.num_agents
    names = getattr(task, "classes", None)
    return {
        "algorithm": run.algorithm.name,
        "setting": None if config is None else config.setting,
        "graph": {"name": schedule.name if config is None else config.graph, **_mixing(schedule)},
        "partition": {
            "name": split.name if config is None else config.partition,
            "label_table": split.label_table().tolist(),
            "classes": [names[c] if names else str(c) for c in split.classes],
        },
        "agents": agents,
        "attackers": run.honest.told(),
        "privacy": run.account.told(run.rounds),
        "names": list(split.names),
        "ranks": []
        if run.attached.uniform
        else [max(s.rank for s in run.attached.sites_of(i).values()) for i in range(agents)],
        "rank": max(s.rank for s in run.attached.sites_of(0).values()) if run.attached.sites else 0,
        "rounds": run.rounds,
        "steps": run.trainer.steps_in_round,
        "epochs": run.training.epochs,
        "batch_size": run.training.batch_size,
        "optimizer": run.training.optimizer,
        "learning_rate": run.training.learning_rate,
        "model": _name_of(task.describe().get("model")),
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "data": None if config is None else _name_of(config.task.data),
        "num_train": len(task.labels),
        "num_test": task.num_test,
        "seed": run.seed,
        "task": task.name,
        "score_name": task.score_name,
        "lower_is_better": task.lower_is_better,
        "majority_score": task.majority_score(),
        "uses_graph": run.algorithm.topology == "graph",
        "agents_per_pass": run.trainer.agents_per_pass,
    }


def _mixing(schedule: graphs.Schedule) -> dict[str, Any]:
    """The mixing matrix of the first round, and sigma_2; of many agents only what costs no (N, N) numbers."""
    if schedule.num_agents >= MANY:
        return {"rows": schedule.at(0).rows(), "sigma_2": None}
    return {
        "weights": schedule.at(0).weights.tolist(),
        "sigma_2": None if schedule.period is None else schedule.sigma_2,
    }


def _name_of(source: str | None) -> str | None:
    """The name of a model or of data for people: of a file or folder without the folders above it."""
    return Path(source).name if source is not None and Path(source).expanduser().exists() else source


def sources(run: Run) -> dict[str, Any]:
    """Hashes and sizes of the data, model, graph and split that a run is made from, as JSON values."""
    task, schedule = run.task, run.schedule
    known = [run.partition.agent] if isinstance(run.partition, partition.Own) else range(run.partition.num_agents)
    told = task.facts()
    found = {
        "labels (hash)": _hash(np.asarray(task.labels)),
        "training examples": told["num_train"],
        "test examples": told["num_test"],
        "classes": told["classes"],
        "data (hash)": told["content"][:16],
        "adapted layers": len(run.attached.sites),
        "base model (hash)": _model(run),
        "partition (hash)": _hash(*(run.partition.shard(agent) for agent in known)),
    }
    if run.partition.names:
        found["names of the agents"] = list(run.partition.names)
    if schedule.period is not None:
        found["graph (hash)"] = _hash(*(schedule.at(t).weights for t in range(schedule.period)))
    return json.loads(json.dumps(found, default=str))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two results of `sources`, as `name: before -> now`; names that only one has are ignored."""
    return [f"{k}: {_short(before[k])} -> {_short(now[k])}" for k in before if k in now and before[k] != now[k]]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _model(run: Run) -> str:
    """Hash of name, shape, dtype and `SAMPLES` values of every parameter of the base model that no agent trains."""
    trained = set(run.attached.extras)
    digest = hashlib.sha256()
    for name, parameter in sorted(run.task.model.named_parameters()):
        if name in trained or parameter.is_meta:
            continue
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // SAMPLES)][:SAMPLES].contiguous().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        digest.update(_bytes(sample))
    return digest.hexdigest()[:16]


def _bytes(values: Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype.kind} ".encode())
        digest.update(str(array.tolist()).encode() if array.dtype.kind in "OUS" else array.tobytes())
    return digest.hexdigest()[:16]


# Python of the user's own


_CODE = ("task.name", "algorithm.name", "graph", "partition", "algorithms", "graphs", "partitions")
"""Fields that may name Python to run."""


def own_code(config: RunConfig) -> dict[str, str]:
    """`file.py:function` or `module:function` -> the field that names this Python to run."""
    values = flat(config)
    found: dict[str, str] = {}
    for field in _CODE:
        given = values.get(field, ())
        for value in [given] if isinstance(given, str) else given:
            if _python_of(value) is not None:
                found.setdefault(value, field)
    return found


def _python_of(value: str) -> str | None:
    """The file or module of `file.py:function` or `module:function`; None for another name. Imports nothing."""
    match = re.search(r"([^:]+\.py):[A-Za-z_]", value)
    if match is not None:
        return match[1]
    match = re.fullmatch(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*(?::.*)?", value)
    if match is None or match[1].replace("_", "-") in {*graphs.KINDS, *partition.KINDS}:
        return None
    return match[1]


def is_python(value: str) -> bool:
    """Whether a name means Python to run, `file.py:function` or `module:function`."""
    return _python_of(value) is not None


def code_hashes(config: RunConfig) -> dict[str, str]:
    """Name that `own_code` finds -> hash of its file, if the file can be found. Imports the packages above a module."""
    hashes = {}
    for value in own_code(config):
        file = _file_of(_python_of(value) or "")
        if file is not None and file.is_file():
            hashes[value] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return hashes


def _file_of(where: str) -> Path | None:
    if where.endswith(".py"):
        return Path(where).expanduser()
    try:
        spec = importlib.util.find_spec(where)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def refuse_changed_code(before: Mapping[str, str], config: RunConfig) -> None:
    """Raises UserError if a Python file of the user has changed since the checkpoint was written.

    `before` is what `code_hashes` gave then.
    """
    now = code_hashes(config)
    for value, hash_ in before.items():
        if now.get(value, hash_) != hash_:
            raise UserError(
                f"resume: {_python_of(value)} ({own_code(config)[value]}) has changed since this run was saved; "
                "put the former file back, or choose another --out."
            )
