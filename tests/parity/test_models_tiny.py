"""The tiny checkpoints that other tests stand on: seeded, shardable, with a tokenizer that fits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lockstep.testing import oracle
from lockstep.testing.tiny import ARCHS, SPECIAL_TOKENS, VOCAB_SIZE, hf_config, make_tiny


def test_seeds_and_shards(tmp_path):
    one = load_file(make_tiny("llama", tmp_path / "one", seed=1) / "model.safetensors")
    again = load_file(make_tiny("llama", tmp_path / "again", seed=1) / "model.safetensors")
    other = load_file(make_tiny("llama", tmp_path / "other", seed=2) / "model.safetensors")
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    sharded = make_tiny("llama", tmp_path / "sharded", seed=1, shards=True)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2 and set(index) == set(one)
    tokens = [[5, 6, 7, 8, 9]]
    assert torch.equal(
        oracle.run_chunks(oracle.load_model(sharded), tokens, [[5]])[0],
        oracle.run_chunks(oracle.load_model(tmp_path / "one"), tokens, [[5]])[0],
    )


def test_type_and_overrides(tmp_path):
    folder = make_tiny("qwen2", tmp_path, dtype="bfloat16", num_hidden_layers=1, vocab_size=320)
    tensors = load_file(folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert tensors["model.embed_tokens.weight"].shape[0] == 320 and not any(".layers.1." in name for name in tensors)


def test_tokenizer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_tiny("llama", tmp_path))
    assert len(tokenizer) == VOCAB_SIZE
    for text in ("def f(x):\n    return x\n", "é€😀 mixed\tbytes", ""):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and all(i < VOCAB_SIZE - len(SPECIAL_TOKENS) for i in ids)
    assert tokenizer.eos_token_id == hf_config("llama").eos_token_id and tokenizer.bos_token_id == hf_config("llama").bos_token_id
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<s><|user|>hi</s><|assistant|>"


@pytest.mark.parametrize("arch", ARCHS)
def test_logits_are_spread(arch, tmp_path):
    """Logits of a few units with clear winners: what makes exact greedy comparisons meaningful."""
    logits = oracle.reference_logits(make_tiny(arch, tmp_path), [list(range(100))])[0]
    best = logits.topk(2).values
    assert 1.0 < logits.std() < 4.0 and (best[:, 0] - best[:, 1]).median() > 0.1
    assert logits.argmax(-1).unique().numel() > 15


def test_unknown_arch_and_impossible_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="'gpt2' is not one of llama"):
        make_tiny("gpt2", tmp_path)
    with pytest.raises(ValueError, match="vocab_size=100"):
        make_tiny("llama", tmp_path, vocab_size=100)
