"""What was measured, and where? Hardware, versions, commit; memory and waiting on CPU and GPU."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
"""The interpreter with Flower and PEFT that `make bench` installs."""
DATA = Path(os.environ.get("DECAF_DATA", ROOT.parent / "shared" / "data"))
"""Where banking77 may be."""


def commit() -> str:
    """The commit of the sources; with a hash of what was edited since, if anything was. Results do not count."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout

    sources = ["src", "benchmarks/suite", "benchmarks/torchrun.py", "constraints.txt"]
    edited = git("diff", "HEAD", "--", *sources) + git("status", "--porcelain", "--", *sources)
    found = git("rev-parse", "HEAD").strip() or "unknown"
    return f"{found}-dirty-{hashlib.sha256(edited.encode()).hexdigest()[:8]}" if edited else found


def facts(device: str) -> dict[str, Any]:
    """Hardware and versions, those of the peers too; for a process that has torch."""
    import torch

    from decaf_lora.records.machine import environment

    found = environment(device)
    found |= {"commit": commit(), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2)}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found["memory"] = round(memory / 2**30, 1)
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def peers() -> dict[str, str]:
    """Versions in the peers' environment; {} without one."""
    if not PEERS.exists():
        return {}
    names = ["flwr", "ray", "peft", "transformers", "torch"]
    code = f"import json; from importlib.metadata import version as v; print(json.dumps({{n: v(n) for n in {names}}}))"
    return json.loads(subprocess.run([PEERS, "-c", code], check=True, capture_output=True, text=True).stdout)


def waiting(device: str) -> Callable[[], object]:
    """A function that returns once the device has done all work."""
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    return torch.cuda.synchronize


def available(device: str) -> int:
    """Bytes of memory that are free on the device."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 8 * 2**30)


def peak_memory(device: str) -> int:
    """The most bytes in use so far: of tensors on a GPU, resident of this process otherwise."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
