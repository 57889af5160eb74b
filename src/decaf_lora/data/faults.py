"""What is wrong with a file? All faulty lines are told in one error: their count, and the first ones by number."""

from __future__ import annotations

from pathlib import Path

from decaf_lora.errors import UserError

SHOWN, KEPT = 5, 1000


class Faults:
    """Collects the faulty lines of one file; true if there are any."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._known: list[tuple[int, str]] = []

    def __bool__(self) -> bool:
        return self.count > 0

    def add(self, line: int, what: str) -> None:
        """Notes that line number `line` is faulty; `what` is what it holds instead."""
        self.count += 1
        if len(self._known) < KEPT:
            self._known.append((line, what))

    def refuse(self, what: str) -> None:
        """Raises UserError if any line is faulty; `what` is what such lines have in common, or lack."""
        if self.count:
            lines = "line has" if self.count == 1 else "lines have"
            first = ", ".join(f"line {line} ({what})" for line, what in sorted(self._known)[:SHOWN])
            more = f" and {self.count - SHOWN} more" if self.count > SHOWN else ""
            raise UserError(f"task.data: {self.path}: {self.count} {lines} {what}: {first}{more}; mend or remove them.")
