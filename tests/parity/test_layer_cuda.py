"""On a GPU: the same weights as on the CPU, bit for bit, and the same arithmetic up to rounding."""

import pytest
import torch

from lockstep.config.model_spec import RopeSpec
from lockstep.layers.activation import gelu_tanh_and_mul, silu_and_mul
from lockstep.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from lockstep.layers.linear import RowParallelLinear
from lockstep.layers.logits import LogitsProcessor
from lockstep.layers.norm import RMSNorm
from lockstep.layers.rotary import RotaryEmbedding
from lockstep.weights.dummy import fill_dummy
from lockstep.weights.loader import load_weights
from tests.parity.layer_sim import fill, simulate
from tests.unit.weights_model import Model, full_tensors, write

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def on_gpu(*args, **kw):
    with torch.device("cuda"):
        return Model(*args, **kw)


def same(gpu, cpu):
    pairs = list(zip(gpu.parameters(), cpu.parameters(), strict=True))
    return bool(pairs) and all(a.is_cuda and torch.equal(a.cpu(), b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 3])
def test_weights_are_the_same(tmp_path, dtype, tp):
    write(tmp_path, full_tensors(dtype))
    for rank in range(tp):
        gpu, cpu = on_gpu(tp, rank, dtype), Model(tp, rank, dtype)
        fill_dummy(gpu, 3)
        fill_dummy(cpu, 3)
        assert same(gpu, cpu)
        report = load_weights(gpu, tmp_path)
        assert load_weights(cpu, tmp_path).bytes_read == report.bytes_read > 0
        assert same(gpu, cpu)


def test_layers_agree_with_the_cpu():
    gen = torch.Generator().manual_seed(0)
    x, ids = torch.randn(5, 48, generator=gen), torch.tensor([0, 99, 3, 64, 7])
    w, table = torch.randn(12, 48, generator=gen), torch.randn(100, 48, generator=gen)

    def rank_main(device):
        def main(group):
            place = {"tp": group, "device": device}
            norm = RMSNorm(48, plus_one=True, device=device)
            norm.weight.data = x[0].to(device)
            row = RowParallelLinear(48, 12, False, input_is_parallel=False, return_bias=False, **place)
            embed = VocabParallelEmbedding(100, 48, **place)
            fill(row, "weight", w)
            fill(embed, "weight", table)
            at = x.to(device)
            turned = RotaryEmbedding(16, RopeSpec(), device=device)(ids.to(device), at.view(5, 3, 16), at.view(5, 3, 16))[0]
            outs = [norm(at), row(at), embed(ids.to(device)), turned, silu_and_mul(at), gelu_tanh_and_mul(at)]
            logits, head = LogitsProcessor(100, tp=group, soft_cap=5.0), ParallelLMHead(100, 48, **place).tie_weights(embed)
            outs += [out for out in (logits(head, at), logits.top_tokens(head, at)) if out is not None]
            assert all(out.device.type == device for out in outs)
            return [out.cpu() for out in outs]

        return main

    for tp in (1, 3):
        for gpu, cpu in zip(simulate(tp, rank_main("cuda")), simulate(tp, rank_main("cpu")), strict=True):
            for a, b in zip(gpu, cpu, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
