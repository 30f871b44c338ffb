"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the model's tokens, without running it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from lockstep.frontend.errors import PromptError
from lockstep.frontend.tokenizer import decoder_of
from lockstep.server.batch import tokens_of
from lockstep.server.errors import ApiError
from lockstep.server.routes.models import check_model
from lockstep.server.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from lockstep.server.state import State
from lockstep.server.talk import prompt_of

router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, state: State) -> dict[str, Any]:
    """The token ids of a prompt, or of a conversation as the chat template writes it."""
    check_model(state, body.model)
    if (body.prompt is None) == (not body.messages):
        raise ApiError(400, "give either prompt or messages.", param="prompt")
    if body.prompt is None:
        ids = (await prompt_of(state, body))["prompt_token_ids"]
    else:
        try:
            ids = await tokens_of(state, body.prompt, special=body.add_special_tokens is not False)
        except PromptError as e:
            raise ApiError(400, str(e), param="prompt") from None
    strings = state.engine.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": state.engine.config.model.max_model_len, "tokens": ids, "token_strs": strings}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, state: State) -> dict[str, str]:
    """The text of token ids, special tokens included."""
    check_model(state, body.model)
    size = state.engine.spec.vocab_size
    wrong = next((t for t in body.tokens if not 0 <= t < size), None)
    if wrong is not None:
        raise ApiError(400, f"tokens holds {wrong}, outside the vocabulary: ids go from 0 to {size - 1}.", param="tokens")
    return {"prompt": decoder_of(state.engine.tokenizer, skip_special_tokens=False)(body.tokens)}


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
