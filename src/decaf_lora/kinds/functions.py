"""Which function does `file.py:function` or `module:function` name, and what do installed packages add?"""

import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from decaf_lora.errors import UserError, nearest

Function = Callable[..., Any]

_OWN = re.compile(r"(?P<source>.+\.py|[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)(:(?P<argument>.*))?")


def own_function(spec: str, field: str) -> tuple[Function, str, str] | None:
    """Loads the function that `file.py:function` or `module:function` names.

    Args:
        spec: the name, perhaps with options after a second colon.
        field: what errors name: "graph".

    Returns:
        The function, its name `source:function`, and the text after the second colon ("" without one). None if `spec`
        names no function: it has another form, or there is no such module.

    Raises:
        UserError: the file is missing, cannot be loaded, or has no such function.
    """
    match = _OWN.fullmatch(spec.strip())
    if match is None:
        return None
    source, name = match["source"], match["function"]
    module = _file(Path(source).expanduser(), field) if source.endswith(".py") else _module(source, field)
    if module is None:
        return None
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        close = nearest(name, known)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{field}: {source} has no function {name!r}.{hint}")
    return function, f"{source}:{name}", (match["argument"] or "").strip()


_files: dict[tuple[Path, int, int], ModuleType] = {}
"""(path, time of change, size) -> module. Each file runs once: a task and an algorithm may share its module."""


def _file(path: Path, field: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"{field}: {path} does not exist.")
    key = (path, path.stat().st_mtime_ns, path.stat().st_size)
    if key in _files:
        return _files[key]
    # Pickle finds a class by the name of its module. A file named like a library must not replace that library.
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{abs(hash(key))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{field}: {path} cannot be loaded ({_where(error, path)}{first_line(error)}).") from error
    _files[key] = module
    return module


def _module(name: str, field: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise UserError(f"{field}: cannot import {name} ({error}).") from error
    except Exception as error:
        raise UserError(f"{field}: {name} cannot be loaded ({first_line(error)}).") from error


def _where(error: Exception, path: Path) -> str:
    """The line of the user's file at which loading stopped, as "line 3: "; "" if it is not known."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: "
    lines, trace = [], error.__traceback__
    while trace is not None:
        lines += [trace.tb_lineno] if trace.tb_frame.f_code.co_filename == str(path) else []
        trace = trace.tb_next
    return f"line {lines[-1]}: " if lines else ""


def first_line(error: BaseException) -> str:
    """Type and first line of an error of somebody else's code, to quote in a UserError."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"


def joined(spec: str, given: Mapping[str, Any], field: str) -> str:
    """The name `spec` with options after its last colon: `mine.py:two_rings:bridges=3`.

    Args:
        spec: the name, which may have options already.
        given: the options to add, by name.
        field: what errors name: "graph".

    Raises:
        UserError: an option is a list, or a text with a comma: neither fits into a name.
    """
    parts = []
    for key, value in given.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if not isinstance(value, str | int | float) or "," in text:
            raise UserError(f"{field}.{key}: {value!r} is more than one number or word; give the function a default.")
        parts.append(f"{key}={text}")
    own = _OWN.fullmatch(spec.strip())
    begun = bool(own["argument"]) if own else ":" in spec
    return f"{spec}{',' if begun else ':'}{','.join(parts)}" if parts else spec


# Installed packages


@functools.cache
def installed(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group in all installed packages."""
    return tuple(entry_points(group=group))


def package_of(entry: EntryPoint) -> str:
    """The package that an entry point belongs to."""
    return entry.dist.name if entry.dist is not None else entry.module
