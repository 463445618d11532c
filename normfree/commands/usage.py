"""The error of an invalid command line, and what several commands share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from normfree.suggest import problem, some_names

if TYPE_CHECKING:
    from normfree.data.source import Source


class UsageError(ValueError):
    """The command line is invalid. The message states what was given, what is allowed, and the nearest fix."""


def check_given(values: Sequence[str], kind: str) -> None:
    """Raise UsageError if no value of a repeated positional argument was given."""
    if not values:
        raise UsageError(problem(f"no {kind} was given", allowed="one or more", fix=f"add a {kind}"))


def check_target(name: str, kinds: Sequence[str], option: str) -> str:
    """Return the suffix of a file to write, without the dot.

    Raises:
        UsageError: the suffix is not one of `kinds`, or the folder does not exist.
    """
    path = Path(name)
    suffix = path.suffix.removeprefix(".")
    if suffix not in kinds:
        allowed = f"a name that ends in {' or '.join(f'.{kind}' for kind in kinds)}"
        raise UsageError(
            problem(f"{option} is {name!r}", allowed=allowed, fix=f"{option} {path.stem}.{kinds[0]}")
        )
    if not path.parent.is_dir():
        raise UsageError(
            problem(
                f"{option} is {name!r}", allowed="a file in an existing folder", fix=f"mkdir {path.parent}"
            )
        )
    return suffix


def check_classifies(classes: Sequence[str], model: str = "MODEL") -> None:
    """Check that a model has classes.

    Raises:
        UsageError: it computes embeddings alone.
    """
    if not classes:
        raise UsageError(
            problem("the model has no classes, only embeddings",
                    fix=f"train a classifier with normfree train finetune --data FOLDER --weights {model}")
        )  # fmt: skip


def with_classes(data: str, source: Source, known: Sequence[str]) -> Source:
    """Return a source with the classes of the model, which are found by name; some may have no images.

    Raises:
        UsageError: `data` has a class that the model does not have.
    """
    from normfree.data.multilabel import as_multilabel, targets_of

    check_classifies(known)
    if tuple(source.classes) == tuple(known):
        return source
    if as_multilabel(source) is not None:
        used = {k for i in range(len(source)) for k in targets_of(source, [i])[0].nonzero()[:, 0].tolist()}
    else:
        used = {source.label(index) for index in range(len(source))}
    other = [name for number, name in enumerate(source.classes) if name not in known and number in used]
    if other:
        raise UsageError(
            problem(f"{data} has the classes {some_names(other)}, which the model does not have",
                    allowed=f"the model's classes, {some_names(known)}", fix="rename the class folders, or remove them")
        )  # fmt: skip
    from normfree.data.subset import Relabeled

    return Relabeled(source, known)


def tell(note: str) -> None:
    """Print a note to the standard error, if there is one."""
    if note:
        print(f"normfree: {note}", file=sys.stderr)
