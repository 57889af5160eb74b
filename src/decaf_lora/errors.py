"""How does a user's mistake become one clear line?

`UserError` is a `ValueError` whose message names the field and the remedy. The command line prints the message
without a traceback and exits with code 2. Any other exception is a bug and keeps its traceback.
"""

import difflib
import errno
import re
import sys
from collections.abc import Iterable, Sequence

_WINDOWS = sys.platform == "win32"


class UserError(ValueError):
    """A mistake in the input that the user can mend; the message says which field and how.

    The message is always one line, whatever names it quotes: white space becomes a single blank, and a character that
    cannot be printed becomes a question mark.
    """

    def __init__(self, message: object = "") -> None:
        line = " ".join(str(message).split())
        super().__init__("".join(c if c.isprintable() else "?" for c in line))

    quiet = False
    """Whether the command line prints nothing, because another process of the same run prints the message."""


class TrainingError(UserError):
    """Training has diverged: a loss or an adapter is not finite. The message names the agent and the round."""


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """At most `count` names of `known` that look most like `name`, best first, for "did you mean"."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)


def listed(names: Sequence[object], most: int = 5) -> str:
    """The first `most` names for a message, and how many more there are."""
    return ", ".join(str(n) for n in names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))


def unknown(field: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not one of `known`; its message lists all of `known` and suggests the nearest."""
    choices = sorted(known)
    hint = nearest(name, choices)
    guess = f" Did you mean {hint[0]!r}?" if hint else ""
    return UserError(f"{field}: {name!r} is not known.{guess} Choose one of: {', '.join(choices)}.")


def remedy(error: BaseException) -> str:
    """What a person can do where a file cannot be written: free space, or allow it."""
    forbidden = (errno.EACCES, errno.EPERM, errno.EROFS)
    return "make it writable" if getattr(error, "errno", None) in forbidden else "free space there"


def out_of_memory(error: BaseException) -> UserError | None:
    """The line for what numpy and torch raise where memory does not suffice; None for other errors."""
    text = str(error)
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    if not isinstance(error, MemoryError) and not any(sign in text.lower() for sign in signs):
        return None
    asked = re.search(r"(?:tried to|Tried to|Unable to) allocate ([\d.]+ ?\w+)", text)
    return UserError(
        f"memory: {f'{asked[1]} more' if asked else 'what comes next'} does not fit into it. Make lora.r, agents, "
        "training.batch_size, training.agents_per_pass or task.eval_batch_size smaller; `decaf plan` shows what each "
        "costs. The last checkpoint, if there is one, is kept."
    )


def unix_only(field: str, what: str) -> None:
    """Refuses, on Windows, what works on Linux and macOS alone.

    Args:
        field: what the user gave.
        what: what it stands for, as the subject of a sentence.
    """
    if _WINDOWS:
        raise UserError(
            f"{field}: {what} works on Linux and macOS; on Windows there is the simulation, `decaf run` and "
            "`decaf compare` in one process."
        )
