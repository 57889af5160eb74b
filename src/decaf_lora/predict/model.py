"""What does a saved model say of examples? The task is made again, the adapter put in place, and each example asked."""

from __future__ import annotations

import re
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from torch import Tensor

from decaf_lora import tasks
from decaf_lora.adapters import attach, load_peft
from decaf_lora.adapters.saved import read_config
from decaf_lora.config import TaskConfig
from decaf_lora.data.examples import given
from decaf_lora.errors import UserError
from decaf_lora.predict.described import Described
from decaf_lora.predict.rows import ROW, Rows, as_examples
from decaf_lora.runs.build import device_of


class Said(NamedTuple):
    """What the model says of n examples."""

    predicted: list[str]
    """(n,) the class of each, or the answer that the model writes."""
    probabilities: NDArray[np.float64]
    """(n,) of what is predicted. Scored answers: the softmax of their scores. Written ones: the geometric mean of the
    tokens' probabilities."""
    logits: Tensor | None
    """(n, C), float64; None without classes."""
    likelihood: float | None = None
    """Log-likelihood per token of the answers that the data give, the score of instruction tuning."""


def ask(described: Described, config: TaskConfig, rows: Rows, device: str, most_tokens: int) -> Said:
    """Asks the model.

    Args:
        described: the model.
        config: `Described.config`.
        rows: the examples.
        device: to compute on, as in a run's configuration.
        most_tokens: length of a written answer, at most.

    Raises:
        UserError: the model or the adapter cannot be loaded, or the adapter does not fit the model.
    """
    with given(as_examples(rows, config.classes)):
        task: Any = tasks.make(config)
    _tell_other_revision(described, task.model)
    task.model.to(device_of(device))
    order = np.array(task.tables["test"][ROW][:], np.int64)  # `order[i]` is the row of the task's example i
    model = _Model(described, task)
    place = {row: i for i, row in enumerate(rows.table[ROW][:])}
    back = np.array([place[row] for row in order], np.int64)
    if described.use == "instruction":
        likelihood = model.likelihood(config.eval_batch_size) if rows.answers else None
        answers, probabilities = model.write(rows.shown, config, most_tokens)
        return Said(answers, probabilities, None, likelihood)
    found = model.logits(config.eval_batch_size)
    logits = torch.empty_like(found)
    logits[torch.from_numpy(back)] = found
    best = logits.argmax(-1)
    probabilities = logits.softmax(-1).gather(1, best[:, None])[:, 0].numpy()
    return Said([task.classes[i] for i in best.tolist()], probabilities, logits)


class _Model:
    """A task's model with the adapter in place."""

    def __init__(self, described: Described, task: Any) -> None:
        self.task, self.use = task, described.use
        self.attached: Any = None
        if not described.is_adapter:
            task.model.requires_grad_(False).eval()
            return
        try:
            saved = read_config(described.directory, "model")
            self.attached = attach(task.model, LoraConfig.from_peft_type(**saved))
            task.on_attach([*self.attached.sites, *self.attached.modules])
            start = self.attached.init([0], 0, True)
            self.adapter = load_peft(self.attached, start, [described.directory], [0])
        except UserError as error:
            raise UserError(re.sub("^init_adapters:", "model:", str(error))) from error

    @torch.no_grad()
    def _with(self, function: Any, *arguments: Any) -> Any:
        if self.attached is None:
            return function(*arguments)
        with self.attached.bind(self.adapter):
            return function(*arguments)

    def _batches(self, size: int) -> Any:
        device = next(self.task.model.parameters()).device
        for start in range(0, self.task.num_test, size):
            indices = np.arange(start, min(start + size, self.task.num_test))
            yield {k: t.to(device) for k, t in self.task.test_batch(indices).items()}

    def logits(self, size: int) -> Tensor:
        """(n, C) float64, in the task's order."""
        functions = {
            "sequence-classification": lambda batch: self.task.logits(batch),
            "image-text": lambda batch: self.task.logits(batch["pixel_values"], 1),
            "answers": lambda batch: self.task.class_scores(batch),
        }
        found = [self._with(functions[self.use], batch).double().cpu() for batch in self._batches(size)]
        return torch.cat(found)

    def likelihood(self, size: int) -> float:
        """Log-likelihood per token of the given answers."""
        sums = sum(self._with(self.task.statistics, batch, 1).double().cpu() for batch in self._batches(size))
        return float(self.task.score(sums)[0])

    def write(self, prompts: list[str], config: TaskConfig, most_tokens: int) -> tuple[list[str], NDArray[np.float64]]:
        """The likeliest answer to each prompt, token by token, and the geometric mean of its tokens' probabilities."""
        from decaf_lora.tasks.pretrained import pretrained_tokenizer

        tokenizer, limit = pretrained_tokenizer(config), config.max_length or most_tokens
        device = next(self.task.model.parameters()).device
        ends = {tokenizer.eos_token_id} | {
            i for i, token in tokenizer.added_tokens_decoder.items() if config.chat_template and token.special
        }
        answers, probabilities = [], []
        for prompt in prompts:
            ids = _prompt(tokenizer, prompt, config.chat_template)[-max(1, limit - most_tokens) :]
            made: list[int] = []
            logs: list[float] = []
            state: Any = None
            read = torch.tensor([ids], device=device)
            while len(made) < most_tokens:
                out = self._with(lambda read=read, state=state: self._step(read, state))
                log = out.logits[0, -1].double().log_softmax(-1)
                token = int(log.argmax())
                logs.append(float(log[token]))
                if token in ends:
                    break
                made.append(token)
                state, read = out.past_key_values, torch.tensor([[token]], device=device)
            answers.append(tokenizer.decode(made, skip_special_tokens=True).strip())
            probabilities.append(float(np.exp(np.mean(logs))))
        return answers, np.array(probabilities)

    def _step(self, read: Tensor, state: Any) -> Any:
        return self.task.model(input_ids=read, past_key_values=state, use_cache=True)


def _prompt(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """The tokens of a prompt to be answered, as training puts them before an answer."""
    if chat:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _tell_other_revision(described: Described, model: Any) -> None:
    """Warns where the base on this machine is another revision than the one that the adapter was made for."""
    theirs, ours = described.task.get("revision"), getattr(getattr(model, "config", None), "_commit_hash", None)
    if theirs and ours and theirs != ours:
        warnings.warn(
            f"model: the adapter was made for revision {theirs[:12]} of {described.task['model']}, here is "
            f"{ours[:12]}; what it predicts may differ.",
            stacklevel=2,
        )
