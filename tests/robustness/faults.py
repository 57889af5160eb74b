"""`make faults`: kills a run at every write, with and without loss of power, resumes it and compares bits."""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "helpers")]

import crashes  # noqa: E402


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        crashes.reference(folder / "whole")
        count, faults = crashes.moments(folder), 0
        for moment in range(1, count + 1):
            for power in (False, True):
                own = folder / f"{moment}-{power}"
                own.mkdir()
                fault = crashes.survives(own, folder / "whole", moment, power)
                faults += fault is not None
                if fault:
                    print(f"moment {moment} of {count}, power {'lost' if power else 'kept'}: {fault}", flush=True)
        print(f"{2 * count} deaths, {faults} of them not recovered from")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
