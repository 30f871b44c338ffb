"""A rank that never joins a collective: the others wait distributed_timeout_seconds for it and no longer, and it is named."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lockstep import LLM, SamplingParams
from lockstep.executor.contract import ExecutorError
from lockstep.testing.tiny import make_tiny

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]
LIMIT_S = 2.0


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_a_rank_that_never_joins_is_named_after_the_timeout(kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_KERNELS", kernels)
    monkeypatch.setenv("LOCKSTEP_FAULT", "decode:1:sleep=100")
    model = make_tiny("llama", tmp_path)
    with LLM(str(model), tensor_parallel_size=2, distributed_timeout_seconds=LIMIT_S, threads_per_rank=1) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1), use_tqdm=False)  # prefill only: nobody is late
        started = time.monotonic()
        with pytest.raises(ExecutorError) as caught:
            llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4), use_tqdm=False)
        waited_s = time.monotonic() - started
    error = caught.value
    assert LIMIT_S <= waited_s < LIMIT_S + 15, "not at once, and not after execute_model_timeout_seconds (300)"
    assert (error.kind, error.rank) == ("raised", 0), "the rank that gave up waiting"
    named = "rank 1 of group tp:0" if kernels == "" else "The others: rank 1 at step"  # the segment knows who is late; gloo does not
    assert named in str(error), error
