"""`lockstep chat [MODEL]`: talk with the model in the terminal, or pipe one message per line into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from lockstep.cli import flags
from lockstep.cli.dialogue import is_person, read_lines, write_pieces
from lockstep.cli.session import HEADLESS, note, running, serve_node
from lockstep.config.tree import opt
from lockstep.engine.errors import RequestError
from lockstep.frontend.chat import render
from lockstep.protocol import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from lockstep.llm import LLM

MAX_TOKENS = 512
COMMANDS = "/clear forgets the conversation, /system TEXT sets the system message, /exit ends it; Ctrl-C stops an answer."


@dataclass
class ChatOptions:
    """How the conversation starts, and how it is shown."""

    system: str | None = opt(None, "The system message.")
    quiet: bool = opt(False, "Say nothing on standard error but errors.")
    headless: bool = opt(False, HEADLESS)


class Conversation:
    """The messages so far; the system message comes first and survives /clear."""

    def __init__(self, system: str | None) -> None:
        self.system = system
        self.turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def command(self, line: str) -> str | None:
        """Carry out a /command; what to tell the person. None ends the conversation."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit", "/bye"):
            return None
        if word == "/clear":
            self.turns.clear()
            return "The conversation starts again."
        if word == "/system":
            self.system = rest.strip() or None
            return f"System message: {self.system}" if self.system else "No system message."
        return COMMANDS if word in ("/help", "/?") else f"{word} is not a command. {COMMANDS}"


def run(argv: list[str]) -> int:
    """Parse, load, and answer until the input ends."""
    parsed = flags.parse("chat", argv, ChatOptions, max_tokens=MAX_TOKENS, description="Talk with the model in the terminal.")
    if parsed.options.headless:
        return serve_node(parsed.config, quiet=parsed.options.quiet)
    talk = Conversation(parsed.options.system)
    sampling = msgspec.structs.replace(parsed.sampling, n=1, output_kind=RequestOutputKind.DELTA)
    with running(parsed.config, quiet=parsed.options.quiet, table=False) as (llm, _):
        if is_person():
            note(COMMANDS, parsed.options.quiet)
        for line in read_lines():
            if line.startswith("/"):
                reply = talk.command(line)
                if reply is None:
                    break
                note(reply, parsed.options.quiet)
            elif line.strip():
                answer(llm, talk, line, sampling)
    return 0


def answer(llm: LLM, talk: Conversation, line: str, sampling: SamplingParams) -> None:
    """Add the person's message, stream the answer to standard output, and keep both."""
    talk.turns.append({"role": "user", "content": line})
    try:
        outputs = llm.stream([render(llm.get_tokenizer(), talk.messages)], sampling)
        text = write_pieces(completion.text for output in outputs for completion in output.outputs).text
    except RequestError as e:
        talk.turns.pop()
        note(f"{e} (/clear starts a new conversation)")
        return
    talk.turns.append({"role": "assistant", "content": text})
