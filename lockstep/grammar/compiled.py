"""Constraints in llguidance's form, and whether it can compile them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from lockstep.grammar.bounds import GrammarError, check_text, checked_schema
from lockstep.protocol import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# A model that is fond of white space would write little else: a space, or a line break and some levels of indentation, is enough.
WHITESPACE = r"( |\n {0,8})?"
NOTHING = "no text at all matches it."
_LONGEST_REASON = 300
_REGEX = re.compile(r"regex parse error:.*?^error: ([^\n]*)", re.DOTALL | re.MULTILINE)


@cache
def limits() -> LLParserLimits:
    """What one grammar may cost. Fuel bounds time (some 0.5 s to build, 15 ms for a token), states bound memory (2 kB each)."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=300_000, max_lexer_states=10_000, max_grammar_size=100_000, verbose_errors=False, precompute_large_lexemes=False
    )


@contextmanager
def guarded() -> Iterator[None]:
    """Whatever the library raises is a GrammarError, also when it panics (no Exception, but of this one request all the same)."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, ImportError):
        raise
    except GrammarError:
        raise
    except BaseException as e:
        raise GrammarError(reason(str(e) or type(e).__name__)) from None


def grammar_of(wanted: StructuredOutputs) -> str:
    """The constraint in llguidance's form. Raises GrammarError when it is out of bounds."""
    from llguidance import LLMatcher, regex_to_lark

    check_text(wanted)
    if wanted.regex is not None:  # in which a digit is one of ten, as in a schema's patterns, and not one of Unicode's 760
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(wanted.regex, 'd')}/")
    if wanted.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice))
    if wanted.grammar is not None:
        return LLMatcher.grammar_from_lark(wanted.grammar)
    schema = checked_schema(wanted)
    options: Any = {"whitespace_pattern": wanted.whitespace_pattern or WHITESPACE}
    if wanted.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    with guarded():
        return LLMatcher.grammar_from_json_schema(schema, defaults=options)


def new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the start of a text. Raises GrammarError when the grammar does not compile, or nothing matches it."""
    from llguidance import LLMatcher

    with guarded():
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
        if not matcher.is_error():
            matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(reason(matcher.get_error()))
    if matcher.is_stopped() and not matcher.is_accepting():
        raise GrammarError(NOTHING)
    return matcher


def check(wanted: StructuredOutputs) -> None:
    """Raise GrammarError, with the reason, when outputs cannot be held to the constraint. Takes up to a second or so."""
    from llguidance import LLMatcher

    grammar = grammar_of(wanted)
    with guarded():
        wrong, notes = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=limits())
    if wrong:
        raise GrammarError(reason(notes[0]))
    if wanted.grammar is None:  # which may name special tokens, that only the model's tokenizer has
        new_matcher(_bytes_tokenizer(), grammar)


def reason(said: str) -> str:
    """What the library said, without what it adds for its own people, and not too long."""
    text = re.split(r"<non-verbose/>|<state>|<grammar>", said)[0].strip()
    regex = _REGEX.search(text)
    if regex:
        text = f"the regex is invalid: {regex[1].strip()}."
    text = text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."
    return NOTHING if text.startswith("NoExtension") else text or "the grammar is too complex."


class _Bytes:
    """A vocabulary of the 256 bytes: enough to try a grammar without a model's."""

    tokens = (*(bytes([i]) for i in range(256)), b"<eos>")
    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@cache
def _bytes_tokenizer() -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()))
