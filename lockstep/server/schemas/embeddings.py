"""`/v1/embeddings` as OpenAI has it, and two fields of our own: `pooling` and `normalize`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from lockstep.protocol import Pooling
from lockstep.server.schemas.common import INT64, MAX_IDS, Body, Ids, Name


class EmbeddingRequest(Body):
    """input: a text, token ids, or a list of either."""

    input: str | Ids | Annotated[list[str], Field(max_length=MAX_IDS)] | Annotated[list[Ids], Field(max_length=MAX_IDS)]
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=-INT64, lt=INT64)
    user: Name | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    priority: int | None = Field(None, ge=-INT64, lt=INT64)

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
