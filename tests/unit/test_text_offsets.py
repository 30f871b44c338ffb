"""Offsets of tokens in their text, against the decoding of all of them at once."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lockstep.server.text_offsets import TextOffsets, prompt_offsets
from lockstep.testing.fakes import ByteTokenizer


class Tokenizer(ByteTokenizer):
    """With what the real ones have beside: which ids are special, and an option of decoding."""

    all_special_ids = (256, 257)

    def decode(self, ids: Any, skip_special_tokens: bool = True, **_: Any) -> str:
        return super().decode(ids, skip_special_tokens)


def offsets(ids: list[int], **options: Any) -> list[int]:
    tokenizer = Tokenizer()
    found = TextOffsets(tokenizer, **options)
    return [found.next(i, tokenizer.decode([i], skip_special_tokens=False)) for i in ids]


@given(st.text(max_size=40), st.text(max_size=10))
def test_bytes_have_the_offset_of_their_character(text: str, before: str) -> None:
    ids = list(text.encode())
    expected = [at for at, character in enumerate(text) for _ in character.encode()]
    assert offsets(ids) == expected
    assert offsets(ids, begin=7, context=list(before.encode())) == [7 + at for at in expected]


@given(st.lists(st.integers(0, 257), max_size=60))
def test_whatever_comes_they_do_not_decrease_and_stay_in_the_text(ids: list[int]) -> None:
    found = offsets(ids)
    assert found == sorted(found) and all(0 <= at <= len(Tokenizer().decode(ids)) for at in found)


def test_a_letter_behind_broken_bytes_is_where_it_stands() -> None:
    assert offsets([255, 97, 98]) == [0, 1, 2]


def test_special_tokens_count_where_the_text_has_them() -> None:
    assert offsets([97, 257, 98]) == [0, 1, 1]
    assert offsets([97, 257, 98], special=True) == [0, 1, 6]


def test_tokens_that_the_tokenizer_adds_to_a_prompt_are_not_in_its_text() -> None:
    tokenizer = Tokenizer()
    for ids, text, expected in (
        ([256, 97, 98], "ab", [0, 0, 1]),
        ([256, 97, 98], "<bos>ab", [0, 5, 6]),
        ([256, 97, 257, 98], "a<eos>b", [0, 0, 1, 6]),
        ([256, 257, 98, 257], "<eos>b", [0, 0, 5, 6]),
        ([256], "", [0]),
        ([256, 97], "another", [0, 0]),
    ):
        found = prompt_offsets(tokenizer, ids, text)
        assert [found.next(i, tokenizer.decode([i], skip_special_tokens=False)) for i in ids] == expected
