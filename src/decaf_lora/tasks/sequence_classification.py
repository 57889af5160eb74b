"""Text classification with a pretrained encoder and a head (`AutoModelForSequenceClassification`).

Which class is the text, or the pair of texts? The loss is the cross-entropy over the classes. The head, and every other
module that the checkpoint lacks, is trained in full: it goes to `modules_to_save`, starts equal on all agents, and is
averaged with the same mixing weights as the adapters.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from decaf_lora import data
from decaf_lora.adapters.stacked import IN_OWN_DTYPE
from decaf_lora.config import TaskConfig
from decaf_lora.data import Ragged
from decaf_lora.errors import UserError
from decaf_lora.tasks.base import Batch, Task, cross_entropy
from decaf_lora.tasks.pretrained import (
    family_targets,
    max_tokens,
    pretrained_config,
    pretrained_model,
    pretrained_tokenizer,
    refuse_unknown_tokens,
)
from decaf_lora.tasks.scores import ClassScore

if TYPE_CHECKING:
    from peft import LoraConfig

HEADS = ("classifier", "score")
"""Names of classification heads, as PEFT knows them."""


class SequenceClassification(Task):
    """Classification of token sequences.

    Args:
        model: a model of transformers whose output has `logits` (m, C).
        train: argument of the model (`input_ids`, `token_type_ids`) -> its sequences for the training examples.
        labels: (num_train,) class numbers.
        test: the same as `train` for the test examples.
        test_labels: (num_test,) class numbers.
        classes: names of the classes in the order of their numbers.
        heads: names of the modules to train in full.
        fills: argument of the model -> the number that pads its sequences; 0 for others.
        score: how to score; None: accuracy.
        name: of the task.
        decode: token numbers -> text, to show examples to people; None: examples are shown as numbers.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        train: Mapping[str, Ragged],
        labels: np.ndarray,
        test: Mapping[str, Ragged],
        test_labels: np.ndarray,
        classes: Sequence[str],
        *,
        heads: Sequence[str] = HEADS[:1],
        fills: Mapping[str, int] | None = None,
        score: ClassScore | None = None,
        name: str = "sequence-classification",
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.model, self.name, self.classes, self.heads = model, name, list(classes), list(heads)
        self.labels, self.num_test, self._decode = np.asarray(labels), len(test_labels), decode
        self._train, self._test, self._fills = train, test, fills or {}
        self.test_labels = np.asarray(test_labels)
        self._train_labels, self._test_labels = torch.as_tensor(labels), torch.as_tensor(test_labels)
        self._score = score or ClassScore("accuracy", classes)
        self.score_name = self._score.name
        # A decoder's cache only costs memory, and gradient checkpointing would fill it twice.
        self._arguments = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        for head in self.heads:
            setattr(model.get_submodule(head), IN_OWN_DTYPE, True)

    def default_lora(self) -> LoraConfig:
        """Rank 8 on the attention layers that PEFT adapts in this family, and the heads."""
        from peft import LoraConfig

        return LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=family_targets(self.model),
            modules_to_save=list(self.heads),
            task_type="SEQ_CLS",
        )

    def train_batch(self, indices: np.ndarray) -> Batch:
        return self._batch(self._train, indices) | {"labels": self._train_labels[indices]}

    def test_batch(self, indices: np.ndarray) -> Batch:
        return self._batch(self._test, indices) | {"labels": self._test_labels[indices]}

    def _batch(self, sequences: Mapping[str, Ragged], indices: np.ndarray) -> Batch:
        batch = {}
        for name, ragged in sequences.items():
            batch[name], batch["attention_mask"] = ragged.padded(indices, self._fills.get(name, 0))
        return batch

    def logits(self, batch: Batch) -> Tensor:
        """(m, C)"""
        return self.model(**{k: t for k, t in batch.items() if k != "labels"}, **self._arguments).logits

    def losses(self, batch: Batch, agents: int) -> Tensor:
        return cross_entropy(self.logits(batch), batch["labels"], agents)

    def statistics(self, batch: Batch, agents: int) -> Tensor:
        return self._score.statistics(self.logits(batch), batch["labels"], agents)

    def score(self, statistics: Tensor) -> Tensor:
        return self._score.score(statistics)

    def majority_score(self) -> float | None:
        return self._score.majority(self.labels, self._test_labels)

    def show_examples(self, indices: np.ndarray) -> list[str]:
        found = []
        for index in indices:
            tokens = self._train["input_ids"][index].tolist()
            text = str(tokens) if self._decode is None else repr(self._decode(tokens))
            found.append(f"{text} ({len(tokens)} tokens), label {self.classes[self.labels[index]]!r}")
        return found

    def example_keys(self, split: Literal["train", "test"]) -> list[Hashable]:
        sequences = self._train if split == "train" else self._test
        return list(zip(*([ids.tobytes() for ids in ragged] for ragged in sequences.values()), strict=True))


def make(config: TaskConfig) -> SequenceClassification:
    """The task that `config` describes."""
    from transformers import AutoModelForSequenceClassification

    columns = [("text_column", config.text_column)]
    if config.text_pair_column is not None:
        columns.append(("text_pair_column", config.text_pair_column))
    own = _own_classes(config)
    examples = data.load(config, columns, label=config.label_column or "label", order=own)
    data.needs_classes(examples.labels, examples.classes)
    data.needs_text(examples.train, columns)
    data.needs_text(examples.test, columns)
    score = ClassScore(config.metric, examples.classes, config.positive)
    tokenizer = pretrained_tokenizer(config)
    model, new = pretrained_model(
        config,
        AutoModelForSequenceClassification,
        num_labels=len(examples.classes),
        id2label=dict(enumerate(examples.classes)),
        label2id={c: i for i, c in enumerate(examples.classes)},
        ignore_mismatched_sizes=True,
    )
    _compare_classes(own, examples.classes)
    pad = _padding_token(tokenizer, model)
    limit = max_tokens(config, model, tokenizer)
    takes = inspect.signature(model.forward).parameters
    sequences, truncated = {}, {}
    for split, rows in (("train", examples.train), ("test", examples.test)):
        tokenized = data.preprocess(
            rows.select_columns([column for _, column in columns]),
            tokenize,
            config,
            f"Tokenizing {split}",
            tokenizer=tokenizer,
            columns=[column for _, column in columns],
            limit=limit,
        )
        truncated[split] = int(np.sum(tokenized["truncated"][:]))
        sequences[split] = {
            name: Ragged.of(tokenized, name)
            for name in ("input_ids", "token_type_ids")
            if name in tokenized.column_names and name in takes
        }
        data.needs_tokens(rows, sequences[split]["input_ids"].lengths, "text_column", split)
        refuse_unknown_tokens(model, tokenizer, **{name: ragged.values for name, ragged in sequences[split].items()})
    refuse_unknown_tokens(model, tokenizer, input_ids=np.array([pad]))
    data.warn_truncated(truncated, limit, {"train": len(examples.train), "test": len(examples.test)})
    by_length = np.argsort(sequences["test"]["input_ids"].lengths, kind="stable")  # batches then pad little
    task = SequenceClassification(
        model,
        sequences["train"],
        examples.labels,
        {name: ragged.take(by_length) for name, ragged in sequences["test"].items()},
        examples.test_labels[by_length],
        examples.classes,
        heads=heads(model, new),
        fills={"input_ids": pad},
        score=score,
        decode=tokenizer.decode,
    )
    task.tables = {"train": examples.train, "test": examples.test.select(by_length)}
    task.interface = {
        "use": "sequence-classification",
        "labels": task.classes,
        "columns": [column for _, column in columns],
        "label_column": config.label_column or "label",
        "max_length": limit,
        "pad_token": tokenizer.pad_token,
    }
    task.content = examples.content
    return task


def _own_classes(config: TaskConfig) -> list[str]:
    """The names of the classes of a checkpoint that was fine-tuned already, in the order of its head; else []."""
    found = pretrained_config(config)
    if not any(name.endswith("ForSequenceClassification") for name in found.architectures or ()):
        return []
    names = [str(found.id2label.get(i, "")) for i in range(len(found.id2label or ()))]
    return [] if all(re.fullmatch(r"(LABEL_\d+)?", name) for name in names) else names


def _compare_classes(own: Sequence[str], classes: Sequence[str]) -> None:
    """What becomes of a checkpoint's head for the classes `own`: refused in another order, else told."""
    keys, wanted = [data.alike(name) for name in own], [data.alike(name) for name in classes]
    if not own or keys == wanted:
        return
    if sorted(keys) == sorted(wanted):
        raise UserError(
            f"task.classes: the checkpoint's head has these classes in the order {', '.join(own)}; leave task.classes "
            "out, or give them in this order."
        )
    if len(own) != len(classes):
        warnings.warn(
            f"task.model: its head is for {len(own)} classes ({', '.join(own[:5])}), the data have {len(classes)}; a "
            "new head is trained. If they are the same classes, name all of them in task.classes.",
            stacklevel=3,
        )
        return
    pairs = ", ".join(f"{a} for {b}" for a, b in list(zip(own, classes, strict=True))[:5])
    warnings.warn(f"task.model: its head was trained for other classes and starts as it is: {pairs}.", stacklevel=3)


def tokenize(batch: Mapping[str, list[str]], tokenizer: Any, columns: list[str], limit: int) -> dict[str, list[Any]]:
    """Texts, or pairs of texts, of the columns as token sequences of at most `limit`, and whether each was cut."""
    texts = [batch[column] for column in columns]
    cut = tokenizer(*texts, truncation=True, max_length=limit)
    whole = tokenizer(*texts, verbose=False)  # last, so that the tokenizer ends as it was (its hash is cached)
    lengths = [len(ids) for ids in whole["input_ids"]]
    kept = {k: v for k, v in cut.items() if k in ("input_ids", "token_type_ids")}
    return {**kept, "truncated": [length > limit for length in lengths]}


def _padding_token(tokenizer: Any, model: Any) -> int:
    """The padding token's number; the end-of-sequence token stands in, with a warning, where there is none."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "task.model: its tokenizer has neither a padding nor an end-of-sequence token; set pad_token in its "
                "tokenizer_config.json."
            )
        warnings.warn(f"task.model: its tokenizer has no padding token; {tokenizer.eos_token!r} is used.", stacklevel=3)
        tokenizer.pad_token = tokenizer.eos_token
    # Decoders with a head find the last token of a sequence by the padding's number.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return int(tokenizer.pad_token_id)


def heads(model: nn.Module, new: Sequence[str]) -> list[str]:
    """The modules to train in full: the head, and those of the `new` parameters outside it."""
    heads = [name for name, _ in model.named_children() if name in HEADS]
    if not heads:
        raise UserError(f"task.model: {type(model).__name__} has no head named {' or '.join(HEADS)}.")
    outside = [key for key in new if key.split(".")[0] not in heads]
    lost = [key for key in outside if re.search(r"embed|layers?\.\d|\.h\.\d|\.block", key)]
    if lost:
        raise UserError(
            f"task.model: the checkpoint lacks {len(lost)} tensors of {type(model).__name__}'s encoder (first: "
            f"{lost[0]}); it is no checkpoint of this family."
        )
    own = dict.fromkeys(key.rpartition(".")[0] for key in outside)
    for name in own:
        old = [key for key, _ in model.get_submodule(name).named_parameters(prefix=name) if key not in new]
        if old:  # such as a parameter of the whole encoder: training its module would train the encoder
            first = next(key for key in outside if key.rpartition(".")[0] == name)
            raise UserError(
                f"task.model: the checkpoint lacks {first} of {type(model).__name__}, which would stay as drawn; "
                "choose a checkpoint that has it."
            )
    return list(dict.fromkeys([*heads, *own]))
