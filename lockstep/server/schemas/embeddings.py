"""`/v1/embeddings` as OpenAI has it, and two fields of our own: `pooling` and `normalize`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from lockstep.protocol import Pooling
from lockstep.server.schemas.common import INT64, Body, Few, Ids, Name
from lockstep.server.schemas.prompts import one_kind

MAX_INPUTS = 2048  # of one request, as OpenAI has it


class EmbeddingRequest(Body):
    """input: a text, token ids, or a list of either."""

    input: str | Ids | Annotated[list[str], Few(MAX_INPUTS, least=1)] | Annotated[list[Ids], Few(MAX_INPUTS, least=1)]
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=-INT64, lt=INT64)
    user: Name | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    priority: int | None = Field(None, ge=-INT64, lt=INT64)

    @field_validator("input", mode="before")
    @classmethod
    def _one_kind(cls, value: Any) -> Any:
        return one_kind(value, MAX_INPUTS)

    def prompts(self) -> list[str | list[int]]:
        """Each input that is to be embedded."""
        given = self.input
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [given]
        return list(given)


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
