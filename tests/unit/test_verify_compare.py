"""The comparison behind `lockstep verify`: it must find what differs, and say where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep.cli.errors import UsageError
from lockstep.cli.verify import VerifyOptions, make_prompts, take_lists
from lockstep.cli.verify_compare import Run, compare


def recorded(**changes: object) -> Run:
    run = Run(tp=1, threads=1, chunk=16, batch=1, cached=False, seconds=0.0)
    run.logits = {(0, 5): torch.tensor([1.0, 2.0]), (0, 6): torch.tensor([3.0, -0.5]), (1, 3): torch.tensor([0.0, 1.0])}
    digests = {(r, p): np.array([10 * p + r, 20 * p + r], np.uint64) for r, last in ((0, 6), (1, 3)) for p in range(last + 1)}
    run.layers = [((0, 1), digests)]
    return run


def test_equal_runs_have_no_difference() -> None:
    assert compare(recorded(), recorded()) is None


def test_a_logit_that_differs_in_the_last_bit_is_found() -> None:
    other = recorded()
    other.logits[0, 6] = torch.nextafter(other.logits[0, 6], torch.tensor(9.0))
    found = compare(recorded(), other)
    assert found is not None and (found.request, found.position, found.layer) == (0, 6, None)
    assert "2 of 2 logits" in str(found)


def test_the_first_layer_and_position_are_named() -> None:
    other = recorded()
    other.layers[0][1][1, 2][1] += 1
    other.layers[0][1][0, 4][0] += 1
    other.logits[0, 5] = other.logits[0, 5] + 1
    found = compare(recorded(), other)
    assert found is not None and (found.request, found.position, found.layer) == (1, 2, 1)
    assert "request 1, position 2, first in layer 1 on rank 0" in str(found)


def test_positions_that_a_cache_hit_left_out_are_not_compared() -> None:
    other = recorded()
    for p in range(3):
        del other.layers[0][1][0, p]
    assert compare(recorded(), other) is None


def test_logits_are_compared_as_bits() -> None:
    runs = [recorded(), recorded()]
    for run in runs:
        run.logits[0, 6] = torch.tensor([torch.nan, 1.0])
    assert compare(*runs) is None, "not a number, the same one"
    runs[0].logits[1, 3], runs[1].logits[1, 3] = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])
    found = compare(*runs)
    assert found is not None and (found.request, found.position) == (1, 3)


def test_ranks_of_the_first_run_that_disagree_are_found() -> None:
    first = recorded()
    first.layers.append(((0, 1), {key: row.copy() for key, row in first.layers[0][1].items()}))
    assert compare(first, first) is None
    first.layers[1][1][0, 2][1] += 1
    found = compare(first, first)
    assert found is not None and (found.request, found.position, found.layer) == (0, 2, 1)


def test_tokens_of_a_run_that_recorded_nothing_are_compared() -> None:
    first, plain = recorded(), Run(tp=2, threads=1, chunk=16, batch=2, cached=True, seconds=0.0)
    first.tokens, plain.tokens = [[5, 6], [7, 8]], [[5, 6], [7, 8]]
    assert compare(first, plain) is None and "tokens" in plain.row()
    plain.tokens[1][1] = 9
    assert str(compare(first, plain)) == "request 1, position 1, first in the tokens chosen: number 1 is 9, not 8"


def test_a_run_without_logits_is_our_fault() -> None:
    other = recorded()
    del other.logits[1, 3]
    with pytest.raises(AssertionError, match="different positions"):
        compare(recorded(), other)


def test_lists_are_taken_out_of_the_command_line() -> None:
    rest, found = take_lists(["model", "-tp", "1,2,3", "--max-tokens", "8", "--threads-per-rank=2"])
    assert rest == ["model", "--max-tokens", "8"]
    assert found == {"tensor_parallel_size": [1, 2, 3], "threads_per_rank": [2]}
    with pytest.raises(UsageError, match="1,x"):
        take_lists(["-tp", "1,x"])


def test_prompts_fit_and_are_the_same_each_time() -> None:
    options = VerifyOptions(max_tokens=10, num_prompts=3, input_len=40)
    prompts = make_prompts(options, 100, 30)
    assert [len(p) for p in prompts] == [20, 14, 7] and prompts == make_prompts(options, 100, 30)
    with pytest.raises(UsageError, match="max_model_len=10"):
        make_prompts(options, 100, 10)
