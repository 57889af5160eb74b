"""How does a `transformers.Trainer` script become decentralized? By one callback.

    trainer.add_callback(GossipCallback(store="tcp://10.0.0.1:29500", agent=0, agents=3, graph="ring", every=50))

Every `every` optimizer steps, and after the last one, the agent exchanges with its neighbours and goes on from what the
algorithm makes of it. The exchange reads and writes the live PEFT model; optimizer, scheduler, accelerate's set-up and
all else stay the script's. It is made at the end of a step (`on_step_end`), so that what the Trainer then evaluates or
saves is the model after the exchange, and, where training ends early, in `on_train_end`: before the script saves.

Gradients. What steers them (tracking) acts in `on_pre_optimizer_step`: they are then summed over
`gradient_accumulation_steps` and clipped to `max_grad_norm`. So an accumulated step counts as one; what is tracked is
the clipped gradient; and the correction is added after clipping, which does not bound it. (`decaf run` adds it before
clipping.) The corrections of all agents add up to 0 either way. The norm that the Trainer logs is without them.

Federation. With `federation=` the agent is one of a sealed federation file: links and protocol are those of `decaf
agent`. Neighbours may then be ahead; the agent joins them at their round, and stops training when the last is over.

Order. An exchange follows its steps whatever `order` the algorithm has, since the last one must precede the save.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Trainer, TrainerCallback
from transformers.training_args import ParallelMode

from decaf_lora.adapters.adapter import Adapter, concatenate
from decaf_lora.adapters.names import flattened, owner, parted, put, take
from decaf_lora.algorithms.transforms.chain import Algorithm, State
from decaf_lora.engines import Engine, Simulate
from decaf_lora.engines.mesh.engine import WaitedOutError
from decaf_lora.errors import TrainingError, UserError
from decaf_lora.exchange import Exchange
from decaf_lora.graphs import Graph, Schedule
from decaf_lora.integrations import moments, saved_state
from decaf_lora.integrations.live import LiveAdapter
from decaf_lora.integrations.places import STAYS, ByStore, OneProcess, Place, refuse_launcher
from decaf_lora.integrations.planned import Plan
from decaf_lora.integrations.turns import Turns
from decaf_lora.runs.folder import disk


class GossipCallback(TrainerCallback):
    """Exchanges the LoRA adapter of a Trainer, or a TRL trainer such as SFTTrainer, with the other agents'.

    Every agent runs its own script, on its own data. The agents meet by `federation` and `name` (a mesh of
    organisations, over TLS), by `store` (gloo, in a network that they trust), or in one process (`simulate`). All take
    equally many steps (`max_steps`), with the same base model, targets, rank and scaling; what is in `modules_to_save`
    is exchanged, too. Adapters that start alike mix best: make each after the same `transformers.set_seed`.

    The state is saved in the Trainer's checkpoints, as `gossip.safetensors`; `resume_from_checkpoint` goes on from
    there, in all agents from the same step, bit for bit. In a federation each agent resumes by itself.

    Args:
        federation: the sealed federation file. It says algorithm, graph, gossip_steps, seed, and `every` (the steps of
            a round); `max_steps` must make as many rounds as it says. The base model's hashes and the fields of the
            adapter are compared with it.
        name: of this agent, in the federation file.
        trust: fingerprint of the organiser's key, told by telephone; needed the first time.
        key: file of this agent's key. None: NAME.key beside the federation file.
        bind: HOST:PORT to listen on. None: the port that the federation file names, on all addresses.
        store: "tcp://HOST:PORT" of agent 0, where all agents meet; messages travel by gloo, in the clear.
        agent: number of this agent, from 0.
        agents: how many there are.
        graph: who listens to whom: a name or file (`graphs.parse`), a Graph, or a Schedule.
        algorithm: a name ("decaf", "decaf_tracked", "dlora", "dlora_fa", "local"), or one with options and transforms:
            `algorithms.decaf() | algorithms.tracking() | algorithms.int8()`. None: "decaf".
        every: optimizer steps from one exchange to the next.
        seed: of random graphs, and of what an algorithm draws. None: 0.
        gossip_steps: exchanges in a row, each on the next graph of the schedule, or "period". None: 1.
        timeout: seconds to wait for an agent that does not come, or falls silent.
        resume: the checkpoint that the Trainer resumes from, where it is not in the Trainer's `output_dir`.

    Raises:
        UserError: something does not fit together, at once or when training starts; names the field. In a federation
            also from `Trainer.train` (`exit_code` 3) if no neighbour answers for as long as the file's `give_up`: the
            adapter is then in OUTPUT_DIR/adapter, and a checkpoint goes on from there.
    """

    def __init__(
        self,
        *,
        store: str | None = None,
        agent: int | None = None,
        agents: int | None = None,
        graph: str | Graph | Schedule | None = None,
        algorithm: str | Algorithm | None = None,
        every: int | None = None,
        seed: int | None = None,
        gossip_steps: int | Literal["period"] | None = None,
        timeout: float = 600.0,
        resume: str | Path | None = None,
        federation: str | Path | None = None,
        name: str | None = None,
        trust: str | None = None,
        key: str | Path | None = None,
        bind: str | None = None,
    ) -> None:
        refuse_launcher()
        if federation is not None or name is not None:
            if federation is None or name is None:
                missing = "federation" if federation is None else "name"
                raise UserError(f"{missing}: missing; federation= and name= go together.")
            from decaf_lora.integrations.federated import InFederation  # needs the extra `mesh`

            given = {"store": store, "agent": agent, "agents": agents, "graph": graph, "algorithm": algorithm}
            given |= {"seed": seed, "gossip_steps": gossip_steps}
            member = InFederation(Path(federation), name, trust, None if key is None else Path(key), bind)
            self._begin(member, member.plan(given, every), resume)
            return
        for field, value in {"trust": trust, "key": key, "bind": bind}.items():
            if value is not None:
                raise UserError(f"{field}: it belongs to a federation; give federation= and name=, or leave it out.")
        if store is None:
            raise UserError(
                "store: missing; give tcp://HOST:PORT, or federation= and name=, or use GossipCallback.simulate in one "
                "process."
            )
        if every is None:
            raise UserError("every: missing; say every how many optimizer steps the agents exchange.")
        place = ByStore(store, agent, agents, timeout)
        chosen = "decaf" if algorithm is None else algorithm
        exchanges = 1 if gossip_steps is None else gossip_steps
        self._begin(place, Plan(chosen, graph, place.agents, every, seed or 0, exchanges), resume)

    @classmethod
    def simulate(
        cls,
        trainers: Sequence[Trainer],
        *,
        graph: str | Graph | Schedule | None = None,
        algorithm: str | Algorithm = "decaf",
        every: int,
        seed: int = 0,
        gossip_steps: int | Literal["period"] = 1,
        resume_from_checkpoint: bool | Sequence[str] = False,
    ) -> list[Any]:
        """Trains all `trainers` in this process, as agents of one run; agent i is `trainers[i]`.

        They train in turn, each up to the next exchange. Each has random generators of its own, which start from its
        `args.seed`, so that the result is what separate processes would have, and the same every time.

        Args:
            trainers: one for each agent, each with a model of its own.
            graph: as for the callback.
            algorithm: as for the callback.
            every: as for the callback.
            seed: as for the callback.
            gossip_steps: as for the callback.
            resume_from_checkpoint: true for every Trainer's last checkpoint, or their paths.

        Returns:
            What `Trainer.train` returns, of each.

        Raises:
            UserError: as for the callback; the trainers are then as far as they have come.
        """
        count = len(trainers)
        refuse_launcher()
        if len({id(trainer.model) for trainer in trainers}) < count:
            raise UserError("trainers: two of them train one model; give each a model of its own.")
        outputs = [str(Path(str(trainer.args.output_dir)).resolve()) for trainer in trainers]
        if len(set(outputs)) < count and any(trainer.args.save_strategy != "no" for trainer in trainers):
            raise UserError("output_dir: two trainers write to one folder; give each its own, or save_strategy='no'.")
        plan = Plan(algorithm, graph, count, every, seed, gossip_steps)
        paths = _paths(trainers, resume_from_checkpoint)
        turns, engine = Turns(count), Simulate(count)
        callbacks = []
        for agent, path in enumerate(paths):
            callback = cls.__new__(cls)
            callback._begin(OneProcess(turns, engine, agent), plan, path)
            callbacks.append(callback)

        def job(agent: int) -> Any:
            trainer = trainers[agent]
            if trainer.args.device.type == "cuda":
                torch.cuda.set_device(trainer.args.device)  # it is a thread's own
            trainer.add_callback(callbacks[agent])
            try:
                return trainer.train(resume_from_checkpoint=paths[agent])
            finally:
                trainer.remove_callback(callbacks[agent])

        return turns.run([functools.partial(job, agent) for agent in range(count)], [t.args.seed for t in trainers])

    def _begin(self, place: Place, plan: Plan, resume: str | Path | None) -> None:
        self._place, self._plan, self._resume = place, plan, resume
        self.round = 0
        """Exchanges made."""
        self.bytes_sent = 0.0
        """In them, by an agent (mean over all)."""
        self._since = 0
        """Optimizer steps since the last exchange."""
        self._gave_up: Exception | None = None
        """Why no neighbour is waited for any more, in a federation."""
        self._live: LiveAdapter
        self._engine: Engine
        self._exchange: Exchange
        self._state: State

    # The Trainer's events, in the order in which they come

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Checks that all fits together, waits for the others, and goes on from a checkpoint if the Trainer does."""
        plan, algorithm = self._plan, self._plan.algorithm
        _check_parallel(args)
        if plan.mixes and plan.every > state.max_steps:
            raise UserError(f"every: {plan.every} steps never come, training has {state.max_steps}; give fewer.")
        steers = any(transform.steer is not None for transform in algorithm.transforms)
        if args.fp16 and steers:
            raise UserError(f"fp16: its scaled gradients cannot be steered by {algorithm.name}; use bf16 or neither.")
        self._live = LiveAdapter(model)
        moments.check(algorithm, kwargs["optimizer"])
        self.round, self.bytes_sent, self._since, self._gave_up = 0, 0.0, 0, None
        try:
            self._place.check(model, self._live, state.max_steps, plan.every)
            self._engine = self._place.arrive(self._facts(state))
            self._exchange = plan.exchange(self._engine, state.max_steps)
            plan.algorithm = self._exchange.algorithm
            adapter = self._live.read()
            if plan.mixes:
                self._state = self._place.together(state.global_step, adapter, self._first_states)
            else:
                self._state = self._exchange.init(adapter)
            if state.global_step:
                self._restore(Path(self._resume or Path(args.output_dir) / f"checkpoint-{state.global_step}"))
            self._place.connect(self._exchange, adapter)
        except BaseException as error:
            self._give_up(error)
            raise
        self._allow()
        if self._since >= plan.every:  # the exchange for which nobody came before the checkpoint was made
            self._mix(state.global_step, kwargs["optimizer"])
            if self._gave_up is not None:
                self._raise_given_up(Path(args.output_dir), model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Steers the gradients, after accumulation and clipping."""
        transforms = self._plan.algorithm.transforms
        if not any(transform.steer or transform.penalty for transform in transforms):
            return
        round_ = self._exchange.round(self.round + 1)
        gradients = self._live.gradients(self._plan.algorithm.trains(round_))
        values = {key: self._live.parameters[key].detach()[None] for key in gradients}
        steered, self._state = self._plan.algorithm.steer(self._state, gradients, round_, values)
        if steered is not gradients:
            self._live.set_gradients(steered)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the exchange, if one is due after this step."""
        self._since += 1
        if self._since >= self._plan.every or state.global_step >= state.max_steps:
            self._mix(state.global_step, kwargs["optimizer"])
            if self._gave_up is not None:
                control.should_save = control.should_training_stop = True
            elif self._is_over() and state.global_step < state.max_steps:
                warnings.warn(
                    f"gossip: the last of {self._place.rounds} rounds is over after step {state.global_step} of "
                    f"{state.max_steps} of this agent, which was away; training ends.",
                    stacklevel=2,
                )
                control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes what the exchanges go on from into the checkpoint that the Trainer has just written."""
        values = self._identity() | {"round": self.round, "since": self._since, "bytes_sent": self.bytes_sent}
        values["engine"] = self._engine.snapshot()
        tensors = put("state/", flattened(self._state))
        saved_state.write(Path(args.output_dir) / f"checkpoint-{state.global_step}", tensors, values)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Makes the last exchange, if training has ended between two, and leaves."""
        if self._since and self._gave_up is None and not self._is_over():
            if args.load_best_model_at_end:
                warnings.warn("gossip: the best model was loaded; the last steps are not exchanged.", stacklevel=2)
            else:
                self._mix(state.global_step, kwargs["optimizer"])
        self._live.release()
        folder = Path(args.output_dir)
        if self._gave_up is not None:
            self._raise_given_up(folder, model)
        try:
            self._place.finish(lambda: self._save(folder, model))
        except BaseException as error:
            self._place.leave(error)
            raise
        self._place.leave()

    # What they do

    def _mix(self, step: int, optimizer: Any) -> None:
        if not self._plan.mixes:
            self._since = 0
            return
        adapter = self._live.read()
        try:
            if not all(bool(torch.isfinite(t).all()) for t in adapter.tensors().values()):
                raise TrainingError(
                    f"training: the adapter of agent {self._place.agent} is not finite after step {step}; lower the "
                    "learning rate or max_grad_norm. Nothing was sent."
                )
            mine = (adapter, self._state)
            new, self._state, sent, self.round = self._place.together(step, mine, self._exchanged)
        except WaitedOutError as error:  # all stays as before the exchange, which is due again after a resume
            self._gave_up = error
            self._place.leave(error)
            return
        except BaseException as error:
            self._give_up(error)
            raise
        self._since, self.bytes_sent = 0, self.bytes_sent + sent
        self._live.write(new)
        moments.carry(self._plan.algorithm, self._state, self._live, optimizer)
        self._allow()

    def _is_over(self) -> bool:
        """Whether the last exchange that all have agreed on is made, by this agent or without it."""
        return self._place.rounds is not None and self.round >= self._place.rounds

    def _raise_given_up(self, folder: Path, model: Any) -> None:
        """Saves the adapter, and raises what tells the script that nobody has answered."""
        assert self._gave_up is not None
        where = f"The adapter is in {self._save(folder, model)}; train again with resume_from_checkpoint=True to go on."
        raise self._place.gave_up(self._gave_up, where) from self._gave_up

    def _save(self, folder: Path, model: Any) -> Path:
        adapter = folder / "adapter"
        with disk(folder):
            model.save_pretrained(adapter)
        return adapter

    def _give_up(self, error: BaseException) -> None:
        self._live.release()
        self._place.leave(error)

    def _exchanged(self, everybody: list[tuple[Adapter, State]]) -> list[tuple[Adapter, State, float, int]]:
        """The round's exchange for the agents of this process: adapters, states, bytes sent, and the round made.

        In a federation that is a later round where the neighbours are ahead.
        """
        count, last = len(everybody), self._place.rounds
        adapter, state = concatenate([adapter for adapter, _ in everybody]), _stacked([own for _, own in everybody])
        number, adapter, state = self._exchange.meet(adapter, state, self.round + 1)
        sent = 0.0
        if last is not None and number > last:
            number = last  # made by the others
        else:
            done = self._exchange.finish(adapter, self._exchange.start(adapter, state, number))
            adapter, state, sent, number = done.adapter, done.state, done.bytes_sent, done.round.number
        states = _apart(state, count)
        return [(adapter.select([i]), states[i], sent, number) for i in range(count)]

    def _first_states(self, adapters: list[Adapter]) -> list[State]:
        return _apart(self._exchange.init(concatenate(adapters)), len(adapters))

    def _allow(self) -> None:
        self._live.allow(self._plan.algorithm.trains(self._exchange.round(self.round + 1)))

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that goes on from it."""
        where = {"agent": self._place.agent, "agents": self._place.agents}
        return {"algorithm": self._plan.described, "graph": self._plan.shown, **where, "adapter": self._live.digest()}

    def _restore(self, checkpoint: Path) -> None:
        tensors, values = saved_state.read(checkpoint, self._identity(), self._live.device)
        self._engine.restore(values.get("engine", {}))
        self.round, self._since, self.bytes_sent = values["round"], values["since"], values["bytes_sent"]
        self._state = parted(take("state/", tensors), self._state)

    def _facts(self, state: Any) -> dict[str, str | int]:
        """What must be equal for all agents."""
        if not self._plan.mixes:  # nobody hears of the others
            return {}
        facts: dict[str, str | int] = {"algorithm": self._plan.described, "graph": self._plan.shown}
        facts |= {"every": self._plan.every, "seed": self._plan.seed, "gossip_steps": self._plan.gossip_steps}
        facts |= {"max_steps": state.max_steps, "resume_from_checkpoint": f"step {state.global_step}"}
        facts |= self._live.facts()
        trained = self._plan.algorithm.trained(self._plan.rounds(state.max_steps))
        for factor in sorted({"A", "B"} - trained):
            values = [p.detach().cpu() for k, p in self._live.parameters.items() if owner(k) == factor]
            made = hashlib.sha256(b"".join(v.float().numpy().tobytes() for v in values)).hexdigest()[:8]
            facts[factor + STAYS] = made
        return facts


def _stacked(states: Sequence[State]) -> State:
    """States of one agent each to the state of all."""
    return {part: {k: torch.cat([s[part][k] for s in states]) for k in own} for part, own in states[0].items()}


def _apart(state: State, count: int) -> list[State]:
    """The state of `count` agents to their own."""
    return [{part: {k: t[i : i + 1] for k, t in own.items()} for part, own in state.items()} for i in range(count)]


def _check_parallel(args: Any) -> None:
    """UserError for a Trainer whose processes train one model together."""
    found = {
        "deepspeed": bool(args.deepspeed),
        "fsdp": bool(args.fsdp),
        "DistributedDataParallel": args.parallel_mode == ParallelMode.DISTRIBUTED,
    }
    for name, used in found.items():
        if used:
            raise UserError(f"{name}: GossipCallback does not support it; train each agent in one plain process.")


def _paths(trainers: Sequence[Trainer], resume: bool | Sequence[str]) -> list[str | None]:
    """The checkpoint that each goes on from."""
    from transformers.trainer_utils import get_last_checkpoint

    if not isinstance(resume, bool):
        if isinstance(resume, str) or len(resume) != len(trainers):
            raise UserError(f"resume_from_checkpoint: give a list of {len(trainers)} paths, one for each trainer.")
        return [str(path) for path in resume]
    if not resume:
        return [None] * len(trainers)
    found = [get_last_checkpoint(str(trainer.args.output_dir)) for trainer in trainers]
    if None in found:
        raise UserError(f"resume_from_checkpoint: trainer {found.index(None)} has no checkpoint in its output_dir.")
    return found
