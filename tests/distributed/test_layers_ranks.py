"""The parallel layers on real processes: the whole chain of a decoder layer, uneven heads, replicated KV, padded vocabulary."""

import pytest
import torch

from lockstep.testing.ranks import run_ranks
from tests.distributed.layer_jobs import VOCAB, whole
from tests.unit.weights_model import full_tensors, write

SIZES = [2, 3, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 4, 5, 6, 7, 8))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tp", SIZES)
def test_a_decoder_layer_over_ranks(tp, bias):
    ids = torch.tensor([0, 5, VOCAB - 1, 64, 63, 100, 5])
    want = whole(ids, bias)
    reports = run_ranks("tests.distributed.layer_jobs:decoder", tp, ids, bias)
    for rank, report in enumerate(reports):
        torch.testing.assert_close(report["hidden"], want["hidden"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(report["gate"], want["gate"], rtol=1e-5, atol=1e-5)
        assert torch.equal(report["hidden"], reports[0]["hidden"])  # ranks that drift apart hang later
        assert report["in_layer"] == {"all_reduce_": 2} if tp > 1 else report["in_layer"] == {}
        if rank == 0:
            torch.testing.assert_close(report["logits"], want["logits"], rtol=1e-5, atol=1e-4)
            assert torch.equal(report["top"], report["logits"].argmax(-1))
        else:
            assert report["logits"] is None and torch.equal(report["top"], reports[0]["top"])


@pytest.mark.parametrize("tp", SIZES)
def test_ranks_load_their_own_bytes(tmp_path, tp):
    full = full_tensors()
    write(tmp_path, full)
    reports = run_ranks("tests.distributed.layer_jobs:load", tp, str(tmp_path))
    for report in reports:
        assert report["wrong"] == [] and report["bytes_read"] == report["owned"]
    if tp > 1:
        assert max(report["bytes_read"] for report in reports) < 0.75 * sum(t.nbytes for t in full.values())
