"""How well do the agents' models score? In passes that are bounded in memory, and with nothing computed twice.

A pass takes the test examples of one batch for as many agents as keep it within `batch_size` examples in all. So memory
does not grow with the number of agents, and the passes do not depend on how agents were timed in training.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.stacked import Attached
from decaf_lora.errors import UserError
from decaf_lora.precision import Precision, autocast
from decaf_lora.tasks.base import Batch, Task, repeat_for_agents, to_device
from decaf_lora.untouched import KEPT_BYTES, Untouched


class Evaluator:
    """Scores adapters on the test examples of a task.

    Args:
        task: model, test examples and score.
        attached: the task's model with adapter sites.
        batch_size: the most examples in a pass, over all agents in it.
        precision: of the forward pass.
    """

    def __init__(self, task: Task, attached: Attached, batch_size: int = 256, precision: Precision = "float32") -> None:
        self.task, self.attached, self.batch_size, self.precision = task, attached, batch_size, precision

    def agents_in_pass(self, examples: int, most: int) -> int:
        """How many agents share a pass over so many test examples.

        Args:
            examples: in the batch, at least 1.
            most: agents that may share a pass, at least 1.
        """
        return min(most, max(1, self.batch_size // examples))

    @torch.no_grad()
    def scores(self, adapter: Adapter, most: int) -> Tensor:
        """(n,) scores of the adapters on the whole test set, in float64 on the CPU. Equal adapters are scored once.

        Args:
            adapter: of n agents.
            most: agents that may share a pass.

        Raises:
            UserError: the test set is empty.
        """
        firsts, same_as = distinct(adapter)
        if len(firsts) < adapter.num_agents:  # as at a common start, and after a server's average
            return self.scores(adapter.select(firsts), most)[same_as]
        n, totals = adapter.num_agents, None
        kept = Kept(self.task) if self.task.num_test > self.batch_size else None
        with Untouched(self.attached).shared() as untouched:
            for start in range(0, self.task.num_test, self.batch_size):
                indices = np.arange(start, min(start + self.batch_size, self.task.num_test))
                batch = to_device(self.task.test_batch(indices), self.attached.device)
                parts, together = [], self.agents_in_pass(len(indices), most)
                untouched.forget()
                for low in range(0, n, together):
                    untouched.begin(more=low + 2 * together <= n)
                    agents = range(low, min(low + together, n))
                    with kept.by(agents) if kept else contextlib.nullcontext():
                        parts.append(self._statistics(adapter.select(slice(agents.start, agents.stop)), batch))
                both = torch.cat(parts)
                totals = both if totals is None else totals + both
        if totals is None:
            raise UserError("task: the test set is empty; give at least one test example.")
        return self.task.score(totals)

    def _statistics(self, some: Adapter, batch: Batch) -> Tensor:
        """(k, q) sums over a batch of test examples, for each of k agents that go through it in one pass."""
        with self.attached.bind(some), autocast(self.precision, self.attached.device):
            return self.task.statistics(repeat_for_agents(batch, some.num_agents), some.num_agents).cpu().double()

    @torch.no_grad()
    def own_scores(self, adapter: Adapter, tests: Sequence[np.ndarray]) -> Tensor:
        """(n,) scores of the adapters, each on its own test examples, in float64 on the CPU.

        Args:
            adapter: of n agents, or of one that is scored on all.
            tests: n arrays (m_i,) of indices of test examples, m_i at least 1.
        """
        totals, device = [], self.attached.device
        for place, own in enumerate(tests):
            some = adapter.select([place if adapter.num_agents > 1 else 0])
            with self.attached.bind(some), autocast(self.precision, device):
                parts = [
                    self.task.statistics(to_device(self.task.test_batch(indices), device), 1).double().cpu()
                    # A copy: torch warns of indices that cannot be written to.
                    for indices in np.split(own.copy(), range(self.batch_size, len(own), self.batch_size))
                ]
            totals.append(torch.stack(parts).sum(0))
        return self.task.score(torch.cat(totals))


class Kept:
    """What depends on adapters and not on test examples (text features, for instance), between the passes of agents.

    Args:
        task: computes it, and looks for it in `Task.kept`.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._room = task, KEPT_BYTES
        self._of: dict[range, dict[str, Tensor]] = {}

    @contextlib.contextmanager
    def by(self, agents: range) -> Iterator[None]:
        """Inside, the task finds what it has kept for these agents; it keeps no more once there is no room."""
        place = self._of.get(agents, {})
        self._task.keep(place if place or self._room > 0 else None)
        try:
            yield
        finally:
            self._task.keep(None)
        if place and agents not in self._of:
            self._of[agents] = place
            self._room -= sum(t.numel() * t.element_size() for t in place.values())


def distinct(adapter: Adapter) -> tuple[list[int], list[int]]:
    """Which agents hold the same adapter, bit by bit?

    Returns:
        The first agent of each distinct adapter (u,) ascending, and for each of the n agents its place among these.
    """
    n = adapter.num_agents
    if n == 1 or any(isinstance(t, FakeTensor) for t in adapter.tensors().values()):  # a plan has shapes only
        return list(range(n)), list(range(n))
    digests = [hashlib.blake2b() for _ in range(n)]
    for tensor in [*adapter.tensors().values(), *adapter.scale.values()]:
        rows = tensor.detach().cpu().contiguous().view(n, -1).view(torch.uint8).numpy()
        for digest, row in zip(digests, rows, strict=True):
            digest.update(row)
    places: dict[bytes, int] = {}
    same_as = [places.setdefault(digest.digest(), len(places)) for digest in digests]
    return [same_as.index(place) for place in range(len(places))], same_as
