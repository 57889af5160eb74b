"""int8 messages with error feedback: a quarter of the bytes, and nothing is lost for good.

    x = what the rule sends (n, ...) ;   e = 0 at the start
    y = x + e ;   s = max |y| / 127  for each agent and tensor ;   q = round(y / s) ;   e <- y - s q
    sent: q (int8) and s (one number); every receiver, the sender itself included, reads s q

Error feedback: Seide, Fu, Droppo, Li and Yu, Interspeech 2014; Karimireddy, Rebjock, Stich and Jaggi, arXiv 1901.09847.
Rounding is to the nearest, half to even, so runs stay reproducible. What differs from those papers: the parameters
themselves are sent (and corrections, with tracking), not gradients.

- The sender reads its own message rounded, as all others do. Pi is doubly stochastic, so for plainly averaged tensors
  an exchange does not change sum_i (x_i + e_i): no part of the mean is lost. (If an agent read itself exactly, the
  error of every round would stay in the sum.) For the same reason tracking's corrections and their e add up to 0.
- e has the frame of the factors and is turned with them (`Rule.turn`).
- Vectors and numbers (biases, LoRA scales) are sent as they are.
- With several exchanges in a round, codes are forwarded whole to everybody within reach. Averages on the way would have
  to be rounded again at every hop. So would the stacks of a `relay`, which is refused for that reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors, leave, take
from decaf_lora.algorithms.contract import Change, Round, Rule, Setting, Transform, turned
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.algorithms.transforms.kind import TransformKind
from decaf_lora.errors import UserError, unknown

PREFIX = "int8/"
"""Prefix of names in a message: int8/code/NAME is q, int8/scale/NAME is s. The state holds e by NAME."""


def int8() -> Transform:
    """int8 messages with error feedback. Raises UserError over a rule that relays."""

    def check(rule: Rule) -> None:
        if rule.relay is not None:
            raise UserError(
                "algorithm.messages: int8 cannot be combined with algorithm.relay_rank, whose stacks are cut and would "
                "be rounded again at every exchange; leave relay_rank unset."
            )

    def init(adapter: Adapter, trained: Tensors, message: Tensors, setting: Setting) -> Tensors:
        return {name: torch.zeros_like(t) for name, t in message.items() if _is_coded(t)}

    def send(adapter: Adapter, state: Tensors, message: Tensors, round_: Round) -> tuple[Tensors, Tensors]:
        coded: Tensors = {}
        left: Tensors = {}
        for name, tensor in message.items():
            if _is_coded(tensor):
                code, scale, left[name] = _code(tensor + state[name] if name in state else tensor)
                coded[f"{PREFIX}code/{name}"], coded[f"{PREFIX}scale/{name}"] = code, scale
            else:
                coded[name] = tensor
        return coded, state | left

    def receive(adapter: Adapter, state: Tensors, inbox: Inbox, round_: Round) -> tuple[Inbox, Tensors]:
        codes, scales = take(f"{PREFIX}code/", inbox.tensors), take(f"{PREFIX}scale/", inbox.tensors)
        read = {name: code.to(scales[name].dtype) * _along(scales[name], code) for name, code in codes.items()}
        return replace(inbox, tensors=leave(PREFIX, inbox.tensors) | read), state

    def after(state: Tensors, change: Change, round_: Round) -> Tensors:
        return turned(state, change.frames)

    return Transform(
        "int8", init, send=send, receive=receive, after=after, check=check, stacks=frozenset({PREFIX.rstrip("/")})
    )


def _is_coded(tensor: Tensor) -> bool:
    return tensor.dim() > 2 and tensor.is_floating_point()


def _code(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes q (n, ...) of y, the scales s (n,), and the error y - s q (n, ...)."""
    # A number that is not finite makes the scale not finite, and with it the whole tensor: rounding never hides it.
    scale = y.abs().flatten(1).amax(1) / 127
    code = (y / _along(scale.clamp_min(torch.finfo(y.dtype).tiny), y)).round().to(torch.int8)
    return code, scale, y - code.to(y.dtype) * _along(scale, y)


def _along(scale: Tensor, tensor: Tensor) -> Tensor:
    """`scale` (n,) in the shape that broadcasts with `tensor` (n, ...)."""
    return scale.view(-1, *[1] * (tensor.dim() - 1))


def _asked(messages: Literal["full", "int8"] = "full") -> Transform | None:
    if messages not in ("full", "int8"):
        raise unknown("algorithm.messages", messages, ("full", "int8"))
    return int8() if messages == "int8" else None


# Next to the network, so that the tensors that other transforms add to a message are coded, too.
KINDS = {"int8": TransformKind(int8, "messages as int8 with error feedback", place=90, asked=_asked)}
