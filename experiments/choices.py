"""`Choices`: the cells of an experiment that first chooses something for each row of its table on V."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from experiments.cells import CHOICE_SEED, Cell, Results

Changes = Mapping[str, Any]
TABLE = ("rates", "seeds", "epsilons")  # of a size: which cells there are, not what one of them does


def settings_of(size: Any, candidate: Changes, network: Any) -> dict[str, Any]:
    """Return the settings of a cell, from dataclasses: a longer list of rates leaves finished cells valid, and a
    change of the network makes other ones."""
    own = {key: value for key, value in asdict(size).items() if key not in TABLE}
    return {**own, **candidate, "network": asdict(network)}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The rows of a table and the candidates of each, such as learning rates.

    Attributes:
        rows: (arm, point), in the order in which they are run.
        candidates: of each arm; an arm with one has no choice.
        cell: returns the cell of an arm, a point, a candidate and a seed.
        score: key of the number on V by which candidates are compared, the higher the better.
        seeds: of each row.
        axis: what the points are, such as "batch".
        choose_at: the point at which an arm's candidates are tried; None: at each point by itself.
    """

    rows: Sequence[tuple[str, str]]
    candidates: Mapping[str, Sequence[Changes]]
    cell: Callable[[str, str, Changes, int], Cell]
    score: str
    seeds: int
    axis: str = ""
    choose_at: str | None = None

    def tried(self, arm: str, point: str) -> list[tuple[Changes, Cell]]:
        """Return the candidates of a row with the cells that score them; empty if there is no choice."""
        candidates, at = self.candidates[arm], point if self.choose_at is None else self.choose_at
        if len(candidates) < 2:
            return []
        return [(changes, self.cell(arm, at, changes, CHOICE_SEED)) for changes in candidates]

    def chosen(self, arm: str, point: str, done: Results) -> Changes | None:
        """Return the candidate with the best score on V, the first of equals; None if some are not finished."""
        tried = self.tried(arm, point)
        if not tried:
            return self.candidates[arm][0]
        if any(cell not in done for _, cell in tried):
            return None
        scores = [done[cell].get(self.score, -1.0) for _, cell in tried]
        return tried[scores.index(max(scores))][0]

    def cells(self, done: Results) -> list[Cell]:
        """Return the cells that choose, and for each row whose choice is made those of the table."""
        found = dict.fromkeys(cell for row in self.rows for _, cell in self.tried(*row))
        for seed in range(self.seeds):
            for row in self.rows:
                if (candidate := self.chosen(*row, done)) is not None:
                    found[self.cell(*row, candidate, seed)] = None
        return list(found)

    def all_cells(self) -> list[Cell]:
        """Return as many cells as there will be, with the middle candidate in place of an unknown choice."""
        found = dict.fromkeys(cell for row in self.rows for _, cell in self.tried(*row))
        for seed in range(self.seeds):
            for arm, point in self.rows:
                own = self.candidates[arm]
                found[self.cell(arm, point, own[len(own) // 2], seed)] = None
        return list(found)
