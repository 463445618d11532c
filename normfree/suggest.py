"""Error messages of three parts: what was given, what is allowed, the fix; similar names, and missing packages."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Literal

_JOINERS = "\u200c\u200d"  # not printable for Python
_PLURALS = {"": "", "is": "are", "was": "were"}


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the string of `known` that is most similar to `name`, or None if none is similar.

    >>> closest("nfnet-f0", ["nfnet_f0", "nf_resnet50"])
    'nfnet_f0'
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence to append to an error message, or "" if no string of `known` is similar to `name`.

    >>> did_you_mean("trian", ["train", "eval"])
    " Did you mean 'train'?"
    """
    match = closest(name, known)
    return f" Did you mean {match!r}?" if match else ""


def some_names(names: Iterable[str], *, limit: int = 5) -> str:
    """Return the first `limit` of `names`, quoted and separated by commas, and the number of the remaining ones.

    >>> some_names(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    listed = list(names)
    text = ", ".join(repr(name) for name in listed[:limit])
    return f"{text} and {len(listed) - limit} more" if len(listed) > limit else text


def number_of(count: int, noun: str, verb: Literal["", "is", "was"] = "") -> str:
    """Return a count with its noun, which is given in the singular, and its verb.

    >>> number_of(1, "image"), number_of(12000, "image"), number_of(2, "class")
    ('1 image', '12,000 images', '2 classes')
    >>> number_of(1, "file", "was"), number_of(2, "file", "was")
    ('1 file was', '2 files were')
    """
    plural = "" if count == 1 else "es" if noun.endswith(("s", "ch", "x")) else "s"
    of_count = verb if count == 1 else _PLURALS[verb]
    return f"{count:,} {noun}{plural} {of_count}".rstrip()


def printable(text: str, *, one_line: bool = False) -> str:
    r"""Return `text` with characters that could control a terminal, or are no valid Unicode, as escapes.

    The joiners of emoji and Indic scripts stay, and so do line breaks and tabs unless `one_line` is set. Names of files
    may hold any character.

    >>> print(printable("a\x1b[31mb\udcff"))
    a\x1b[31mb\udcff
    >>> print(printable("two\nlines", one_line=True))
    two\nlines
    """
    if text.isprintable():
        return text
    kept = _JOINERS if one_line else _JOINERS + "\n\t"
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    r"""Return `text` as `printable` does, with line breaks and tabs as escapes too.

    >>> print(one_line("a\nb"))
    a\nb
    """
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def problem(given: str, *, allowed: str = "", fix: str = "") -> str:
    """Return an error message in three parts. The last two are optional.

    Args:
        given: what was given or found.
        allowed: what would be valid.
        fix: the nearest correction.

    >>> problem("decay is 2.0", allowed="0 to 1", fix="pass decay=0.99999, the published value")
    'decay is 2.0. Allowed: 0 to 1. Fix: pass decay=0.99999, the published value.'
    """
    parts = [given, f"Allowed: {allowed}" if allowed else "", f"Fix: {fix}" if fix else ""]
    return " ".join(part if part.endswith((".", "?", "!")) else f"{part}." for part in parts if part)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the error message for a name that is not in `known`.

    >>> unknown("mode", "agx", ["agc", "norm"])
    "unknown mode 'agx'. Did you mean 'agc'? Allowed: 'agc', 'norm'."
    """
    listed = list(known)
    return f"unknown {kind} {name!r}.{did_you_mean(name, listed)} Allowed: {', '.join(map(repr, listed))}."


@contextlib.contextmanager
def needs(what: str, *, install: str) -> Iterator[None]:
    """Return a context for imports: if a package is missing, the error names the command that installs it.

    Args:
        what: what the packages are needed for, as the subject of the message.
        install: what to give to pip, usually this package with one of its extras.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ImportError: it is installed and cannot be imported; the message has the reason.

    >>> with needs("a table", install="normfree[tables]"):
    ...     import no_such_package
    Traceback (most recent call last):
    ModuleNotFoundError: a table needs no_such_package, which is not installed. Fix: pip install "normfree[tables]".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise not_installed(what, (error.name or install).partition(".")[0], install=install) from None
    except ImportError as error:
        package = (error.name or install).partition(".")[0]
        given = f"{what} needs {package}, which cannot be imported: {error}"
        raise ImportError(
            problem(given, fix=f'pip install --upgrade "{install}"'), name=error.name
        ) from error


def not_installed(what: str, package: str, *, install: str, otherwise: str = "") -> ModuleNotFoundError:
    """Return the error for a missing `package`, as `needs` raises it.

    Args:
        what: what the package is needed for, as the subject of the message.
        package: the name of the package.
        install: what to give to pip.
        otherwise: what else would help.

    >>> not_installed("--log.to wandb", "wandb", install="normfree[wandb]", otherwise='--log.to ""').args[0]
    '--log.to wandb needs wandb, which is not installed. Fix: pip install "normfree[wandb]", or --log.to "".'
    """
    # Double quotes are those that every shell removes, also that of Windows.
    fix = f'pip install "{install}"' + (f", or {otherwise}" if otherwise else "")
    return ModuleNotFoundError(
        problem(f"{what} needs {package}, which is not installed", fix=fix), name=package
    )
