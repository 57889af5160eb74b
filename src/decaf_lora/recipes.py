"""Which runs are ready to use? Recipes: functions that return a full configuration for `decaf compare`.

`decaf run RECIPE` takes the base run of the same recipe.
"""

from __future__ import annotations

from collections.abc import Callable

from decaf_lora.config import AlgorithmConfig, CompareConfig, LoraOptions, TaskConfig, TrainingConfig
from decaf_lora.errors import unknown


def digits() -> CompareConfig:
    """A tiny CLIP meets turned, inverted handwritten digits; 10 agents on a ring, Dirichlet(0.1)."""
    return CompareConfig(
        task=TaskConfig(name="digits"),
        lora=LoraOptions(r=2, lora_alpha=2),
        algorithm=AlgorithmConfig(name="decaf"),
        training=TrainingConfig(steps=5, batch_size=16, learning_rate=0.02, schedule="cosine"),
        # Each method at its own best of the study (docs/study-decaf.md), where that is not 0.02.
        learning_rates={"local": 0.02, "dlora_fa": 0.16, "fedavg": 0.04},
        agents=10,
        graph="ring",
        partition="dirichlet:0.1",
        rounds=30,
        evaluate_every=5,
        checkpoint_every=10,
    )


RECIPES: dict[str, Callable[[], CompareConfig]] = {"digits": digits}


def get(name: str) -> CompareConfig:
    """The recipe called `name`; UserError suggests the nearest."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()


def describe() -> dict[str, str]:
    """Recipe name -> the first line of what it says about itself."""
    return {name: (recipe.__doc__ or "").splitlines()[0] for name, recipe in RECIPES.items()}
