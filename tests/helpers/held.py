"""The toy task with a brake, for tests that must do something while a process trains, however fast the machine is.

While the file that $BRAKE names exists, no step after the N-th of the process begins; N is what the file holds. The
file beside it, with `.held` for `.brake`, says that the brake holds.
"""

import os
import time
from pathlib import Path

from toy import Toy


class Held(Toy):
    taken = 0

    def losses(self, batch, agents):
        brake = Path(os.environ.get("BRAKE", "/nowhere/at/all"))
        while brake.exists() and Held.taken >= int(brake.read_text()):
            brake.with_suffix(".held").touch()
            time.sleep(0.02)
        Held.taken += 1
        return super().losses(batch, agents)


def make_held() -> Toy:
    return Held()
