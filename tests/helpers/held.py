"""The toy task with a brake, for tests that must do something while a process trains, however fast the machine is.

While the file that $BRAKE names exists, no step after the N-th of the process begins; N is what the file holds. The
file beside it, with `.held` for `.brake`, says that the brake holds, and after how many steps.
"""

import math
import os
import time
from pathlib import Path

from toy import Toy

_taken = 0


def step(indices):
    """A step of training on these examples begins, unless the brake holds it."""
    global _taken
    if len(indices) == 2:  # the check before the run, which is no step
        return
    brake = Path(os.environ.get("BRAKE", "/nowhere/at/all"))
    while _taken >= _most(brake):
        beside = brake.with_suffix(".now")
        beside.write_text(str(_taken))
        beside.rename(brake.with_suffix(".held"))
        time.sleep(0.02)
    _taken += 1


def _most(brake):
    """Steps that the process may take."""
    try:
        return int(brake.read_text())
    except FileNotFoundError:
        return math.inf


class Held(Toy):
    def train_batch(self, indices):
        step(indices)
        return super().train_batch(indices)


def make_held() -> Toy:
    return Held()
