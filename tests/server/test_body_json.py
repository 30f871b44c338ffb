"""JSON bodies before they are parsed: what is counted, what is refused, and that nothing is parsed twice."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from lockstep.server import body_json
from lockstep.server.app import ROUTERS
from lockstep.server.body_json import MAX_CONTAINERS, MAX_DEPTH, MAX_NAMES, MAX_STRINGS, MAX_VALUES, Counts, parse
from lockstep.server.errors import ApiError
from lockstep.server.routes.parsed import ParsedRoute
from tests.server.scripted import Scripted


def test_nesting_counts_brackets_outside_of_text_only() -> None:
    assert parse(b'{"a": "' + b"[{" * 1000 + b'"}') == {"a": "[{" * 1000}
    assert parse(b'["' + b'\\"[' * 200 + b'"]') == ['"[' * 200]
    assert parse(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    with pytest.raises(ApiError, match="nested"):
        parse(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))
    assert len(parse(b"[" + b"[]," * (MAX_CONTAINERS - 2) + b"[]]")) == MAX_CONTAINERS - 1
    with pytest.raises(ApiError, match="arrays and objects"):
        parse(b"[" + b"[]," * MAX_CONTAINERS + b"[]]")
    Counts().read(b'{"a' + b"\\" * 100_000 + b"[" * 200)  # unterminated text: found in one go


def test_json_of_too_many_values_is_refused_before_it_is_parsed() -> None:
    for body, what in (
        (b"[" + b"1," * MAX_VALUES + b"1,1]", "values"),
        (b"[" + b'"",' * MAX_STRINGS + b'""]', "strings"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(MAX_NAMES + 1)) + b"}", "fields"),
    ):
        with pytest.raises(ApiError, match=f"more than [0-9]+ {what}"):
            parse(body)
    assert parse(b'{"a": "' + b'1,:\\"' * MAX_VALUES + b'"}')["a"] == '1,:"' * MAX_VALUES  # text may have them
    assert len(parse(b"[" + b"1," * (MAX_VALUES - 1) + b"1]")) == MAX_VALUES


def test_a_prompt_of_more_token_ids_than_any_context_has_is_told_as_one() -> None:
    with pytest.raises(ApiError, match="prompt: it has more than 1048576 token ids") as found:
        parse(b'{"model": "m", "prompt": [' + b"1," * 2_000_000 + b"1]}")
    assert (found.value.code, found.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("cut", range(-3, 4))
@pytest.mark.parametrize("text", [b"\\\\" * 8, b'\\"' * 8, b'\\\\\\"[' * 4, b"x" * 16, b'","' * 5])
def test_where_a_body_is_cut_for_counting_changes_nothing(text: bytes, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"a": ["' + text + b'", 12345678901234567890123, {"b": []}]}'
    whole, pieces = Counts(), Counts()
    whole.read(body)
    monkeypatch.setattr(body_json, "PIECE", len(body) // 2 + cut)
    pieces.read(body)
    monkeypatch.setattr(body_json, "PIECE", 1)
    bytewise = Counts()
    bytewise.read(body)
    for one in (pieces, bytewise):
        assert (one.containers, one.values, one.names, one.quotes) == (whole.containers, whole.values, whole.names, whole.quotes)
        assert one.depth == whole.depth == 0 and one.long_number and whole.long_number


def test_half_of_a_pair_is_told_wherever_it_is() -> None:
    for body in (b'["' + b"x" * 300 + b"\\ud83dabcdefgh" + b"y" * 300 + b'"]', b'["\\ud83d"]', b'["' + b"x" * 300 + b'\\ude00"]'):
        with pytest.raises(ApiError, match="surrogate"):
            parse(body)
    with pytest.raises(ApiError, match="no valid JSON"):
        parse(b'["' + b"x" * 300 + b"\\ud83d\\ude00" + b"y" * 300 + b'",]')


async def no_json(_: object) -> None:
    raise AssertionError("the body is parsed a second time")


def test_every_route_with_a_body_takes_it_as_it_was_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    routes = [route for router in ROUTERS for route in router.routes if getattr(route, "body_field", None) is not None]
    assert len(routes) >= 7
    assert [route for route in routes if not isinstance(route, ParsedRoute)] == []
    monkeypatch.setattr(Request, "json", no_json)
    assert Scripted("x").post("/tokenize", prompt="a").json()["count"] == 1
