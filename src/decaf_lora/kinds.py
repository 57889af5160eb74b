"""Which graph, partition, algorithm or task does a name mean?

Each of these rooms has one `Table` of kinds. A name is read as
a kind of the table (`ring`), with an argument after a colon where the kind takes one (`erdos-renyi:0.4`);
a kind that an installed package adds by an entry point; or a function of one's own, `file.py:function` or
`module:function`. The options of a function are the parameters of its signature. In a name they follow a
second colon, in order or by name: `mine.py:two_rings:3`, `mine.py:two_rings:bridges=3,far=true`.
"""

import functools
import importlib
import importlib.util
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

import yaml
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from decaf_lora.errors import UserError, nearest, unknown

Function = Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """One name of a table.

    Attributes:
        build: makes the thing; the room of the table says from what.
        summary: one line for `--help`.
        example: the name with an argument; None: it takes none.
        required: whether the argument must be given.
    """

    build: Function
    summary: str
    example: str | None = None
    required: bool = False


K = TypeVar("K", bound=Kind)


class Found(NamedTuple, Generic[K]):
    """What a name means."""

    name: str
    """The name as tables and figures show it, without its argument."""
    kind: K
    argument: str
    """The text after the colon, "" if there is none."""


class Table(Mapping[str, K]):
    """The built-in kinds by name, and a way to find those of installed packages and of the user.

    Args:
        field: how errors call what is named: "graph".
        group: the entry-point group of installed packages: "decaf_lora.graphs". An entry point is a `Kind`, or
            a function as the user's own.
        built_in: the kinds of this package.
        adopt: (function, name) -> a function of the user's as a kind.
        hyphen: what stands between the words of a name; the other of "-" and "_" is read as it.
    """

    def __init__(
        self, field: str, group: str, built_in: Mapping[str, K], adopt: Callable[[Function, str], K], hyphen: str = "-"
    ) -> None:
        self.field, self.group = field, group
        self._built_in, self._adopt, self._hyphen = dict(built_in), adopt, hyphen

    def __getitem__(self, name: str) -> K:
        return self._built_in[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._built_in)

    def __len__(self) -> int:
        return len(self._built_in)

    def find(self, spec: str, remedy: str = "") -> Found[K]:
        """The kind that `spec` names, and its argument.

        Args:
            spec: the name, with its argument after a colon.
            remedy: what else could be given; ends the error for a name that is not known.

        Raises:
            UserError: the name is not known, has two meanings, or lacks an argument or has one too many.
        """
        spec = spec.strip()
        name, _, argument = (part.strip() for part in spec.partition(":"))
        name = self.written(name)
        kind = self._named(name)
        if kind is None:
            own = own_function(spec, self.field)
            if own is None:
                error = unknown(self.field, name, [*self, *self.installed()])
                module = _OWN.fullmatch(spec)
                missing = f" As a module: cannot import {module['source']!r}." if module else ""
                raise UserError(f"{error}{missing} Or name a function of your own, file.py:function.{remedy}")
            function, name, argument = own
            return Found(name, self._adopt(function, name), argument)
        if argument and kind.example is None:
            raise UserError(f"{self.field}: {name} takes no argument; write {name} instead of {spec}.")
        if kind.required and not argument:
            raise UserError(f"{self.field}: {name} needs an argument, for example {kind.example}.")
        return Found(name, kind, argument)

    def written(self, name: str) -> str:
        """`name` in the spelling of the table."""
        return name.lower().replace("_" if self._hyphen == "-" else "-", self._hyphen)

    def installed(self) -> dict[str, list[EntryPoint]]:
        """The kinds that installed packages add, by name; more than one where packages share a name."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in _entry_points(self.group):
            found.setdefault(self.written(entry.name), []).append(entry)
        return found

    def summaries(self) -> list[tuple[str, str]]:
        """Name and summary of every kind, for `--help`; packages are named, not imported."""
        rows = [(kind.example or name, kind.summary) for name, kind in self.items()]
        return rows + [(name, f"of the package {_package(found[0])}") for name, found in self.installed().items()]

    def _named(self, name: str) -> K | None:
        found = self.installed().get(name, [])
        owners = ["decaf-lora"] * (name in self) + sorted(_package(entry) for entry in found)
        if len(owners) > 1:
            raise UserError(
                f"{self.field}: {name!r} is a kind of {' and of '.join(owners)}; uninstall a package, or name the "
                f"function that you mean, for example {found[0].value}."
            )
        if name in self:
            return self[name]
        if not found:
            return None
        try:
            made = found[0].load()
        except Exception as error:
            raise UserError(
                f"{self.field}: {name} of the package {owners[0]} cannot be loaded ({_first_line(error)})."
            ) from error
        return made if isinstance(made, Kind) else self._adopt(made, name)  # type: ignore[return-value]


@functools.cache
def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.module


# A function of one's own

_OWN = re.compile(r"(?P<source>.+\.py|[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)(:(?P<argument>.*))?")


def own_function(spec: str, field: str) -> tuple[Function, str, str] | None:
    """The function that `file.py:function` or `module:function` names, its name, and the text after a second colon.

    None if `spec` names no function: it has another form, or there is no such module.

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


_files: dict[Path, ModuleType] = {}
"""Modules of files, each run once: a task and an algorithm may share one."""


def _file(path: Path, field: str) -> ModuleType:
    path = path.resolve()
    if path in _files:
        return _files[path]
    if not path.is_file():
        raise UserError(f"{field}: {path} does not exist.")
    # Classes are pickled by the name of their module; a file that is called as a library must not replace it.
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{field}: {path} cannot be loaded ({_where(error, path)}{_first_line(error)}).") from error
    _files[path] = module
    return module


def _module(name: str, field: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise UserError(f"{field}: cannot import {name} ({error}).") from error
    except Exception as error:
        raise UserError(f"{field}: {name} cannot be loaded ({_first_line(error)}).") from error


def _where(error: Exception, path: Path) -> str:
    """The line of the user's file at which loading stopped."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: "
    lines, trace = [], error.__traceback__
    while trace is not None:
        lines += [trace.tb_lineno] if trace.tb_frame.f_code.co_filename == str(path) else []
        trace = trace.tb_next
    return f"line {lines[-1]}: " if lines else ""


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"


# Its options


class Option(NamedTuple):
    """A parameter of a function that its user may set."""

    name: str
    type: Any
    """The annotation, or the type of the default; `Any` if there is neither."""
    default: Any
    """`inspect.Parameter.empty` if it must be given."""


def options(function: Function, supplied: Iterable[str] = ()) -> dict[str, Option]:
    """The options of a function: its parameters but for those that are `supplied` to it."""
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # a name that only a type checker sees; a callable object
        hints = {}
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in supplied or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        guess = Any if parameter.default in (parameter.empty, None) else type(parameter.default)
        found[name] = Option(name, hints.get(name, guess), parameter.default)
    return found


def checked(option: Option, value: Any, field: str) -> Any:
    """`value`, from a command line or YAML, as the type of the option.

    Raises:
        UserError: it is none.
    """
    if option.type is Any:
        return yaml.safe_load(value) if isinstance(value, str) else value
    try:
        adapter = TypeAdapter(option.type)
    except PydanticSchemaGenerationError:  # a class of the user's own
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise UserError(f"{field}.{option.name}: {message[0].lower()}{message[1:]} (got {value!r}).") from error


def call(function: Function, name: str, argument: str, field: str, supplied: Mapping[str, Any]) -> Any:
    """What the user's `function` returns.

    Args:
        function: takes any of the names of `supplied`, and options.
        name: of the function, for errors.
        argument: its options, "3" or "bridges=3,far=true".
        field: what is named, for errors: "graph".
        supplied: what the function may ask for by the name of a parameter.

    Raises:
        UserError: an option is not known, is missing, or has no value of its type.
    """
    known = options(function, supplied)
    values: dict[str, Any] = {}
    parts = [part.strip() for part in argument.split(",")] if argument else []
    for place, part in enumerate(parts):
        key, equals, text = part.partition("=")
        if not equals:
            if place >= len(known):
                raise UserError(f"{field}: {name} takes {_counted(known)}, so {part!r} is one too many.")
            key, text = list(known)[place], part
        key = key.strip().replace("-", "_")
        if key not in known:
            raise (
                unknown(f"{field}: option of {name}", key, known)
                if known
                else UserError(f"{field}: {name} takes no options; write {name} instead of {name}:{argument}.")
            )
        if key in values:
            raise UserError(f"{field}: {name}:{argument} sets {key} twice; give it once.")
        values[key] = checked(known[key], text.strip(), field)
    missing = [key for key, option in known.items() if option.default is inspect.Parameter.empty and key not in values]
    if missing:
        raise UserError(
            f"{field}: {name} needs {missing[0]}; write {name}:{missing[0]}=VALUE, give the parameter a default, or "
            f"take one of what is supplied: {', '.join(supplied)}."
        )
    wanted = inspect.signature(function).parameters
    return function(**{key: value for key, value in supplied.items() if key in wanted}, **values)


def _counted(known: Mapping[str, Any]) -> str:
    return f"{len(known)} option{'s' * (len(known) != 1)} ({', '.join(known)})" if known else "no options"
