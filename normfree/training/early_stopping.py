"""Early stopping: the best score of a run, and how many evaluations have passed since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Best:
    """Best score of the averaged weights so far.

    Of equal scores, which are common with a few dozen images, the one with the lower loss is better. Checkpoints hold
    all fields, so a resumed run stops after the same step as an uninterrupted one.

    Attributes:
        score: percent; -1 before the first evaluation.
        loss: validation loss of that evaluation.
        step: its step.
        waited: evaluations since then.
    """

    score: float = -1.0
    loss: float = 0.0
    step: int = 0
    waited: int = 0

    def after(self, score: float, loss: float, step: int) -> Best:
        """Return the best score after one more evaluation."""
        if (score, -loss) > (self.score, -self.loss):
            return Best(score, loss, step)
        return replace(self, waited=self.waited + 1)

    def plateau(self, patience: int) -> bool:
        """Return True if the last `patience` evaluations brought no better score; always False for patience 0."""
        return 0 < patience <= self.waited

    def state(self) -> dict[str, Any]:
        """Return the fields, for a checkpoint's state.json."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Best:
        """Return the best score that a checkpoint's state.json holds."""
        return cls(**state["best"])
