"""The skeleton of `python -m reliability`: results are kept, an interrupted goal continues, the page shows all."""

import json
from collections.abc import Iterator

import pytest

from reliability import page, records
from reliability.goals import GOALS, Case, Goal, Result, spread


class Made(Goal):
    """A goal whose cases are functions; `calls` has the names of those that ran."""

    def __init__(self, **runs):
        super().__init__(7, "Made up", full=len(runs))
        object.__setattr__(self, "runs", runs)
        object.__setattr__(self, "calls", [])

    def cases(self, name: str, count: int) -> Iterator[Case]:
        for case in list(self.runs)[:count]:
            yield Case("a check" if case < "c" else "another", case, lambda case=case: self.run(case))

    def run(self, case: str) -> Result:
        self.calls.append(case)
        return self.runs[case]()


def run(goal: Goal, tmp_path, count: int) -> dict:
    return records.run_goal(
        "made", goal, count, records=tmp_path / "records", results=tmp_path / "results", say=lambda line: None
    )


def test_passed_cases_are_not_run_again_and_failed_ones_are(tmp_path):
    goal = Made(a=lambda: Result(3, 3), b=lambda: Result(2, 1, "one is wrong"), c=lambda: 1 / 0)
    run(goal, tmp_path, 1)
    run(goal, tmp_path, 3)
    found = run(goal, tmp_path, 3)
    assert goal.calls == ["a", "b", "c", "b", "c"]
    assert found["checks"] == {
        "a check": {"wanted": 5, "passed": 4, "cases": 2, "full": 2, "detail": ["b: one is wrong"]},
        "another": {"wanted": 1, "passed": 0, "cases": 1, "full": 1,
                    "detail": ["c: ZeroDivisionError: division by zero"]},
    }  # fmt: skip


def test_an_interrupted_goal_keeps_its_results_and_continues(tmp_path):
    def interrupted() -> Result:
        raise KeyboardInterrupt

    runs = {"a": lambda: Result(1, 1), "b": interrupted, "c": lambda: Result(1, 1)}
    goal = Made(**runs)
    with pytest.raises(KeyboardInterrupt):
        run(goal, tmp_path, 3)
    with (tmp_path / "records" / "made.jsonl").open("a") as file:
        file.write('{"case": "c", "che')  # cut by a kill
    summary = json.loads((tmp_path / "results" / "made.json").read_text())
    assert [line["cases"] for line in summary["checks"].values()] == [1, 0]
    goal.runs["b"] = lambda: Result(1, 1)
    found = run(goal, tmp_path, 3)
    assert goal.calls == ["a", "b", "b", "c"]
    assert [line["cases"] for line in found["checks"].values()] == [2, 1]


def test_the_page_shows_counts_failures_and_missing_cases(tmp_path):
    goal = Made(a=lambda: Result(1200, 1200), b=lambda: Result(2, 1, "one is wrong"), c=lambda: Result(1, 1))
    found = {"made": run(goal, tmp_path, 2)}
    text = page.page(found)
    assert "## 7. Made up" in text
    assert "| a check | 1,201 | 1,202 | all |" in text
    assert "| another | 0 | 0 | 0 of 1 cases |" in text
    assert "- b: one is wrong" in text
    assert page.printed(found).splitlines()[1].split() == ["made", "a", "check", "1,201", "1,202", "all"]


def test_cases_of_all_goals_have_names_of_their_own_and_do_no_work_yet():
    for name, goal in GOALS.items():
        cases = list(goal.cases(name, goal.full))
        assert cases
        assert len({case.name for case in cases}) == len(cases), name
        assert {case.name for case in goal.cases(name, 3)} <= {case.name for case in cases}, name


def test_the_page_shows_the_figures_of_a_check_with_a_single_case(tmp_path):
    goal = Made(a=lambda: Result(1, 1, "4 s"), b=lambda: Result(1, 1, "5 s"), c=lambda: Result(1, 1, "6 s"))
    found = {"made": run(goal, tmp_path, 3)}
    assert "Measured:\n\n- another: 6 s\n" in page.page(found)
    assert "5 s" not in page.page(found)


def test_the_page_in_docs_is_that_of_the_results():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(page.summaries())


def test_a_few_of_many_cases_are_spread_evenly():
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 9) == [0, 1, 2]
    assert spread(5, 1) == [0]
