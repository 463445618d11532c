"""normfree.training.config_io."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from normfree.training.config import Config, ConfigError


def keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key, dotted: "data", ..., "optim.lr", ..."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += keys(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _unknown(key: str) -> str:
    known = keys()
    leaf = key.rpartition(".")[2]
    sections = {k.partition(".")[0] for k in known}
    close = [k for k in known if k.rpartition(".")[2] == leaf]  # the right key without its section
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    close = close or difflib.get_close_matches(key, sections, n=1, cutoff=0.6)
    close = close or [k for k in known if difflib.get_close_matches(leaf, [k.rpartition(".")[2]], cutoff=0.6)]
    hint = f" Did you mean {close[0]!r}?" if close else " All keys: normfree train --help"
    return f"unknown key {key!r}.{hint}"


def _problems(error: ValidationError) -> Iterator[str]:
    """pydantic's findings in our three parts: what was given, what is allowed."""
    seen: set[str] = set()
    for item in error.errors():
        # a union reports once per member and ends the location with the member's name
        path = [str(p) for p in item["loc"]]
        while path and ".".join(path) not in keys() and item["type"] != "extra_forbidden":
            path = path[:-1]
        key = ".".join(path)
        if key in seen:
            continue
        seen.add(key)
        if item["type"] == "extra_forbidden":
            yield _unknown(key)
        elif not key:
            yield item["msg"]
        else:
            yield f"{key}={item['input']!r}: {_allowed(key, item['msg'])}."


def _allowed(key: str, message: str) -> str:
    if message.startswith("Value error, "):  # from a check of ours
        return message.removeprefix("Value error, ")
    kind = _annotation(key)
    if "Literal" in str(kind) and "float" in str(kind):
        return "expected a number or 'auto'"
    if "Literal" in str(kind) and "int" in str(kind):
        return "expected a whole number or 'auto'"
    message = message.replace("Input should be", "expected")
    return message[0].lower() + message[1:]


def _annotation(key: str) -> Any:
    model: type[BaseModel] = Config
    *sections, leaf = key.split(".")
    for section in sections:
        kind = model.model_fields[section].annotation
        assert isinstance(kind, type)
        model = kind
    return model.model_fields[leaf].annotation


def with_overrides(base: Config, flags: Sequence[str]) -> Config:
    """`base` with flags `--section.key value` (or `--section.key=value`) applied from left to right.

    pydantic, not the command-line library, judges the values, so that all errors come at once and files and
    flags obey one rule.

    Raises:
        ConfigError: unknown keys, missing or impossible values; all of them.
    """
    problems: list[str] = []
    given: dict[str, Any] = {}
    known = keys()
    words = list(flags)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            problems.append(f"unexpected {word!r}: expected --key value, for example --optim.lr 0.05.")
            continue
        key = key.replace("-", "_")
        if not equals:
            if not words or (words[0].startswith("--") and len(words[0]) > 2):
                problems.append(
                    _unknown(key) if key not in known else f"{key}: a value is missing after --{key}."
                )
                continue
            value = words.pop(0)
        if key not in known:
            problems.append(_unknown(key))
            continue
        *sections, leaf = key.split(".")
        place = given
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    try:
        read = Config.model_validate_strings(given)
    except ValidationError as error:
        raise ConfigError([*problems, *_problems(error)]) from None
    if problems:
        raise ConfigError(problems)
    return base.model_validate(_merge(base.model_dump(), read, given))


def _merge(base: dict[str, Any], read: BaseModel, given: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        new = getattr(read, name)
        base[name] = _merge(base[name], new, value) if isinstance(value, Mapping) else new
    return base


def load_config(path: Path) -> Config:
    """A config from a TOML file; keys that it leaves out have their defaults.

    Raises:
        ConfigError: the file cannot be read, or keys or values are wrong; all of them.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError([f"{path} cannot be read as TOML: {error}."]) from None
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([f"{path}: {problem}" for problem in _problems(error)]) from None


def to_toml(config: Config) -> str:
    """The complete config as TOML; `load_config` of it gives the same config."""
    import tomli_w

    return tomli_w.dumps(config.model_dump())
