"""How does a folder belong to one run at a time? A lock that the system drops when its holder dies.

The lock is `flock` through filelock, on `.lock`. `.owner.json` beside it says who holds the lock, for the message to a
second run. Some file systems have no locks, or do not share them between machines: then `.owner.json` alone counts.
Whether a process on another machine still runs cannot be seen from here, so the user has to say it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from decaf_lora.errors import UserError

LOCK, OWNER = ".lock", ".owner.json"

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


_HERE: set[Path] = set()
"""Folders that runs of this process have locked."""


class FolderLock:
    """The right to write in `path`, from `acquire` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK, blocking=False, thread_local=False, fallback_to_soft=False)
        self._held = False

    def acquire(self, take_over: bool = False) -> None:
        """Takes the folder, which must exist.

        Args:
            take_over: the user says that the former owner, on another machine, is gone.

        Raises:
            UserError: another process has the folder, or may have it; names that process and its machine.
            OSError: the folder cannot be written.
        """
        locks = True
        try:
            self._lock.acquire()
        except Timeout:
            owner = self._owner()
            if not (take_over and owner and not _is_here(owner)):
                raise self._in_use(owner) from None
            (self.path / LOCK).unlink(missing_ok=True)  # a server may keep the lock of a machine that is gone
            self._lock.acquire()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            locks = False
        try:
            self._claim(locks, take_over)
        except BaseException:
            self._lock.release()
            raise
        self._held = True
        _HERE.add(self.path.resolve())

    def release(self) -> None:
        """Gives the folder back, and removes `.lock` and `.owner.json`."""
        if not self._held:
            return
        self._held = False
        _HERE.discard(self.path.resolve())
        with contextlib.suppress(OSError):
            (self.path / OWNER).unlink(missing_ok=True)
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink(missing_ok=True)  # whoever opened it before sees that its name is gone
            self._lock.release()

    def _claim(self, locks: bool, take_over: bool) -> None:
        """Writes `.owner.json`; UserError if the owner that it names may still run."""
        owner = self._owner()
        if self.path.resolve() in _HERE or (owner is not None and not take_over and not _is_gone(owner, locks)):
            raise self._in_use(owner)
        path = self.path / OWNER
        if locks:  # of owners that died while they wrote it
            for stale in self.path.glob(f"{OWNER}.*.tmp"):
                stale.unlink(missing_ok=True)
        aside = path.with_name(f"{OWNER}.{os.getpid()}.tmp")
        aside.write_text(json.dumps(_me()), encoding="utf-8")
        try:
            if owner is None and not locks:
                try:
                    os.link(aside, path)  # exclusive: the second to come fails
                except FileExistsError:
                    raise self._in_use(self._owner()) from None
                except OSError:  # nor do hard links work here
                    os.replace(aside, path)
            else:
                os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    def _owner(self) -> dict[str, Any] | None:
        """Who has the folder, or had it and did not give it back; None: nobody; {}: `.owner.json` cannot be read."""
        try:
            owner = json.loads((self.path / OWNER).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _in_use(self, owner: dict[str, Any] | None) -> UserError:
        if not owner:
            return UserError(
                f"out: {self.path} is in use by another process; wait for it, or choose another --out. If it is gone, "
                "go on with --take-over."
            )
        who = f"process {owner.get('pid')} on {owner.get('host')}"
        since = f" since {owner['started']}" if "started" in owner else ""
        if owner.get("host") == socket.gethostname() and owner.get("pid") == os.getpid():
            return UserError(f"out: {self.path} is in use by a run of this very process; close that run first.")
        if _is_here(owner):
            return UserError(
                f"out: {self.path} is in use by {who}{since}; wait for it or stop it, or choose another --out."
            )
        return UserError(
            f"out: {self.path} is in use by {who}{since}, and {socket.gethostname()} cannot see whether that still "
            "runs. If it does not, go on with --take-over; else choose another --out."
        )


def _me() -> dict[str, Any]:
    """Who this process is."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "launch": _launch(),
    }


def _launch() -> dict[str, int]:
    """Launcher -> how often it has restarted this run. It restarts a run only once the former processes are gone."""
    found = {}
    for name, restarts in (
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
        ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    ):
        count = os.environ.get(restarts, "0")
        if name in os.environ and count.isdigit():
            found[f"{name}={os.environ[name]}"] = int(count)
    return found


def _is_here(owner: dict[str, Any]) -> bool:
    return owner.get("host") == socket.gethostname()


def _is_gone(owner: dict[str, Any], locks: bool) -> bool:
    """Whether the owner that a folder names has ended for sure; with `locks` this process holds the lock already."""
    before = owner.get("launch")
    if isinstance(before, dict) and any(before.get(name, count) < count for name, count in _launch().items()):
        return True
    if not owner:  # nobody knows who it was
        return locks
    if not _is_here(owner):
        return False
    return locks or not _runs(owner.get("pid"))


def _runs(pid: Any) -> bool:
    """Whether another process of this machine has this number."""
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
