"""Which tokens does a causal language model read, and from where on must it predict them?

Prompt and answer are tokenized as one text, as they are in use. A token that reaches over the seam between them belongs
to the answer. Sequences are padded on the right: a causal model does not look there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from decaf_lora.data import Ragged
from decaf_lora.errors import UserError
from decaf_lora.tasks.base import Batch

IGNORED = -100


class Sequences(NamedTuple):
    """n token sequences, and the position (n,) of each one's first target: from there on all tokens are targets."""

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


def packed(tokens: Ragged, labels: np.ndarray, length: int) -> tuple[Sequences, np.ndarray]:
    """Joins the sequences of each label end to end, and cuts them into blocks of `length` tokens.

    The last block of a label may be shorter; one of a single token predicts nothing and is dropped.

    Returns:
        The blocks, and the label (n,) of each.
    """
    joined = tokens.take(np.argsort(labels, kind="stable"))
    names, counts = np.unique(labels, return_counts=True)
    ends = joined.offsets[np.cumsum(counts)]
    of_each = [np.diff([*range(begin, end, length), end]) for begin, end in itertools.pairwise([0, *ends])]
    sizes, of_block = np.concatenate(of_each), np.repeat(names, [len(of_label) for of_label in of_each])
    fine, values = sizes > 1, joined.values
    if not fine.all():
        values = values[np.repeat(fine, sizes)]
    blocks = Ragged(values, np.concatenate([[0], sizes[fine].cumsum()]))
    return Sequences(blocks, np.ones(len(blocks), np.int64)), of_block[fine].astype(np.int64)


def encode_texts(batch: Mapping[str, list[str]], tokenizer: Any, column: str, limit: int) -> dict[str, list[Any]]:
    """Texts of a column, each with an end of sequence, cut to `limit` tokens unless that is 0."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    whole = [_ended(ids, end) for ids in tokenizer(batch[column], verbose=False)["input_ids"]]
    return {
        "input_ids": [ids[:limit] if limit else ids for ids in whole],
        "start": [1] * len(whole),
        "truncated": [0 < limit < len(ids) for ids in whole],
    }


def parts_of(template: str) -> list[tuple[str, str]]:
    """A template as pairs (text, column that follows it); no column, "", follows the last text. {{ and }} are braces.

    A column's name may have dots, blanks and other signs: everything between two braces is the name.
    """
    parts, text = [], ""
    for found in re.finditer(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+", template):
        piece, column = found[0], found[1]
        if column == "":
            raise UserError(f"task.templates: {template!r} needs {{column}} for each field, by name.")
        if column is not None:
            parts.append((text, column))
            text = ""
        elif piece in ("{", "}"):
            raise UserError(
                f"task.templates: {template!r} has a single {piece}; write {piece * 2} for a brace as text."
            )
        else:
            text += piece[0] if piece in ("{{", "}}") else piece
    return [*parts, (text, "")] if text else parts


def encode_prompts(
    batch: Mapping[str, list[Any]],
    tokenizer: Any,
    parts: list[tuple[str, str]],
    answers: str | list[str],
    chat: bool,
    limit: int,
) -> dict[str, list[Any]]:
    """Prompts with their answers as token sequences.

    A space goes between a prompt and an answer, unless there is white space already or a chat template. If a sequence
    is too long, the beginning of its prompt is cut off, by the same number of tokens for all answers of that prompt.

    Args:
        batch: column -> its values, one an example.
        tokenizer: that of the model.
        parts: what prompts are made of, from `parts_of`.
        answers: a column, whose answers get an end of sequence; or the list of answers that every prompt gets.
        chat: whether to put prompt and answer into the tokenizer's chat template.
        limit: longest sequence in tokens.

    Returns:
        `input_ids`; `start`, the position of the first target; `truncated`, whether the prompt was cut.

    Raises:
        UserError: an answer has no token, or the chat template fails.
    """
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    prompts = ["".join(text + (str(row[column]) if column else "") for text, column in parts) for row in rows]
    column = answers if isinstance(answers, str) else ""
    per_prompt = answers if isinstance(answers, list) else None
    texts, seams = [], []
    for prompt, row in zip(prompts, rows, strict=True):
        for answer in per_prompt or [str(row[column])]:
            text, seam = _joined(tokenizer, prompt, answer, chat, to_the_end=per_prompt is None)
            texts.append(text)
            seams.append(seam)
    found, starts = _tokens_and_starts(tokenizer, texts, seams, special=not chat)
    sequences = found if per_prompt else [_with_end(tokenizer, *one, chat) for one in zip(found, starts, strict=True)]
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


def _tokens_and_starts(
    tokenizer: Any, texts: list[str], seams: list[int], special: bool
) -> tuple[list[list[int]], list[int]]:
    """The tokens of every text, and the first of them that reaches beyond the text's seam (at least 1)."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ids = found["input_ids"]
        starts = [
            next((i for i, (_, stop) in enumerate(offsets) if stop > seam), len(of_text))
            for of_text, offsets, seam in zip(ids, found["offset_mapping"], seams, strict=True)
        ]
    else:
        # Tokenizers in plain Python do not say where a token lies. The tokens before the seam are those that the
        # prompt alone begins with too.
        ids = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        prompts = [text[:seam] for text, seam in zip(texts, seams, strict=True)]
        alone = tokenizer(prompts, add_special_tokens=special, verbose=False)["input_ids"]
        starts = [
            next(
                (i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), min(len(whole), len(prompt))
            )
            for whole, prompt in zip(ids, alone, strict=True)
        ]
    return ids, [max(1, start) for start in starts]


def _with_end(tokenizer: Any, ids: list[int], start: int, chat: bool) -> list[int]:
    """A sequence whose last target ends the answer: the end of sequence, or what ends a turn of the chat template."""
    if chat:
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if (added | set(tokenizer.all_special_ids)).intersection(ids[start:]):
            return ids
        if tokenizer.eos_token_id is None:
            raise UserError(
                "task.chat_template: a turn of the assistant has no end in it, and the tokenizer has no "
                "end-of-sequence token; a model could not learn to stop. Let the template end it with a special token."
            )
    return _ended(ids, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def _joined(tokenizer: Any, prompt: str, answer: str, chat: bool, to_the_end: bool) -> tuple[str, int]:
    """Prompt and answer as one text, and the length of the prompt in it."""
    if not chat:
        space = "" if not prompt or prompt[-1].isspace() or answer[:1].isspace() else " "
        return prompt + space + answer, len(prompt)
    user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
    asked = _rendered(tokenizer, [user], add_generation_prompt=True)
    if not to_the_end:
        return asked + answer, len(asked)
    whole = _rendered(tokenizer, [user, assistant])
    if not whole.startswith(asked):
        raise UserError(
            "task.chat_template: the tokenizer's template changes the prompt once it is answered; "
            "write the prompt with task.templates instead."
        )
    return whole, len(asked)


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program, and may raise whatever it does
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"task.chat_template: the tokenizer's template fails on a message of the user with its answer ({reason}); "
            "write the prompt with task.templates instead."
        ) from error


def _ended(ids: list[int], end: list[int]) -> list[int]:
    return ids if not end or ids[-1:] == end else ids + end


def _without_beginning(ids: list[int], start: int, excess: int, begin: int | None) -> tuple[list[int], int]:
    """`ids` without `excess` tokens of the prompt, as far as it has them; a begin-of-sequence token, or one
    token to predict from, stays."""
    kept = 1 if ids[:1] == [begin] or start - excess < 1 else 0
    dropped = max(0, min(excess, start - kept))
    return ids[:kept] + ids[kept + dropped :], start - dropped
