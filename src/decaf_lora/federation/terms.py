"""What must all agents of a federation do alike? The shared part of a run's configuration.

The other fields (data, splits, columns, device, workers, folders) belong to a site: they are neither signed nor sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, create_model, field_validator

from decaf_lora import algorithms
from decaf_lora.config import (
    MOST_EXCHANGES,
    OWN,
    AlgorithmConfig,
    LoraOptions,
    RunConfig,
    TaskConfig,
    TrainingConfig,
    build,
    explain,
)
from decaf_lora.errors import UserError
from decaf_lora.privacy.accounting import MESH

SHARED_TASK = (
    *("name", "model", "classes", "templates", "answers", "length_normalized", "chat_template", "packing"),
    *("max_length", "metric", "positive", "dtype", "quantization", OWN),
)
"""Fields of the task that all agents share."""

LOCAL_TASK = tuple(name for name in TaskConfig.model_fields if name not in SHARED_TASK)
"""Fields of the task that each site sets for itself."""

LOCAL_TRAINING = ("agents_per_pass",)
"""Fields of the training that each site sets for itself: they change only its speed."""

SHARED_RUN = ("gossip_steps", "start", "rounds", "seed")
"""Fields of the run itself that all agents share, beside the graph."""


LOCAL_RUN = ("partition", "evaluate_every", "measure_every", "checkpoint_every", "device")
"""Fields of the run itself that each site sets for itself."""


def _local() -> type[BaseModel]:
    found: dict[str, Any] = {}
    for kind, names in ((TaskConfig, LOCAL_TASK), (TrainingConfig, LOCAL_TRAINING), (RunConfig, LOCAL_RUN)):
        found |= {name: (kind.model_fields[name].annotation, kind.model_fields[name]) for name in names}
    config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    return create_model("Local", __config__=config, __doc__="What a site sets for itself.", **found)


Local = _local()
"""What a site sets for itself, as one flat model: `LOCAL_TASK`, `LOCAL_TRAINING` and `LOCAL_RUN`."""


class Terms(BaseModel):
    """The shared part of a run's configuration, with every value."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: dict[str, Any]
    """`SHARED_TASK`."""
    lora: LoraOptions
    algorithm: AlgorithmConfig
    training: dict[str, Any]
    """All of the training but `LOCAL_TRAINING`."""
    gossip_steps: int = Field(ge=1, le=MOST_EXCHANGES)
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
        """The configuration of a site's run: these terms, and the site's own fields.

        A site whose data are one file, which has no test set, holds out a fifth of them.

        Raises:
            UserError: a value is wrong, or `local` holds a field that is shared.
        """
        own = dict(local or {})
        shared = [name for name in own if name not in Local.model_fields]
        if shared:
            raise UserError(f"{shared[0]}: the federation file says it, for all agents; leave it out.")
        one_file = own.get("data") is not None and Path(own["data"]).expanduser().is_file()
        if one_file and own.get("test_split") is None and own.get("test_share") is None:
            own["test_share"] = 0.2
        values = {
            **{name: own[name] for name in LOCAL_RUN if name in own},
            "task": {**self.task, **{name: own[name] for name in LOCAL_TASK if name in own}},
            "lora": self.lora,
            "algorithm": self.algorithm,
            "training": {**self.training, **{name: own[name] for name in LOCAL_TRAINING if name in own}},
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


GOOD = (
    "decaf_tracked with messages int8 on the complete graph (up to 8 agents), else a ring with gossip_steps 2 to 4 and "
    "algorithm.relay_rank"
)
"""What is recommended in a federation: named wherever something else is refused."""


def refuse(config: RunConfig) -> None:
    """Raises UserError for what needs a server, or everybody's data: no agent of a federation has either."""
    algorithm = config.algorithm
    kind = algorithms.KINDS.get(algorithms.spelled(algorithm.name))
    if kind is not None and kind.build().topology in ("server", "pooled"):
        raise UserError(f"algorithm.name: {algorithm.name} needs a server, and a federation has none; use {GOOD}.")
    if config.gossip_steps == "period":
        raise UserError(f"gossip_steps: write the number of exchanges in a round instead of period; use {GOOD}.")
    if "pooled" in config.baseline:
        raise UserError("baseline: pooled needs everybody's data; each agent trains the baseline alone by itself.")
    if config.privacy.on:
        raise UserError(MESH)
    if config.attackers.kind is not None:
        raise UserError("attackers: they are for a simulation in one process; leave them out of a federation.")
    if config.init_adapters:
        raise UserError("init_adapters: a federation starts from fresh adapters; leave it out.")
    if config.validation_share is not None:
        raise UserError("validation_share: a federation scores on each site's own test set; leave it out.")
    if config.training.learning_rate == "auto":
        raise UserError(
            "training.learning_rate: auto needs all agents in one process; find a rate with `decaf tune` on examples "
            "that you may use, and give the number."
        )
    task = config.task
    if task.name in ("image-text", "sequence-classification") and not task.classes:
        raise UserError(
            "task.classes: list the classes in the order of their numbers; each site would else number the labels "
            "of its own file, and the sites would differ without a word."
        )
