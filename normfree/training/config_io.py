"""Reading, overriding and writing configs, and the translation of pydantic's errors into our form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from normfree.files import UnreadableFileError, read_toml
from normfree.suggest import closest, did_you_mean, problem
from normfree.training.config import Config, ConfigError
from normfree.training.synonyms import what_to_use

# Keys of earlier versions in [optim] that are options now: the old key, the new key, its value that has the option, the
# option, and its default.
MOVED = (
    ("momentum", "optimizer", "sgd", "momentum", 0.9),
    ("clipping_eps", "clip", "agc", "eps", 1e-3),
    ("unclipped", "clip", "agc", "unclipped", "head.weight"),
    ("final_lr", "schedule", "warmup_cosine", "final", 0.0),
)


def keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return all keys with their sections: "data", ..., "optim.lr", ..."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += keys(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _unknown(key: str, value: str = "") -> str:
    """Return the message for an unknown key and its value, with the most similar key or section."""
    known = keys()
    leaf = key.rpartition(".")[2]
    leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
    use = what_to_use(key, value)
    if use and leaf not in leaves:
        return f"unknown key {key!r}. Use {use}"
    sections = {k.partition(".")[0] for k in known}
    near = (
        leaves.get(leaf)  # the right key without its section
        or closest(key, known)
        or closest(key, sections)
        or leaves.get(closest(leaf, leaves) or "")
    )
    hint = f" Did you mean {near!r}?" if near else " All keys: normfree train --help"
    return f"unknown key {key!r}.{hint}"


def _without_value(key: str) -> str:
    """Return the message for a key without a value: what values it allows, or else what it is."""
    *sections, leaf = key.split(".")
    tree: dict[str, Any] = {leaf: ""}
    for section in reversed(sections):
        tree = {section: tree}
    try:
        Config.model_validate_strings(tree)
    except ValidationError as error:
        (item,) = error.errors()[:1]
        return problem(f"--{key} has no value", allowed=_allowed(key, item["type"], item["msg"]))
    return problem(f"--{key} has no value. {(_field(key).description or '').partition('. ')[0]}")


def _problems(error: ValidationError) -> Iterator[str]:
    """Yield one message for each wrong key of a pydantic error: the given and the allowed value."""
    seen: set[str] = set()
    for item in error.errors():
        # For a union, pydantic reports each member and appends the member's name to the location.
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
            given = problem(f"{key}={item['input']!r}") + _similar_choice(key, str(item["input"]))
            yield problem(given, allowed=_allowed(key, item["type"], item["msg"]))


def _similar_choice(key: str, value: str) -> str:
    """Return a sentence with the value nearest to `value` if a key allows a few names only, else ""."""
    kind = _field(key).annotation
    choices = (
        [name for name in get_args(kind) if isinstance(name, str)] if get_origin(kind) is Literal else []
    )
    return did_you_mean(value.lower(), choices)


# Our text for the types of pydantic's errors.
_KINDS = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "string": "a text",
    "finite_number": "a finite number",
}  # fmt: skip


def _allowed(key: str, kind: str, message: str) -> str:
    """Return what a key allows, from the type and the message of a pydantic error."""
    if message.startswith("Value error, "):
        return message.removeprefix("Value error, ")
    members = get_args(_field(key).annotation)
    if "'auto'" in str(members) and float in members:
        return "a number or 'auto'"
    if "'auto'" in str(members) and int in members:
        return "a whole number or 'auto'"
    for prefix, text in _KINDS.items():
        if kind.startswith(prefix):
            return text
    return message.removeprefix("Input should be ")


def _field(key: str) -> FieldInfo:
    """Return the field of a key."""
    model: type[BaseModel] = Config
    *sections, leaf = key.split(".")
    for section in sections:
        kind = model.model_fields[section].annotation
        assert isinstance(kind, type)
        model = kind
    return model.model_fields[leaf]


def with_overrides(base: Config, flags: Sequence[str]) -> Config:
    """Return `base` with flags `--section.key value` or `--section.key=value` applied from left to right.

    The values are checked by pydantic, not by a command-line library, so that all errors are reported at once and
    files and flags follow the same rules.

    Raises:
        ConfigError: Keys are unknown, values are missing or not allowed; the message lists all of them.

    Examples:
        >>> with_overrides(Config(), ["--optim.lr", "0.05", "--compile=true"]).optim.lr
        0.05
    """
    problems: list[str] = []
    given: dict[str, Any] = {}
    known = keys()
    args = list(flags)
    while args:
        arg = args.pop(0)
        key, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not key:
            problems.append(
                problem(f"unexpected argument {arg!r}", allowed="--key value, for example --optim.lr 0.05")
            )
            continue
        key = key.replace("-", "_")
        if not equals:
            if not args or (args[0].startswith("--") and len(args[0]) > 2):
                problems.append(_unknown(key) if key not in known else _without_value(key))
                continue
            value = args.pop(0)
        if key not in known:
            problems.append(_unknown(key, value))
            continue
        *sections, leaf = key.split(".")
        section_values = given
        for section in sections:
            section_values = section_values.setdefault(section, {})
        section_values[leaf] = value
    _forget_rates(base, given)
    try:
        read = Config.model_validate_strings(given)
    except ValidationError as error:
        raise ConfigError([*problems, *_problems(error)]) from None
    if problems:
        raise ConfigError(problems)
    return base.model_validate(_merge(base.model_dump(), read, given))


def _forget_rates(base: Config, given: dict[str, Any]) -> None:
    """Set learning rate and weight decay to "auto" in `given` if it names another optimizer, and does not set them.

    Those of `base` are numbers for its own optimizer.
    """
    optim = given.get("optim", {})
    before, now = base.optim.optimizer, optim.get("optimizer", base.optim.optimizer)
    if now.partition(":")[0] != before.partition(":")[0]:
        for key in ("lr", "weight_decay"):
            optim.setdefault(key, "auto")


def _merge(base: dict[str, Any], read: BaseModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Replace in `base` the values of the keys in `given` by those of `read`; return `base`."""
    for name, value in given.items():
        new = getattr(read, name)
        base[name] = _merge(base[name], new, value) if isinstance(value, Mapping) else new
    return base


def load_config(path: Path) -> Config:
    """Return the config in a TOML file; missing keys have the defaults of `Config`.

    Raises:
        ConfigError: The file cannot be read, or keys or values are wrong; the message lists all of them.
    """
    if not path.exists():
        raise ConfigError([f"{path} does not exist."])
    try:
        tree = read_toml(path)
    except UnreadableFileError as error:
        raise ConfigError([str(error)]) from None
    _upgrade(tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([f"{path}: {text}" for text in _problems(error)]) from None


def _upgrade(tree: dict[str, Any]) -> None:
    """Rewrite keys of earlier versions, which have become options of another key, in a tree read from a file."""
    optim, log = tree.get("optim"), tree.get("log")
    if isinstance(log, dict):
        log.pop("keep", None)
        if steps := log.pop("profile", 0):
            log["to"] = ",".join(filter(None, (str(log.get("to", "")), f"profile={steps}")))
    if not isinstance(optim, dict):
        return
    for old, key, name, option, default in MOVED:
        value = optim.pop(old, default)
        chosen = str(optim.get(key, name))
        if value != default and chosen.partition(":")[0] == name:
            optim[key] = f"{chosen}{',' if ':' in chosen else ':'}{option}={value}"


def to_toml(config: Config) -> str:
    """Return the complete config as TOML text; `load_config` of it gives the same config."""
    import tomli_w

    return tomli_w.dumps(config.model_dump())
