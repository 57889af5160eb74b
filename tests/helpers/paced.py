"""Tasks for agents that are slow, or are held: `Digits` and `Toy` whose local steps take as long as a test says.

PACE makes the steps of a process so many times slower. While the file HOLD exists, no step begins. Both are variables
of the environment, so that agents of one federation, which share the task, may differ.
"""

import os
import time
from pathlib import Path

from decaf_lora import tasks
from toy import Toy


def paced(task):
    """`task`, held and slowed down where it makes the batch of a step."""
    batch, pace, hold = task.train_batch, float(os.environ.get("PACE", "1")), os.environ.get("HOLD")
    since = time.thread_time()

    def train_batch(indices):
        nonlocal since
        time.sleep((pace - 1) * (time.thread_time() - since))  # of the work since the last step, the exchange included
        while hold and Path(hold).exists():
            time.sleep(0.01)
        since = time.thread_time()
        return batch(indices)

    task.train_batch = train_batch
    return task


def make_digits():
    """The demo's task."""
    return paced(tasks.digits())


def make_toy():
    """The toy of the tests."""
    return paced(Toy())
