"""How does a plan look on a terminal?"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from decaf_lora.plan.costs import Plan
from decaf_lora.records import Spread, human_bytes


def shown(plan: Plan, name: str) -> list[Any]:
    """The plan as rich tables and texts for a terminal; `name` is that of the recipe."""
    one = plan.agents_here == 1
    memory = Table(title=f"memory while training, {_process(plan)}", **_STYLE)
    for column in ("", "in all", *(() if one else ("an agent",))):
        memory.add_column(column, justify="left" if not column else "right")
    for part in plan.parts:
        per_agent = "" if part.per_agent is None else _bytes(part.per_agent)
        memory.add_row(part.name, _bytes(part.bytes), *(() if one else (per_agent,)))
    memory.add_section()
    memory.add_row("highest while training", _bytes(plan.peaks["train"]))
    memory.add_row("highest in an exchange", _bytes(plan.peaks["exchange"]) if "exchange" in plan.peaks else "none")
    memory.add_row("highest in an evaluation", _bytes(plan.peaks["evaluate"]))
    work = Table(title="work", **_STYLE)
    for column in ("", "a step", "a round", "the run"):
        work.add_column(column, justify="left" if not column else "right")
    steps = plan.steps_per_round
    work.add_row("rounds", "", "1", f"{plan.rounds}")
    work.add_row("local steps", "1", f"{steps}", f"{steps * plan.rounds}")
    sent = [_bytes(plan.bytes_per_round), _bytes(plan.bytes_sent)] if plan.bytes_per_round else ["nothing", "nothing"]
    work.add_row("an agent sends", "", *sent)
    flops = [plan.flops_per_step * n for n in (1, steps, steps * plan.rounds)]
    work.add_row("training, all agents, FLOP", *(f"{x:.3g}" for x in flops))
    if plan.flops_per_evaluation is not None:
        evaluating = plan.flops_per_evaluation * plan.evaluations
        work.add_row(f"evaluating {plan.evaluations} models, FLOP", "", "", f"{evaluating:.3g}")
    if plan.hours is not None:
        work.add_row(f"hours at {plan.tflops:.3g} TFLOP/s", "", "", f"{plan.hours:.3g}")
    facts = [
        f"{name}: {plan.model}, {plan.parameters / 1e6:.4g} million parameters, {plan.agents} agents, each trains "
        f"{plan.trained_per_agent / 1e6:.3g} million",
        f"{plan.agents_per_pass} agents in a pass, {plan.examples_per_pass} examples",
    ]
    return [
        *(Text(fact) for fact in facts),
        Text(""),
        memory,
        Text(""),
        work,
        Text(""),
        *(Text(f"- {text}") for text in plan.assumptions),
    ]


_STYLE: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "title_justify": "left"}


def _process(plan: Plan) -> str:
    if plan.agents_here == plan.agents:
        return "all agents in one process"
    return f"a process with {plan.agents_here} of {plan.agents} agents"


def _bytes(count: float) -> str:
    return human_bytes(Spread(count))
