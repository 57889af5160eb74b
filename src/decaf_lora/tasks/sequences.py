"""Which tokens does a causal language model read, and from where on must it predict them?

Prompt and answer are tokenized as one text, as they are met in use; a token that reaches over the seam belongs
to the answer. Sequences are padded on the right, where a causal model sees nothing of it.
"""

from __future__ import annotations

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
