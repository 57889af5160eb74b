"""What do all sections of a configuration refuse? Fields that are not known, and numbers that nobody means."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Frozen(BaseModel):
    """A section of the configuration: checked once when made, unchangeable afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values(cls, values: Any) -> Any:
        """Refuses true and false where a number is expected: Python would read true as 1, and nobody means that."""
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
"""The largest whole number of a field, and of a seed. A larger one cannot be meant, and a library would fail on it."""


def _inside(value: Any) -> list[Any]:
    """The values of a list or mapping, or the one value itself."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]
