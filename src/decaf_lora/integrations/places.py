"""Where do the agents of training scripts meet: in one process, or by a store that all of them reach?"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.engines import Engine, Simulate
from decaf_lora.engines.launch import Launch, Processes, connect
from decaf_lora.engines.torchrun import Torchrun
from decaf_lora.errors import UserError
from decaf_lora.exchange import Exchange
from decaf_lora.integrations.live import LiveAdapter
from decaf_lora.integrations.turns import Turns

Facts = Mapping[str, str | int]
"""What must be equal for all agents, by the name that people know it by."""
STAYS = ", which stays as it starts (call set_seed alike before get_peft_model)"
"""Ends the names of facts about factors that the algorithm never trains."""
Work = Callable[[list[Any]], list[Any]]
"""Values of the agents of this process -> results for them."""


class Place(ABC):
    """Where one agent meets the others."""

    agent: int
    agents: int
    rounds: int | None = None
    """The number of exchanges that all have agreed on; None: as many as the Trainer's steps make."""

    def check(self, model: Any, live: LiveAdapter, max_steps: int, every: int) -> None:  # noqa: B027 - optional
        """Raises UserError if model, adapter or number of exchanges are not what this agent has agreed to."""

    @abstractmethod
    def arrive(self, facts: Facts) -> Engine:
        """Waits for all agents; the engine that moves their messages.

        Raises:
            UserError: somebody does not come, or has other facts.
        """

    def connect(self, exchange: Exchange, adapter: Adapter) -> None:  # noqa: B027 - optional
        """Called once the agent is as its checkpoint says, before the first exchange."""

    @abstractmethod
    def together(self, step: int, value: Any, work: Work) -> Any:
        """`work` on the values of all agents of this process, after the step `step` of all; the own result.

        Raises:
            UserError: another agent has come after another number of steps, or has failed.
            WaitedOutError: in a federation: no neighbour has answered for as long as its file says.
        """

    def finish(self, save: Callable[[], object]) -> None:  # noqa: B027 - optional
        """After the last exchange. A place that others may come back to calls `save`, and serves them."""

    def gave_up(self, error: Exception, saved: str) -> Exception:
        """What the script sees of a WaitedOutError; `saved` says what lies where."""
        return error

    @abstractmethod
    def leave(self, error: BaseException | None = None) -> None:
        """Ends it; `error` is told to the others."""


class OneProcess(Place):
    """An agent of a simulation; `turns` and `engine` are shared by all of them."""

    def __init__(self, turns: Turns, engine: Simulate, agent: int) -> None:
        self._turns, self._engine, self.agent, self.agents = turns, engine, agent, turns.count

    def arrive(self, facts: Facts) -> Engine:
        """Compares the facts of all."""

        def compare(everybody: list[Facts]) -> list[None]:
            for other, theirs in enumerate(everybody):
                for field, value in everybody[0].items():
                    if theirs[field] != value:
                        raise UserError(
                            f"{field}: agent 0 has {value}, agent {other} {theirs[field]}; give all the same."
                        )
            return [None] * len(everybody)

        self._turns.meet(self.agent, "the start", facts, compare)
        return self._engine

    def together(self, step: int, value: Any, work: Work) -> Any:
        """`work` on the values of all."""
        return self._turns.meet(self.agent, f"the exchange after step {step}", value, work)

    def leave(self, error: BaseException | None = None) -> None:
        """Whoever runs the turns learns of it by itself."""


class ByStore(Place):
    """An agent that meets the others at "tcp://HOST:PORT"; agent 0 listens there. Messages travel by gloo.

    Args:
        store: the address.
        agent: number of this one, from 0.
        agents: how many there are.
        timeout: seconds to wait for an agent that does not come, or falls silent.

    Raises:
        UserError: something in it is wrong, or this process is one of several that train one model.
    """

    def __init__(self, store: str, agent: int | None, agents: int | None, timeout: float) -> None:
        found = re.fullmatch(r"tcp://(\[[0-9a-fA-F:]+\]|[^:/\s]+):(\d{1,5})", store)
        if not found or not 0 < int(found[2]) < 2**16:
            raise UserError(f"store: {store!r} is no address; write tcp://HOST:PORT, of the machine of agent 0.")
        if agent is None or agents is None:
            raise UserError("store: agent= and agents= are missing; say which agent this is, and how many there are.")
        if agents < 1 or not 0 <= agent < agents:
            raise UserError(f"agent: there is no agent {agent} of {agents}; numbers go from 0 to agents - 1.")
        if not timeout > 0:
            raise UserError(f"timeout: {timeout:g} is not above 0; give seconds.")
        self.agent, self.agents, self._timeout = agent, agents, timeout
        self._host, self._port = found[1].strip("[]"), int(found[2])
        self._processes: Processes | None = None

    def arrive(self, facts: Facts) -> Engine:
        """Joins the others, and compares facts with them."""
        if torch.distributed.is_initialized():
            raise UserError("store: torch.distributed is in use in this process already; leave out init_process_group.")
        launch = Launch(self.agent, self.agents, 0, 1, self._host, self._port, 0, 0, False)
        self._processes = connect("gloo", "cpu", self._timeout, launch)
        try:
            self._processes.agree(dict(facts), "agents")
        except BaseException:
            self.leave()
            raise
        self._engine = Torchrun(self.agents, self._processes)
        return self._engine

    def together(self, step: int, value: Any, work: Work) -> Any:
        """`work` on the own value, once all say that they are here for the same step."""
        steps = self._engine.gather({"step": torch.tensor([step])})["step"].tolist()
        for other, theirs in enumerate(steps):
            if theirs != steps[0]:
                raise UserError(
                    f"steps: agent 0 has come to an exchange after step {steps[0]}, agent {other} after {theirs}; all "
                    "must take equally many steps."
                )
        return work([value])[0]

    def leave(self, error: BaseException | None = None) -> None:
        """Leaves the group."""
        processes, self._processes = self._processes, None
        if processes is not None:
            processes.__exit__(None if error is None else type(error), error, None)


def refuse_launcher() -> None:
    """UserError under torchrun and its like, where accelerate would wrap the model to train one together."""
    found = [name for name in ("RANK", "WORLD_SIZE") if os.environ.get(name)]
    if found:
        raise UserError(
            f"GossipCallback: {' and '.join(found)} set, under which accelerate trains one model in all processes; "
            "start each agent by itself with python, without torchrun (unset RANK WORLD_SIZE)."
        )
