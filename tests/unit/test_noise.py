"""What is undisturbed of something that was measured again and again."""

from __future__ import annotations

from random import Random

import pytest

from lockstep.utils.noise import PIECE_S, undisturbed, undisturbed_course


def test_the_lower_quartile_and_of_few_the_least():
    assert undisturbed([3.0, 1.0, 2.0]) == 1.0
    assert undisturbed(range(8)) == 2
    with pytest.raises(IndexError):
        undisturbed([])


@pytest.mark.parametrize("step_s", [1e-3, 3e-3, 5e-2])
def test_a_course_is_put_together_of_its_undisturbed_pieces(step_s: float):
    """Every answer meets a neighbour somewhere, who makes a third of its steps twice as long: no whole one is undisturbed."""
    random, steps = Random(7), 60

    def course() -> list[float]:
        begin, times = random.randrange(steps * 2 // 3), [0.1]
        for i in range(steps):
            times.append(times[-1] + step_s * (2 if begin <= i < begin + steps // 3 else 1))
        return times

    courses = [course() for _ in range(16)]
    found = undisturbed_course(courses)
    assert found == pytest.approx([0.1 + i * step_s for i in range(steps + 1)], rel=0.02)
    assert min(c[-1] for c in courses) - 0.1 > 1.2 * (found[-1] - 0.1)


def test_tokens_that_come_late_and_the_next_in_time_are_of_one_piece():
    """Every second gap is nearly none, by chance the odd ones or the even ones: short gaps alone would be half of the truth."""
    step_s, steps = PIECE_S / 10, 40
    ends = [[(i + ((i + odd) % 2) * 0.9 * (0 < i < steps)) * step_s for i in range(steps + 1)] for odd in (0, 1) * 4]
    found = undisturbed_course(ends)
    assert found[-1] - found[0] == pytest.approx(steps * step_s, rel=0.25)


def test_two_events_and_none_between():
    assert undisturbed_course([[1.0, 1.0], [2.0, 2.0]]) == [1.0, 1.0]
    assert undisturbed_course([[1.0, 3.0], [2.0, 3.0], [1.5, 9.0]]) == [1.0, 2.0]
