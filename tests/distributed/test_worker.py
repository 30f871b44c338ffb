"""Workers on several ranks: the same state everywhere, sampled requests alike for any split, exact memory, pipeline hops."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lockstep.testing.ranks import RankError, run_ranks
from lockstep.testing.tiny import ARCHS, VOCAB_SIZE, make_tiny
from tests.parity.generate_cases import ROOMY, TIGHT, make_prompts

PRELOAD = ("tests.distributed.worker_ranks",)
HERE = "tests.distributed.worker_ranks"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    return cache(lambda arch: make_tiny(arch, tmp_path_factory.mktemp(f"tiny-{arch}")))


def ranks(function: str, world: int, *args: Any) -> list[Any]:
    return run_ranks(f"{HERE}:{function}", world, *args, timeout=150, preload=PRELOAD)


@pytest.fixture(scope="module")
def alone(checkpoints):
    """What one rank samples: tokens and log-probabilities of the mixed requests."""
    return cache(lambda arch: ranks("sample", 1, str(checkpoints(arch)), make_prompts(VOCAB_SIZE), TIGHT, 1)[0])


def alike(a: list[Any], b: list[Any]) -> bool:
    """Log-probabilities equal up to the rounding of another order of summation, which may also swap near-equal neighbours."""
    pairs = [(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)]
    return all(x[0][0] == y[0][0] and x[1] == pytest.approx(y[1], abs=1e-3) and abs(x[2] - y[2]) <= 2 for x, y in pairs)


# (tp, pp): pipeline stages are not offered by the configuration yet, but the runner has them
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (3, 1), (1, 2), (2, 2)])
def test_sampled_requests_are_alike_for_any_split(tp: int, pp: int, checkpoints, alone) -> None:
    """Every parameter at once, over chunks, preemption and prefix hits; all ranks end with the same state."""
    reports = ranks("sample", tp * pp, str(checkpoints("llama")), make_prompts(VOCAB_SIZE), TIGHT, pp)
    for report in reports:
        assert report["tokens"] == alone("llama")["tokens"]
        assert alike(report["logprobs"], alone("llama")["logprobs"])
        assert alike(report["prompt_logprobs"], alone("llama")["prompt_logprobs"])
        lengths, tokens, *others = report["state"]
        assert [lengths, *others] == [reports[0]["state"][0], *reports[0]["state"][2:]]
        # In a pipeline the ranks of the first stage know the same tokens; no other but the output rank needs any.
        assert (pp > 1 and report not in reports[:tp]) or tokens == reports[0]["state"][1]


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 3), (2, 2)])
def test_sampled_requests_whole_matrix(arch: str, tp: int, pp: int, checkpoints, alone) -> None:
    for report in ranks("sample", tp * pp, str(checkpoints(arch)), make_prompts(VOCAB_SIZE), TIGHT, pp):
        assert report["tokens"] == alone(arch)["tokens"] and alike(report["logprobs"], alone(arch)["logprobs"])


def test_seeds_matter(checkpoints, alone) -> None:
    """The sampled requests above really are sampled: other seeds give other tokens."""
    tokens = alone("llama")["tokens"]
    assert alone("llama")["other_seed"] != tokens and len({tuple(t) for t in tokens}) == len(tokens)


@pytest.mark.parametrize("tp", [2, 3])
def test_memory_of_each_rank_is_exact(tp: int, checkpoints) -> None:
    reports = ranks("generate", tp, str(checkpoints("llama")), make_prompts(VOCAB_SIZE), ROOMY, False)
    for rank, report in enumerate(reports):
        found = report["memory"]
        assert report["ping"] == found["rank"] == rank
        assert found["kv_bytes"] == ROOMY["blocks"] * found["kv_bytes_per_block"]
        assert report["summary"]["weight_bytes"] == found["weight_bytes"]
    # 4 KV heads over 2 ranks: 2 each; over 3 ranks (3, 3 and 2 of 8 query heads, two for each KV head): 2, 2 and 1
    heads = {2: [2, 2], 3: [2, 2, 1]}[tp]
    one_head = 3 * 2 * ROOMY["block_size"] * 8 * 4  # layers, K and V, tokens, head_dim, fp32
    assert [r["memory"]["kv_bytes_per_block"] for r in reports] == [h * one_head for h in heads]
    assert len({r["digest"] for r in reports}) == tp, "ranks hold different shards"


def test_an_exception_in_sampling_names_its_rank(checkpoints) -> None:
    with pytest.raises(RankError, match="injected") as caught:
        ranks("sampler_raises", 2, str(checkpoints("llama")), make_prompts(VOCAB_SIZE)[0])
    assert caught.value.rank == 0


def test_a_missing_checkpoint_tensor_is_told_by_name(checkpoints, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = make_tiny("llama", tmp_path)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(RankError, match=r"layers\.1\.mlp\.up_proj\.weight") as caught:
        ranks("generate", 2, str(broken), make_prompts(VOCAB_SIZE), ROOMY, False)
    assert caught.value.error_type == "WeightError"
