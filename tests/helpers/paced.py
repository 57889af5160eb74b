"""The demo's task with the brake of held.py, for agents some of which are slow.

With PACE=5 in its environment a process takes 5 times as long for each step.
"""

import os
import time

import held
from decaf_lora import tasks


def make_digits():
    task = tasks.digits()
    batch, pace, since = task.train_batch, float(os.environ.get("PACE", "1")), time.thread_time()

    def train_batch(indices):
        nonlocal since
        time.sleep((pace - 1) * (time.thread_time() - since))  # of the work since the last step, the exchange included
        held.step(indices)
        since = time.thread_time()
        return batch(indices)

    task.train_batch = train_batch
    return task
