"""`lockstep generate [MODEL] --prompt ...`: complete prompts, as text for a person or as JSON lines for a program.

Standard output carries the completions and nothing else; everything that is said about them goes to standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lockstep.cli import flags
from lockstep.cli.errors import UsageError, show_error
from lockstep.cli.session import HEADLESS, hushed, note, running, serve_node
from lockstep.config.source import find_folder, tokenizer_folder
from lockstep.config.tree import ModelConfig, opt
from lockstep.frontend.outputs import CompletionOutput, Position, RequestOutput
from lockstep.frontend.prompts import check_early
from lockstep.frontend.tokenizer import load_tokenizer
from lockstep.protocol import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from lockstep.llm import LLM

MAX_TOKENS = 128


@dataclass
class GenerateOptions:
    """What to complete, and how to show it."""

    prompt: list[str] = field(default_factory=list, metadata={"help": "A prompt; repeat it for several, which run together."})
    prompts_file: str | None = opt(
        None, 'A file with one prompt per line (*.jsonl: {"prompt": ...} or {"prompt_token_ids": [...]}); - is standard input.'
    )
    json: bool = opt(False, "Print one JSON line per prompt, in the prompts' order.")
    quiet: bool = opt(False, "Say nothing on standard error but errors.")
    headless: bool = opt(False, HEADLESS)


@dataclass
class Counts:
    """What a run came to."""

    prompts: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    failed: int = 0

    def add(self, output: RequestOutput) -> None:
        """Count a finished request; say so when it failed."""
        if output.error is not None:
            self.failed += 1
            show_error(f"prompt {self.prompts}: {output.error}")
        self.prompts += 1
        self.tokens_in += len(output.prompt_token_ids)
        self.add_tokens(output)

    def add_tokens(self, output: RequestOutput) -> None:
        """Count the tokens of an output, or of a piece of one."""
        self.tokens_out += sum(len(c.token_ids) for c in output.outputs)


def run(argv: list[str]) -> int:
    """Parse, load, complete, print."""
    parsed = flags.parse("generate", argv, GenerateOptions, max_tokens=MAX_TOKENS, description="Complete prompts.")
    options, sampling = parsed.options, parsed.sampling
    if options.headless:
        return serve_node(parsed.config, quiet=options.quiet)
    quiet = hushed(parsed.config, options.quiet)
    prompts = read_prompts(options)
    check_early(prompts, lambda: _tokenizer(parsed.config.model))  # a refusal need not wait for the weights
    with running(parsed.config, quiet=quiet, table=not options.json) as (llm, ready_s):
        counts, start_s = Counts(), time.monotonic()
        if options.json:
            _as_json(llm, prompts, sampling, counts)
        elif len(prompts) == 1 and sampling.n == 1:
            _as_stream(llm, prompts[0], sampling, counts)
        else:
            _as_text(llm, prompts, sampling, counts)
        took_s = time.monotonic() - start_s
    note(
        f"{counts.prompts} prompt{'s' if counts.prompts != 1 else ''}: {counts.tokens_in} tokens in, {counts.tokens_out} out, "
        f"{took_s:.2f} s, {counts.tokens_out / max(took_s, 1e-9):.1f} tok/s (ready after {ready_s:.1f} s)",
        quiet,
    )
    return 1 if counts.failed else 0


def read_prompts(options: GenerateOptions) -> list[Any]:
    """The prompts of --prompt, then of the file, else of standard input. Raises UsageError when there are none."""
    prompts: list[Any] = list(options.prompt)
    if options.prompts_file == "-" or (options.prompts_file is None and not prompts and not sys.stdin.isatty()):
        prompts += [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    elif options.prompts_file is not None:
        prompts += list(_from_file(Path(options.prompts_file)))
    if not prompts:
        raise UsageError("there is no prompt: give --prompt TEXT, --prompts-file FILE, or one prompt per line on standard input.")
    return prompts


def _tokenizer(model: ModelConfig) -> Any:
    return load_tokenizer(tokenizer_folder(model, find_folder(model.model, model.revision)))


def _from_file(path: Path) -> Iterator[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"prompts_file={str(path)!r} cannot be read: {e}.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield line
            continue
        try:
            yield msgspec.json.decode(line)
        except msgspec.DecodeError as e:
            raise UsageError(f"prompts_file={str(path)!r}, line {number} is not JSON: {e}.") from None


def in_order(outputs: Iterable[RequestOutput], counts: Counts) -> Iterator[tuple[int, RequestOutput]]:
    """Finished outputs in the prompts' order, each as soon as all before it are there."""
    waiting: dict[int, RequestOutput] = {}
    for output in outputs:
        waiting[int(output.request_id)] = output
        while counts.prompts in waiting:
            index = counts.prompts
            ready = waiting.pop(index)
            counts.add(ready)
            yield index, ready


def _as_json(llm: LLM, prompts: list[Any], sampling: SamplingParams, counts: Counts) -> None:
    for index, output in in_order(llm.stream(prompts, _kind(sampling, RequestOutputKind.FINAL_ONLY)), counts):
        sys.stdout.write(msgspec.json.encode(as_record(index, output)).decode() + "\n")
        sys.stdout.flush()


def _as_stream(llm: LLM, prompt: Any, sampling: SamplingParams, counts: Counts) -> None:
    """One completion, token by token. On a terminal its prompt stands before it, dimmed."""
    if sys.stdout.isatty() and isinstance(prompt, str):
        sys.stdout.write(f"\033[2m{prompt}\033[0m")
    begun = False
    try:
        for piece in llm.stream([prompt], _kind(sampling, RequestOutputKind.DELTA)):
            if piece.finished:
                counts.add(piece)  # the prompt, and the last piece's tokens
            else:
                counts.add_tokens(piece)
            begun = True
            for completion in piece.outputs:
                sys.stdout.write(completion.text)
            sys.stdout.flush()
    finally:
        if begun:  # an error's line stands by itself
            sys.stdout.write("\n")
            sys.stdout.flush()


def _as_text(llm: LLM, prompts: list[Any], sampling: SamplingParams, counts: Counts) -> None:
    """Every completion under a label that says which prompt it belongs to."""
    for index, output in in_order(llm.stream(prompts, _kind(sampling, RequestOutputKind.FINAL_ONLY)), counts):
        for completion in output.outputs:
            which = f"{index}.{completion.index}" if sampling.n > 1 else str(index)
            sys.stdout.write(f"[{which}] {shorten(output)}\n{completion.text}\n\n")
        sys.stdout.flush()


def shorten(output: RequestOutput, width: int = 60) -> str:
    """A prompt as one short line."""
    text = repr(output.prompt) if output.prompt is not None else f"{len(output.prompt_token_ids)} token ids"
    return text if len(text) <= width else text[: width - 3] + "..."


def as_record(index: int, output: RequestOutput) -> dict[str, Any]:
    """A finished request as the JSON line's object."""
    tokens_in, tokens_out = len(output.prompt_token_ids), sum(len(c.token_ids) for c in output.outputs)
    record: dict[str, Any] = {
        "index": index,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "outputs": [_completion(c) for c in output.outputs],
        "usage": {
            "prompt_tokens": tokens_in,
            "completion_tokens": tokens_out,
            "total_tokens": tokens_in + tokens_out,
            "cached_tokens": output.num_cached_tokens,
        },
    }
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [None if p is None else _position(p) for p in output.prompt_logprobs]
    return record


def _completion(c: CompletionOutput) -> dict[str, Any]:
    return {
        "index": c.index,
        "token_ids": c.token_ids,
        "text": c.text,
        "finish_reason": c.finish_reason,
        "stop_reason": c.stop_reason,
        "cumulative_logprob": c.cumulative_logprob,
        "logprobs": None if c.logprobs is None else [_position(p) for p in c.logprobs],
    }


def _position(position: Position) -> dict[str, dict[str, Any]]:
    return {str(token): entry._asdict() for token, entry in position.items()}


def _kind(sampling: SamplingParams, kind: RequestOutputKind) -> SamplingParams:
    return msgspec.structs.replace(sampling, output_kind=kind)
