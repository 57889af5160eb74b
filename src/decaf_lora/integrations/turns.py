"""How do several training scripts run in one process? In turn: each trains up to where all meet, then the next.

One thread runs at a time, and always in the order of the agents, so that what comes out does not depend on the
threads. Every agent has random generators of its own, which are put in place with its turn.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from decaf_lora.errors import UserError

T = TypeVar("T")


class _EndedError(BaseException):
    """Ends a thread because another one has failed; not an Exception, which a script might catch."""


class Turns:
    """Lets `count` functions run in turn: `run` starts them, and in each of them `meet` waits for all others."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._changed = threading.Condition()
        self._turn = 0
        self._ended = [False] * count
        self._error: BaseException | None = None
        self._here: dict[int, tuple[str, Any]] = {}
        self._results: list[Any] = []
        self._generators: list[Any] = [None] * count

    def run(self, jobs: Sequence[Callable[[], T]], seeds: Sequence[int]) -> list[T]:
        """What the jobs return; each begins as after `transformers.set_seed` with its seed.

        Raises whatever the first job to fail raises; the others are then ended.
        """
        from transformers import set_seed

        before, results = _generators(), [None] * self.count
        for agent, seed in enumerate(seeds):
            set_seed(seed)
            self._generators[agent] = _generators()

        def work(agent: int) -> None:
            try:
                self._wait(agent)
                results[agent] = jobs[agent]()  # type: ignore[call-overload]
            except _EndedError:
                return
            except BaseException as error:
                self._fail(error)
                return
            self._ended[agent] = True
            self._pass_on(agent)

        threads = [threading.Thread(target=work, args=(agent,), daemon=True) for agent in range(self.count)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C reaches the main thread only
            self._fail(error)
            for thread in threads:
                thread.join()
            raise
        finally:
            _restore(before)
        if self._error is not None:
            raise self._error
        return results  # type: ignore[return-value]

    def meet(self, agent: int, what: str, value: T, work: Callable[[list[T]], list[Any]]) -> Any:
        """Waits until all agents are here; then `work` is called once, with everybody's values; returns the own result.

        Args:
            agent: who comes.
            what: why; all must come for the same.
            value: what the agent brings.
            work: (values by agent) -> results by agent.

        Raises:
            UserError: another agent has ended, or has come for something else.
        """
        if True in self._ended:
            gone = self._ended.index(True)
            raise UserError(
                f"trainers: agent {gone} has ended before {what} of agent {agent}; all must take equally many steps."
            )
        self._here[agent] = (what, value)
        if len(self._here) == self.count:
            for other, (why, _) in self._here.items():
                if why != what:
                    raise UserError(
                        f"trainers: agent {other} has come to {why} and agent {agent} to {what}; all must take equally "
                        "many steps."
                    )
            self._results = work([self._here[i][1] for i in range(self.count)])
            self._here = {}
        self._pass_on(agent)
        self._wait(agent)
        return self._results[agent]

    def _pass_on(self, agent: int) -> None:
        self._generators[agent] = _generators()
        with self._changed:
            others = [(agent + 1 + k) % self.count for k in range(self.count)]
            self._turn = next((other for other in others if not self._ended[other]), agent)
            self._changed.notify_all()

    def _wait(self, agent: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == agent or self._error is not None)
            if self._error is not None:
                raise _EndedError
        _restore(self._generators[agent])

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


def _generators() -> tuple[Any, ...]:
    """The states of all global random generators."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpus


def _restore(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])
