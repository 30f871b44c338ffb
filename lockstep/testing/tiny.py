"""Tiny random Hugging Face checkpoints of every architecture, made by transformers' own classes.

Weights are scaled so that every part of the network matters (norm weights and biases are random too, windows and soft caps
are small) and logits spread over a few units: a wrong model is far off, and greedy choices are seldom near ties.
"""

from __future__ import annotations

import itertools
import string
from pathlib import Path
from typing import Any

VOCAB_SIZE = 307  # not a multiple of 64: the padded part of the vocabulary is exercised
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")  # the last ids of the vocabulary
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ 'assistant' if m.role == 'assistant' else 'user' }}|>{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_GEMMA = {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 24}
_ROPES_GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True, "intermediate_size": 160}),
    "mistral": ("Mistral", {"sliding_window": 16, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3Text", {**_GEMMA, "num_key_value_heads": 1, "rope_parameters": _ROPES_GEMMA3,
                              "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
}  # fmt: skip

ARCHS = tuple(_VARIANTS)


def make_tiny(arch: str, folder: str | Path, seed: int = 0, *, shards: bool = False, dtype: str = "float32", **overrides: Any) -> Path:
    """Write a tiny random checkpoint of `arch` (one of ARCHS) with a byte-level tokenizer to `folder`; returns the folder.

    shards: several safetensors files with an index instead of one. overrides: keys of the transformers config.
    Three layers, hidden size 64, 8 query heads, 1 to 4 KV heads. The same seed gives the same weights.
    """
    import torch

    folder = Path(folder)
    config = hf_config(arch, **overrides)
    model = _model_class(arch)(config)
    with torch.no_grad():
        _scale_weights(model, torch.Generator().manual_seed(seed))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="100KB" if shards else "5GB")
    tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def hf_config(arch: str, **overrides: Any) -> Any:
    """The transformers config object of a tiny `arch`."""
    import transformers

    if arch not in _VARIANTS:
        raise ValueError(f"arch={arch!r} is not one of {', '.join(ARCHS)}.")
    name, variant = _VARIANTS[arch]
    vocab = overrides.get("vocab_size", VOCAB_SIZE)
    first_special = vocab - len(SPECIAL_TOKENS)
    settings: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 512, "pad_token_id": first_special, "bos_token_id": first_special + 1,
        "eos_token_id": first_special + 2, **variant, **overrides,
    }  # fmt: skip
    return getattr(transformers, f"{name}Config")(**settings)


def load_hf(folder: str | Path) -> Any:
    """The checkpoint as transformers runs it: fp32, eager attention (the only one that soft-caps), in eval mode."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def tokenizer(vocab_size: int = VOCAB_SIZE) -> Any:
    """A byte-level BPE tokenizer whose ids fill `vocab_size` exactly: 256 bytes, pairs of letters, then SPECIAL_TOKENS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    n_merges = vocab_size - 256 - len(SPECIAL_TOKENS)
    pairs = list(itertools.islice(itertools.product("etaoinshrdlu" + string.ascii_uppercase, "etaoinshrdlu"), max(n_merges, 0)))
    if n_merges < 0 or len(pairs) < n_merges:
        raise ValueError(f"vocab_size={vocab_size} must be between {256 + len(SPECIAL_TOKENS)} and {256 + len(SPECIAL_TOKENS) + 456}.")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(SPECIAL_TOKENS))
    pad, bos, eos = SPECIAL_TOKENS[:3]
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token=pad, bos_token=bos, eos_token=eos, chat_template=CHAT_TEMPLATE)


def _model_class(arch: str) -> Any:
    import transformers

    return getattr(transformers, f"{_VARIANTS[arch][0].removesuffix('Text')}ForCausalLM")


def _scale_weights(model: Any, generator: Any) -> None:
    """Fill every parameter: matrices with fan-in scaling, so that activations stay O(1) at any depth.

    Gemma scales its embeddings up and stores norm weights less one: smaller embeddings and a larger last norm keep a token
    from predicting itself.
    """
    gemma = "Gemma" in type(model).__name__
    for name, param in model.named_parameters():
        if "norm" in name:
            centre = (9.0 if name == "model.norm.weight" else 0.0) if gemma else 1.0
            param.normal_(centre, 0.3, generator=generator)
        elif param.dim() == 1:
            param.normal_(0.0, 0.3, generator=generator)
        else:
            gain = 1.3 if "proj" in name else 0.2 if gemma else 2.0
            param.normal_(0.0, gain * param.shape[1] ** -0.5, generator=generator)
