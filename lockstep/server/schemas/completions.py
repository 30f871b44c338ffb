"""The body of `/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from lockstep.server.schemas.common import MAX_IDS, MAX_LOGPROBS, MAX_N, MAX_PROMPTS, Few, SamplingFields
from lockstep.server.schemas.prompts import one_kind

Text = Annotated[list[str], Few(MAX_PROMPTS, least=1)]
Tokens = Annotated[list[int], Few(MAX_IDS, least=1)]
Batches = Annotated[list[Tokens], Few(MAX_PROMPTS, least=1)]


class CompletionRequest(SamplingFields):
    prompt: str | Text | Tokens | Batches
    max_tokens: int | None = Field(16, ge=0, lt=1 << 31)  # 0 only with echo
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: str | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_kind(cls, value: Any) -> Any:
        return one_kind(value, MAX_PROMPTS)

    def prompts(self) -> list[str | list[int]]:
        """Each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
