"""Admission is books: what goes in comes out, nobody is let in beyond a bound, and Retry-After follows the rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.server.admission import GUESS_S, LEAST_S, MOST_S, WINDOW_S, Admission, Bounds, Busy, Cost, NeverFits
from lockstep.server.admission_cost import characters_of, cost_of
from lockstep.testing.fakes import FakeClock


def test_a_full_queue_says_when_to_come_back_by_the_measured_rate() -> None:
    clock = FakeClock()
    books = Admission(Bounds(running=2, queued=2), clock)
    tickets = [books.admit(Cost()) for _ in range(4)]
    with pytest.raises(Busy) as first:
        books.admit(Cost())
    assert first.value.retry_after_s == GUESS_S  # nothing has ended yet
    for ticket in tickets:  # one in four seconds
        clock.advance(4)
        ticket.leave()
        books.admit(Cost())
    with pytest.raises(Busy) as later:
        books.admit(Cost(sequences=3))
    assert later.value.retry_after_s == 9  # three at the rate of four in twelve seconds
    assert books.refused == {"queue": 2, "tokens": 0, "client": 0}


def test_what_never_fits_is_no_429() -> None:
    books = Admission(Bounds(running=2, queued=2, tokens=100))
    with pytest.raises(NeverFits, match="5 sequences"):
        books.admit(Cost(sequences=5))
    with pytest.raises(NeverFits, match="max_queued_tokens=100"):
        books.admit(Cost(tokens=101))
    assert books.requests == 0


def test_tokens_are_a_bound_of_their_own() -> None:
    books = Admission(Bounds(running=100, queued=0, tokens=100))
    with books.admit(Cost(tokens=60)), pytest.raises(Busy, match="max_queued_tokens=100"):
        books.admit(Cost(tokens=41))
    books.admit(Cost(tokens=100))


def test_one_client_does_not_take_the_place_of_others() -> None:
    books = Admission(Bounds(running=10, queued=0, per_key=2))
    one, _ = books.admit(Cost(), "a"), books.admit(Cost(), "a")
    with pytest.raises(Busy, match="max_concurrency_per_key"):
        books.admit(Cost(), "a")
    books.admit(Cost(), "b")
    one.leave()
    one.leave()  # twice is once
    books.admit(Cost(), "a")
    assert books.requests == 3


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50), st.sampled_from("abc"), st.booleans()), max_size=60))
def test_books_balance_and_no_bound_is_passed(moves: list[tuple[int, int, str, bool]]) -> None:
    clock = FakeClock()
    bounds = Bounds(running=4, queued=4, tokens=120, per_key=3)
    books, inside = Admission(bounds, clock), []
    for sequences, tokens, key, leave in moves:
        clock.advance(0.5)
        if leave and inside:
            inside.pop(0).leave()
        try:
            inside.append(books.admit(Cost(sequences, tokens), key))
        except Busy as e:
            assert LEAST_S <= e.retry_after_s <= MOST_S
        assert books.sequences == sum(t.cost.sequences for t in inside) <= 8
        assert books.tokens == sum(t.cost.tokens for t in inside) <= 120
        assert max((sum(t.key == k for t in inside) for k in "abc"), default=0) <= 3
    for ticket in inside:
        ticket.leave()
    assert (books.requests, books.sequences, books.tokens) == (0, 0, 0)


@pytest.mark.parametrize(
    ("body", "cost"),
    [
        ({"prompt": "x" * 40, "max_tokens": 10}, Cost(1, 20)),
        ({"prompt": "x" * 40, "max_tokens": 10, "n": 3}, Cost(3, 60)),
        ({"prompt": ["x" * 40, "y" * 80], "max_tokens": 10, "n": 2}, Cost(4, 2 * (20 + 30))),
        ({"prompt": [1, 2, 3]}, Cost(1, 19)),  # 16 tokens are OpenAI's default
        ({"prompt": [[1, 2], [3]], "max_tokens": 1}, Cost(2, 5)),
        ({"messages": [{"role": "user", "content": "x" * 40}], "max_completion_tokens": 5}, Cost(1, 15)),
        ({"messages": [{"content": [{"type": "text", "text": "x" * 40}]}], "max_tokens": 5}, Cost(1, 15)),
        ({"messages": [{"content": "x" * 40}]}, Cost(1, 100)),  # no limit: all that fits
        ({"input": "x" * 40, "max_output_tokens": 5}, Cost(1, 15)),
        ({"prompt": 7, "n": "many", "max_tokens": -1}, Cost(1, 17)),
        ([1], Cost()),
        (None, Cost()),
    ],
)
def test_cost(body: object, cost: Cost) -> None:
    assert cost_of(body, 100) == cost


def test_characters_are_those_of_the_longest_prompt() -> None:
    assert characters_of({"prompt": ["ab", "abcd"]}) == 4
    assert characters_of({"messages": [{"content": "abc"}, {"content": [{"text": "de"}]}]}) == 5
    assert characters_of({"prompt": {"x": 1}, "messages": 3}) == 0


def test_what_ended_long_ago_is_forgotten_though_nobody_is_refused() -> None:
    clock = FakeClock()
    books = Admission(Bounds(running=2, queued=2), clock)
    for _ in range(1000):
        books.admit(Cost()).leave()
        clock.advance(1)
    assert len(books._ended) <= WINDOW_S + 1
