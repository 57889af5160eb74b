"""Which options does a function have, and which values does the user give them?"""

import inspect
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from decaf_lora.errors import UserError, unknown
from decaf_lora.yaml_file import read_value

from .functions import Function


class Option(NamedTuple):
    """A parameter of a function that its user may set."""

    name: str
    type: Any
    """The annotation, or the type of the default; `Any` if there is neither."""
    default: Any
    """`inspect.Parameter.empty` if it must be given."""


def options(function: Function, supplied: Iterable[str] = ()) -> dict[str, Option]:
    """The options of a function by name: its parameters without those that the program supplies (`supplied`)."""
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
    """`value`, from a command line or YAML, converted to the type of the option; `field` is named in errors.

    Raises:
        UserError: `value` does not fit the type.
    """
    if option.type is Any:
        return read_value(value, f"{field}.{option.name}") if isinstance(value, str) else value
    try:
        adapter = TypeAdapter(option.type)
    except PydanticSchemaGenerationError:  # a class of the user's own
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise UserError(f"{field}.{option.name}: {message[0].lower()}{message[1:]} (got {value!r}).") from error


def call(
    function: Function,
    name: str,
    argument: str,
    field: str,
    supplied: Mapping[str, Any],
    given: Mapping[str, Any] | None = None,
) -> Any:
    """Calls the user's `function` with its options, and returns what it returns.

    Args:
        function: its parameters are names of `supplied`, or options.
        name: what errors call the function.
        argument: options as text, "3" or "bridges=3,far=true".
        field: what errors name: "graph".
        supplied: values by name; the function gets those that it has a parameter for.
        given: more options, by name.

    Raises:
        UserError: an option is not known, is missing, or has no value of its type.
    """
    known = options(function, supplied)
    values = dict(given or {})
    for key, text in _pairs(argument, name, field, known):
        if key in values:
            raise UserError(f"{field}: {name}:{argument} sets {key} twice; give it once.")
        values[key] = text
    for key in values:
        if not known:
            raise UserError(f"{field}: {name} takes no options; leave out {key}.")
        if key not in known:
            raise unknown(f"{field}: option of {name}", key, known)
    missing = [key for key, option in known.items() if option.default is inspect.Parameter.empty and key not in values]
    if missing:
        where = ", or take one of what is supplied: " + ", ".join(supplied) if supplied else ""
        raise UserError(
            f"{field}: {name} needs {missing[0]}; give {field}.{missing[0]}, or the parameter a default{where}."
        )
    wanted = inspect.signature(function).parameters
    values = {key: checked(known[key], value, field) for key, value in values.items()}
    return function(**{key: value for key, value in supplied.items() if key in wanted}, **values)


def _pairs(argument: str, name: str, field: str, known: Mapping[str, Option]) -> Iterable[tuple[str, str]]:
    """Name and value of every option in the text after a colon."""
    for place, part in enumerate(argument.split(",") if argument else []):
        key, equals, text = part.partition("=")
        if equals:
            yield key.strip().replace("-", "_"), text.strip()
        elif place < len(known):
            yield list(known)[place], part.strip()
        else:
            takes = f"{len(known)} option{'s' * (len(known) != 1)} ({', '.join(known)})" if known else "no options"
            raise UserError(f"{field}: {name} takes {takes}, so {part.strip()!r} is one too many.")


def described(function: Function, field: str, supplied: Iterable[str] = ()) -> list[str]:
    """The options of a function for the help of a command: one text an option, with its type and default."""
    lines = []
    for option in options(function, supplied).values():
        kind = getattr(option.type, "__name__", None) or str(option.type).removeprefix("typing.")
        default = "required" if option.default is inspect.Parameter.empty else f"default: {option.default}"
        lines.append(f"--{field}.{option.name} {kind.upper() if kind.isidentifier() else kind} ({default})")
    return lines
