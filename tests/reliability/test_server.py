"""Goal 10 in small numbers: good clients get right answers under attack; nothing of it depends on time."""

import pytest

from reliability import server
from reliability.server_attacks import ATTACKS


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_good_clients_are_answered_under_attack(name):
    trial = server.attacked(name, rounds=1, requests=3)
    assert trial.complaints(ATTACKS[name].statuses) == []
    assert len(trial.attacked.seconds) == 3


@pytest.mark.slow
def test_the_server_listens_on_the_loopback_interface_only():
    result = server.loopback()
    assert result.passed == result.wanted, result.detail


@pytest.mark.parametrize(
    ("trial", "wrong"),
    [
        (server.Trial(code=0), []),
        (server.Trial(code=0, log="2026-01-01 00:00:00,000 WARNING request a: 503, the queue is full\n"), []),
        (server.Trial(code=0, log="fake\n"), ["in the log: ['fake']"]),
        (server.Trial(code=0, log="2026-01-01 00:00:00,000 ERROR \x1b[31m\n"),
         [r"in the log: ['2026-01-01 00:00:00,000 ERROR \x1b[31m']"]),
        (server.Trial(code=0, counts={200: 3, 422: 1}), ["attackers got {200: 3}"]),
        (server.Trial(code=-15, waiting=5.0, left=["a"], memory=2 * 10**9),
         ["the server took 2000 MB", "5 still wait", "exit code -15 after SIGTERM", "left: ['a']"]),
        (server.Trial(code=0, attacked=server.Answers([1.0], ["503"])), ["1 good requests not answered: ['503']"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_noticed(trial, wrong):
    assert trial.complaints(frozenset({422})) == wrong
