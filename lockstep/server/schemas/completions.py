"""The body of `/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from lockstep.server.schemas.common import MAX_IDS, MAX_LOGPROBS, MAX_N, MAX_PROMPTS, SamplingFields

KINDS = "text, a list of texts, a list of token ids, or a list of lists of token ids"
Text = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
Tokens = Annotated[list[int], Field(min_length=1, max_length=MAX_IDS)]
Batches = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]


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
        """Say in one sentence what a prompt may be, rather than what is wrong with each kind."""
        if isinstance(value, str) or _ids(value):
            return value
        if not isinstance(value, list) or not value:
            raise ValueError(f"it must be {KINDS}, and not empty.")
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"it has {len(value)} prompts: at most {MAX_PROMPTS} are taken in one request.")
        if not (all(isinstance(v, str) for v in value) or all(_ids(v) for v in value)):
            raise ValueError(f"it must be {KINDS}, and nothing mixed.")
        return value

    def prompts(self) -> list[str | list[int]]:
        """Each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(t) is int for t in value) and len(value) <= MAX_IDS
