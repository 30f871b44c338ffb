"""Fields that several endpoints have. A known field of a wrong type or size is refused; unknown fields are ignored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationInfo, field_validator, model_validator
from pydantic_core import CoreSchema, core_schema

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_IDS = 1 << 20  # more than any vocabulary, or any context, has
MAX_PROMPTS = 256
MAX_BIASES = 1024
INT64 = 1 << 63
GUIDED = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar", "whitespace_pattern")} | {
    "guided_json_object": "json_object"
}

# What a client may call its request: what can be put into a header and a log line as it is, and is no name of the engine's (#0-1).
GIVEN_ID = r"[A-Za-z0-9._:+/=@~-]{1,128}"


@dataclass(frozen=True)
class Few:
    """At most so many elements of a list or an object, and a check that ends at the first wrong one.

    Without that one small body has a million errors, each of which takes a kilobyte.
    """

    most: int
    least: int = 0

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        bounds = {"max_length": self.most} | ({"min_length": self.least} if self.least else {})
        schema: Any = {**handler(source), **bounds}
        if schema["type"] == "list":
            return {**schema, "fail_fast": True}
        return core_schema.no_info_before_validator_function(self._check, schema)

    def _check(self, value: Any) -> Any:
        """An object's size is known before its values are looked at, which do not end at the first wrong one."""
        if isinstance(value, dict) and len(value) > self.most:
            raise ValueError(f"it has {len(value)} entries: at most {self.most} are taken.")
        return value


TokenId = Annotated[int, Field(ge=-INT64, lt=INT64)]
Ids = Annotated[list[TokenId], Few(MAX_IDS)]
GivenId = Annotated[str, Field(pattern=f"^{GIVEN_ID}$")]
Word = Annotated[str, Field(max_length=1024)]
Name = Annotated[str, Field(max_length=256)]


class Body(BaseModel):
    """A request's JSON. No number is read from text, no text from a number."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None  # a last chunk tells what was used
    continuous_usage_stats: bool | None = None  # every chunk does


class JsonSchema(Body):
    name: Name | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputsFields(Body):
    """What the text must be; one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = Field(None, max_length=65536)
    choice: Annotated[list[str], Few(4096, least=1)] | None = None
    grammar: str | None = Field(None, max_length=262144)
    json_object: bool | None = None
    whitespace_pattern: str | None = Field(None, max_length=1024)
    disable_any_whitespace: bool | None = None


class SamplingFields(Body):
    """How tokens are chosen, and what is told of them; null is the default."""

    model: Name | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: str | Annotated[list[Word], Few(MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Few(1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: Annotated[dict[str, float], Few(MAX_BIASES)] | None = None
    allowed_token_ids: Annotated[list[int], Few(MAX_IDS, least=1)] | None = None
    bad_words: Annotated[list[Word], Few(256)] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsFields | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: int | None = Field(None, ge=1, le=1 << 20)  # tokens of a choice in each chunk after its first
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # log-probabilities name tokens "token_id:123"
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=MAX_IDS)  # keep the prompt's last ones; -1: as many as fit
    add_special_tokens: bool | None = None
    priority: int | None = Field(None, ge=-INT64, lt=INT64)
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    request_id: GivenId | None = None
    session_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    data_parallel_rank: int | None = Field(None, ge=0, lt=1 << 31)

    @model_validator(mode="before")
    @classmethod
    def _guided(cls, values: Any) -> Any:
        """Read the former names of what `structured_outputs` says now."""
        given = {} if not isinstance(values, dict) else {old: values[old] for old in GUIDED if values.get(old) is not None}
        if not given:
            return values
        if values.get("structured_outputs") is not None:
            raise ValueError(f"{next(iter(given))} is an older name for a field of structured_outputs, which is given too: leave one out.")
        meant = {GUIDED[old]: value for old, value in given.items()}
        return {name: value for name, value in values.items() if name not in GUIDED} | {"structured_outputs": meant}

    @field_validator("stream_options")
    @classmethod
    def _only_streams(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("it is for streams: set stream=true, or leave it out.")
        return value
