"""Embeddings as callers get them: of the length and the form that they asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lockstep.protocol import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]

NO_TEXT = SamplingParams(max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)  # of a request with `pooling`


@dataclass
class EmbeddingOutput:
    """A prompt's vector."""

    embedding: list[float]


@dataclass
class EmbeddingRequestOutput:
    """A prompt with its vector, under the names that the ecosystem uses."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Raise ValueError when a vector cannot be cut to so many."""
    if dimensions is not None and not 1 <= dimensions <= hidden_size:
        raise ValueError(f"dimensions={dimensions} is invalid: it must be from 1 to {hidden_size}, the model's hidden size, or left out.")


def finish(vector: bytes, *, dimensions: int | None = None, normalize: bool = True) -> F32:
    """The engine's vector, cut to its first `dimensions` and then (`normalize`) scaled to length 1. A zero vector stays zero."""
    import numpy as np

    found = np.frombuffer(vector, "<f4")[:dimensions]
    if not normalize:
        return found
    exact = found.astype(np.float64)
    length = float(np.sqrt(np.add.accumulate(exact * exact)[-1]))  # one by one: the same bits on every machine
    return (exact / length).astype(np.float32) if length else found
