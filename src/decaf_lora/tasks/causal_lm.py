"""Fine-tuning a causal language model (`AutoModelForCausalLM`): which text comes next?

Three uses, all with the loss  - sum log p(target token | all before) / number of target tokens :

- verbalised classification (`answers`): the targets are the tokens of the right answer after a prompt; an
  example is scored by which class's answer is the likeliest;
- instruction tuning (`answer_column`): the targets are the answer's tokens and the end of sequence;
- text tuning (neither): every token but the first is a target; texts are padded, or packed into blocks.

Prompt and answer are tokenized as one text, as they are met in use; a token that reaches over the seam belongs
to the answer. Sequences are padded on the right, where a causal model sees nothing of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from decaf_lora import data
from decaf_lora.config import TaskConfig
from decaf_lora.data import Examples, Ragged
from decaf_lora.errors import UserError
from decaf_lora.tasks import family_targets, max_tokens, pretrained_model, pretrained_tokenizer
from decaf_lora.tasks.base import Batch, Task
from decaf_lora.tasks.sequence_classification import ClassScore

IGNORED = -100


def perplexity(score: float) -> float:
    """The perplexity of a log-likelihood per token, the score of `LanguageModeling`."""
    return math.exp(-score)


class Sequences(NamedTuple):
    """Token sequences, and for each the position (n,) of its first target; all from there on are targets."""

    tokens: Ragged
    starts: NDArray[np.int64]

    def take(self, indices: NDArray[np.int64]) -> Sequences:
        """Sequences `indices` (m,) alone, in this order."""
        return Sequences(self.tokens.take(indices), self.starts[indices])

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """`input_ids`, `attention_mask` and `targets` (m, L) of sequences `indices` (m,)."""
        tokens, mask = self.tokens.padded(indices, 0)
        positions = torch.arange(tokens.shape[1])
        is_target = mask.bool() & (positions >= torch.from_numpy(self.starts[indices])[:, None])
        return {
            "input_ids": tokens,
            "attention_mask": mask,
            "targets": torch.where(is_target, tokens, IGNORED),
        }


class CausalTask(Task):
    """What the uses of a language model share: training on target tokens."""

    model: Any

    def __init__(self, model: Any, train: Sequences, labels: np.ndarray, num_test: int, name: str) -> None:
        self.model, self.name = model, name
        self.labels, self.num_test = np.asarray(labels), num_test
        self._train = train
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def default_lora(self) -> LoraConfig:
        """Rank 8 on the attention layers that PEFT adapts in this family."""
        return LoraConfig(r=8, lora_alpha=16, target_modules=family_targets(self.model), task_type="CAUSAL_LM")

    def train_batch(self, indices: np.ndarray) -> Batch:
        return self._train.batch(indices)

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

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "model": self.model.config._name_or_path}


class LanguageModeling(CausalTask):
    """Instruction or text tuning; the score is the log-likelihood per target token of the test set.

    `labels` (num_train,) are any classes to split data by, with their names `classes`, or zeros.
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

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "perplexity": "exp(-score)"}


class AnswerScoring(CausalTask):
    """Classification by the likeliest answer.

    `train` and `test` hold one sequence for every example and class: example e with the answer of class c is
    sequence e C + c. With `length_normalized` answers are compared by log-likelihood per token.
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
        self._test, self._test_labels = test, torch.as_tensor(test_labels)
        self._score = score or ClassScore("accuracy", classes)
        self.score_name = self._score.name
        self._one_token = self._differ_in_last_token()

    def train_batch(self, indices: np.ndarray) -> Batch:
        return self._train.batch(indices * len(self.classes) + self.labels[indices])

    def test_batch(self, indices: np.ndarray) -> Batch:
        """Tensors with the answers on the second axis: (m, C, L); where answers are one token, the prompts
        (m, L - 1) with the answers' tokens (m, C)."""
        count = len(self.classes)
        rows = (indices[:, None] * count + np.arange(count)).ravel()
        batch = {k: t.unflatten(0, (-1, count)) for k, t in self._test.batch(rows).items()}
        batch["labels"] = self._test_labels[indices]
        if self._one_token:
            asked = batch["targets"][:, 0, 1:] != IGNORED
            batch["answers"] = batch.pop("targets")[:, :, 1:].transpose(1, 2)[asked]
            batch = {k: t[:, 0] if t.dim() == 3 else t for k, t in batch.items()} | {"asked": asked}
        return batch

    def statistics(self, batch: Batch, agents: int) -> Tensor:
        return self._score.statistics(self.class_scores(batch), batch["labels"], agents)

    def class_scores(self, batch: Batch) -> Tensor:
        """(m, C) log-likelihood of every class's answer, per token if `length_normalized`."""
        if self._one_token:
            logits = self.logits(batch["input_ids"], batch["attention_mask"], batch["asked"])
            return logits.log_softmax(-1).gather(1, batch["answers"])
        flat = {k: batch[k].flatten(0, 1) for k in ("input_ids", "attention_mask", "targets")}
        found, counts = self.log_likelihoods(flat)
        each = found / counts.clamp_min(1) if self.length_normalized else found
        return each.view(-1, len(self.classes))

    def score(self, statistics: Tensor) -> Tensor:
        return self._score.score(statistics)

    def _differ_in_last_token(self) -> bool:
        """Whether all answers of every test example are one token after the same prompt: one pass scores all."""
        tokens, starts, count = self._test.tokens, self._test.starts, len(self.classes)
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
    examples = data.load(config, columns, label=config.label_column)
    model, tokenizer, limit = _load(config)
    train, test = _encode(config, examples, columns, tokenizer, limit)
    labels = examples.labels
    if config.packing:
        train, labels = packed(train.tokens, labels, limit)
        test, _ = packed(test.tokens, examples.test_labels, limit)
    test = test.take(np.argsort(test.tokens.lengths, kind="stable"))  # batches then pad little
    return LanguageModeling(model, train, labels, test, examples.classes or ["all"])


def packed(tokens: Ragged, labels: np.ndarray, length: int) -> tuple[Sequences, np.ndarray]:
    """Sequences of one label after the other as blocks of `length` tokens (the last of a label may be shorter),
    and the label of each block (n,). A single token left over predicts nothing and is dropped."""
    blocks: list[NDArray[Any]] = []
    of_block: list[Any] = []
    for label in np.unique(labels):
        joined = np.concatenate([tokens[i] for i in np.flatnonzero(labels == label)])
        cut = [joined[i : i + length] for i in range(0, len(joined), length)]
        cut = [block for block in cut if len(block) > 1]
        blocks += cut
        of_block += [label] * len(cut)
    offsets = np.cumsum([0] + [len(block) for block in blocks])
    values = np.concatenate(blocks) if blocks else np.zeros(0, np.int32)
    return Sequences(Ragged(values, offsets), np.ones(len(blocks), np.int64)), np.array(of_block, np.int64)


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
    try:
        names = [name for _, name, _, _ in Formatter().parse(config.templates[0]) if name is not None]
    except ValueError as error:
        raise UserError(f"task.templates: {config.templates[0]!r}: {error}.") from error
    if not names or not all(name.isidentifier() for name in names):
        raise UserError(f"task.templates: {config.templates[0]!r} needs {{column}} for each field, by name.")
    return [("templates", name) for name in dict.fromkeys(names)]


def _load(config: TaskConfig) -> tuple[Any, Any, int]:
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
    score = ClassScore(config.metric, examples.classes, config.positive)
    model, tokenizer, limit = _load(config)
    train, test = _encode(config, examples, columns, tokenizer, limit)
    count = len(examples.classes)
    by_length = np.argsort(test.tokens.lengths.reshape(-1, count).max(1), kind="stable")  # batches then pad little
    return AnswerScoring(
        model,
        train,
        examples.labels,
        test.take((by_length[:, None] * count + np.arange(count)).ravel()),
        examples.test_labels[by_length],
        examples.classes,
        length_normalized=config.length_normalized,
        score=score,
    )


def _encode(
    config: TaskConfig, examples: Examples, columns: list[tuple[str, str]], tokenizer: Any, limit: int
) -> tuple[Sequences, Sequences]:
    names = list(dict.fromkeys(column for _, column in columns))
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "limit": limit}
    function: Any = encode_prompts
    if config.answers or config.answer_column:
        arguments |= {
            "template": config.templates[0] if config.templates else f"{{{config.prompt_column}}}",
            "answers": config.answer_column or list(config.answers),
            "chat": config.chat_template,
        }
    else:
        function = encode_texts
        arguments |= {"column": config.text_column, "limit": 0 if config.packing else limit}
        for rows in (examples.train, examples.test):
            data.needs_text(rows, columns)
    found, truncated = [], {}
    for split, rows in (("train", examples.train), ("test", examples.test)):
        encoded = data.preprocess(rows.select_columns(names), function, config, f"Tokenizing {split}", **arguments)
        found.append(Sequences(Ragged.of(encoded, "input_ids"), np.array(encoded["start"][:], np.int64)))
        truncated[split] = int(np.sum(encoded["truncated"][:])) // max(1, len(config.answers))
    data.warn_truncated(truncated, limit)
    return found[0], found[1]


def encode_texts(batch: Mapping[str, list[str]], tokenizer: Any, column: str, limit: int) -> dict[str, list[Any]]:
    """Texts of a column, each with an end of sequence, cut to `limit` tokens unless that is 0."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    whole = [_ended(ids, end) for ids in tokenizer(batch[column], verbose=False)["input_ids"]]
    return {
        "input_ids": [ids[:limit] if limit else ids for ids in whole],
        "start": [1] * len(whole),
        "truncated": [0 < limit < len(ids) for ids in whole],
    }


def encode_prompts(
    batch: Mapping[str, list[Any]],
    tokenizer: Any,
    template: str,
    answers: str | list[str],
    chat: bool,
    limit: int,
) -> dict[str, list[Any]]:
    """Prompts with their answers: the column `answers`, ended, or every one of the list `answers`.

    A space is put between a prompt and an answer unless there is white space or a chat template. What is too
    long loses the beginning of its prompt, the same for all answers.
    """
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    prompts = [template.format(**row) for row in rows]
    per_prompt = answers if isinstance(answers, list) else None
    texts, seams = [], []
    for prompt, row in zip(prompts, rows, strict=True):
        for answer in per_prompt or [str(row[answers])]:  # type: ignore[index]
            text, seam = _joined(tokenizer, prompt, answer, chat, to_the_end=per_prompt is None)
            texts.append(text)
            seams.append(seam)
    found = tokenizer(texts, add_special_tokens=not chat, return_offsets_mapping=True, verbose=False)
    end = [tokenizer.eos_token_id] if per_prompt is None and not chat and tokenizer.eos_token_id is not None else []
    sequences = [_ended(ids, end) for ids in found["input_ids"]]
    starts = [
        max(1, next((i for i, (_, stop) in enumerate(offsets) if stop > seam), len(ids)))
        for ids, offsets, seam in zip(found["input_ids"], found["offset_mapping"], seams, strict=True)
    ]
    for text, ids, start in zip(texts, sequences, starts, strict=True):
        if start >= len(ids):
            raise UserError(f"task.answers: the tokenizer makes no token of the answer in {text[-60:]!r}.")
    size = len(per_prompt) if per_prompt else 1
    longest = [max(map(len, sequences[i : i + size])) for i in range(0, len(sequences), size)]
    excess = [max(0, longest[i // size] - limit) for i in range(len(sequences))]
    cut = [
        _without_beginning(ids, start, n, tokenizer.bos_token_id)
        for ids, start, n in zip(sequences, starts, excess, strict=True)
    ]
    return {
        "input_ids": [ids[:limit] for ids, _ in cut],
        "start": [start for _, start in cut],
        "truncated": [n > 0 for n in excess],
    }


def _joined(tokenizer: Any, prompt: str, answer: str, chat: bool, to_the_end: bool) -> tuple[str, int]:
    """Prompt and answer as one text, and the length of the prompt in it."""
    if not chat:
        space = "" if not prompt or prompt[-1].isspace() or answer[:1].isspace() else " "
        return prompt + space + answer, len(prompt)
    user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
    asked = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    if not to_the_end:
        return asked + answer, len(asked)
    whole = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    if not whole.startswith(asked):
        raise UserError(
            "task.chat_template: the tokenizer's template changes the prompt once it is answered; "
            "write the prompt with task.templates instead."
        )
    return whole, len(asked)


def _ended(ids: list[int], end: list[int]) -> list[int]:
    return ids if not end or ids[-1:] == end else ids + end


def _without_beginning(ids: list[int], start: int, excess: int, begin: int | None) -> tuple[list[int], int]:
    """`ids` without `excess` tokens of the prompt, as far as it has them; a begin-of-sequence token, or one
    token to predict from, stays."""
    kept = 1 if ids[:1] == [begin] or start - excess < 1 else 0
    dropped = max(0, min(excess, start - kept))
    return ids[:kept] + ids[kept + dropped :], start - dropped
