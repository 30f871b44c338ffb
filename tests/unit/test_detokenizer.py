"""Text as it grows: equal to decoding everything at once, never half a character, stop strings across any border."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lockstep.frontend.detokenizer import UNKNOWN, WINDOW, Detokenizer, StopChecker

CORPUS = ["def add(a, b):\n    return a + b\n", "naïve café, 你好世界, 😀😃👩‍👩‍👧 ключ", "the quick brown fox " * 3]
SPECIAL = 0


@cache
def byte_level() -> Tokenizer:
    """A byte-level BPE with some merges, so that tokens hold parts of characters, several characters, or both."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(vocab_size=330, special_tokens=["<eos>"], initial_alphabet=alphabet))
    return made


@cache
def sentencepiece_like() -> Tokenizer:
    """Words begin with a marked space, and what is not in the vocabulary is written byte by byte."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁the", "▁cat"]
    made = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return made


def decode_with(tokenizer: Tokenizer) -> Any:
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def chunks(ids: list[int], sizes: list[int]) -> list[list[int]]:
    out, at = [], 0
    for size in sizes:
        out.append(ids[at : at + size])
        at += size
    return [*out, ids[at:]]


SIZES = st.lists(st.integers(0, 5), max_size=40)


@given(ids=st.lists(st.integers(0, 329), max_size=120), sizes=SIZES)
@settings(max_examples=300, deadline=None)
@example(ids=[SPECIAL] * 60, sizes=[1] * 60)
def test_any_tokens_give_the_text_of_all_at_once(ids: list[int], sizes: list[int]) -> None:
    decode = decode_with(byte_level())
    ids = [i for i in ids if i < byte_level().get_vocab_size()]
    grown = Detokenizer(decode, skip=frozenset({SPECIAL}))
    parts = [grown.extend(part) for part in chunks(ids, sizes)]
    assert "".join(parts) + grown.finish() == decode(ids)


@given(text=st.text(max_size=60), sizes=SIZES)
@settings(max_examples=200, deadline=None)
def test_text_comes_in_whole_characters(text: str, sizes: list[int]) -> None:
    ids = byte_level().encode(text).ids
    grown = Detokenizer(decode_with(byte_level()))
    parts = [grown.extend(part) for part in chunks(ids, sizes)]
    if UNKNOWN not in text:
        assert not any(UNKNOWN in part for part in parts)
    assert "".join(parts) + grown.finish() == text


@given(lead=st.text(max_size=30), text=st.text(max_size=30))
@settings(max_examples=150, deadline=None)
def test_the_prompt_as_context_changes_nothing_for_bytes(lead: str, text: str) -> None:
    prompt, ids = byte_level().encode(lead).ids, byte_level().encode(text).ids
    grown = Detokenizer(decode_with(byte_level()), context=prompt)
    assert "".join(grown.extend([i]) for i in ids) + grown.finish() == text


def test_the_first_word_keeps_its_space_after_a_prompt() -> None:
    the, cat = sentencepiece_like().token_to_id("▁the"), sentencepiece_like().token_to_id("▁cat")
    assert Detokenizer(decode_with(sentencepiece_like()), context=[the]).extend([cat]) == " cat"
    assert Detokenizer(decode_with(sentencepiece_like())).extend([cat]) == "cat"


@given(text=st.text(alphabet="你好é😀 the cat", max_size=40))
@settings(max_examples=150, deadline=None)
def test_byte_fallback_characters_appear_when_complete(text: str) -> None:
    ids = []
    for c in text:
        known = sentencepiece_like().token_to_id("▁" if c == " " else c)
        ids += [known] if known is not None else [sentencepiece_like().token_to_id(f"<0x{b:02X}>") for b in c.encode()]
    grown = Detokenizer(decode_with(sentencepiece_like()), context=[sentencepiece_like().token_to_id("▁the")])
    parts = [grown.extend([i]) for i in ids]
    assert not any(UNKNOWN in part for part in parts)
    assert "".join(parts) + grown.finish() == text


def test_half_a_character_waits_and_is_shown_at_the_end_as_unknown() -> None:
    first, *_ = byte_level().encode("😀x").ids
    euro = byte_level().encode("€").ids
    assert len(euro) == 3, "the vocabulary must spell this character in bytes"
    grown = Detokenizer(decode_with(byte_level()))
    assert [grown.extend([t]) for t in euro] == ["", "", "€"]
    cut = Detokenizer(decode_with(byte_level()))
    assert cut.extend(euro[:2]) == ""
    assert cut.finish() == UNKNOWN
    assert first >= 0


def test_a_long_run_of_garbage_is_not_held_back_for_ever() -> None:
    lone = byte_level().encode("€").ids[1]  # a continuation byte: never the start of a character
    grown = Detokenizer(decode_with(byte_level()))
    text = "".join(grown.extend([lone]) for _ in range(100))
    assert len(text) > 80
    assert text + grown.finish() == UNKNOWN * 100


def test_the_work_per_token_does_not_grow() -> None:
    longest = 0

    def decode(ids: Any) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return byte_level().decode(list(ids))

    grown = Detokenizer(decode)
    for token in byte_level().encode("the quick brown fox 你好 " * 200).ids:
        grown.extend([token])
    assert longest <= WINDOW + 4


# --- stop strings ---


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The oracle: the earliest match in the whole text, the first listed one where two begin together."""
    found = [(text.find(s), i) for i, s in enumerate(stops) if s in text]
    if not found:
        return text, None
    at, i = min(found)
    return text[: at + len(stops[i]) * include], stops[i]


@given(
    text=st.text(alphabet="ab\n", max_size=40),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_character_by_character_finds_the_stop_that_completes_first(text: str, stops: list[str], include: bool) -> None:
    checker, shown, end = StopChecker(stops, include=include), "", len(text)
    for i, c in enumerate(text):
        shown += checker.feed(c)
        assert text.startswith(shown), "what was shown is never taken back"
        if checker.matched is not None:
            end = i + 1
            break
    shown += checker.finish()
    # Fed one character at a time, the text ends where the first stop string is complete.
    assert (shown, checker.matched) == expected(text[:end], stops, include)
    if checker.matched is None:
        assert not any(s in text for s in stops)


def test_all_at_once_takes_the_earliest() -> None:
    checker = StopChecker(["zz", "b"])
    assert checker.feed("aabzz") == "aa"
    assert checker.matched == "b"
    assert checker.feed("more") == ""
    assert checker.finish() == ""


def test_text_is_held_back_only_while_it_could_be_a_stop() -> None:
    checker = StopChecker(["END"])
    assert checker.feed("x E") == "x "
    assert checker.feed("N") == ""
    assert checker.feed("ough") == "ENough"
    assert checker.feed("EN") == ""
    assert checker.finish() == "EN"


@pytest.mark.parametrize(("include", "shown"), [(False, "ab"), (True, "abEND")])
def test_stop_string_is_kept_only_when_asked(include: bool, shown: str) -> None:
    assert StopChecker(["END"], include=include).feed("abENDcd") == shown


def test_before_min_tokens_nothing_stops() -> None:
    checker = StopChecker(["b"])
    assert checker.feed("abab", may_stop=False) == "abab"
    assert checker.matched is None
    assert checker.feed("xb") == "x"
    assert checker.matched == "b"
