"""The local steps of the agents that this process holds, and the evaluation of their models.

All agents train at once: their batches go through the one base model together, agent after agent, and one optimizer
steps the stacked adapters. To bound memory, `agents_per_pass` splits the agents of a step into several passes forward
and backward. The result does not change.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from decaf_lora import calibration, optimizers, separation
from decaf_lora.adapters.adapter import Adapter, Factor
from decaf_lora.adapters.names import Tensors, put, take
from decaf_lora.adapters.stacked import Attached, DropoutMasks
from decaf_lora.algorithms.contract import Round
from decaf_lora.algorithms.transforms.chain import Algorithm, State
from decaf_lora.batches import BatchStream, local_steps
from decaf_lora.config import TrainingConfig
from decaf_lora.errors import TrainingError, UserError
from decaf_lora.evaluation import Evaluator
from decaf_lora.precision import autocast, short_attention, work_device
from decaf_lora.randomness import torch_generator
from decaf_lora.tasks.base import Batch, Task, to_device

GROUPS: tuple[Factor, ...] = ("A", "B", "core", "extras")


@dataclass(frozen=True)
class Shape:
    """A tensor of a flat group: its name, and its shape without the agent axis."""

    name: str
    shape: tuple[int, ...]


class FlatGroup:
    """The tensors of one kind (all A, all B, all cores, or all extras) of n agents as one matrix (n, P)."""

    def __init__(self, tensors: Tensors) -> None:
        self.shapes = [Shape(name, tuple(t.shape[1:])) for name, t in tensors.items()]
        self.sizes = [int(np.prod(s.shape)) for s in self.shapes]

    def pack(self, tensors: Tensors) -> Tensor:
        """name -> (n, ...) as a new matrix (n, P)."""
        return torch.cat([tensors[s.name].flatten(1) for s in self.shapes], 1)

    def unpack(self, matrix: Tensor) -> Tensors:
        """The matrix (n, P) as views name -> (n, ...); differentiable, with one split for all."""
        parts = matrix.split(self.sizes, 1)
        return {s.name: part.unflatten(1, s.shape) for s, part in zip(self.shapes, parts, strict=True)}


class Trainer:
    """Trains and evaluates the agents of this process.

    Args:
        task: model, data, loss and score.
        attached: the task's model with adapter sites.
        config: local steps, optimizer and learning rate.
        agents: numbers, in the run, of the n agents of this process.
        shards: (m_i,) indices of each agent's training examples, in the same order.
        seed: of batches and dropout.
        eval_batch_size: the most test examples in a forward pass, over all agents in it.
        steps_in_round: the largest number of local steps of any agent in the run, where other processes that keep step
            hold some of them; None: of these n agents.

    Raises:
        UserError: there is a rate for modules that are trained in full, and no such module.
    """

    def __init__(
        self,
        task: Task,
        attached: Attached,
        config: TrainingConfig,
        agents: Sequence[int],
        shards: Sequence[np.ndarray],
        seed: int,
        eval_batch_size: int = 256,
        steps_in_round: int | None = None,
    ) -> None:
        if config.head_rate_ratio != 1 and not attached.modules:
            raise UserError(
                f"training.head_rate_ratio: {config.head_rate_ratio:g}, but no module is trained in full, only A and "
                "B; leave it at 1, or name a module in lora.modules_to_save."
            )
        self.task, self.attached, self.config = task, attached, config
        self.agents, self.seed = list(agents), seed
        self.evaluator = Evaluator(task, attached, eval_batch_size, config.precision)
        self.streams = [BatchStream(s, config.batch_size, seed, a) for a, s in zip(agents, shards, strict=True)]
        self.local_steps = local_steps(config, shards)
        self.steps_in_round = int(self.local_steps.max()) if steps_in_round is None else steps_in_round
        self.steps_taken = np.zeros(len(self.streams), dtype=np.int64)
        self.moments: dict[str, optimizers.Moments] = {}
        self._one_by_one = False
        self.agents_per_pass = 0 if config.agents_per_pass == "auto" else int(config.agents_per_pass)
        self._layouts: dict[str, FlatGroup] = {}
        self._formats = {p.dtype for p in attached.model.parameters()} | {getattr(torch, config.precision)}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.attached.device

    def prepare(self, adapter: Adapter, steps: int | None = None) -> None:
        """Gets ready to train; to be called once, before the first round.

        It allocates the optimizer's state, checks that agents stay apart in a pass (`separation.check`), and where
        `training.agents_per_pass` is "auto" measures the best number.

        Args:
            adapter: of the n agents.
            steps: local steps of the whole run: a short one does without measuring. None: a long one.

        Raises:
            UserError: as `separation.check` does.
        """
        for group in GROUPS:
            tensors = getattr(adapter, group)
            if tensors:
                self._layouts[group] = FlatGroup(tensors)
                flat = self._layouts[group].pack(tensors)
                self.moments[group] = optimizers.Moments.zeros(flat, self.config)
        auto = not self.agents_per_pass
        together = self.agents_per_pass != 1 and len(self.streams) > 1
        if not separation.check(self.task, self.attached, adapter, self._two_examples(), together):
            self._one_by_one, self.agents_per_pass = True, 1
            warnings.warn(
                f"training.agents_per_pass: {type(self.task.model).__name__} does not keep the examples of a batch "
                "apart in a layer that is trained, so agents go through it one by one.",
                stacklevel=2,
            )
        elif auto:
            self.agents_per_pass = self._calibrate(adapter, steps)

    @property
    def agents_per_pass(self) -> int:
        """The most agents whose examples go through the model together; 0 until `prepare` has found it."""
        return 1 if self._one_by_one else self._agents_per_pass

    @agents_per_pass.setter
    def agents_per_pass(self, count: int) -> None:
        self._agents_per_pass = count

    def _two_examples(self) -> Batch:
        """A training example of the first agent here and one of the last; different ones if they hold two in all."""
        first, last = self.streams[0].shard[0], self.streams[-1].shard[-1]
        return to_device(self.task.train_batch(np.array([first, last])), self.device)

    def train_round(
        self,
        adapter: Adapter,
        algorithm: Algorithm,
        state: State,
        round_: Round,
        rounds: int,
        first_step: int = 0,
        losses: Tensor | None = None,
        on_step: Callable[[int, Tensor], bool] | None = None,
    ) -> tuple[Adapter, State, Tensor]:
        """The local steps of a round.

        Args:
            adapter: of the n agents.
            algorithm: says which factors are trained, and steers gradients.
            state: of the algorithm.
            round_: the round.
            rounds: number of rounds of the run, for the schedule of the learning rate.
            first_step: the step, from 0, at which to go on with a round that was left.
            losses: (n,) sums of the losses of the steps before; None: 0.
            on_step: called after every step with (steps done, sums of losses); if it returns true the round ends early.

        Returns:
            The adapter, the state and the sums of losses (n,) over the round's steps.

        Raises:
            TrainingError: a loss, or at the end of the steps an adapter, is not finite.
        """
        trains = algorithm.trains(round_)
        flats = {g: layout.pack(getattr(adapter, g)) for g, layout in self._layouts.items()}
        trained: list[str] = [g for g in flats if g in trains]
        losses = torch.zeros(adapter.num_agents, device=self.device) if losses is None else losses
        total = self.steps_in_round

        for step in range(first_step, total):
            active = self.local_steps > step
            batches = [s.batch(int(t)) for s, t in zip(self.streams, self.steps_taken, strict=True)]
            gradients, step_losses = self._gradients(flats, adapter, trained, batches, active)
            self._check_finite("loss", step_losses, f"in round {round_.number}, step {step + 1}")
            losses = losses + step_losses
            gradients, state = self._steer(algorithm, state, flats, gradients, round_)
            if self.config.clip_norm is not None:
                optimizers.clip_([gradients[g] for g in trained], self.config.clip_norm)
            lr = self._learning_rate(round_.number, step, rounds)
            mask = torch.from_numpy(active).to(self.device)
            for group in trained:
                rate = lr * self.config.head_rate_ratio if group == "extras" else lr
                optimizers.step(flats[group], gradients[group], self.moments[group], self.config, rate, mask)
            self.steps_taken[active] += 1
            if on_step is not None and on_step(step + 1, losses):
                break
        for group in trained:  # A finite loss can still have a non-finite gradient.
            flat = flats[group].to(work_device(self.device))
            self._check_finite("adapter", flat.sum(-1, dtype=torch.float64), f"after round {round_.number}")
        parts: dict[str, Tensors] = {g: self._unpack(g, flats) for g in GROUPS}
        return replace(adapter, **parts), state, losses

    def _learning_rate(self, number: int, step: int, rounds: int) -> float | Tensor:
        """The learning rate in a step of a round; (n, 1) where agents may take unequal numbers of steps.

        There the schedule follows each agent's own steps, so that an agent need not know the others' numbers.
        """
        if self.config.epochs is None:
            return optimizers.learning_rate(self.config, (number - 1 + step / self.steps_in_round) / rounds)
        done = [(number - 1 + min(1.0, step / own)) / rounds for own in self.local_steps.tolist()]
        rates = [optimizers.learning_rate(self.config, progress) for progress in done]
        return torch.tensor(rates, dtype=torch.float64, device=work_device(self.device))[:, None]

    def _check_finite(self, what: str, values: Tensor, when: str) -> None:
        """Raises TrainingError unless all values (n,), one an agent, are finite."""
        if not bool(torch.isfinite(values).all()):
            bad = self.agents[int((~torch.isfinite(values)).nonzero()[0])]
            raise TrainingError(
                f"training: the {what} of agent {bad} is not finite {when}; lower training.learning_rate or set "
                "training.clip_norm. The last good checkpoint is kept."
            )

    def moments_after(self, algorithm: Algorithm, state: State) -> None:
        """Lets the algorithm carry the optimizer's moments into the frame that `combine` has chosen."""
        firsts: Tensors = {}
        seconds: Tensors = {}
        for group, moments in self.moments.items():
            layout = self._layouts[group]
            firsts |= {f"{group}/{k}": t for k, t in layout.unpack(moments.first).items()}
            if moments.second.shape[1]:
                seconds |= {f"{group}/{k}": t for k, t in layout.unpack(moments.second).items()}
        new_firsts, new_seconds = algorithm.moments(state, firsts, seconds)
        if new_firsts is firsts and new_seconds is seconds:
            return
        for group, moments in self.moments.items():
            names = [s.name for s in self._layouts[group].shapes]
            moments.first = self._layouts[group].pack({k: new_firsts[f"{group}/{k}"] for k in names})
            if moments.second.shape[1]:
                moments.second = self._layouts[group].pack({k: new_seconds[f"{group}/{k}"] for k in names})

    def snapshot(self) -> Tensors:
        """What a checkpoint holds of the local steps: moments and steps taken, name -> (n, ...)."""
        tensors = {"steps_taken": torch.from_numpy(self.steps_taken.copy())}
        for group, moments in self.moments.items():
            parts = {"first": moments.first, "second": moments.second, "steps": moments.steps}
            tensors |= put(f"moments/{group}/", parts)
        return tensors

    def restore(self, tensors: Tensors) -> None:
        """Goes back to a snapshot; further tensors among `tensors` are ignored."""
        for group, moments in self.moments.items():
            own = take(f"moments/{group}/", tensors)
            moments.first, moments.second, moments.steps = own["first"], own["second"], own["steps"]
        self.steps_taken = tensors["steps_taken"].cpu().numpy().copy()

    def evaluate(self, adapter: Adapter) -> Tensor:
        """(n,) scores of the adapters on the whole test set, in float64 on the CPU.

        Equal adapters are scored once.

        Raises:
            UserError: the test set is empty.
        """
        return self.evaluator.scores(adapter, self.evaluated_together)

    @property
    def evaluated_together(self) -> int:
        """The most agents in a pass of an evaluation. It does not depend on how fast passes were in `prepare`."""
        if self._one_by_one:
            return 1
        return len(self.streams) if self.config.agents_per_pass == "auto" else self.config.agents_per_pass

    def evaluate_own(self, adapter: Adapter, tests: Sequence[np.ndarray]) -> Tensor:
        """(n,) scores of the adapters, each on its own test examples, in float64 on the CPU.

        Args:
            adapter: of n agents, or of one that is scored on all.
            tests: n arrays (m_i,) of indices of test examples, m_i at least 1.
        """
        return self.evaluator.own_scores(adapter, tests)

    def score_of(self, adapter: Adapter, tests: Sequence[np.ndarray] | None = None) -> float:
        """The score of a single model on all test examples, or the mean of its scores on each of `tests`."""
        return float((self.evaluate(adapter) if tests is None else self.evaluate_own(adapter, tests)).mean())

    # One step's gradients

    def _unpack(self, group: str, flats: dict[str, Tensor]) -> Tensors:
        return self._layouts[group].unpack(flats[group]) if group in flats else {}

    def _gradients(
        self,
        flats: dict[str, Tensor],
        adapter: Adapter,
        trained: list[str],
        batches: list[np.ndarray],
        active: np.ndarray,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients group -> (n, P) and losses (n,) of one step; 0 for agents that are not active."""
        gradients = {g: torch.zeros_like(flats[g]) for g in trained}
        losses = torch.zeros(len(batches), device=self.device)
        for rows in self._passes(active):
            index: slice | Tensor = torch.from_numpy(rows)
            if rows[-1] - rows[0] + 1 == len(rows):
                index = slice(int(rows[0]), int(rows[-1]) + 1)
            examples = np.concatenate([batches[i] for i in rows])
            grads, losses[index] = self._pass(flats, adapter, trained, index, examples, self._masks(rows))
            for group, grad in zip(trained, grads, strict=True):
                if grad is not None:
                    gradients[group][index] = grad
        return gradients, losses

    def _pass(
        self,
        flats: dict[str, Tensor],
        adapter: Adapter,
        trained: list[str],
        index: slice | Tensor,
        examples: np.ndarray,
        masks: DropoutMasks | None,
    ) -> tuple[tuple[Tensor | None, ...], Tensor]:
        """Gradients (k, P) of the trained groups and losses (k,) of the k agents at `index`.

        `examples` are the numbers (k b,) of their training examples, agent by agent. An agent may appear several times.
        """
        leaves = {g: flats[g][index].detach().requires_grad_(g in trained) for g in flats}
        bound = Adapter(
            self._unpack("A", leaves),
            self._unpack("B", leaves),
            {name: s[index] for name, s in adapter.scale.items()},
            self._unpack("extras", leaves),
            core=self._unpack("core", leaves),
        )
        batch = to_device(self.task.train_batch(examples), self.device)
        with self.attached.bind(bound, masks), short_attention(self.device, self._formats):
            with autocast(self.config.precision, self.device):
                loss = self.task.losses(batch, bound.num_agents)
            grads = torch.autograd.grad(loss.float().sum(), [leaves[g] for g in trained], allow_unused=True)
        return grads, loss.detach().float()

    def _passes(self, active: np.ndarray) -> Iterator[np.ndarray]:
        rows = np.flatnonzero(active)
        for low in range(0, len(rows), self.agents_per_pass):
            yield rows[low : low + self.agents_per_pass]

    def _steer(
        self,
        algorithm: Algorithm,
        state: State,
        flats: dict[str, Tensor],
        gradients: dict[str, Tensor],
        round_: Round,
    ) -> tuple[dict[str, Tensor], State]:
        named, values = (
            {f"{g}/{k}": t for g in gradients for k, t in self._layouts[g].unpack(of[g]).items()}
            for of in (gradients, flats)
        )
        steered, state = algorithm.steer(state, named, round_, values)
        if steered is named:
            return gradients, state
        return {
            g: self._layouts[g].pack({s.name: steered[f"{g}/{s.name}"] for s in self._layouts[g].shapes})
            for g in gradients
        }, state

    def _masks(self, rows: np.ndarray) -> DropoutMasks | None:
        """Dropout masks, each a function of (seed, agent, step, layer); None without dropout.

        So the masks are the same for every number of agents a pass, and when activation checkpointing computes a
        segment again.
        """
        return self._drawn_by([(self.seed, "dropout", self.agents[i], int(self.steps_taken[i])) for i in rows])

    def _drawn_by(self, names: Sequence[tuple[int, str, int, int]]) -> DropoutMasks | None:
        """Dropout masks, for each agent of a pass drawn by its (seed, name ...) and the layer; None without dropout."""
        p = float(self.attached.config.lora_dropout)
        if not p:
            return None

        def masks(layer: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
            parts = []
            for name in names:
                generator = torch_generator(*name, layer, device=device)
                parts.append(torch.empty(shape[1:], device=device).bernoulli_(1 - p, generator=generator))
            return torch.stack(parts).div_(1 - p)

        return masks

    def _calibrate(self, adapter: Adapter, steps: int | None) -> int:
        """The number of agents a pass with which steps are fastest; timed unless there are only few steps."""
        n, batch_size = len(self.streams), self.config.batch_size
        candidates = calibration.sizes(n, batch_size, self.device)
        if len(candidates) == 1:
            return 1
        if steps is not None and steps < calibration.SHORT:
            return calibration.untimed(candidates, batch_size)
        # Only as many agents as the largest pass takes.
        some = adapter.select(slice(0, candidates[-1]))
        flats = {g: layout.pack(getattr(some, g)) for g, layout in self._layouts.items()}
        batches = [s.batch(0) for s in self.streams[: candidates[-1]]]

        def seconds(agents: int) -> float:
            start = time.perf_counter()
            examples, masks = np.concatenate(batches[:agents]), self._masks(np.arange(agents))
            self._pass(flats, some, list(flats), slice(0, agents), examples, masks)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        return calibration.fastest(candidates, seconds)
