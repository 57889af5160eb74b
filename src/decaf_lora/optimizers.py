"""How does one optimizer step many agents at once?

The trained tensors of n agents are the rows of one flat matrix (n, P). So a step is a dozen operations, however many
layers and agents there are. Every row is an optimizer of its own, with its own moments and step count. Rows that have
finished their local steps stand still.

    AdamW (Loshchilov & Hutter, arXiv 1711.05101)         SGD with momentum
    m <- b1 m + (1 - b1) g                                g <- g + wd x
    v <- b2 v + (1 - b2) g^2                              m <- mu m + g
    x <- x - lr wd x                                      x <- x - lr m
    x <- x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decaf_lora.config import TrainingConfig
from decaf_lora.precision import double


@dataclass
class Moments:
    """Optimizer state of one group of tensors: first and second moment (n, P), steps taken (n,) int64."""

    first: Tensor
    second: Tensor
    steps: Tensor = field(default_factory=lambda: torch.empty(0))

    @staticmethod
    def zeros(x: Tensor, config: TrainingConfig) -> Moments:
        """Fresh moments for x (n, P). SGD needs no second moment and has an empty one, (n, 0)."""
        second = torch.zeros_like(x) if config.optimizer == "adamw" else x.new_zeros((x.shape[0], 0))
        return Moments(torch.zeros_like(x), second, torch.zeros(x.shape[0], dtype=torch.long, device=x.device))


def step(
    x: Tensor,
    gradient: Tensor,
    moments: Moments,
    config: TrainingConfig,
    learning_rate: float | Tensor,
    active: Tensor,
) -> None:
    """One optimizer step, in place.

    Args:
        x: (n, P), the trained tensors.
        gradient: (n, P)
        moments: of x; changed in place.
        config: which optimizer, and its constants.
        learning_rate: one for all rows, or (n, 1) in float64, one for each.
        active: (n,) bool; the other rows stand still.
    """
    if not bool(active.all()):
        rows = active.nonzero(as_tuple=True)[0]
        some = Moments(moments.first[rows], moments.second[rows], moments.steps[rows])
        values = x[rows]
        rates = learning_rate[rows] if isinstance(learning_rate, Tensor) else learning_rate
        step(values, gradient[rows], some, config, rates, torch.ones_like(rows, dtype=torch.bool))
        x[rows], moments.first[rows], moments.second[rows], moments.steps[rows] = (
            values,
            some.first,
            some.second,
            some.steps,
        )
        return
    moments.steps += 1
    # In the dtype of x, so that a tensor of rates gives the same results as a number.
    rate = learning_rate.to(x) if isinstance(learning_rate, Tensor) else learning_rate
    if config.optimizer == "sgd":
        if config.weight_decay:
            gradient = gradient + config.weight_decay * x
        moments.first.mul_(config.momentum).add_(gradient)
        x.sub_(moments.first * rate)
        return
    beta1, beta2 = config.betas
    moments.first.lerp_(gradient, 1 - beta1)
    moments.second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    count = double(moments.steps)[:, None]
    correction1 = (1 - beta1**count).to(x)
    correction2 = (1 - beta2**count).sqrt().to(x)
    kept = 1 - learning_rate * config.weight_decay
    x.mul_(kept.to(x) if isinstance(kept, Tensor) else kept)
    x.sub_(moments.first / (correction1 / rate) / (moments.second.sqrt() / correction2 + config.eps))


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """The learning rate at `progress` of the whole run, in [0, 1]: linear warm-up, then the schedule."""
    if progress < config.warmup:
        return config.peak * progress / config.warmup
    t = (progress - config.warmup) / (1 - config.warmup)
    peak, final = config.peak, config.final_learning_rate
    if config.schedule == "linear":
        return final + (peak - final) * (1 - t)
    if config.schedule == "cosine":
        return final + (peak - final) * (1 + math.cos(math.pi * t)) / 2
    return peak


def clip_(gradients: list[Tensor], max_norm: float) -> None:
    """Clips, in place, every agent's gradient to a Euclidean norm of at most `max_norm`.

    Args:
        gradients: matrices (n, P_k); row i of all of them together is the gradient of agent i.
        max_norm: above 0.
    """
    norms = torch.sqrt(sum((g.square().sum(1) for g in gradients), torch.zeros_like(gradients[0][:, 0])))
    factor = (max_norm / (norms + 1e-6)).clamp_max(1.0)
    for g in gradients:
        g.mul_(factor[:, None])
