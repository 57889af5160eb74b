"""Does a run begin? All is loaded, a batch goes through the model, and what it will cost is computed from that."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator

from decaf_lora import plan
from decaf_lora.check.cost import cost, memory, seconds_of_example
from decaf_lora.check.examples import examples
from decaf_lora.check.findings import Finding, look
from decaf_lora.config import RunConfig
from decaf_lora.errors import UserError
from decaf_lora.run import Run
from decaf_lora.runs.build import build_run


def check(config: RunConfig, name: str) -> Iterator[Finding]:
    """Checks a run of one's own; `name` is that of its recipe or file."""
    steps = "" if config.gossip_steps == 1 else f", {config.gossip_steps} exchanges a round"
    yield Finding(
        "configuration",
        "right",
        f"{name}: {config.algorithm.name} on the graph {config.graph}, {config.agents} agents, {config.rounds} "
        f"rounds{steps}; {config.task.name}" + (f" with {config.task.model}." if config.task.model else "."),
    )
    made = plan.with_a_rate(config)
    searched = "the learning rate is searched for before, which takes about as long again" if made != config else ""
    yield from rehearse(lambda: build_run(made), made, "loading", more=searched)


def rehearse(
    build: Callable[[], Run], config: RunConfig, what: str, *, processes: int = 1, more: str = ""
) -> Iterator[Finding]:
    """Builds a run, shows what it learns from, takes one batch through the model, and says what the run will cost.

    Args:
        build: makes the run.
        config: its configuration.
        what: the name of the finding if it cannot be built.
        processes: number of processes that the agents are split over.
        more: what is to be added to the cost, in words.
    """
    try:
        run, warned = _built(build)
    except UserError as error:
        yield Finding(what, "wrong", str(error))
        return
    with run:
        yield from examples(run)
        yield from map(_odd, warned)
        measured: list[float] = []

        def one_batch() -> str:
            seconds, losses = plan.timed_step(run)
            measured.extend([seconds, seconds_of_example(run), run.exchange.bytes_per_round(run.adapter)])
            each = [f"{loss:.4g}" for loss in losses.tolist()]
            if len(each) == 1:
                return f"goes through the model; its loss is {each[0]}."
            return f"goes through the model; losses from {min(losses.tolist()):.4g} to {max(losses.tolist()):.4g}."

        found = look("one batch", one_batch)
        yield found
        if found.verdict == "wrong":
            return
        says, device = cost(run, config, *measured), run.trainer.device
    yield Finding("cost", "right", "; ".join([*says, *([more] if more else [])]) + ".")
    yield memory(config, processes, device)


def _built(build: Callable[[], Run]) -> tuple[Run, list[str]]:
    """The run, and what was warned of while it was built."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = build()
    old = DeprecationWarning | FutureWarning | PendingDeprecationWarning
    return run, list(dict.fromkeys(str(each.message) for each in caught if not issubclass(each.category, old)))


def _odd(message: str) -> Finding:
    """What a library or this one has warned of. Ours begin with the field that is meant."""
    text = " ".join(message.split())
    named = re.match(r"([a-z_]+(?:\.[a-z_]+)*): (.*)", text)
    return Finding(named[1], "odd", named[2]) if named else Finding("warning", "odd", text)
