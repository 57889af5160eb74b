"""What do the agents of a federation have to do alike? The shared part of a run's configuration.

The other fields (data, splits, columns, device, workers, folders) belong to a site: they are neither signed nor sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from decaf_lora.config import AlgorithmConfig, LoraOptions, RunConfig, TaskConfig, TrainingConfig, build, explain
from decaf_lora.errors import UserError

SHARED_TASK = (
    *("name", "model", "classes", "templates", "answers", "length_normalized", "chat_template", "packing"),
    *("max_length", "metric", "positive", "dtype", "quantization"),
)
"""Fields of the task that all agents share."""

LOCAL_TASK = tuple(name for name in TaskConfig.model_fields if name not in SHARED_TASK)
"""Fields of the task that each site sets for itself."""

LOCAL_TRAINING = ("agents_per_pass",)
"""Fields of the training that each site sets for itself: they change its speed alone."""

SHARED_RUN = ("gossip_steps", "start", "rounds", "seed")
"""Fields of the run itself that all agents share, beside the graph."""


class Terms(BaseModel):
    """What all agents of a federation do alike, with every value."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: dict[str, Any]
    """`SHARED_TASK`."""
    lora: LoraOptions
    algorithm: AlgorithmConfig
    training: dict[str, Any]
    """All of the training but `LOCAL_TRAINING`."""
    gossip_steps: int = Field(ge=1)
    """Exchanges in a round."""
    start: str
    """`common`, or `independent`."""
    rounds: int = Field(ge=1)
    """Rounds of local steps and exchange."""
    seed: int = Field(ge=0)
    """Seeds the start and each agent's batches."""

    @field_validator("task", "training")
    @classmethod
    def _complete(cls, values: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Every value, and none that is local."""
        kind, local = (TaskConfig, LOCAL_TASK) if info.field_name == "task" else (TrainingConfig, LOCAL_TRAINING)
        for name in values:
            if name in local:
                raise ValueError(f"{name} belongs to a site and is not shared; remove it")
        try:
            return kind.model_validate(values).model_dump(mode="json", exclude=set(local))
        except ValidationError as error:
            raise ValueError(explain(kind, error).removesuffix(".")) from error

    def config(self, agents: int, graph: str, local: Mapping[str, Any] | None = None) -> RunConfig:
        """The run of a site: these terms, and `local`, the site's own values (`task` and `training` nested).

        Raises:
            UserError: a value is wrong, or `local` holds a field that is shared.
        """
        own = dict(local or {})
        task, training = dict(own.pop("task", {})), dict(own.pop("training", {}))
        for shared, given in ((SHARED_TASK, task), (self.training, training), (SHARED_RUN, own)):
            for name in shared:
                if name in given:
                    raise UserError(f"{name}: the federation file says it, for all agents; leave it out.")
        values = {
            **own,
            "task": {**self.task, **task},
            "lora": self.lora,
            "algorithm": self.algorithm,
            "training": {**self.training, **training},
            **{name: getattr(self, name) for name in SHARED_RUN},
            "agents": agents,
            "graph": graph,
        }
        return build(RunConfig, values)


def terms_of(config: RunConfig) -> Terms:
    """The shared part of a run. UserError where an option cannot work in a federation: see `refuse`."""
    refuse(config)
    return Terms(
        task=config.task.model_dump(mode="json", include=set(SHARED_TASK)),
        lora=config.lora,
        algorithm=config.algorithm,
        training=config.training.model_dump(mode="json", exclude=set(LOCAL_TRAINING)),
        **{name: getattr(config, name) for name in SHARED_RUN},
    )


GOOD = "decaf_tracked with messages int8 on the complete graph (up to 8 agents), or decaf on a ring"
"""What works in a federation and is recommended: named wherever something else is refused."""


def refuse(config: RunConfig) -> None:
    """Raises UserError for what needs a server, or everybody's data: no agent of a federation has either."""
    algorithm = config.algorithm
    if algorithm.name in ("fedavg", "centralized"):
        raise UserError(f"algorithm.name: {algorithm.name} needs a server, and a federation has none; use {GOOD}.")
    if config.training.epochs is not None:
        raise UserError(
            "training.epochs: it makes the number of steps depend on the size of everybody's data, which no agent "
            "knows; set training.steps."
        )
    if config.gossip_steps == "period":
        raise UserError("gossip_steps: write the number of exchanges in a round instead of period.")
    if config.gossip_steps > 1 and algorithm.name != "local":
        if algorithm.messages == "int8":
            raise UserError(
                "algorithm.messages: int8 goes to neighbours only, and several exchanges in a round (gossip_steps) "
                "hand messages on; use one exchange, or full messages with algorithm.relay_rank."
            )
        if algorithm.relay_rank is None:
            raise UserError(
                "algorithm.relay_rank: several exchanges in a round (gossip_steps) need it in a federation, where an "
                "agent receives its neighbours' messages alone; set the rank that they are cut to, or one exchange."
            )
    if config.init_adapters:
        raise UserError("init_adapters: a federation starts from fresh adapters; leave it out.")
    task = config.task
    if task.name in ("image-text", "sequence-classification") and not task.classes:
        raise UserError(
            "task.classes: list the classes in the order of their numbers; each site would else number the labels "
            "of its own file, and the sites would differ without a word."
        )
