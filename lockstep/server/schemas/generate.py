"""The body of `/generate`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from lockstep.server.schemas.common import (
    INT64,
    MAX_BIASES,
    MAX_IDS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_PROMPTS,
    MAX_STOPS,
    Body,
    Few,
    GivenId,
    Ids,
    Word,
)


class GenerateSampling(Body):
    """`sampling_params` of a request, with that endpoint's names."""

    max_new_tokens: int | None = Field(128, ge=1, lt=1 << 31)
    min_new_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    n: int | None = Field(None, ge=1, le=MAX_N)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: str | Annotated[list[Word], Few(MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Few(1024)] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: Annotated[dict[str, float], Few(MAX_BIASES)] | None = None
    skip_special_tokens: bool | None = None
    json_schema: str | None = Field(None, max_length=262144)
    regex: str | None = Field(None, max_length=65536)
    ebnf: str | None = Field(None, max_length=262144)


class GenerateRequest(Body):
    """Text or token ids in; one prompt or several, which the answer's form follows."""

    text: str | Annotated[list[str], Few(MAX_PROMPTS, least=1)] | None = None
    input_ids: Annotated[list[int], Few(MAX_IDS, least=1)] | Annotated[list[Ids], Few(MAX_PROMPTS, least=1)] | None = None
    sampling_params: GenerateSampling = GenerateSampling.model_validate({})
    return_logprob: bool | None = None
    top_logprobs_num: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stream: bool | None = None
    rid: GivenId | None = None
    priority: int | None = Field(None, ge=-INT64, lt=INT64)
    data_parallel_rank: int | None = Field(None, ge=0, lt=1 << 31)
    session_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt."""
        given: Any = self.text if self.text is not None else self.input_ids
        return list(given) if self.several else [given]

    @property
    def several(self) -> bool:
        """Whether a list of prompts was given, be it of one."""
        if self.text is not None:
            return isinstance(self.text, list)
        return bool(self.input_ids) and isinstance(self.input_ids[0], list)  # type: ignore[index]
