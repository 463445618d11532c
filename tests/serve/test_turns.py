"""A client alone has no limit of requests at work; while others ask, each has one."""

from functools import partial

from normfree.serve.turns import ASKING_SECONDS, Turns


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def turns_of(clock, **options):
    """Return turns and a function that enters a request with a number; a request that waited adds itself to `begun`."""
    made, begun = Turns(clock=clock, **options), []
    return made, begun, lambda client, number: made.enter(client, partial(begun.append, number))


def test_a_client_alone_has_no_limit():
    turns, begun, enter = turns_of(Clock())
    assert all(enter("a", i) for i in range(100))
    for _ in range(100):
        turns.leave("a")
    assert (begun, turns._working, turns._waiting) == ([], {}, {})


def test_while_others_ask_the_requests_of_a_client_begin_one_after_the_other():
    turns, begun, enter = turns_of(Clock())
    assert enter("b", "b0")
    assert [enter("a", i) for i in range(4)] == [True, False, False, False]
    assert (turns.waits("a"), turns.waits("b")) == (True, False)
    turns.leave("b")
    assert begun == []  # another client's turn
    for expected in ([1], [1, 2], [1, 2, 3]):
        turns.leave("a")
        assert begun == expected
    turns.leave("a")
    assert (turns._working, turns._waiting) == ({}, {})


def test_all_that_wait_begin_once_no_other_client_asks():
    clock = Clock()
    turns, begun, enter = turns_of(clock)
    assert enter("b", "b0")
    assert [enter("a", i) for i in range(4)] == [True, False, False, False]
    turns.leave("b")
    clock.now += ASKING_SECONDS + 0.1
    turns.leave("a")
    assert begun == [1, 2, 3]
    assert enter("a", 4)


def test_a_request_that_waited_and_left_does_not_begin():
    turns, begun, _ = turns_of(Clock())
    first, second = partial(begun.append, 1), partial(begun.append, 2)
    assert turns.enter("b", first)
    assert [turns.enter("a", begin) for begin in (first, first, second)] == [True, False, False]
    turns.forget("a", first)
    turns.forget("a", first)  # does not wait any more
    turns.leave("a")
    assert begun == [2]
    turns.leave("a")
    assert not turns._waiting


def test_without_a_limit_nothing_waits():
    _, _, enter = turns_of(Clock(), at_once=None)
    assert all(enter(client, i) for i in range(10) for client in "ab")
