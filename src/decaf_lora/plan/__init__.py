"""What will this run cost? Memory, bytes and arithmetic, before any weight or image is loaded.

`estimate` builds the run that a configuration describes, with a model made from its config.json alone, and takes
one round of it (local step, exchange, evaluation) through `dry_run.py`: the code that will run is the code that is
measured, on tensors without memory. Sizes are bytes of tensors, in this process; what Python, libraries and a GPU's
own context take comes on top.
"""

from decaf_lora.plan.assumed import DATASETS, NAME_TOKENS, planned_task
from decaf_lora.plan.costs import DataSizes, Part, Plan
from decaf_lora.plan.planner import estimate, measured, timed_step, with_a_rate
from decaf_lora.plan.shapes import ARCHITECTURES, FourBit, shapes_of
from decaf_lora.plan.shown import shown

__all__ = [
    "ARCHITECTURES",
    "DATASETS",
    "NAME_TOKENS",
    "DataSizes",
    "FourBit",
    "Part",
    "Plan",
    "estimate",
    "measured",
    "planned_task",
    "shapes_of",
    "shown",
    "timed_step",
    "with_a_rate",
]
