"""Changes to logits before a token is chosen: what is banned, biased or penalised. In place, one row at a time.

Only rows that ask for it come here. Each change touches a handful of entries, and reads only the row's own history,
so no other row of the batch can alter the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from lockstep.protocol import SamplingParams
from lockstep.worker.batch import I32, AlteredRow
from lockstep.worker.grammars import Grammars

BANNED = float("-inf")


def alter_logits(logits: torch.Tensor, altered: list[AlteredRow], grammars: Grammars | None = None) -> None:
    """Apply each altered row's parameters to its row of `logits [rows, vocab]` (float32), in place.

    The order is the ecosystem's: allowed tokens, grammar, bad words, minimum length, bias, repetition, presence and frequency.
    When nothing is left to choose from, bad words and minimum length are lifted, for this token only.
    """
    for row in altered:
        line = logits[row.row]
        if row.params.allowed_token_ids is not None:
            keep_only(line, row.params.allowed_token_ids)
        if grammars is not None:
            grammars.restrict(line, row)
        banned = banned_tokens(row.params, row.tokens, row.num_prompt_tokens, row.eos_token_ids)
        if banned:
            index = _index(sorted(banned), line)
            before = line[index]
            line[index] = BANNED
            if bool(torch.isneginf(line.max())):
                line[index] = before
        if row.params.logit_bias:
            add_bias(line, row.params.logit_bias)
        penalise(line, row.params, row.tokens, row.num_prompt_tokens)


def banned_tokens(params: SamplingParams, tokens: I32, num_prompt_tokens: int, eos_token_ids: Iterable[int]) -> set[int]:
    """The tokens that may not come next: those completing a bad word, and stop tokens before `min_tokens` outputs."""
    banned = set()
    for word in filter(None, params.bad_words_token_ids or ()):  # a tokenizer may make nothing of a word
        prefix = len(word) - 1
        if prefix <= len(tokens) and tokens[len(tokens) - prefix :].tolist() == word[:-1]:
            banned.add(word[-1])
    if len(tokens) - num_prompt_tokens < params.min_tokens:
        banned.update(params.stop_token_ids or ())
        banned.update(eos_token_ids)
    return banned


def keep_only(line: torch.Tensor, allowed: list[int]) -> None:
    """Ban every token of `line [vocab]` that is not in `allowed`."""
    index = _index(allowed, line)
    kept = line[index]
    line.fill_(BANNED)
    line[index] = kept


def add_bias(line: torch.Tensor, bias: dict[int, float]) -> None:
    """Add each token's bias to its entry of `line [vocab]`."""
    line[_index(list(bias), line)] += torch.tensor(list(bias.values()), dtype=line.dtype, device=line.device)


def penalise(line: torch.Tensor, params: SamplingParams, tokens: I32, num_prompt_tokens: int) -> None:
    """Make tokens that were already used less likely, in `line [vocab]`.

    Repetition (prompt and output; Keskar et al. 2019, "CTRL") divides a positive logit and multiplies a negative one;
    presence (output) subtracts once, frequency (output) once for each occurrence.
    """
    if params.repetition_penalty != 1.0:
        index = _index(np.unique(tokens), line)
        used = line[index]
        line[index] = torch.where(used > 0, used / params.repetition_penalty, used * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(tokens[num_prompt_tokens:], return_counts=True)
        cost = params.frequency_penalty * counts + params.presence_penalty
        line[_index(ids, line)] -= torch.from_numpy(cost).to(line)


def _index(ids: Sequence[int] | I32, line: torch.Tensor) -> torch.Tensor:
    """Token ids as an index tensor on `line`'s device."""
    return torch.as_tensor(np.asarray(ids, np.int64), device=line.device)
