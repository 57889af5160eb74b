"""What do all sections of a configuration refuse? Fields that are not known, and numbers that nobody means."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Frozen(BaseModel):
    """Values that are checked once and never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values(cls, values: Any) -> Any:
        """Python counts with true as 1; nobody means that."""
        if isinstance(values, dict):
            for name, field in cls.model_fields.items():
                if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                    continue  # it checks itself
                may = any(word in str(field.annotation) for word in ("bool", "Any"))
                if not may and any(isinstance(v, bool) for v in _inside(values.get(name))):
                    raise ValueError(f"{name} must not be true or false; write a number, or a word in quotes")
        return values

    @model_validator(mode="after")
    def _no_absurd_numbers(self) -> Frozen:
        for name, field in type(self).model_fields.items():
            if "Any" in str(field.annotation):
                continue
            most = MOST_SEED if "seed" in name else MOST
            if any(isinstance(v, int) and abs(v) > most for v in _inside(getattr(self, name))):
                raise ValueError(f"{name} must be at most {most}")
        return self


MOST, MOST_SEED = 10**9, 2**63 - 1
"""No whole number of a configuration is larger: what cannot be meant is told before a library fails on it."""


def _inside(value: Any) -> list[Any]:
    """A value, or those that a list or mapping of them holds."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]
