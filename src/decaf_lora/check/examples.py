"""What will the agents learn from? Examples as the model sees them, labels, who holds what, and what is odd in it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from decaf_lora.check.findings import Finding
from decaf_lora.run import Run

SHOWN = 3
"""Examples to show."""

_MOST_LISTED = 12
"""Labels or agents that a line lists one by one."""


def examples(run: Run) -> Iterator[Finding]:
    """What a person should know of the data of `run` before training."""
    task = run.task
    held = np.concatenate(run.partition.shards)
    classes = f" of {len(task.classes)} classes" if len(task.classes) > 1 else ""
    yield Finding(
        "data",
        "right",
        f"{len(held)} examples to learn from{classes}, {task.num_test} to score on ({task.score_name}).",
    )
    for number, index in enumerate(chosen(task.labels, held), start=1):
        (example,) = task.show_examples(np.array([index]))
        yield Finding(f"example {number}", "right", shortened(example))
    if len(task.classes) > 1:
        yield Finding("labels", "right", f"{_counts(task.labels[held], task.classes)}.")
    yield Finding("agents", "right", _holdings(run))
    yield from odd(run, held)


def chosen(labels: np.ndarray, held: np.ndarray) -> list[int]:
    """The examples to show: the first one of each of the first classes, then further ones.

    Args:
        labels: (M,) of all examples.
        held: indices of the examples that agents hold, ascending in each agent's part.
    """
    _, first = np.unique(labels[held], return_index=True)
    order = [*first, *(i for i in range(min(len(held), SHOWN)) if i not in set(first))]
    return [int(held[i]) for i in sorted(order[:SHOWN])]


def shortened(text: str, most: int = 400) -> str:
    """`text`, with its middle left out if it is longer than `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 107]} [...] {text[-100:]}"


MANY = 6
"""Classes from which on a new head was measured to gain by a rate of its own (docs/methods.md)."""


def odd(run: Run, held: np.ndarray) -> Iterator[Finding]:
    """What works, and may not be what is meant. `held`: indices of the examples that agents hold."""
    task, part = run.task, run.partition
    names, sizes = called(run), [len(shard) for shard in part.shards]
    table = part.label_table()
    if len(task.classes) > 1 and (single := [n for n, row in zip(names, table, strict=True) if (row > 0).sum() == 1]):
        yield Finding(
            "one class",
            "odd",
            f"{_listed(single)} of {len(names)} agents {'holds' if len(single) == 1 else 'hold'} one class alone. If "
            "that is how the data are, decaf_tracked is made for it; if not, look at the labels and the partition.",
        )
    few = [n for n, size in zip(names, sizes, strict=True) if size < run.training.batch_size]
    if few:
        yield Finding(
            "few examples",
            "odd",
            f"{_listed(few)} of {len(names)} agents {'holds' if len(few) == 1 else 'hold'} fewer examples than a batch "
            f"has ({run.training.batch_size}): a step sees some of them twice. Set training.batch_size lower.",
        )
    majority = task.majority_score()
    if majority is not None and majority >= 0.8 and task.score_name == "accuracy":
        yield Finding(
            "majority",
            "odd",
            f"always answering the most frequent class scores {majority:.3f} already. task.metric: macro-f1 tells a "
            "model that has learnt from one that has not.",
        )
    if run.attached.modules and len(task.classes) >= MANY and run.training.head_rate_ratio == 1:
        yield Finding(
            "one rate",
            "odd",
            f"{_listed(sorted(run.attached.modules))} learns at the rate of the adapters. A new head for "
            f"{len(task.classes)} classes wants more: training.head_rate_ratio 16, or what decaf tune finds.",
        )
    if task.num_test < 100:
        yield Finding(
            "few test examples",
            "odd",
            f"a score over {task.num_test} examples is known to about {98 / np.sqrt(task.num_test):.0f} points up or "
            "down: smaller differences mean nothing. Give more test examples if there are any.",
        )
    yield from _repeated(run, held)


def _repeated(run: Run, held: np.ndarray) -> Iterator[Finding]:
    """Examples that are to learn from and to score on; and those that are there twice, with two labels."""
    task = run.task
    train, test = task.example_keys("train"), task.example_keys("test")
    if not train:
        return
    known = {train[i] for i in held}
    both = sum(key in known for key in test)
    if both:
        yield Finding(
            "in both sets",
            "odd",
            f"{both} of {len(test)} test examples are also to learn from: the score will be better than on new data. "
            "Remove them from one of the two.",
        )
    if len(task.classes) < 2:
        return
    labels: dict[Hashable, set[int]] = defaultdict(set)
    for index in held.tolist():
        labels[train[index]].add(int(task.labels[index]))
    two = sum(len(labels[train[i]]) > 1 for i in held)
    if two:
        example = next(i for i in held.tolist() if len(labels[train[i]]) > 1)
        found = ", ".join(repr(task.classes[c]) for c in sorted(labels[train[example]]))
        (said,) = task.show_examples(np.array([example]))
        yield Finding(
            "two labels",
            "odd",
            f"{two} of {len(held)} training examples are there again with another label, such as "
            f"{shortened(said, 240)} ({found}): no model can tell them apart. Correct the labels.",
        )


def called(run: Run) -> list[str]:
    """The names of the agents that this process knows the examples of."""
    part = run.partition
    numbers = range(len(part.shards)) if run.sees_all else run.engine.agents
    return [part.names[i] if part.names else f"agent {i}" for i in numbers]


def _holdings(run: Run) -> str:
    names, table = called(run), run.partition.label_table()
    sizes = table.sum(1)
    per_class = len(run.task.classes) > 1
    if len(names) <= _MOST_LISTED:
        held = [f"{name} {size}" for name, size in zip(names, sizes, strict=True)]
        if per_class:
            held = [f"{text} (of {(row > 0).sum()} classes)" for text, row in zip(held, table, strict=True)]
        return f"examples of each: {', '.join(held)}."
    low, high = int(sizes.argmin()), int(sizes.argmax())
    text = f"{len(names)} agents hold {sizes[low]} ({names[low]}) to {sizes[high]} ({names[high]}) examples"
    present = (table > 0).sum(1)
    return text + (f", of {present.min()} to {present.max()} classes." if per_class else ".")


def _counts(labels: np.ndarray, classes: Sequence[str]) -> str:
    counts = Counter(labels.tolist())
    ranked = sorted(range(len(classes)), key=lambda c: -counts[c])
    if len(classes) <= _MOST_LISTED:
        return ", ".join(f"{classes[c]!r} {counts[c]}" for c in ranked)
    most, least = ranked[0], ranked[-1]
    return f"{len(classes)} classes, from {counts[least]} ({classes[least]!r}) to {counts[most]} ({classes[most]!r})"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= _MOST_LISTED else f"{', '.join(names[:3])} and {len(names) - 3} more"
