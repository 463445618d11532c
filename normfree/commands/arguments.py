"""Parse the arguments of a verb into its dataclass, with one line for each error; tyro prints the help."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro

from normfree.commands.usage import UsageError
from normfree.suggest import closest, did_you_mean, problem

Arguments = TypeVar("Arguments")


@dataclasses.dataclass(frozen=True)
class _Field:
    """One argument: its name in Python, its type, and its name for users: "MODEL" or "--batch-size".

    `example` is what a value of an option looks like: "FOLDER", or the default of a number.
    """

    name: str
    kind: Any
    shown: str
    example: str
    positional: bool
    required: bool

    @property
    def repeated(self) -> bool:
        """True if it takes any number of values."""
        return get_origin(self.kind) is tuple


def parse_arguments(verb: str, kind: type[Arguments], args: Sequence[str]) -> Arguments:
    """Return the arguments of `normfree VERB`; with --help, print the help and exit.

    Args:
        verb: name of the verb.
        kind: a dataclass whose fields are str, int, float, bool, Literal or tuple[str, ...]. Those annotated as
            `tyro.conf.Positional` are given by their position.
        args: the arguments after the verb.

    Raises:
        UsageError: an argument is missing, unknown or has a wrong value.
    """
    prog = f"normfree {verb}"
    if {"--help", "-h"} & set(args):
        return tyro.cli(kind, args=["--help"], prog=prog)
    fields = _fields(kind)
    options = {field.shown: field for field in fields if not field.positional}
    values: dict[str, Any] = {}
    loose: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            loose += rest
            break
        if not arg.startswith("-") or _is_number(arg) or arg == "-":
            loose.append(arg)
        else:
            _option(arg, rest, options, values, prog=prog)
    _positional(loose, [field for field in fields if field.positional], values, prog=prog)
    missing = [field.shown for field in fields if field.required and field.name not in values]
    if missing:
        usage = " ".join([prog, *(field.shown for field in fields if field.positional)])
        raise UsageError(problem(f"{prog} needs {' and '.join(missing)}", fix=f"{usage}, see {prog} --help"))
    return kind(**values)


def _fields(kind: type) -> list[_Field]:
    """Return the arguments that a dataclass describes."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):
        hint: Any = hints[field.name]
        extras: list[Any] = []
        if get_origin(hint) is Annotated:
            hint, *extras = get_args(hint)
        positional = any(extra is tyro.conf.Positional for extra in extras)
        metavar = next((e.metavar for e in extras if getattr(e, "metavar", None)), None)
        shown = metavar or field.name.upper() if positional else f"--{field.name.replace('_', '-')}"
        required = field.default is dataclasses.MISSING and get_origin(hint) is not tuple
        example = metavar or str(field.default)
        found.append(_Field(field.name, hint, shown, example, positional, required))
    return found


def _option(
    arg: str, rest: list[str], options: Mapping[str, _Field], values: dict[str, Any], *, prog: str
) -> None:
    """Read one option and its values, which are removed from `rest`."""
    given, equals, value = arg.partition("=")
    name = given.replace("_", "-")
    positive = f"--{name.removeprefix('--no-')}"
    if name not in options and positive in options and options[positive].kind is bool and not equals:
        values[options[positive].name] = False
        return
    if name not in options:
        near = closest(name.lstrip("-"), [option.lstrip("-") for option in options])
        hint = f" Did you mean '--{near}'?" if near else ""
        raise UsageError(f"unknown option {given!r}.{hint} All options: {prog} --help")
    field = options[name]
    if field.kind is bool and not equals:
        values[field.name] = True
        return
    if equals:
        texts = [value]
    elif field.repeated:
        count = next((i for i, text in enumerate(rest) if text.startswith("--")), len(rest))
        texts, rest[:count] = rest[:count], []
    else:
        texts = [rest.pop(0)] if rest and (not rest[0].startswith("--") or _is_number(rest[0])) else []
    if not texts:
        fix = f"{name} {field.example}"
        raise UsageError(problem(f"{name} has no value", allowed=_allowed(field.kind), fix=fix))
    values[field.name] = tuple(texts) if field.repeated else _value(name, texts[0], field.kind)


def _positional(loose: list[str], fields: list[_Field], values: dict[str, Any], *, prog: str) -> None:
    """Assign the values that are given by their position."""
    for field in fields:
        if field.repeated:
            values[field.name], loose = tuple(loose), []
        elif loose:
            values[field.name] = _value(field.shown, loose.pop(0), field.kind)
    if loose:
        usage = " ".join([prog, *(field.shown for field in fields)])
        raise UsageError(problem(f"unexpected argument {loose[0]!r}", allowed=usage))


def _value(name: str, text: str, kind: Any) -> Any:
    """Return the value that a text stands for."""
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            given = f"{name} is {text!r}.{did_you_mean(text, get_args(kind))}"
            raise UsageError(problem(given, allowed=_allowed(kind)))
        return text
    try:
        if kind is bool:
            return {"true": True, "yes": True, "false": False, "no": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise UsageError(problem(f"{name} is {text!r}", allowed=_allowed(kind))) from None


def _allowed(kind: Any) -> str:
    """Return what values of a type look like; "" for text, which can be anything."""
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "")


def _is_number(text: str) -> bool:
    """Return True for a negative number, which is a value and no option."""
    try:
        float(text)
    except ValueError:
        return False
    return True
