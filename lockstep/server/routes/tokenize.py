"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the model's tokens, without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter

from lockstep.frontend.async_engine import LONG_TEXT
from lockstep.frontend.errors import PromptError
from lockstep.frontend.tokenizer import decoder_of
from lockstep.server.admission_cost import CHARS_PER_TOKEN, TOGETHER, characters_of
from lockstep.server.aside import T
from lockstep.server.batch import tokens_of
from lockstep.server.errors import ApiError
from lockstep.server.routes.models import check_model
from lockstep.server.routes.parsed import ParsedRoute
from lockstep.server.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from lockstep.server.state import ServerState, State
from lockstep.server.talk import prompt_of

router = APIRouter(tags=["tokens"], route_class=ParsedRoute)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, state: State) -> dict[str, Any]:
    """The token ids of a prompt, or of a conversation as the chat template writes it."""
    check_model(state, body.model)
    most = state.options.max_tokenize_characters
    length = characters_of(body.model_dump(include={"prompt", *TOGETHER}))
    if length > most:
        raise ApiError(
            400, f"the text has {length} characters, more than max_tokenize_characters={most}: send it in parts.", param="prompt"
        )
    if (body.prompt is None) == (not body.messages):
        raise ApiError(400, "give either prompt or messages.", param="prompt")
    if body.prompt is None:
        ids = (await prompt_of(state, body))["prompt_token_ids"]
    else:
        try:
            ids = await tokens_of(state, body.prompt, special=body.add_special_tokens is not False)
        except PromptError as e:
            raise ApiError(400, str(e), param="prompt") from None
    strings = None
    if body.return_token_strs:
        strings = await beside(state, ids, lambda: list(state.engine.tokenizer.convert_ids_to_tokens(ids)))
    return {"count": len(ids), "max_model_len": state.engine.config.model.max_model_len, "tokens": ids, "token_strs": strings}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, state: State) -> dict[str, str]:
    """The text of token ids, special tokens included."""
    check_model(state, body.model)
    size, count, most = state.engine.spec.vocab_size, len(body.tokens), state.options.max_tokenize_characters // CHARS_PER_TOKEN
    if count > most:
        message = f"tokens has {count} ids, more than {most}, as many as max_tokenize_characters={state.options.max_tokenize_characters}"
        raise ApiError(400, f"{message} of ordinary text are: send them in parts.", param="tokens")
    wrong = next((t for t in body.tokens if not 0 <= t < size), None)
    if wrong is not None:
        raise ApiError(400, f"tokens holds {wrong}, outside the vocabulary: ids go from 0 to {size - 1}.", param="tokens")
    decode = decoder_of(state.engine.tokenizer, skip_special_tokens=False)
    return {"prompt": await beside(state, body.tokens, lambda: decode(body.tokens))}


@router.get("/tokenizer_info")
async def tokenizer_info(state: State) -> dict[str, Any]:
    """What evaluation harnesses need to know of the tokenizer when they have no copy of it."""
    tokenizer = state.engine.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": state.engine.spec.vocab_size,
        "max_model_len": state.engine.config.model.max_model_len,
        **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")},
    }


async def beside(state: ServerState, ids: list[int], work: Callable[[], T]) -> T:
    """What `work` makes of token ids: of many of them beside the event loop."""
    return await state.aside.do(work) if len(ids) > LONG_TEXT // CHARS_PER_TOKEN else work()
