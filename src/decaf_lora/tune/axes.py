"""Which fields may be searched, and which run is a trial? Values of the command line become configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from decaf_lora import config as configs
from decaf_lora.config import RunConfig
from decaf_lora.errors import UserError, nearest
from decaf_lora.tune.halving import Point
from decaf_lora.yaml_file import parse_scalar

SECTIONS = ("lora", "algorithm", "training")
FIELDS = ("graph", "gossip_steps", "start")
"""Fields of the run itself, and its sections, that change how agents train and not what their score is measured on."""
MOST_TRIALS = 1000


def read_axes(config: RunConfig, given: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    """The axes of a search, with the values as the configuration holds them.

    Args:
        config: the run that is tuned.
        given: dotted field -> values, which may be text.

    Raises:
        UserError: a field is unknown or may not be searched, or a value is wrong, alone, or there twice.
    """
    if not given:
        raise UserError("over: name a field and its values, as in --over training.learning_rate 1e-3 3e-3 1e-2.")
    axes: dict[str, tuple[Any, ...]] = {}
    for written, values in given.items():
        field = "training.learning_rate" if written in ("lr", "learning_rate") else written.replace("-", "_")
        _refuse_field(config, field)
        if field in axes:
            raise UserError(f"over: {field} is given twice; write all its values after one --over.")
        read = [_value(config, field, value) for value in values]
        if len(read) < 2:
            raise UserError(f"over: {field} needs at least two values, as in --over {field} 1 2.")
        twice = [value for i, value in enumerate(read) if value in read[:i]]
        if twice:
            raise UserError(f"over: {field} has {twice[0]!r} twice; leave one out.")
        axes[field] = tuple(read)
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MOST_TRIALS:
        raise UserError(f"over: the axes make {count} trials; give fewer values (at most {MOST_TRIALS} trials).")
    return axes


def with_values(config: RunConfig, point: Point) -> RunConfig:
    """`config` with the values of a trial; UserError where it refuses one."""
    values = config.model_dump()
    for field, value in point.items():
        section, dot, name = field.partition(".")
        if dot:
            values[section] = {**values[section], name: value}
        else:
            values[field] = value
    return configs.build(RunConfig, values)


def described(point: Point) -> str:
    """A trial in words, such as `learning_rate 0.003, r 8`."""
    return ", ".join(f"{short(field)} {shown(value)}" for field, value in point.items())


def short(field: str) -> str:
    """The last part of a dotted field, by which people know it."""
    return "algorithm" if field == "algorithm.name" else field.rpartition(".")[2]


def shown(value: Any) -> str:
    """A value as text for people."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _refuse_field(config: RunConfig, field: str) -> None:
    known = configs.fields(RunConfig)
    section, dot, _ = field.partition(".")
    of_own = section == "algorithm" and dot and type(config.algorithm).has_own([config.algorithm.name])
    if field not in known and not of_own:
        close = nearest(field, known) or [f for f in known if f.rpartition(".")[2] == field]
        raise UserError(f"over: {field} is no field." + (f" Did you mean {close[0]}?" if close else ""))
    if section not in SECTIONS and field not in FIELDS:
        reason = {
            "rounds": "trials are compared at equal rounds",
            "seed": "a seed is no choice to make; --seeds trains every trial with several",
        }.get(field, "it changes more than how agents train, and scores could not be compared")
        raise UserError(
            f"over: {field} cannot be searched: {reason}. Fields of {', '.join(SECTIONS)}, and {', '.join(FIELDS)} can."
        )


def _value(config: RunConfig, field: str, value: Any) -> Any:
    read = parse_scalar(value) if isinstance(value, str) else value
    made = with_values(config, {field: read})
    if field == "training.learning_rate" and made.training.learning_rate == "auto":
        raise UserError("over: training.learning_rate auto is no value to try; give numbers.")
    return configs.flat(made).get(field, read)
