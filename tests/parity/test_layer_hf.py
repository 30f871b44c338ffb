"""Norm, rotary embedding and activations against the classes of transformers, in float32 and bfloat16."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from lockstep.config.model_spec import RopeSpec
from lockstep.layers.activation import gated_activation
from lockstep.layers.norm import RMSNorm
from lockstep.layers.rotary import RotaryEmbedding, apply_rotary

DTYPES = [torch.float32, torch.bfloat16]
LLAMA3 = RopeSpec(500000.0, "llama3", 8.0, 1.0, 4.0, 64)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theirs", [LlamaRMSNorm, Gemma2RMSNorm])
def test_norm(dtype, theirs):
    x, residual, weight = normal(5, 48, dtype=dtype), normal(5, 48, dtype=dtype, seed=1), normal(48, dtype=dtype, seed=2)
    reference = theirs(48, eps=1e-5).to(dtype)
    ours = RMSNorm(48, 1e-5, plus_one=theirs is Gemma2RMSNorm, dtype=dtype)
    reference.weight.data = ours.weight.data = weight
    kept = x.clone(), residual.clone()
    with torch.no_grad():
        assert torch.equal(ours(x), reference(x))
        normed, total = ours(x, residual)
        assert torch.equal(total, x + residual) and torch.equal(normed, reference(x + residual))
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])


@pytest.mark.parametrize("plus_one", [False, True])
def test_norm_of_a_row_does_not_depend_on_the_batch(plus_one):
    norm = RMSNorm(100, plus_one=plus_one)
    norm.weight.data = normal(100, seed=2)
    x = normal(33, 100)
    assert torch.equal(norm(x), torch.cat([norm(row) for row in x.split(1)]))


def hf_rotary(rope: RopeSpec, head_dim: int):
    params = {"rope_type": rope.type, "rope_theta": rope.theta, "factor": rope.factor}
    if rope.type == "llama3":
        params |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=4096, rope_parameters=params
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rope", [RopeSpec(), RopeSpec(1e6), RopeSpec(type="linear", factor=4.0), LLAMA3], ids=lambda r: f"{r.type}-{r.theta:g}"
)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rotary(dtype, rope, head_dim):
    reference = hf_rotary(rope, head_dim)
    ours = RotaryEmbedding(head_dim, rope)
    assert torch.equal(ours.inv_freq, reference.inv_freq)
    positions = torch.tensor([0, 1, 5, 63, 64, 1000, 4095])
    q, k = normal(7, 4, head_dim, dtype=dtype), normal(7, 2, head_dim, dtype=dtype, seed=1)
    cos, sin = reference(q, positions[None])
    wanted = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-2  # theirs rounds cos and sin to bfloat16
    for got, want in zip(ours(positions, q, k), wanted, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=0, atol=tolerance)


def test_llama3_scaling_uses_all_three_bands():
    plain, scaled = RotaryEmbedding(64, RopeSpec(500000.0)).inv_freq, RotaryEmbedding(64, LLAMA3).inv_freq
    ratio = plain / scaled
    assert (ratio == 1).any() and (ratio == 8).any() and ((ratio > 1.01) & (ratio < 7.99)).any()


def test_partial_rotary_passes_the_rest_through():
    rope = RotaryEmbedding(16, RopeSpec(), rotary_dim=8)
    x = normal(3, 2, 16)
    out, _ = rope(torch.tensor([3, 4, 5]), x, x)
    assert torch.equal(out[..., 8:], x[..., 8:])
    whole = RotaryEmbedding(8, RopeSpec())
    assert torch.equal(out[..., :8], whole(torch.tensor([3, 4, 5]), x[..., :8], x)[0])


def test_rotary_of_a_view_and_at_a_position_is_the_same():
    """What layers pass is a column view of q|k|v; a token's rotation must not depend on the others in the step."""
    rope = RotaryEmbedding(16, RopeSpec())
    qkv = normal(9, 5 * 16)
    view = qkv[:, 16:64].unflatten(-1, (3, 16))
    positions = torch.arange(9) * 100
    together = apply_rotary(view, *rope.cos_sin(positions))
    alone = torch.cat([apply_rotary(view[i : i + 1], *rope.cos_sin(positions[i : i + 1])) for i in range(9)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("silu", nn.SiLU()),
        ("gelu", nn.GELU()),
        ("gelu_pytorch_tanh", nn.GELU(approximate="tanh")),
        ("gelu_new", nn.GELU(approximate="tanh")),
    ],
)
def test_gated_activation(dtype, name, act):
    x = normal(5, 46, dtype=dtype)
    kept = x.clone()
    assert torch.equal(gated_activation(name)(x), act(x[:, :23]) * x[:, 23:])
    assert torch.equal(x, kept)
