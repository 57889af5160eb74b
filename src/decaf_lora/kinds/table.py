"""Which kinds have a name, and which does a name mean?"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Generic, NamedTuple, TypeVar, cast

from decaf_lora.errors import UserError, unknown

from .functions import Function, first_line, installed, own_function, package_of


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
        field: what errors name: "graph".
        group: the entry-point group of installed packages: "decaf_lora.graphs". An entry point is a `Kind`, or a
            function, which `adopt` makes a kind.
        built_in: the kinds of this package, by name.
        adopt: (function, name) -> the kind of a function of the user's.
        hyphen: "-" or "_", whichever stands between the words of a name in this table; the other one is read as it.
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
            remedy: what else could be given; the last sentence of the error for an unknown name.

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
                source, _, last = spec.rpartition(":")
                missing = f" As a module: cannot import {source!r}." if source and last.isidentifier() else ""
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
        """Name -> the entry points of installed packages that add a kind of this name; several if packages collide."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in installed(self.group):
            found.setdefault(self.written(entry.name), []).append(entry)
        return found

    def summaries(self) -> list[tuple[str, str]]:
        """Name and summary of every kind, for `--help`. Installed packages are not imported for it."""
        rows = [(kind.example or name, kind.summary) for name, kind in self.items()]
        return rows + [(name, f"of the package {package_of(found[0])}") for name, found in self.installed().items()]

    def _named(self, name: str) -> K | None:
        found = self.installed().get(name, [])
        owners = ["decaf-lora"] * (name in self) + sorted(package_of(entry) for entry in found)
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
                f"{self.field}: {name} of the package {owners[0]} cannot be loaded ({first_line(error)})."
            ) from error
        return cast(K, made) if isinstance(made, Kind) else self._adopt(made, name)
