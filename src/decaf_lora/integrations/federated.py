"""How does a training script become an agent of a federation? Its own process keeps the file's terms and the links.

The federation file says who talks to whom, by which algorithm and how often; the script trains as it did. What the
file says of the adapter is compared with the live model; its optimizer and batches are left to the script.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from decaf_lora import algorithms
from decaf_lora.adapters.adapter import Adapter
from decaf_lora.config import LoraOptions, RunConfig, TaskConfig
from decaf_lora.engines import Engine
from decaf_lora.engines.links import Links
from decaf_lora.engines.links.links import check_free
from decaf_lora.engines.mesh.engine import Mesh, WaitedOutError
from decaf_lora.errors import UserError
from decaf_lora.exchange import Exchange
from decaf_lora.federation import base_model, checking, status
from decaf_lora.federation.file import Signed
from decaf_lora.federation.site import make_engine
from decaf_lora.integrations.live import LiveAdapter, frozen
from decaf_lora.integrations.places import STAYS, Facts, Place, Work
from decaf_lora.integrations.planned import Plan

_COMPARED = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "target_modules", "exclude_modules", "modules_to_save"),
)
"""Fields of the adapter that the file gives; None there: the script chooses."""


class GaveUpError(UserError):
    """No neighbour answered for as long as the federation file says; the adapter and a checkpoint are saved."""

    exit_code = 3


class InFederation(Place):
    """The agent `name` of a sealed federation file.

    Args:
        path: the file.
        name: of the agent.
        told: fingerprint of the organiser's key; needed the first time.
        key: file of the agent's key; None: NAME.key beside the federation file.
        bind: HOST:PORT to listen on; None: the port that the file names, on all addresses.

    Raises:
        UserError: what `decaf federation check` would call wrong in file, trust, clock, software or key.
    """

    def __init__(self, path: Path, name: str, told: str | None, key: Path | None, bind: str | None) -> None:
        self.signed, self._own = checking.site(path, name, told=told, key=key, base=False)
        self.name, self._path = name, path
        self.agent, self.agents = self.signed.number(name), len(self.signed.agents)
        self.config: RunConfig = self.signed.terms.config(self.agents, self.signed.graph)
        self.rounds = self.config.rounds
        self.neighbours = checking.neighbours(self.signed, name)
        self._listen = checking.listening(self.signed, name, bind)
        self._engine: Mesh
        self._links: Links | None = None
        self._facts = b""
        self._leave = ExitStack()
        self._warned: set[str] = set()

    def plan(self, given: Mapping[str, Any], every: int | None) -> Plan:
        """What the file says of the exchanges.

        Args:
            given: field -> what the script says of it; None where it says nothing.
            every: steps from one exchange to the next; None: those of the file.

        Raises:
            UserError: the script says something else than the file.
        """
        config = self.config
        said = {"algorithm": config.algorithm.name, "seed": config.seed, "gossip_steps": config.gossip_steps}
        for field, value in given.items():
            if value is not None and value != said.get(field):
                there = f"the federation file says {said[field]}" if field in said else "the federation file says it"
                raise UserError(f"{field}: {there}, for all agents; leave {field}= out.")
        if config.lora.ranks or config.lora.alphas:
            raise UserError("lora.ranks: agents of unequal rank cannot be Trainers; run the site with `decaf agent`.")
        algorithm = algorithms.make(config.algorithm.name, **config.algorithm.options())
        if algorithm.topology == "none":
            raise UserError(f"algorithm: {algorithm.name} exchanges nothing, so there is no federation to join.")
        steps = config.training.steps if config.training.epochs is None else None
        if every is None and steps is None:
            raise UserError("every: the federation file counts epochs; say every how many steps you exchange.")
        if every is not None and steps is not None and every != steps:
            raise UserError(f"every: the federation file says {steps} steps a round, every is {every}; leave it out.")
        exchanges = config.gossip_steps
        return Plan(algorithm, self.signed.schedule(), self.agents, every or steps or 0, config.seed, exchanges)

    def check(self, model: Any, live: LiveAdapter, max_steps: int, every: int) -> None:
        """UserError if model, adapter or number of rounds are not those that the file names."""
        rounds, expected = -(-max_steps // every), self.config.rounds
        if rounds != expected:
            raise UserError(
                f"max_steps: {max_steps} steps with an exchange every {every} make {rounds} rounds, and the federation "
                f"file says {expected}; set max_steps={expected * every}."
            )
        check_lora(self.config.lora, model.peft_config[live.name])
        root = model.get_base_model()
        check_classes(self.config.task.classes, root.config)
        if self.signed.base:
            check_base(self.signed, root, live)

    def arrive(self, facts: Facts) -> Engine:
        """The engine, not yet connected; refuses an agent that runs already and a port that is taken."""
        self.leave()  # of a training that was interrupted in this process
        others = status.running(status.file_of(self._path, self.name))
        if others and others != os.getpid():
            raise UserError(f"agent: {self.name} runs already (process {others}); stop it first.")
        if self._listen is not None:
            check_free(self._listen)
        stays = sorted((field, value) for field, value in facts.items() if STAYS in field)
        self._facts = self.signed.facts() + (repr(stays).encode() if stays else b"")
        self._engine = make_engine(self.signed, self.agent, self.config)
        return self._engine

    def connect(self, exchange: Exchange, adapter: Adapter) -> None:
        """Starts the links; the engine has gone back to a checkpoint before, if there is one."""
        links = Links(self._own, self.neighbours, version=self.signed.version, listen=self._listen)
        self._engine.connect(*exchange.templates(adapter), links, self._facts, self._differs)
        self.said = status.AgentStatus(self.signed.name, self.signed.version, self.name, os.getpid())
        self.said.rounds, self.said.state = self.config.rounds, "training"
        self.said.neighbours = [status.EdgeStatus(neighbour.name) for neighbour in self.neighbours]
        links.start(self._engine)
        self._leave.callback(links.stop)
        self._links = links
        self._leave.enter_context(status.Teller(status.file_of(self._path, self.name), self.said, self._refresh))

    def _differs(self, theirs: bytes) -> str:
        """What is different in a neighbour's facts, in words."""
        of_file = self.signed.facts()
        if theirs[: len(of_file)] != of_file:
            return self.signed.differs(theirs[: len(of_file)])
        return f"it has other values of a factor{STAYS}"

    def together(self, step: int, value: Any, work: Work) -> Any:
        """`work` on the own value: the engine waits for the neighbours in it."""
        return work([value])[0]

    def finish(self, save: Callable[[], object]) -> None:
        """Saves the result, and then serves the neighbours until none needs this agent."""
        if self._engine.status()["phase"] == "closed all":
            save()
            self.said.state = "serving"
            self._engine.finish()

    def leave(self, error: BaseException | None = None) -> None:
        """Ends links and status."""
        if self._links is not None:
            self._refresh()
            whole = self.said.state == "serving" and error is None
            self.said.state = "done" if whole else "gave up" if isinstance(error, WaitedOutError) else "stopped"
            if error is not None:
                self.said.said = str(error)
        self._leave.close()
        self._links = None

    def gave_up(self, error: Exception, saved: str) -> Exception:
        """The line for a script whose neighbours have not answered; `saved` says what lies where."""
        assert isinstance(error, WaitedOutError)
        why = {edge.name: edge.why for edge in self.said.neighbours}
        missing = ", ".join(f"{name} ({why[name]})" if why.get(name) else name for name in error.missing)
        seconds = self.signed.limits.give_up
        return GaveUpError(f"neighbours: nobody answered for {seconds:g} s: {missing}. {saved}")

    def _refresh(self) -> None:
        """Brings the status up to date, once a second; a refused message is told once."""
        if self._links is None:
            return
        for edge, neighbour in zip(self.said.neighbours, self.neighbours, strict=True):
            there = self._links.status(neighbour.number)
            edge.up, edge.since, edge.why = there.up, there.since, there.why
            edge.sent, edge.received = there.sent, there.received
        now = self._engine.status()
        self.said.waits_for, self.said.round = now["waits_for"], now["round"] - 1
        if self.said.state in ("training", "waiting"):
            self.said.state = "waiting" if now["waits_for"] else "training"
        for edge in self.said.neighbours:
            edge.missed = now["neighbours"][edge.name]["missed"]
        for line in now["rejected"]:
            if line not in self._warned:
                self._warned.add(line)
                warnings.warn(f"gossip: refused a message of {line}.", stacklevel=2)


def check_lora(said: LoraOptions, live: Any) -> None:
    """UserError if a field of the live adapter's LoraConfig is not what the file says."""
    for field in _COMPARED:
        expected, found = getattr(said, field), getattr(live, field)
        if field == "target_modules" and expected == "all-linear":
            continue  # PEFT has put the names in its place; the shapes of messages are compared at every edge
        if isinstance(expected, list) and not isinstance(found, str | int | None):
            expected, found = sorted(map(str, expected)), sorted(map(str, found))
            if field == "modules_to_save":  # PEFT adds the heads of its task type
                found = [name for name in found if name in expected]
        if expected is not None and expected != found:
            raise UserError(f"lora.{field}: the federation file says {expected}, the model has {found}; make it equal.")


def check_classes(classes: tuple[str, ...], config: Any) -> None:
    """UserError if the model's classes are others than the file's, or in another order."""
    named = getattr(config, "id2label", None)
    if not classes or not isinstance(named, dict):
        return
    found = [str(named[number]) for number in sorted(named)]
    if len(found) != len(classes):
        raise UserError(f"task.classes: the federation file has {len(classes)}, the model {len(found)}; make it equal.")
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(found))
    if not unnamed and found != list(classes):
        at = next(i for i, (a, b) in enumerate(zip(classes, found, strict=True)) if a != b)
        raise UserError(
            f"task.classes: class {at} is {classes[at]!r} in the federation file and {found[at]!r} in the model's "
            "id2label; number them as the file does."
        )


def check_base(signed: Signed, root: nn.Module, live: LiveAdapter) -> None:
    """UserError if the model was loaded from another base than the signed one, or was changed since."""
    name = getattr(getattr(root, "config", None), "_name_or_path", "")
    if not name:
        raise UserError("base model: it does not say where it was loaded from; load it with from_pretrained.")
    folder = base_model.model_folder(TaskConfig(name="causal-lm", model=name))
    assert folder is not None
    base_model.check_same("weights", base_model.tensors(folder), signed.base, folder)
    prefix = f"{getattr(root, 'base_model_prefix', '')}."
    ours = {k.removeprefix(prefix): p for k, p in frozen(root, {id(p) for p in live.parameters.values()})}
    for stored, read in _stored(folder):
        parameter = ours.get(stored.removeprefix(prefix))
        if parameter is None or not parameter.is_floating_point() or parameter.numel() == 0:
            continue  # of another head, or quantized
        value = read()
        if value.shape != parameter.shape or not torch.equal(value.to(parameter.dtype), parameter.detach().cpu()):
            raise UserError(
                f"base model: {stored} is not what {folder} holds, whose hash the organiser signed; do not change the "
                "model after from_pretrained."
            )


def _stored(folder: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name of each tensor of the model in `folder`, and how to read it."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                yield name, lambda name=name, file=file: file.get_tensor(name)  # type: ignore[misc]
