"""What does a comparison run beside the bare algorithms? Named settings: overrides of the base run, each a row.

    settings:
      recommended: {algorithm.name: decaf_tracked, graph: "base:5", gossip_steps: period, algorithm.messages: int8}

A setting inherits everything that it does not override: data, split, seeds and test set are always the comparison's.
"""

from __future__ import annotations

import re
from typing import Any

from decaf_lora import algorithms
from decaf_lora import config as configs
from decaf_lora.algorithms import KINDS
from decaf_lora.config import CompareConfig, RunConfig
from decaf_lora.errors import UserError
from decaf_lora.records import BASELINES
from decaf_lora.runs.identity import is_python

COMMON = (
    *("task", "agents", "attackers", "partition", "seed", "test", "device"),
    *("baseline", "baseline_learning_rate", "setting"),
)
"""Fields that all rows of a comparison share, and no setting overrides."""
_NAME = re.compile(r"[\w][\w .,+=-]{0,59}")


def overrides(config: CompareConfig) -> dict[str, dict[str, Any]]:
    """Name of each setting -> dotted field -> value.

    Raises:
        UserError: a name cannot be that of a row, or a field cannot be overridden.
    """
    found: dict[str, dict[str, Any]] = {}
    taken = {KINDS.written(str(name)): str(name) for name in (*KINDS, *config.algorithms)}
    for name, given in config.settings.items():
        if not _NAME.fullmatch(name):
            raise UserError(
                f"settings: {name[:80]!r} cannot be a name; use up to 60 letters, digits, blanks and - + . , ="
            )
        if KINDS.written(name) in taken:
            raise UserError(f"settings.{name}: an algorithm is called so; give the setting a name of its own.")
        taken[KINDS.written(name)] = name
        fields = _dotted(given, f"settings.{name}")
        if not fields:
            raise UserError(f"settings.{name}: it overrides nothing; give the fields that differ, or leave it out.")
        for field, value in fields.items():
            if field.partition(".")[0] in COMMON:
                raise UserError(f"settings.{name}.{field}: all rows of a comparison share this field; set it outside.")
            if field == "graph" and not isinstance(value, str):
                raise UserError(f"settings.{name}.graph: write it as one name, such as base:5.")
            if isinstance(value, str) and is_python(value):
                raise UserError(
                    f"settings.{name}.{field}: Python of your own is named in algorithms or graph, not in a setting."
                )
        found[name] = fields
    return found


def _dotted(given: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """`given`, whose fields may be nested, dotted or both, by dotted names; UserError for one that is there twice."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        field = f"{prefix}{key}"
        is_section = isinstance(value, dict) and field in ("lora", "algorithm", "training", "privacy", "task")
        for inner, of in (_dotted(value, where, f"{field}.") if is_section else {field: value}).items():
            if inner in found:
                raise UserError(f"{where}.{inner}: it is given twice; keep one.")
            found[inner] = of
    return found


def applied(config: CompareConfig, name: str, fields: dict[str, Any], **cell: Any) -> RunConfig:
    """The run of a setting.

    Args:
        config: the comparison.
        name: of the setting.
        fields: from `overrides`.
        cell: fields of the run in this cell of the comparison: graph, partition, seed.

    Raises:
        UserError: a field is unknown, or its value is wrong.
    """
    try:
        key = algorithms.spelled(str(fields.get("algorithm.name", config.algorithm.name)))
        if key == BASELINES["pooled"]:
            raise UserError(f"algorithm.name: {key} is the reference of all settings; name it in algorithms.")
        rate = config.learning_rates.get(key, config.training.learning_rate)
        values = {field: getattr(config, field) for field in RunConfig.model_fields if field != "algorithm"}
        nested = {field: dict(values[field].model_dump()) for field in ("lora", "training", "privacy")}
        nested["training"]["learning_rate"] = rate
        nested["algorithm"] = {"name": key, **algorithms.accepted(key, config.algorithm.options())}
        values |= {**cell, "baseline": (), "baseline_learning_rate": None, "setting": name}
        for field, value in fields.items():
            section, dot, inner = field.partition(".")
            if dot and section in nested:
                nested[section][inner] = key if field == "algorithm.name" else value
            else:
                values[field] = value
        return configs.build(RunConfig, values | nested)
    except UserError as error:
        raise UserError(f"settings.{name}.{error}") from error
