"""What pages and JSON say of candidates: those that were tried for each row of a table, and which of the best ones are
at an end of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.cells import Results
from experiments.choices import Choices
from experiments.pages import markdown


def tried_rows(choices: Choices, done: Results) -> list[dict[str, Any]]:
    """Return what the JSON holds of the candidates of each row that has a choice: their scores on V, and the best."""
    found = []
    for arm, point in choices.rows:
        own = choices.tried(arm, point)
        tried = [
            {"changes": dict(changes), "status": done[cell]["status"], "top1": done[cell].get(choices.score)}
            for changes, cell in own
            if cell in done
        ]
        if own:
            best = choices.chosen(arm, point, done)
            found.append(
                {"arm": arm, "point": point, "tried": tried, "best": None if best is None else dict(best)}
            )
    return found


def ends(entry: Mapping[str, Any]) -> list[str]:
    """Return how the best candidate of a row is at an end of those that were tried, such as "rate 0.4, the largest".

    Each value of a candidate, such as its rate or λ, is compared with those of the candidates that differ in it alone.
    """
    best, found = entry["best"] or {}, []
    for key, value in best.items():
        tried = {one["changes"][key] for one in entry["tried"] if {**one["changes"], key: value} == best}
        if len(tried) > 1 and value in (min(tried), max(tried)):
            end = "smallest" if value == min(tried) else "largest"
            name = {"clipping": "λ"}.get(key, key)
            found.append(f"{name} {value:g}, the {end}")
    return found


def edges(chosen: Sequence[Mapping[str, Any]], choices: Choices) -> list[tuple[str, str]]:
    """Return each arm whose best candidate on V is at an end of those that were tried, with where and which."""
    found = []
    for entry in chosen:
        at = f" at {choices.axis} {entry['point']}" if choices.choose_at is None and choices.axis else ""
        found += [(entry["arm"], f"{at} ({end})") for end in ends(entry)]
    return list(dict.fromkeys(found))


def edge_lines(chosen: Sequence[Mapping[str, Any]], choices: Choices) -> list[str]:
    """Return a list item that names the arms of `edges`; nothing if there are none."""
    named = ", ".join(arm + where for arm, where in edges(chosen, choices))
    if not named:
        return []
    return [f"- Best on V at an end of those that were tried, so another may be better: {named}."]


def section(chosen: Sequence[Mapping[str, Any]], choices: Choices) -> list[str]:
    """Return the section with the table of candidates, the chosen one in bold; nothing if nothing was chosen."""
    if not chosen:
        return []
    lines, seen = [], set()
    for entry in chosen:
        point = choices.choose_at if choices.choose_at is not None else entry["point"]
        if (entry["arm"], point) in seen:
            continue
        seen.add((entry["arm"], point))
        shown = []
        for one in entry["tried"]:
            name = ", ".join(
                f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in one["changes"].items()
            )
            score = "diverged" if one["top1"] is None else f"{one['top1']:.1f}"
            text = f"{name}: {score}"
            shown.append(f"**{text}**" if one["changes"] == entry["best"] else text)
        lines.append([entry["arm"], point or "–", "; ".join(shown)])
    head = ["arm", choices.axis or "point", "candidates"]
    return ["## Candidates, top-1 on V in percent", "", *markdown(head, lines), ""]
