#!/usr/bin/env python3
"""Make a seeded random-weight checkpoint for benchmarks: `python scripts/make_bench_model.py llama-0.5b FOLDER`.

The shapes are those of real models of that size; weights are scaled so that activations stay of order one and greedy
tokens are well defined. The tokenizer is the demo model's: benchmarks send token ids.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

DEMO = Path(__file__).parents[1] / "lockstep" / "assets" / "demo"
COMMON = {"max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "rms_norm_eps": 1e-6}
SHAPES = {
    "llama-0.5b": {
        "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 4096,
    },
    "llama-tiny": {
        "vocab_size": 8000, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 768,
    },
}  # fmt: skip


def scale_weights(model: torch.nn.Module, seed: int) -> None:
    """Matrices get a spread of 1/sqrt(inputs), embeddings 1, norms values near but not equal to 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim < 2:
                param.copy_(1 + 0.1 * noise)
            elif "embed_tokens" in name:
                param.copy_(noise)
            else:
                param.copy_(noise * param.shape[-1] ** -0.5 * (2 if "lm_head" in name else 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=4321)
    args = parser.parse_args()
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[args.shape], **COMMON)).to(torch.bfloat16)
    scale_weights(model, args.seed)
    model.save_pretrained(args.folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, args.folder / name)
    print(f"{args.folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
