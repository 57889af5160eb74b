"""What is wrong with a file, told at once: so many lines, the first of them by number."""

from __future__ import annotations

from pathlib import Path

from decaf_lora.errors import UserError

SHOWN = 5


class Faults:
    """Faulty lines of one file."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.first: list[str] = []

    def __bool__(self) -> bool:
        return self.count > 0

    def add(self, line: int, what: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"line {line} ({what})")

    def refuse(self, what: str) -> None:
        """UserError if there were any."""
        if self.count:
            lines = "line has" if self.count == 1 else "lines have"
            more = f" and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
            raise UserError(
                f"task.data: {self.path}: {self.count} {lines} {what}: {', '.join(self.first)}{more}; mend or remove "
                "them."
            )
