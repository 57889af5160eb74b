"""Which extra brings a library that is not installed?

`pip install decaf-lora` brings what training from Python, a Trainer script and merging need. Tables of one's own,
reports, the demo and federations need more, and each extra brings it: `pip install 'decaf-lora[data,mesh]'`.
"""

from __future__ import annotations

import importlib.util

from decaf_lora.errors import UserError

LIBRARIES = {
    "data": ("datasets", "pyarrow", "pandas", "openpyxl"),
    "report": ("matplotlib", "scipy"),
    "demo": ("sklearn",),
    "privacy": ("opacus",),
    "mesh": ("grpc", "cryptography", "google"),
}
"""Extra -> names under which the libraries that it brings are imported."""


def need(extra: str, field: str) -> None:
    """Checks that the libraries of an extra are there, without importing them.

    Args:
        extra: a key of `LIBRARIES`.
        field: what needs them.

    Raises:
        UserError: one is missing.
    """
    for name in LIBRARIES[extra]:
        if importlib.util.find_spec(name) is None:
            raise lacking(name, extra, field)


def lacking(name: str, extra: str, field: str) -> UserError:
    """The line that says what to install."""
    return UserError(f"{field}: {name} is missing; pip install 'decaf-lora[{extra}]'.")


def missing(error: ImportError) -> UserError | None:
    """The line for an import that failed; None if no extra brings the library."""
    root = (error.name or "").partition(".")[0]
    for extra, names in LIBRARIES.items():
        if root in names:
            return lacking(root, extra, extra)
    return None
