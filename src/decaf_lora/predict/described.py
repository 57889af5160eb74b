"""What was saved? A run's adapter or an exported folder, and the task that its description tells.

`decaf_lora.json` says how examples were put to the model: columns, prompts, classes in their order, longest sequence.
The task is made again from it by the code that made it for training, so that both prepare examples alike.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from decaf_lora.config import TaskConfig
from decaf_lora.errors import UserError
from decaf_lora.validation import checked

_NAMES = {
    "sequence-classification": "sequence-classification",
    "answers": "causal-lm",
    "instruction": "causal-lm",
    "image-text": "image-text",
}
"""Use of a model -> name of its task."""


class Described(NamedTuple):
    """A saved model and what it is for."""

    directory: Path
    """Of the adapter, or of a whole model."""
    task: Mapping[str, Any]
    """`Task.describe`."""
    made: Mapping[str, Any]
    """How it was made, for people."""
    is_adapter: bool

    @property
    def use(self) -> str:
        """sequence-classification, answers, instruction or image-text."""
        return str(self.task["use"])

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(field of `TaskConfig`, column) of what the model reads, without images."""
        from decaf_lora.tasks.sequences import parts_of

        if self.use == "sequence-classification":
            return list(zip(("text_column", "text_pair_column"), self.task["columns"], strict=False))
        if self.use == "image-text":
            return []
        return [("templates", column) for _, column in parts_of(self.task["templates"][0]) if column]

    def config(self, data: str, **options: Any) -> TaskConfig:
        """The configuration of the task on other data; `options` say how these are read."""
        task, use = self.task, self.use
        values: dict[str, Any] = {"name": _NAMES[use], "data": data, "model": task["model"]}
        values |= {name: value for name, value in options.items() if value is not None}
        if use == "image-text" and options.get("image_column") is None:
            values["image_column"] = task.get("image_column", "image")
        values["dtype"] = task.get("dtype", "float32")
        values["quantization"] = "4bit" if task.get("quantized") else None
        for field in ("max_length", "templates", "answers", "length_normalized", "chat_template", "pixel_range"):
            if task.get(field) is not None and not (use == "image-text" and field == "max_length"):
                values[field] = task[field]
        if use == "instruction":
            values["answer_column"] = task["columns"][0]
        else:
            values |= {"classes": task["labels"], **_metric(task)}
        if use == "sequence-classification":
            values |= dict(self.columns)
        return checked(TaskConfig, values)


@contextlib.contextmanager
def described(source: Path, agent: str | None) -> Iterator[Described]:
    """A saved model to predict with.

    Args:
        source: folder of a run, of an adapter that `decaf export` or `decaf merge` has written, or of a whole model
            that they have written.
        agent: of a run: number, name, or None for the averaged model.

    Raises:
        UserError: the folder is none of these, or its model has no use that can be predicted with.
    """
    if not source.is_dir():
        raise UserError(f"model: {source} is no folder; give that of a run, or of an exported adapter.")
    if (source / "decaf_lora.json").exists():
        if agent is not None:
            raise UserError(f"agent: {source} holds one model; leave --agent out, or give the folder of the run.")
        yield _read(source)
    elif (source / "adapter_config.json").exists():
        raise UserError(
            f"model: {source} has no decaf_lora.json, which says how examples are put to the model; predict with the "
            "folder of the run, or with what `decaf export` has written."
        )
    else:
        from decaf_lora.runs.export import ALL, export

        if agent == ALL:
            raise UserError("agent: all is no single model; name one agent, or averaged.")
        with tempfile.TemporaryDirectory(prefix="decaf-predict-") as aside:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of what only a written folder lacks
                    export(source, agent or "averaged", Path(aside) / "adapter")
            except UserError as error:
                raise UserError(re.sub("^export:", "model:", str(error))) from error
            yield _read(Path(aside) / "adapter")


def _read(directory: Path) -> Described:
    path = directory / "decaf_lora.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        task, made = dict(values["task"]), dict(values["made"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"model: {path} cannot be read ({error}); export the adapter again.") from error
    use, name = task.get("use"), task.get("name")
    if use == "text":
        raise UserError("model: it was tuned on plain text, which asks for no answer; there is nothing to predict.")
    if use not in _NAMES or (use == "image-text" and not task.get("processor")):
        raise UserError(
            f"model: the task {name} is not one whose examples can be read from a file (sequence-classification, "
            "image-text, and causal-lm with answers or answer_column); use it from Python."
        )
    needed: dict[str, tuple[str, ...]] = {
        "sequence-classification": ("columns", "labels"),
        "image-text": ("templates", "labels"),
    }
    needed |= {"answers": ("templates", "answers", "labels"), "instruction": ("templates", "columns")}
    missing = [field for field in ("model", *needed[use]) if not task.get(field)]
    if missing:
        raise UserError(f"model: {path} does not say {missing[0]}; predict with the folder of the run.")
    is_adapter = (directory / "adapter_config.json").exists()
    if not is_adapter:
        task |= {"model": str(directory.resolve()), "revision": None}
    return Described(directory, task, made, is_adapter)


def _metric(task: Mapping[str, Any]) -> dict[str, Any]:
    """The metric that a score's name tells, as fields of `TaskConfig`."""
    name = str(task.get("score_name", "accuracy"))
    if found := re.fullmatch(r"F1 \((.*)\)", name):
        return {"metric": "f1", "positive": found[1]}
    return {"metric": "macro-f1" if name == "macro-F1" else "accuracy"}
