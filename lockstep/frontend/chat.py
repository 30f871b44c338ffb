"""Conversations to prompts, by the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.frontend.errors import PromptError
from lockstep.frontend.tokenizer import encode
from lockstep.utils.interrupt import at_once

Message = Mapping[str, Any]
Conversation = Sequence[Message]


def conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """One conversation or several, as a list of them."""
    if not messages:
        raise PromptError("messages is empty: give at least one {'role': 'user', 'content': ...}.")
    if isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]
    return list(messages)  # type: ignore[arg-type]


def check_template(name: str, text: str) -> None:
    """Compile a template where it will be rendered, in the tokenizer's sandbox. Raises ConfigError where that fails; name: of its file."""
    with at_once():
        from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=text)
    except (ImportError, MemoryError):
        raise
    except Exception as e:  # of Jinja, of Python (`break` outside of a loop), or of how deep it nests
        line = f" in line {number}" if (number := getattr(e, "lineno", None)) else ""
        told = str(getattr(e, "msg", None) or getattr(e, "message", None) or e).rstrip(".")
        raise ConfigError(
            f"chat_template={name!r} is no Jinja template: {told}{line}: correct it, or leave it out for the model's own."
        ) from None


def render(
    tokenizer: Any,
    talk: Conversation,
    add_generation_prompt: bool = True,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The prompt of a conversation: its text and token ids. The template writes the special tokens, so none are added.

    Raises PromptError for a message without role or content, a tokenizer without template, or a template that refuses.
    """
    for i, message in enumerate(talk):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise PromptError(f"messages[{i}]={message!r} must be a dict with `role` (text) and `content`.")
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise PromptError("this model has no chat template: give chat_template=..., or use generate() with a prompt.")
    try:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in talk],
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **(template_kwargs or {}),
        )
    except Exception as e:  # templates raise what they like: a refusal is the caller's message to read
        raise PromptError(f"the chat template cannot render these messages: {e}") from e
    return {"prompt": text, "prompt_token_ids": encode(tokenizer, text, "messages", add_special_tokens=False)}
