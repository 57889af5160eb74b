"""Fine-tuning a causal language model (`AutoModelForCausalLM`): which text comes next?

Three uses, all with the loss  - sum log p(target token | all before) / number of target tokens :

- verbalised classification (`answers`): the targets are the tokens of the right answer after a prompt; an
  example is scored by which class's answer is the likeliest;
- instruction tuning (`answer_column`): the targets are the answer's tokens and the end of sequence;
- text tuning (neither): every token but the first is a target; texts are padded, or packed into blocks.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from decaf_lora import data
from decaf_lora.config import TaskConfig
from decaf_lora.data import Ragged
from decaf_lora.errors import UserError
from decaf_lora.tasks.base import Batch, Task
from decaf_lora.tasks.pretrained import (
    family_targets,
    max_tokens,
    pretrained_model,
    pretrained_tokenizer,
    refuse_unknown_tokens,
)
from decaf_lora.tasks.scores import ClassScore
from decaf_lora.tasks.sequences import IGNORED, Sequences, encode_prompts, encode_texts, packed, parts_of

if TYPE_CHECKING:
    from peft import LoraConfig

    from decaf_lora.data import Examples


def perplexity(score: float) -> float:
    """The perplexity of a log-likelihood per token, the score of `LanguageModeling`."""
    return math.exp(-score)


class CausalTask(Task):
    """What the uses of a language model share: training on target tokens."""

    model: Any
    decode: Callable[[list[int]], str] | None = None
    """Token numbers -> text, to show examples to people; None: examples are shown as numbers."""
    _train: Sequences
    _test: Sequences

    def __init__(self, model: Any, train: Sequences, labels: np.ndarray, num_test: int, name: str) -> None:
        self.model, self.name = model, name
        self.labels, self.num_test = np.asarray(labels), num_test
        self._train = train
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def default_lora(self) -> LoraConfig:
        """Rank 8 on the attention layers that PEFT adapts in this family."""
        from peft import LoraConfig

        return LoraConfig(r=8, lora_alpha=16, target_modules=family_targets(self.model), task_type="CAUSAL_LM")

    def train_batch(self, indices: np.ndarray) -> Batch:
        return self._train.batch(indices)

    def show_examples(self, indices: np.ndarray) -> list[str]:
        return [self._shown(self._train, int(index)) for index in indices]

    def example_keys(self, split: Literal["train", "test"]) -> list[Hashable]:
        sequences = self._train if split == "train" else self._test
        return [ids.tobytes() for ids in sequences.tokens]

    def _shown(self, sequences: Sequences, index: int) -> str:
        """A sequence as text, split where the model begins to predict."""
        tokens, start = sequences.tokens[index].tolist(), int(sequences.starts[index])
        parts = tokens[:start], tokens[start:]
        given, learnt = map(str, parts) if self.decode is None else (repr(self.decode(part)) for part in parts)
        return f"{given}, to go on with {learnt} ({len(tokens)} tokens)"

    def losses(self, batch: Batch, agents: int) -> Tensor:
        found, counts = self.log_likelihoods(batch)
        return -found.view(agents, -1).sum(1) / counts.view(agents, -1).sum(1).clamp_min(1)

    def log_likelihoods(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of log p over every sequence's targets (m,), and their number (m,)."""
        targets = batch["targets"][:, 1:]
        asked = targets != IGNORED
        logits = self.logits(batch["input_ids"], batch["attention_mask"], asked)
        each = -nn.functional.cross_entropy(logits, targets[asked], reduction="none")
        spread = torch.zeros(targets.shape, device=targets.device).masked_scatter(asked, each)
        return spread.sum(1), asked.sum(1)

    def logits(self, input_ids: Tensor, attention_mask: Tensor, asked: Tensor) -> Tensor:
        """(asked.sum(), V) float32 logits that predict the tokens after the positions `asked` (m, L - 1).

        Only columns in which some sequence asks go through the vocabulary.
        """
        columns = asked.any(0).nonzero()[:, 0]
        keep = {"logits_to_keep": columns} if self._selects else {}
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **keep).logits
        if not self._selects:
            logits = logits[:, columns]
        return logits[asked[:, columns]].float()


class LanguageModeling(CausalTask):
    """Instruction or text tuning; the score is the log-likelihood per target token of the test set.

    Args:
        model: a causal language model of transformers.
        train: the training sequences.
        labels: (num_train,) class numbers for partitions to split by; zeros if there are no classes.
        test: the test sequences.
        classes: names of these classes.
        name: of the task.
    """

    score_name = "log-likelihood per token"

    def __init__(
        self,
        model: Any,
        train: Sequences,
        labels: np.ndarray,
        test: Sequences,
        classes: Sequence[str] = ("all",),
        name: str = "causal-lm",
    ) -> None:
        super().__init__(model, train, labels, len(test.tokens), name)
        self.classes, self._test = list(classes), test

    def test_batch(self, indices: np.ndarray) -> Batch:
        return self._test.batch(indices)

    def statistics(self, batch: Batch, agents: int) -> Tensor:
        """(agents, 2) sum of log-likelihoods, number of target tokens."""
        found, counts = self.log_likelihoods(batch)
        return torch.stack([found.view(agents, -1).sum(1), counts.view(agents, -1).sum(1)], 1)


class AnswerScoring(CausalTask):
    """Classification by the likeliest answer.

    Args:
        model: a causal language model of transformers.
        train: one sequence for every training example and class: example e with the answer of class c is sequence
            e C + c.
        labels: (num_train,) class numbers.
        test: one sequence for every test example and class, in the same order.
        test_labels: (num_test,) class numbers.
        classes: names of the C classes.
        length_normalized: compare answers by their log-likelihood per token, not by its sum.
        score: how to score; None: accuracy.
        name: of the task.
    """

    def __init__(
        self,
        model: Any,
        train: Sequences,
        labels: np.ndarray,
        test: Sequences,
        test_labels: np.ndarray,
        classes: Sequence[str],
        *,
        length_normalized: bool = True,
        score: ClassScore | None = None,
        name: str = "causal-lm",
    ) -> None:
        super().__init__(model, train, labels, len(test_labels), name)
        self.classes, self.length_normalized = list(classes), length_normalized
        self.test_labels = np.asarray(test_labels)
        self._test, self._test_labels = test, torch.as_tensor(test_labels)
        self._score = score or ClassScore("accuracy", classes)
        self.score_name = self._score.name
        self._one_token = self._differ_in_last_token(test)
        self._one_token_in_training: bool | None = None

    def train_batch(self, indices: np.ndarray) -> Batch:
        return self._train.batch(indices * len(self.classes) + self.labels[indices])

    def show_examples(self, indices: np.ndarray) -> list[str]:
        return super().show_examples(indices * len(self.classes) + self.labels[indices])

    def example_keys(self, split: Literal["train", "test"]) -> list[Hashable]:
        """The prompts, without the answers."""
        tokens, starts = self._train if split == "train" else self._test
        return [tokens[i][: starts[i]].tobytes() for i in range(0, len(tokens), len(self.classes))]

    def test_batch(self, indices: np.ndarray) -> Batch:
        """Tensors (m, C, L), with the answers on the second axis.

        If all answers are single tokens: the prompts (m, L - 1), and the tokens of the answers (m, C).
        """
        return self._with_all_answers(self._test, indices, self._test_labels, self._one_token)

    def validation_batch(self, indices: np.ndarray) -> Batch:
        """As `test_batch`, of training examples."""
        if self._one_token_in_training is None:
            self._one_token_in_training = self._differ_in_last_token(self._train)
        return self._with_all_answers(self._train, indices, torch.as_tensor(self.labels), self._one_token_in_training)

    def _with_all_answers(self, sequences: Sequences, indices: np.ndarray, labels: Tensor, one_token: bool) -> Batch:
        count = len(self.classes)
        rows = (indices[:, None] * count + np.arange(count)).ravel()
        batch = {k: t.unflatten(0, (-1, count)) for k, t in sequences.batch(rows).items()}
        batch["labels"] = labels[indices]
        if one_token:
            asked = batch["targets"][:, 0, 1:] != IGNORED
            batch["answers"] = batch.pop("targets")[:, :, 1:].transpose(1, 2)[asked]
            batch = {k: t[:, 0] if t.dim() == 3 else t for k, t in batch.items()} | {"asked": asked}
        return batch

    def statistics(self, batch: Batch, agents: int) -> Tensor:
        return self._score.statistics(self.class_scores(batch), batch["labels"], agents)

    def class_scores(self, batch: Batch) -> Tensor:
        """(m, C) log-likelihood of every class's answer, per token if `length_normalized`."""
        if "answers" in batch:
            logits = self.logits(batch["input_ids"], batch["attention_mask"], batch["asked"])
            return logits.log_softmax(-1).gather(1, batch["answers"])
        flat = {k: batch[k].flatten(0, 1) for k in ("input_ids", "attention_mask", "targets")}
        found, counts = self.log_likelihoods(flat)
        each = found / counts.clamp_min(1) if self.length_normalized else found
        return each.view(-1, len(self.classes))

    def score(self, statistics: Tensor) -> Tensor:
        return self._score.score(statistics)

    def majority_score(self) -> float | None:
        return self._score.majority(self.labels, self._test_labels)

    def _differ_in_last_token(self, sequences: Sequences) -> bool:
        """Whether all answers of every example are one token after the same prompt: one pass scores all."""
        tokens, starts, count = sequences.tokens, sequences.starts, len(self.classes)
        if not (tokens.lengths - starts == 1).all():
            return False
        firsts = range(0, len(tokens), count)
        return all(
            np.array_equal(tokens[first][:-1], tokens[first + c][:-1]) for first in firsts for c in range(1, count)
        )


# From a configuration


def make(config: TaskConfig) -> CausalTask:
    """The task that `config` describes: scored answers, instruction tuning, or text tuning."""
    _check_use(config)
    if config.answers:
        return _answer_scoring(config)
    columns = _prompt_columns(config) if config.answer_column else [("text_column", config.text_column)]
    if config.answer_column:
        columns.append(("answer_column", config.answer_column))
    examples = data.load(config, columns, label=config.label_column, label_is_learnt=False)
    model, tokenizer, limit = _load(config)
    train, test = _encode(config, examples, columns, model, tokenizer, limit)
    labels = examples.labels
    if config.packing:
        train, labels = packed(train.tokens, labels, limit)
        test, _ = packed(test.tokens, examples.test_labels, limit)
    fine = _with_targets(train, "train"), _with_targets(test, "test")
    test = test.take(fine[1])
    by_length = np.argsort(test.tokens.lengths, kind="stable")  # batches then pad little
    classes = examples.classes or ["all"]
    task = LanguageModeling(model, train.take(fine[0]), labels[fine[0]], test.take(by_length), classes)
    if not config.packing:  # a packed block holds several rows
        task.tables = {"train": examples.train.select(fine[0]), "test": examples.test.select(fine[1][by_length])}
    task.decode = tokenizer.decode
    task.interface = _interface(config, "instruction" if config.answer_column else "text", tokenizer, limit)
    task.content = examples.content
    return task


def _with_targets(sequences: Sequences, split: str) -> NDArray[np.int64]:
    """The sequences (n,) that have a target; a warning counts the others, such as empty texts."""
    fine = sequences.tokens.lengths > sequences.starts
    count, total = int((~fine).sum()), len(fine)
    if count == total:
        raise UserError(f"task.text_column: none of the {total} {split} texts has a token to predict.")
    if count:
        warnings.warn(
            f"task.text_column: {count} of {total} {split} texts have no token to predict and are left out.",
            stacklevel=3,
        )
    return np.flatnonzero(fine)


def _check_use(config: TaskConfig) -> None:
    if config.answers and config.answer_column:
        raise UserError("task.answers: classification scores `answers`, tuning learns `answer_column`; give one.")
    prompted = bool(config.answers or config.answer_column)
    if len(config.templates) > 1:
        raise UserError("task.templates: causal-lm takes one template.")
    if prompted == (not config.templates and config.prompt_column is None):
        raise UserError(
            "task.prompt_column: a prompt needs task.prompt_column or task.templates."
            if prompted
            else "task.answer_column: a prompt needs task.answer_column or task.answers."
        )
    if config.templates and config.prompt_column:
        raise UserError("task.templates: the prompt is task.templates or task.prompt_column; give one.")
    refused = {
        "packing": config.packing and prompted,
        "chat_template": config.chat_template and not prompted,
        "classes": bool(config.classes) and not config.answers and config.label_column is None,
        "metric": config.metric != "accuracy" and not config.answers,
        "positive": config.positive is not None and not config.answers,
        "length_normalized": not config.length_normalized and not config.answers,
        "text_column": config.text_column != "text" and prompted,
    }
    use = "verbalised classification" if config.answers else "instruction tuning" if prompted else "text tuning"
    for field, is_wrong in refused.items():
        if is_wrong:
            raise UserError(f"task.{field}: {use} does not use it; leave it out.")


def _prompt_columns(config: TaskConfig) -> list[tuple[str, str]]:
    if config.prompt_column:
        return [("prompt_column", config.prompt_column)]
    names = [name for _, name in parts_of(config.templates[0]) if name]
    if not names:
        raise UserError(f"task.templates: {config.templates[0]!r} needs {{column}} for each field, by name.")
    return [("templates", name) for name in dict.fromkeys(names)]


def _load(config: TaskConfig) -> tuple[Any, Any, int]:
    from transformers import AutoModelForCausalLM

    tokenizer = pretrained_tokenizer(config)
    if config.chat_template and not tokenizer.chat_template:
        raise UserError("task.chat_template: the tokenizer of task.model has no chat template.")
    model, new = pretrained_model(config, AutoModelForCausalLM)
    if new:
        raise UserError(
            f"task.model: the checkpoint lacks {len(new)} tensors of {type(model).__name__} (first: {new[0]}); it is "
            "no causal language model."
        )
    return model, tokenizer, max_tokens(config, model, tokenizer)


def _answer_scoring(config: TaskConfig) -> AnswerScoring:
    columns = _prompt_columns(config)
    examples = data.load(config, columns, label=config.label_column or "label")
    if len(config.answers) != len(examples.classes):
        raise UserError(
            f"task.answers: {len(config.answers)} answers for {len(examples.classes)} classes "
            f"({', '.join(examples.classes[:8])}); give one for each, in this order."
        )
    data.needs_classes(examples.labels, examples.classes)
    _refuse_moved_answers(config.answers, examples.classes)
    score = ClassScore(config.metric, examples.classes, config.positive)
    model, tokenizer, limit = _load(config)
    train, test = _encode(config, examples, columns, model, tokenizer, limit)
    count = len(examples.classes)
    by_length = np.argsort(test.tokens.lengths.reshape(-1, count).max(1), kind="stable")  # batches then pad little
    task = AnswerScoring(
        model,
        train,
        examples.labels,
        test.take((by_length[:, None] * count + np.arange(count)).ravel()),
        examples.test_labels[by_length],
        examples.classes,
        length_normalized=config.length_normalized,
        score=score,
    )
    task.tables = {"train": examples.train, "test": examples.test.select(by_length)}
    task.decode = tokenizer.decode
    task.interface = {**_interface(config, "answers", tokenizer, limit), "labels": task.classes}
    task.content = examples.content
    return task


def _refuse_moved_answers(answers: Sequence[str], classes: Sequence[str]) -> None:
    """UserError if an answer is the name of another class than the one that it is given for."""
    keys = [data.alike(name) for name in classes]
    for i, answer in enumerate(answers):
        key = data.alike(answer)
        if key in keys and keys[i] != key:
            raise UserError(
                f"task.answers: {answer!r} is given for the class {classes[i]!r}. The order of the classes is "
                f"{', '.join(classes[:8])}: give the answers in this order, or set task.classes to the order that you "
                "want."
            )


def _interface(config: TaskConfig, use: str, tokenizer: Any, limit: int) -> dict[str, Any]:
    facts = {"use": use, "max_length": limit, "eos_token": tokenizer.eos_token}
    if use == "text":
        return facts | {"columns": [config.text_column]}
    template = config.templates[0] if config.templates else f"{{{config.prompt_column}}}"
    facts |= {"templates": [template], "chat_template": config.chat_template}
    if use == "instruction":
        return facts | {"columns": [config.answer_column]}
    facts |= {"answers": list(config.answers), "length_normalized": config.length_normalized}
    return facts | {"label_column": config.label_column or "label"}


def _encode(
    config: TaskConfig, examples: Examples, columns: list[tuple[str, str]], model: Any, tokenizer: Any, limit: int
) -> tuple[Sequences, Sequences]:
    names = list(dict.fromkeys(column for _, column in columns))
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "limit": limit}
    function: Any = encode_prompts
    if config.answers or config.answer_column:
        arguments |= {
            "parts": parts_of(config.templates[0]) if config.templates else [("", config.prompt_column)],
            "answers": config.answer_column or list(config.answers),
            "chat": config.chat_template,
        }
        for rows in (examples.train, examples.test):
            data.needs_text(rows, columns, numbers=True)
    else:
        function = encode_texts
        arguments |= {"column": config.text_column, "limit": 0 if config.packing else limit}
        for rows in (examples.train, examples.test):
            data.needs_text(rows, columns)
    found, truncated = [], {}
    for split, rows in (("train", examples.train), ("test", examples.test)):
        encoded = data.preprocess(rows.select_columns(names), function, config, f"Tokenizing {split}", **arguments)
        found.append(Sequences(Ragged.of(encoded, "input_ids"), np.array(encoded["start"][:], np.int64)))
        refuse_unknown_tokens(model, tokenizer, input_ids=found[-1].tokens.values)
        truncated[split] = int(np.sum(encoded["truncated"][:])) // max(1, len(config.answers))
    data.warn_truncated(truncated, limit, {"train": len(examples.train), "test": len(examples.test)})
    return found[0], found[1]
