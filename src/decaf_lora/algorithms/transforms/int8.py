"""int8 messages with error feedback: a quarter of the bytes, and nothing is lost for good.

    x = what the rule sends (n, ...) ;   e = 0 at the start
    y = x + e ;   s = max |y| / 127  for each agent and tensor ;   q = round(y / s) ;   e <- y - s q
    sent: q (int8) and s (one number); every receiver, the sender itself included, reads s q

Error feedback: Seide, Fu, Droppo, Li and Yu, Interspeech 2014; Karimireddy, Rebjock, Stich and Jaggi, arXiv 1901.09847.
Rounding is to the nearest, half to even, so runs stay reproducible. What differs from those papers: the parameters
themselves are sent (and corrections, with tracking), not gradients.

- The sender reads itself as all others do. Pi is doubly stochastic, so a mean of plainly averaged tensors is kept with
  what is still to be sent: sum_i (x_i + e_i) does not change by an exchange. (Were its own share exact, every
  round's error would stay in the sum.) Through the same sum, tracking's corrections and their e add up to 0.
- e has the frame of the factors and is turned with them (`Algorithm.turn`).
- Vectors and numbers (biases, LoRA scales) are sent as they are.
- With several exchanges in a round codes are forwarded whole to everybody within reach, not averaged on the way:
  what is averaged would have to be rounded again in every hop. A `relay` would have to, too, and is refused.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from decaf_lora.adapters.adapter import Adapter, Tensors
from decaf_lora.adapters.names import leave, put, take
from decaf_lora.algorithms.contract import Algorithm, State, turned
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.errors import UserError

PREFIX = "int8/"
"""Of the names here: int8/NAME is a code in a message and e in the state, int8/NAME/scale is s."""


def quantized(algorithm: Algorithm) -> Algorithm:
    """`algorithm` with int8 messages and error feedback."""
    if algorithm.relay is not None:
        raise UserError(
            "algorithm.messages: int8 cannot be combined with algorithm.relay_rank, whose stacks are cut and would be "
            "rounded again at every exchange; leave relay_rank unset."
        )

    def init(adapter: Adapter) -> State:
        state = algorithm.init(adapter)
        sent = algorithm.message(adapter, state, 1)
        return state | put(PREFIX, {k: torch.zeros_like(t) for k, t in sent.items() if _is_coded(t)})

    def message(adapter: Adapter, state: State, round_: int) -> Tensors:
        return _code(algorithm.message(adapter, leave(PREFIX, state), round_), take(PREFIX, state))[0]

    def combine(adapter: Adapter, state: State, inbox: Inbox, round_: int) -> tuple[Adapter, State]:
        # A message is a function of adapter and state, which are still those of the sending.
        _, errors = _code(algorithm.message(adapter, leave(PREFIX, state), round_), take(PREFIX, state))
        inbox = _decode(inbox)
        new, inner = algorithm.combine(adapter, leave(PREFIX, state), inbox, round_)
        frames = algorithm.turn(adapter, inbox, new) if algorithm.turn is not None else {}
        return new, inner | put(PREFIX, turned(errors, frames))

    def steer(state: State, gradients: Tensors, round_: int) -> tuple[Tensors, State]:
        gradients, inner = algorithm.steer(leave(PREFIX, state), gradients, round_)
        return gradients, state | inner

    def moments(state: State, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
        return algorithm.moments(leave(PREFIX, state), first, second)

    paced = algorithm.paced
    return algorithm._replace(
        init=init,
        message=message,
        combine=combine,
        steer=steer,
        moments=moments,
        decode=lambda inbox: algorithm.decode(_decode(inbox)),
        stacks=algorithm.stacks | {PREFIX.rstrip("/")},
        paced=None if paced is None else lambda rounds: quantized(paced(rounds)),
    )


def _is_coded(tensor: Tensor) -> bool:
    return tensor.dim() > 2 and tensor.is_floating_point()


def _code(sent: Tensors, errors: Tensors) -> tuple[Tensors, Tensors]:
    """The message of codes and scales, and the errors that are left, by the names in `sent`."""
    coded, left = {}, {}
    for name, tensor in sent.items():
        if not _is_coded(tensor):
            coded[name] = tensor
            continue
        y = tensor + errors[name]
        # What is not finite makes the scale so, and with it the whole tensor: it is not hidden.
        scale = y.abs().flatten(1).amax(1) / 127
        code = (y / _along(scale.clamp_min(torch.finfo(y.dtype).tiny), y)).round().to(torch.int8)
        coded[PREFIX + name], coded[f"{PREFIX}{name}/scale"] = code, scale
        left[name] = y - code.to(y.dtype) * _along(scale, y)
    return coded, left


def _decode(inbox: Inbox) -> Inbox:
    tensors = leave(PREFIX, inbox.tensors)
    received = take(PREFIX, inbox.tensors)
    for name, code in received.items():
        if (scale := received.get(f"{name}/scale")) is not None:
            tensors[name] = code.to(scale.dtype) * _along(scale, code)
    return replace(inbox, tensors=tensors)


def _along(scale: Tensor, tensor: Tensor) -> Tensor:
    """(n,) to the shape that multiplies a tensor (n, ...)."""
    return scale.view(-1, *[1] * (tensor.dim() - 1))
