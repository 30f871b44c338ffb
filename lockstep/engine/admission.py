"""Whether a request can run at all. One place, before anything is queued: nothing invalid reaches the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lockstep.engine.errors import RequestError
from lockstep.protocol import EngineRequest


@dataclass(frozen=True)
class Limits:
    """The numbers that bound requests and steps. All are known before the first request."""

    max_num_seqs: int  # rows in one step
    max_num_batched_tokens: int  # tokens in one step
    max_model_len: int  # tokens of prompt and output
    vocab_size: int
    num_blocks: int
    block_size: int
    chunked_prefill: bool = True
    by_priority: bool = False

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit in the cache."""
        return self.num_blocks * self.block_size

    @property
    def max_request_tokens(self) -> int:
        """Tokens of prompt and output that one request can have, alone in the engine."""
        return min(self.max_model_len, self.kv_tokens)


def check_request(request: EngineRequest, limits: Limits) -> int:
    """The number of tokens (prompt and output) at which the request ends by length.

    max_tokens is cut to what max_model_len leaves. Raises RequestError with the number that was broken; the caller knows
    the request's name.
    """
    size = len(request.prompt_token_ids)
    least, beyond = (size, "") if request.pooling else (size + 1, " with 1 output token")
    if size == 0:
        raise RequestError("an empty prompt (0 tokens) cannot run: a prompt needs at least 1 token.")
    if least > limits.max_model_len:
        raise RequestError(
            f"the prompt has {size} tokens, and{beyond} it exceeds max_model_len={limits.max_model_len}: "
            f"shorten the prompt by {least - limits.max_model_len} tokens or raise max_model_len."
        )
    if least > limits.kv_tokens:
        raise RequestError(
            f"the prompt has {size} tokens, which{beyond} needs {-(-least // limits.block_size)} KV blocks of "
            f"{limits.block_size} tokens; the cache has {limits.num_blocks}: shorten the prompt or give the KV cache more memory."
        )
    if not limits.chunked_prefill and size > limits.max_num_batched_tokens:
        raise RequestError(
            f"the prompt has {size} tokens, more than max_num_batched_tokens={limits.max_num_batched_tokens}, and chunked "
            f"prefill is off: raise max_num_batched_tokens or enable chunked prefill."
        )
    for what, ids in _token_lists(request):
        _check_ids(what, ids, limits.vocab_size)
    if request.pooling:
        return size + 1  # its result is awaited like a token, and ends it
    return min(limits.max_request_tokens, size + (request.sampling.max_tokens or limits.max_model_len))


def _token_lists(request: EngineRequest) -> Iterator[tuple[str, Iterable[int]]]:
    """Every list of token ids that a request carries, with its name."""
    sampling = request.sampling
    yield "prompt", request.prompt_token_ids
    yield "output_token_ids", request.output_token_ids
    yield "eos_token_ids", request.eos_token_ids
    yield "stop_token_ids", sampling.stop_token_ids or ()
    yield "logit_bias", sampling.logit_bias or ()
    yield "allowed_token_ids", sampling.allowed_token_ids or ()
    for word in sampling.bad_words_token_ids or ():
        yield "bad_words", word


def _check_ids(what: str, ids: Iterable[int], vocab_size: int) -> None:
    """Every id is an integer of the vocabulary."""
    if not ids:
        return
    if not set(map(type, ids)) <= {int}:
        wrong = next(t for t in ids if type(t) is not int)
        raise RequestError(f"{what} holds {wrong!r}, which is not an integer: token ids are integers from 0 to {vocab_size - 1}.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise RequestError(f"{what} holds token id {wrong}, outside the vocabulary: ids go from 0 to {vocab_size - 1}.")
