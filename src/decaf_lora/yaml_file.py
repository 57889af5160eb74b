"""How is a YAML file read, so that every word means what it says?

As YAML 1.2 does: `no`, `on` and `1:30` are words, `010` is ten and `1e-3` a number, where YAML 1.1 (PyYAML's default)
has a truth value, another truth value, ninety, eight and a word. A key that stands twice in one mapping is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from decaf_lora.errors import UserError

_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    "tag:yaml.org,2002:merge": (r"<<", "<"),
}
"""Tag -> pattern of the plain words that have the tag (YAML 1.2, core schema), and the characters they begin with."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's way: a copy of one's own

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, Any] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool | None) and key in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"{key} is there twice (lines {seen[key]} and {line}); leave one out.")
            if isinstance(key, str | int | float | bool | None):
                seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every word that this module, or a reader of YAML 1.1, would not read as a word."""

    yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012


def _integer(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node)
    return int(text[2:], 8) if text.startswith("0o") else int(text, 16) if text.startswith("0x") else int(text)


for _tag, (_words, _first) in _SCALARS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, re.compile(rf"^(?:{_words})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


MOST_BYTES = 2**20
"""Largest size of a configuration file. PyYAML takes some ten seconds to read so much."""

MOST_VALUES = 200_000
"""Values in a file with aliases, each counted as often as it is meant. A few lines of aliases can mean billions."""


def read_yaml(path: Path, field: str, most_bytes: int = MOST_BYTES) -> Any:
    """What a YAML file holds, as plain values.

    Args:
        path: the file.
        field: named in errors.
        most_bytes: largest size of the file.

    Raises:
        UserError: the file cannot be read, is larger than that, is neither UTF-8 nor UTF-16 with a byte order mark, is
            not YAML, has a key twice, or means too many values by its aliases.
    """
    try:
        with path.open("rb") as file:  # may be a device without an end
            raw = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{field}: cannot read {path} ({getattr(error, 'strerror', None) or error}).") from error
    if len(raw) > most_bytes:
        raise UserError(f"{field}: {path} is larger than {most_bytes // 2**20} MiB; is it the file that is meant?")
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{field}: {path} is not UTF-8 (byte 0x{raw[error.start]:02x} in line {line}); save it as UTF-8."
        ) from error
    return _read(text, f"{field}: {path}")


def read_value(text: str, field: str) -> Any:
    """What a value on the command line means, where its type is not known: a number, a word, a list.

    Args:
        text: the value.
        field: named in errors.

    Raises:
        UserError: it is not YAML.
    """
    return _read(text, f"{field}: {text[:80]!r}")


def _read(text: str, what: str) -> Any:
    try:
        loader = _Loader(text)
        if (node := loader.get_single_node()) is None:
            return None
        if _meant(node, {}) > MOST_VALUES:
            raise UserError(f"its aliases (*name) mean more than {MOST_VALUES} values; write out what is meant.")
        return loader.construct_document(node)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{what} is nested too deeply.") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # a broken tag raises the last three
        raise UserError(f"{what} is not YAML ({str(error)[:300]}).") from error


def parse_scalar(text: str) -> Any:
    """The value that `text` means where it stands in a YAML file: a number, a word, a list; itself if it is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except (UserError, RecursionError, yaml.YAMLError, ValueError, TypeError, AttributeError):
        return text


def _meant(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node means: what an alias stands for counts each time. 0 in `known` marks an open node."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise UserError(f"the anchor in line {node.start_mark.line + 1} holds itself; write out what is meant.")
        return known[id(node)]
    known[id(node)] = 0
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    inner = (part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,)))
    known[id(node)] = count = 1 + sum(_meant(part, known) for part in inner)
    return count


def write_yaml(values: Any) -> str:
    """Plain values as YAML text, from which `read_yaml` gets the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
