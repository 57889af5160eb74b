"""`make faults`: kills a run at every write, with and without loss of power, resumes it and compares bits.

benchmarks/results_faults.json says what was killed where. A second call goes on with the record, unless the program
has changed since.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RECORD = ROOT / "benchmarks" / "results_faults.json"
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]

import crashes  # noqa: E402


def program() -> str:
    """A hash of the package and of what kills it."""
    digest = hashlib.sha256()
    for path in [*sorted((ROOT / "src").rglob("*.py")), HERE / "crashes.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write(record: dict) -> None:
    deaths = record["deaths"]
    counts = {"deaths": len(deaths), "not recovered from": sum(death["fault"] is not None for death in deaths)}
    (temporary := RECORD.with_suffix(".tmp")).write_text(json.dumps(record | {"counts": counts}, indent=1) + "\n")
    temporary.replace(RECORD)


def main() -> int:
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if record.get("program") != program():
        record = {"program": program(), "deaths": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        crashes.reference(folder / "whole")
        count = record["moments"] = crashes.moments(folder)
        for moment in range(1, count + 1):
            for power in (False, True):
                death = {"moment": moment, "power": "lost" if power else "kept"}
                if any(death.items() <= done.items() for done in record["deaths"]):
                    continue
                own = folder / f"{moment}-{power}"
                own.mkdir()
                fault, before = crashes.survives(own, folder / "whole", moment, power)
                record["deaths"].append(death | {"before": before, "fault": fault})
                write(record)
                if fault:
                    print(f"moment {moment} of {count}, power {death['power']}, {before}: {fault}", flush=True)
    faults = sum(death["fault"] is not None for death in record["deaths"])
    print(f"{len(record['deaths'])} deaths, {faults} of them not recovered from")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
