"""Tasks that go wrong in one rank."""

import os
import signal
import time

from toy import Toy


class Doomed(Toy):
    """Rank 1 kills itself, by SIGKILL, in step 2 of round 4, in its first life."""

    signal, batches = signal.SIGKILL, 0

    def train_batch(self, indices):
        self.batches += len(indices) > 2  # the two examples that show whether agents stay apart are no step
        rank, lives = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # Three steps a round, of each of this rank's share of four agents.
        agents = 4 // int(os.environ.get("WORLD_SIZE", 4))
        if (rank, lives, self.batches) == ("1", "0", (3 * 3 + 1) * agents + 1):
            os.kill(os.getpid(), self.signal)
        return super().train_batch(indices)


class Terminated(Doomed):
    """The same with the signal that asks."""

    signal = signal.SIGTERM


class DoomedInFlight(Toy):
    """The same in its second evaluation, in round 5: under combine-adapt with an exchange under way."""

    evaluations = 0

    def test_batch(self, indices):
        self.evaluations += 1
        rank, lives = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if (rank, lives, self.evaluations) == ("1", "0", 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().test_batch(indices)


class Silent(Toy):
    """Rank 1 falls silent in its second step."""

    def train_batch(self, indices):
        self.steps = getattr(self, "steps", 0) + 1
        if os.environ.get("RANK") == "1" and self.steps == 3:
            time.sleep(16)
        return super().train_batch(indices)


def other_data() -> Toy:
    """Every rank reads its own examples."""
    return Toy(seed=int(os.environ["RANK"]))


class Stopped(Doomed):
    """Rank 0, which keeps the store, is stopped for good in its second round."""

    def train_batch(self, indices):
        self.batches += 1
        if os.environ.get("RANK") == "0" and self.batches == 8:
            os.kill(os.getpid(), signal.SIGSTOP)
        return Toy.train_batch(self, indices)
