"""How one request wants its tokens chosen."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import msgspec

MAX_N = 64
MAX_LOGPROBS = 128
MAX_TOKENS = 2**31
CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")  # of `StructuredOutputs`


class RequestOutputKind(IntEnum):
    """What a stream of outputs carries: all text so far, what is new, or only the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class StructuredOutputs(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the output must look like: exactly one of the first five fields says it. Raises ValueError otherwise.

    json: a JSON schema, as a dict or as its text. regex: the whole output matches it (no look-around, no back references).
    choice: the output is one of these. grammar: in Lark's syntax, from the rule `start` on. json_object: any JSON object.
    The other two are for JSON: whitespace_pattern is the regex of what may stand between tokens (None: a little of any),
    disable_any_whitespace forbids it. Treat as immutable once made.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        set_ = [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]
        if len(set_) != 1:
            raise ValueError(f"structured_outputs has {set_ or 'no constraint'}: give exactly one of {', '.join(CONSTRAINTS)}.")
        name, value = set_[0], getattr(self, set_[0])
        rule, ok = {
            "json": ("a JSON schema: a dict, or its text", isinstance(value, dict | str)),
            "regex": ("a non-empty regular expression", isinstance(value, str) and value != ""),
            "choice": ("a non-empty list of non-empty strings", bool(value) and _strings(value)),
            "grammar": ("a non-empty text in Lark's syntax", isinstance(value, str) and value != ""),
            "json_object": ("true, or left out", value is True),
        }[name]
        if not ok:
            raise ValueError(f"structured_outputs.{name}={value!r} is invalid: it must be {rule}.")
        spaced = self.disable_any_whitespace or self.whitespace_pattern is not None
        if spaced and name not in ("json", "json_object"):
            raise ValueError(f"structured_outputs has {name} with a rule about whitespace: that is for json and json_object; leave it out.")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError("structured_outputs has both disable_any_whitespace and whitespace_pattern: give one of them.")


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The sampling parameters of one request, with the ecosystem's names and defaults.

    Raises ValueError (naming the parameter, its value, the rule and the remedy) when a value is out of range.
    Treat as immutable once made.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputs | None = None
    bad_words_token_ids: list[list[int]] | None = None  # written by the frontend, which has the tokenizer

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if self.top_k == -1:  # an older spelling of "off" that many clients still send
            self.top_k = 0
        for name, rule, ok in self._rules():
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r} is invalid: it must be {rule}.")

    def _rules(self) -> list[tuple[str, str, bool]]:
        """(parameter, rule in words, whether it holds) for every range rule."""
        return [*self._shape_rules(), *self._end_rules(), *self._weight_rules()]

    def _shape_rules(self) -> list[tuple[str, str, bool]]:
        """Rules of how many completions, and of the distribution they are drawn from."""
        seed_ok = self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**63)
        return [
            ("n", f"an integer from 1 to {MAX_N}", _is_int(self.n) and 1 <= self.n <= MAX_N),
            ("temperature", "a number from 0 (greedy) to 100", _between(self.temperature, 0, 100)),
            ("top_p", "greater than 0 and at most 1", _between(self.top_p, 0, 1) and self.top_p > 0),
            ("top_k", "0 (off) or a positive integer", _is_int(self.top_k) and self.top_k >= 0),
            ("min_p", "from 0 to 1", _between(self.min_p, 0, 1)),
            ("seed", "an integer from -2**63 to 2**63-1, or None", seed_ok),
            ("logprobs", f"from 0 to {MAX_LOGPROBS}, or None", _count(self.logprobs)),
            ("prompt_logprobs", f"from 0 to {MAX_LOGPROBS}, or None", _count(self.prompt_logprobs)),
        ]

    def _end_rules(self) -> list[tuple[str, str, bool]]:
        """Rules of where a completion ends."""
        max_ok = self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1)
        most = self.max_tokens if _is_int(self.max_tokens) else MAX_TOKENS
        return [
            ("stop", "a string or a list of non-empty strings", _strings(self.stop)),
            ("stop_token_ids", "a list of token ids (integers of at least 0)", _ids(self.stop_token_ids)),
            ("max_tokens", "at least 1, or None for no limit but the model's length", max_ok),
            ("min_tokens", "from 0 to max_tokens", _is_int(self.min_tokens) and 0 <= self.min_tokens <= (most or 0)),
            ("bad_words", "a list of non-empty strings", _strings(self.bad_words)),
        ]

    def _weight_rules(self) -> list[tuple[str, str, bool]]:
        """Rules of what makes a token more or less likely."""
        bias = self.logit_bias or {}
        bias_ok = all(_is_int(k) and k >= 0 and _between(v, -100, 100) for k, v in bias.items())
        allowed_ok = self.allowed_token_ids is None or (bool(self.allowed_token_ids) and _ids(self.allowed_token_ids))
        repetition_ok = _between(self.repetition_penalty, 0, 100) and self.repetition_penalty > 0
        return [
            ("repetition_penalty", "greater than 0 and at most 100", repetition_ok),
            ("presence_penalty", "from -2 to 2", _between(self.presence_penalty, -2, 2)),
            ("frequency_penalty", "from -2 to 2", _between(self.frequency_penalty, -2, 2)),
            ("logit_bias", "a map of token id to a bias from -100 to 100", bias_ok),
            ("allowed_token_ids", "a non-empty list of token ids", allowed_ok),
            (
                "structured_outputs",
                "StructuredOutputs, or None",
                self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputs),
            ),
        ]

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < 1e-5


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _between(x: Any, low: float, high: float) -> bool:
    """Whether x is a number in [low, high]; NaN is in no interval."""
    return isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high


def _count(x: Any) -> bool:
    return x is None or (_is_int(x) and 0 <= x <= MAX_LOGPROBS)


def _ids(x: Any) -> bool:
    return x is None or (isinstance(x, list) and all(_is_int(t) and t >= 0 for t in x))


def _strings(x: Any) -> bool:
    return x is None or (isinstance(x, list) and all(isinstance(s, str) and s for s in x))
