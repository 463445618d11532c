"""How far a run is, its best score, and how many evaluations have passed since: what early stopping looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
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


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: number of steps taken.
        best: the best averaged score so far.
        evaluated: False if an evaluation is due after `step` steps and was not made yet, because a signal arrived.
        rollbacks: how often the run has gone back to its last checkpoint, each time to a lower learning rate.
    """

    step: int = 0
    best: Best = field(default_factory=Best)
    evaluated: bool = True
    rollbacks: int = 0
