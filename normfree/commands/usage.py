"""The error of an invalid command line, and a check that two commands share."""

from __future__ import annotations

from collections.abc import Sequence

from normfree.suggest import problem, some_names


class UsageError(ValueError):
    """The command line is invalid. The message states what was given, what is allowed, and the nearest fix."""


def check_given(values: Sequence[str], kind: str) -> None:
    """Raise UsageError if no value of a repeated positional argument was given."""
    if not values:
        raise UsageError(problem(f"no {kind} was given", allowed="one or more", fix=f"add a {kind}"))


def check_classes(data: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Raise UsageError unless the classes of `data` are those of the model, in the same order."""
    if not known:
        raise UsageError(
            problem("the model has no classes, only embeddings",
                    fix=f"train a classifier with normfree train finetune --data {data} --weights MODEL")
        )  # fmt: skip
    if tuple(given) != tuple(known):
        raise UsageError(
            problem(f"{data} has the classes {some_names(given)}", allowed=f"the model's classes {some_names(known)}, "
                    "in the same order", fix="rename the class folders")
        )  # fmt: skip
