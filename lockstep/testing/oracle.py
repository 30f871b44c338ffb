"""Runs a model directly, without engine or worker: hand-made block tables, steps of any rows in any chunks.

With `reference_logits` (transformers, one sequence at a time) this is how a model, a split or a kernel is checked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.attention.batch import AttentionBatch
from lockstep.config.hf import load_spec
from lockstep.distributed.groups import ParallelGroups
from lockstep.models.decoder import DecoderModel
from lockstep.models.registry import build_model
from lockstep.testing.tiny import load_hf
from lockstep.weights.loader import load_weights

Chunks = list[list[int]]  # per step, how many tokens each row computes; 0 leaves the row out


def load_model(
    folder: str | Path, groups: ParallelGroups | None = None, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DecoderModel:
    """This rank's part of the checkpoint in `folder`; without groups the whole model."""
    model = build_model(load_spec(folder), groups or ParallelGroups.solo(device), dtype, device)
    load_weights(model, folder)
    return model


class PagedRows:
    """A few sequences over one model's KV cache. Blocks are dealt in a seeded random order, and the cache starts as NaN."""

    def __init__(self, model: DecoderModel, lengths: Sequence[int], block_size: int = 16, seed: int = 0) -> None:
        self.model, self.block_size, self.done = model, block_size, [0] * len(lengths)
        needs = [-(-length // block_size) for length in lengths]
        total = sum(needs) + 1
        blocks = random.Random(seed).sample(range(total), total)
        self.tables = [[blocks.pop() for _ in range(need)] for need in needs]
        # What was never written must never be read; NaN shows it.
        self.caches = [
            torch.full((2, total, block_size, kv.num_kv_heads, kv.head_dim), torch.nan, dtype=model.dtype, device=model.device)
            for kv in model.kv_layers()
        ]
        self.bind()

    def bind(self) -> None:
        """Give the model this object's cache, when several share the model."""
        self.model.bind_kv(self.caches)

    def step(self, tokens: Sequence[Sequence[int]], intermediate: dict[str, Tensor] | None = None) -> Any:
        """Compute `tokens[i]` (may be empty) of row i. Hidden states `[all tokens, hidden]`, or what the next stage takes."""
        rows = [i for i, row in enumerate(tokens) if len(row)]
        counts = [len(tokens[i]) for i in rows]
        ends = [self.done[i] + count for i, count in zip(rows, counts, strict=True)]
        batch = AttentionBatch.build(counts, ends, [self.tables[i] for i in rows], self.block_size, self.model.device)
        for i, end in zip(rows, ends, strict=True):
            self.done[i] = end
        ids = torch.tensor([token for i in rows for token in tokens[i]], device=self.model.device)
        return self.model(ids, batch, intermediate)

    def logits(self, tokens: Sequence[Sequence[int]]) -> Tensor | None:
        """`step`, then the logits of every token `[all tokens, vocab]` on TP rank 0, None on the others."""
        return self.model.compute_logits(self.step(tokens))


def run_chunks(model: DecoderModel, sequences: Sequence[Sequence[int]], chunks: Chunks, block_size: int = 16) -> list[Tensor] | None:
    """Logits of every token of every sequence `[length, vocab]`, computed in these chunks; None where the head is not."""
    rows = PagedRows(model, [len(s) for s in sequences], block_size)
    parts: list[list[Tensor]] = [[] for _ in sequences]
    for counts in chunks:
        logits = rows.logits([s[at : at + n] for s, at, n in zip(sequences, rows.done, counts, strict=True)])
        if logits is None:
            continue
        for i, part in enumerate(logits.split(counts)):
            parts[i].append(part)
    assert rows.done == [len(s) for s in sequences], f"the chunks compute {rows.done} tokens of {[len(s) for s in sequences]}"
    return [torch.cat(p) for p in parts] if parts[0] else None


def prefill_then_decode(lengths: Sequence[int], prompts: Sequence[int]) -> Chunks:
    """All prompts in one step, then one token of each row a step until all have their length."""
    chunks, done = [list(prompts)], list(prompts)
    while done != list(lengths):
        counts = [int(at < length) for at, length in zip(done, lengths, strict=True)]
        chunks.append(counts)
        done = [at + n for at, n in zip(done, counts, strict=True)]
    return chunks


def random_chunks(lengths: Sequence[int], seed: int, most: int = 24) -> Chunks:
    """Rows advance by random amounts, often one token, sometimes none: chunked prefill and decode mixed."""
    rng = random.Random(seed)
    chunks, done = [], [0] * len(lengths)
    while done != list(lengths):
        counts = [min(rng.choice([0, 1, 1, rng.randint(2, most)]), length - at) for at, length in zip(done, lengths, strict=True)]
        if any(counts):
            chunks.append(counts)
        done = [at + n for at, n in zip(done, counts, strict=True)]
    return chunks


def reference_logits(folder: str | Path, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """transformers' fp32 logits of every token of every sequence, each computed alone."""
    model = load_hf(folder)
    with torch.inference_mode():
        return [model(torch.tensor([list(s)])).logits[0].clone() for s in sequences]


def reference_greedy(folder: str | Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The `count` tokens that transformers' greedy generate appends to each prompt, end tokens ignored."""
    model = load_hf(folder)
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        # Given, so that no prompt token is taken for padding.
        seen = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=seen, max_new_tokens=count, do_sample=False, eos_token_id=None)
        found.append(out[0, len(prompt) :].tolist())
    return found


def greedy(model: DecoderModel, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy continuations of all prompts as one batch. Every TP rank must call it; every rank gets the tokens."""
    rows = PagedRows(model, [len(p) + count for p in prompts])
    fed, found = [list(p) for p in prompts], [[] for _ in prompts]  # type: list[list[int]], list[list[int]]
    for _ in range(count):
        ends = torch.tensor([len(f) for f in fed]).cumsum(0) - 1
        best = model.compute_top_tokens(rows.step(fed)[ends.to(model.device)])
        tokens = best if best is not None else torch.empty(len(prompts), dtype=torch.int64, device=model.device)
        fed = [[token] for token in model.groups.tp.broadcast(tokens, src=0).tolist()]
        for row, new in zip(found, fed, strict=True):
            row += new
    return found
