"""`/v1/embeddings` as OpenAI has it, and two fields of our own: `pooling` and `normalize`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, StrictInt, StrictStr

from lockstep.protocol import Pooling


class EmbeddingRequest(BaseModel):
    """input: a text, token ids, or a list of either."""

    input: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
    pooling: Pooling = "last"
    normalize: bool = True
    priority: int = 0

    def prompts(self) -> list[str | list[int]]:
        """Each input that is to be embedded."""
        given = self.input
        if isinstance(given, str):
            return [given]
        ids = [t for t in given if isinstance(t, int)]
        return [ids] if ids else [p for p in given if not isinstance(p, int)]


class Embedding(BaseModel):
    """One input's vector: a list of numbers, or their float32 bytes (little-endian) in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
