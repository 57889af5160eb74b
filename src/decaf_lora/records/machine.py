"""Where did a run happen? Versions, hardware, commit and time."""

import os
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, hardware, commit and the time now: what a reader needs to judge the numbers.

    Never fails: what this machine cannot tell is None.
    """
    return {
        "decaf_lora": _attempt(lambda: metadata.version("decaf-lora")),
        "torch": _attempt(lambda: metadata.version("torch")),
        "transformers": _attempt(lambda: metadata.version("transformers")),
        "peft": _attempt(lambda: metadata.version("peft")),
        "numpy": _attempt(lambda: metadata.version("numpy")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _attempt(_processor) or platform.machine(),
        "cpu_count": os.cpu_count(),
        "device": _attempt(lambda: _device(device)) or device,
        "commit": _attempt(_commit),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _attempt(call: Callable[[], str | None]) -> str | None:
    """What `call` returns; None if this machine cannot tell."""
    try:
        return call()
    except (OSError, RuntimeError, ValueError, AssertionError, ImportError, subprocess.SubprocessError):
        return None


def _processor() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
    return names[0] if names else None


def _device(device: str) -> str:
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


def _commit() -> str | None:
    """The commit of this source, `-dirty` if it was edited since; None unless git tracks this very file."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    git("ls-files", "--error-unmatch", here.name)
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
