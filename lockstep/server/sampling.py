"""What a request says of sampling, as SamplingParams; what cannot be done is refused by name."""

from __future__ import annotations

from typing import Any, get_type_hints

import msgspec

from lockstep.protocol import SamplingParams
from lockstep.server.errors import ApiError
from lockstep.server.schemas.common import Body, SamplingFields
from lockstep.server.state import ServerState

COPIED = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos"),
    *("min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "allowed_token_ids", "bad_words"),
    *("prompt_logprobs", "skip_special_tokens"),
)
# Fields of other servers that would change the answer: to ignore one would be to answer something else than was asked.
REFUSED = {
    "suffix": "text cannot be inserted between a prompt and a suffix",
    "use_beam_search": "there is no beam search: best_of gives the most likely of several samples",
    "chat_template": "a template is code and is not taken from requests: start the server with --chat-template FILE",
    "prompt_embeds": "prompts are text or token ids",
    "logits_processors": "no code is taken from requests",
    "custom_logit_processor": "no code is taken from requests",
    "functions": "it was replaced: give tools",
    "function_call": "it was replaced: give tool_choice",
    "audio": "this model writes text",
    "web_search_options": "this server does not search",
}


def refuse(body: Body) -> None:
    """Raises ApiError for what cannot be done."""
    for name, why in REFUSED.items():
        if getattr(body, name, None):
            raise ApiError(400, f"{name} is not supported: {why}.", param=name)
    if getattr(body, "echo", None) and "echo" not in type(body).model_fields:
        raise ApiError(400, "echo is only for /v1/completions: a conversation is not repeated. Leave it out here.", param="echo")


def sampling_params(state: ServerState, body: SamplingFields, constraint: dict[str, Any] | None = None, **more: Any) -> SamplingParams:
    """The parameters of a request. constraint: fields of StructuredOutputs that hold instead of those of the body.

    Raises ApiError, naming the field.
    """
    refuse(body)
    if body.priority and state.engine.config.scheduler.scheduling_policy != "priority":
        raise ApiError(
            400, f"priority={body.priority} has no meaning here: start the server with --scheduling-policy priority.", param="priority"
        )
    _check_allowed(state, body.allowed_token_ids)
    given = {name: value for name in COPIED if (value := getattr(body, name)) is not None}
    if body.logit_bias:
        given["logit_bias"] = _biases(body.logit_bias)
    constraint = constraint or _constraint(body)
    if constraint:
        more["structured_outputs"] = _structured(constraint)
    return checked({**given, **more})


def _check_allowed(state: ServerState, ids: list[int] | None) -> None:
    """None of them is looked at where there are more than the model has."""
    size = state.engine.spec.vocab_size
    if ids is not None and len(ids) > size:
        message = f"allowed_token_ids has {len(ids)} ids, more than the vocabulary, {size}: name each once."
        raise ApiError(400, message, param="allowed_token_ids")


def checked(given: dict[str, Any]) -> SamplingParams:
    """SamplingParams of these. Raises ApiError for one out of range."""
    try:
        return SamplingParams(**given)
    except ValueError as e:
        name = str(e).partition("=")[0]
        raise ApiError(400, str(e), param=name if name in given else None) from None


def _biases(given: dict[str, float]) -> dict[int, float]:
    found = {}
    for token, bias in given.items():
        try:
            found[int(token)] = bias
        except ValueError:
            raise ApiError(
                400, f'logit_bias has the key {token[:40]!r}: its keys are token ids, like "1234".', param="logit_bias"
            ) from None
    return found


def _constraint(body: SamplingFields) -> dict[str, Any] | None:
    """What the text must be, by `structured_outputs` or `response_format`."""
    if body.structured_outputs is not None:
        given = body.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        return given or None
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ApiError(400, "response_format of type json_schema needs json_schema: {name, schema}.", param="response_format")
    return {"json": wanted.json_schema.schema_}


def _structured(constraint: dict[str, Any]) -> Any:
    """As the engine has it. Raises ApiError when it cannot enforce one, or for what is none."""
    kind = get_type_hints(SamplingParams).get("structured_outputs")
    if kind is None:
        raise ApiError(400, "this engine cannot enforce the shape of its output (response_format, structured_outputs, tool_choice).")
    try:
        return msgspec.convert(constraint, kind)
    except (msgspec.ValidationError, ValueError) as e:
        raise ApiError(400, f"structured_outputs: {e}", param="structured_outputs") from None
