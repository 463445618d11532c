"""When a run has stopped getting better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Best:
    """The best score of the averaged weights so far (percent), its loss and step, and the evaluations since.

    Of equal scores, which a few dozen images often give, that of the lower loss is better. A checkpoint's state holds
    all of it, so that a continued run waits no longer than an unbroken one.
    """

    score: float = -1.0
    loss: float = 0.0
    step: int = 0
    waited: int = 0

    def after(self, score: float, loss: float, step: int) -> Best:
        """The same after one more evaluation."""
        if (score, -loss) > (self.score, -self.loss):
            return Best(score, loss, step)
        return replace(self, waited=self.waited + 1)

    def plateau(self, patience: int) -> bool:
        """Whether the last `patience` evaluations brought no better score; never for 0."""
        return 0 < patience <= self.waited

    def state(self) -> dict[str, Any]:
        """For a checkpoint's state.json."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Best:
        """From a checkpoint's state.json."""
        return cls(**state["best"])
