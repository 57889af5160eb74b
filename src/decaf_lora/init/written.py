"""How is a configuration written so that a person understands it? YAML with a remark beside each field."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from decaf_lora.config import RunConfig, build
from decaf_lora.init.found import Asked, Found
from decaf_lora.yaml_file import read_yaml, write_yaml

_RATES = {"text": 5e-3, "images": 5e-3, "llm": 2e-3}
"""Peak learning rates of LoRA, with a schedule that ends at 0."""

_HEAD_RATIO = {"text": 16}
"""Rate of a new head, where there is one, in multiples of LoRA's (docs/methods.md)."""

_SAID = {
    "name": "what is learnt; also: image-text, sequence-classification, causal-lm",
    "model": "a model of the Hugging Face Hub, or a folder",
    "data": "as seen from where `decaf` is started",
    "text_column": "what the model reads",
    "label_column": "what it is to tell",
    "image_column": "paths of the images",
    "prompt_column": "what the model is asked",
    "answer_column": "what it is to answer; the loss is on this alone",
    "templates": "the prompt; {column} stands for the value of a column",
    "answers": "the answers to choose from, one for each class, in the order of `classes`",
    "test_share": "this share is held out, class by class, and only scores",
}


def yaml_of(found: Found, asked: Asked, out: Path) -> str:
    """The configuration as YAML with comments; it is read back to be sure that it says what it should."""
    graph = "complete" if found.agents <= 8 else "ring"
    batch = 16 if found.size >= 160 * found.agents else 4  # a round should have ten steps or so
    head = {"head_rate_ratio": _HEAD_RATIO[asked.kind]} if asked.kind in _HEAD_RATIO else {}
    values: dict[str, Any] = {
        "task": found.task,
        "lora": {"r": 8, "lora_alpha": 16},
        "algorithm": {"name": "decaf_tracked"},
        "training": {"epochs": 1, "batch_size": batch, "learning_rate": _RATES[asked.kind], **head},
        "agents": found.agents,
        "graph": graph,
        "partition": found.partition,
        "rounds": 10,
        "baseline": ["alone"],
    }
    order = ("name", "model", "data", "text_column", "prompt_column", "templates", "answer_column", "label_column")
    fields = {**{k: found.task[k] for k in order if k in found.task}, **found.task}
    remarks = [
        *_head(found, asked, out),
        "task:",
        *[_line(f"  {name}", value, _SAID.get(name, "")) for name, value in fields.items()],
        "lora: {r: 8, lora_alpha: 16}  # names and meanings of peft.LoraConfig; targets default to the model's family",
        "algorithm: {name: decaf_tracked}  # DeCAF with gradient tracking, for sites whose data differ",
        "training:",
        "  epochs: 1  # passes over an agent's own rows in a round",
        f"  batch_size: {batch}  # rows of an agent in a step; 4 for a few hundred rows, 16 for more",
        f"  learning_rate: {_RATES[asked.kind]}  # or auto: chosen before the run; `decaf tune` searches wider",
        *(_line(f"  {name}", value, "the new head learns at so many times that rate") for name, value in head.items()),
        _line("agents", found.agents, "how many train together"),
        _line("graph", graph, "who talks to whom; also: ring, star, or a file with edges between names"),
        _line("partition", found.partition, "who holds which rows; also: iid, dirichlet:0.1, column:NAME"),
        "rounds: 10  # of training and exchange",
        "baseline: [alone]  # also what each agent reaches on its own rows alone: did it help?",
    ]
    text = "\n".join(remarks) + "\n"
    assert build(RunConfig, _read_back(text)) == build(RunConfig, values)
    return text


def _head(found: Found, asked: Asked, out: Path) -> list[str]:
    lines = [f"# Written by `decaf init {asked.kind}`, from {found.size} rows to train on. It was assumed that"]
    lines += [f"#   - {_plain(line)}" for line in found.assumed]
    lines += ["# Change what is wrong. Then:"]
    lines += [f"#   decaf check {_plain(str(out))}"]
    lines += [f"#   decaf run {_plain(str(out))} --out runs/{_plain(out.stem)}"]
    return lines


def _line(name: str, value: Any, remark: str) -> str:
    flow = write_yaml({"x": value}) if not isinstance(value, list | dict) else None
    text = flow.removeprefix("x:").strip() if flow is not None and flow.count("\n") == 1 else _flow(value)
    return f"{name}: {text}" + (f"  # {remark}" if remark else "")


def _flow(value: Any) -> str:
    """A value on one line: JSON is YAML."""
    return json.dumps(value, ensure_ascii=False)


def _plain(text: str) -> str:
    """A text that cannot leave its comment."""
    return "".join(c if c.isprintable() else " " for c in text)


def _read_back(text: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return read_yaml(path, "init")
