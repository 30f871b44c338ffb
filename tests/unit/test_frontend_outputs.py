"""Tokens on their way out: gathered by request, cut at stop strings, as cumulative, delta or final outputs."""

from __future__ import annotations

from typing import Any

import pytest

from lockstep.frontend.collector import Collector
from lockstep.frontend.inputs import Job
from lockstep.frontend.outputs import Logprob, RequestOutput, position
from lockstep.protocol import EngineOutput, EngineRequest, RequestOutputKind, SamplingParams, TokenLogprobs

EOS = 256


class Bytes:
    """A tokenizer of bytes, with as much of the interface as the frontend uses."""

    backend_tokenizer = None
    all_special_ids = [EOS]

    def decode(self, ids: list[int], skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False) -> str:
        parts = [bytes([i]) if i < EOS else b"" if skip_special_tokens else b"<eos>" for i in ids]
        return b"".join(parts).decode("utf-8", "replace")


def start(sampling: SamplingParams, name: str = "r") -> Collector:
    collector = Collector(Bytes())
    collector.start(job(sampling, name))
    return collector


def job(sampling: SamplingParams, name: str = "r") -> Job:
    ids = [name] if sampling.n == 1 else [f"{name}.{i}" for i in range(sampling.n)]
    requests = [EngineRequest(request_id=i, prompt_token_ids=[112], sampling=sampling, seed=0) for i in ids]
    return Job(name, "p", [112], sampling, requests)


def news(tokens: str | list[int], end: Any = None, name: str = "r", **more: Any) -> EngineOutput:
    ids = list(tokens.encode()) if isinstance(tokens, str) else tokens
    return EngineOutput(request_id=name, new_token_ids=ids, finish_reason=end, **more)


def one(outputs: list[RequestOutput]) -> Any:
    (output,) = outputs
    (completion,) = output.outputs
    return completion


def test_cumulative_outputs_hold_all_so_far_and_stay_as_they_were() -> None:
    collector = start(SamplingParams(max_tokens=9))
    first, none = collector.take([news("ab")])
    second, _ = collector.take([news("c", "length")])
    assert (one(first).text, one(first).token_ids, one(first).finish_reason, none) == ("ab", [97, 98], None, [])
    assert (one(second).text, one(second).token_ids, one(second).finish_reason) == ("abc", [97, 98, 99], "length")
    assert (first[0].finished, second[0].finished) == (False, True)


def test_delta_outputs_hold_what_is_new() -> None:
    collector = start(SamplingParams(output_kind=RequestOutputKind.DELTA, logprobs=0))
    lp = [TokenLogprobs([97], [-1.0], 1)]
    parts = [one(collector.take([news("a", logprobs=lp)])[0]), one(collector.take([news("a", "length", logprobs=lp)])[0])]
    assert [(p.text, p.token_ids, len(p.logprobs)) for p in parts] == [("a", [97], 1), ("a", [97], 1)]
    assert parts[1].cumulative_logprob == -2.0


def test_delta_outputs_join_to_the_whole_and_never_split_a_character() -> None:
    text = "né😀x"
    collector, got = start(SamplingParams(output_kind=RequestOutputKind.DELTA)), []
    for i, byte in enumerate(text.encode()):
        outputs, _ = collector.take([news([byte], "length" if i + 1 == len(text.encode()) else None)])
        got += [c.text for o in outputs for c in o.outputs]
    assert "".join(got) == text
    assert not any("\ufffd" in part for part in got)


def test_of_several_completions_each_tells_its_end_once() -> None:
    collector = start(SamplingParams(output_kind=RequestOutputKind.DELTA, n=2))
    told = [
        (c.index, c.text, c.finish_reason)
        for step in ([news("a", "stop", "r.0"), news("x", name="r.1")], [news("y", name="r.1")], [news("z", "length", "r.1")])
        for output in collector.take(step)[0]
        for c in output.outputs
    ]
    assert told == [(0, "", "stop"), (1, "x", None), (1, "y", None), (1, "z", "length")]


@pytest.mark.parametrize("stop", [None, "never"])
def test_final_outputs_come_once(stop: str | None) -> None:
    collector = start(SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, stop=stop))
    assert collector.take([news("ab")]) == ([], [])
    final, _ = collector.take([news("c", "length")])
    assert (one(final).text, one(final).token_ids) == ("abc", [97, 98, 99])


def test_n_completions_are_one_output() -> None:
    collector = start(SamplingParams(n=2, output_kind=RequestOutputKind.FINAL_ONLY))
    assert collector.take([news("ab", "length", "r.1")]) == ([], [])
    ((final,), _) = collector.take([news("x", "stop", "r.0", stop_reason=120)])
    assert [(c.index, c.text, c.finish_reason) for c in final.outputs] == [(0, "", "stop"), (1, "ab", "length")]


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abEND")])
def test_a_stop_string_across_steps_ends_the_request_and_aborts_it(kind: RequestOutputKind, include: bool, text: str) -> None:
    collector, got = start(SamplingParams(stop=["END"], include_stop_str_in_output=include, output_kind=kind, max_tokens=99)), []
    for part in ("ab", "EN"):
        outputs, abort = collector.take([news(part)])
        got += [c.text for o in outputs for c in o.outputs]
        assert abort == []
    (last,), abort = collector.take([news("Dxx")])
    got.append(last.outputs[0].text)
    assert abort == ["r"]
    assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason, last.finished) == ("stop", "END", True)
    assert ("".join(got) if kind == RequestOutputKind.DELTA else got[-1]) == text
    assert collector.take([news("late", "abort")]) == ([], []), "what the engine says after that is for nobody"


def test_tokens_after_the_one_that_completed_the_stop_are_dropped() -> None:
    collector = start(SamplingParams(stop="b"))
    outputs, _ = collector.take([news("abcd")])
    assert one(outputs).token_ids == [97, 98]


def test_a_stop_string_in_the_last_step_needs_no_abort() -> None:
    collector = start(SamplingParams(stop="b"))
    outputs, abort = collector.take([news("ab", "length")])
    assert (one(outputs).finish_reason, one(outputs).stop_reason, abort) == ("stop", "b", [])


def test_text_held_for_a_stop_string_is_given_at_the_end() -> None:
    collector = start(SamplingParams(stop="END"))
    assert one(collector.take([news("xEN")])[0]).text == "x"
    assert one(collector.take([news("", "length")])[0]).text == "xEN"


def test_no_stop_string_before_min_tokens() -> None:
    collector = start(SamplingParams(stop="b", min_tokens=2))
    outputs, abort = collector.take([news("ab")])
    assert (one(outputs).text, abort) == ("ab", [])
    outputs, abort = collector.take([news("cb")])
    assert (one(outputs).text, abort) == ("abc", ["r"])


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "ab")])
def test_the_token_that_stopped_is_text_only_when_asked(include: bool, text: str) -> None:
    collector = start(SamplingParams(stop_token_ids=[98], include_stop_str_in_output=include))
    outputs, _ = collector.take([news("ab", "stop", stop_reason=98)])
    assert (one(outputs).text, one(outputs).token_ids, one(outputs).stop_reason) == (text, [97, 98], 98)


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<eos>b")])
def test_special_tokens_are_skipped_unless_asked(skip: bool, text: str) -> None:
    collector = start(SamplingParams(skip_special_tokens=skip, ignore_eos=True))
    outputs, _ = collector.take([news([97, EOS, 98], "length")])
    assert one(outputs).text == text


def test_no_text_without_detokenizing() -> None:
    outputs, _ = start(SamplingParams(detokenize=False)).take([news("ab", "length")])
    assert (one(outputs).text, one(outputs).token_ids) == ("", [97, 98])


def test_logprobs_are_maps_with_the_chosen_token_first() -> None:
    collector = start(SamplingParams(logprobs=2))
    entry = TokenLogprobs([98, 97, 98], [-2.0, -0.5, -2.0], 2)
    outputs, _ = collector.take([news("b", "length", logprobs=[entry])])
    assert one(outputs).logprobs == [{98: Logprob(-2.0, 2, "b"), 97: Logprob(-0.5, 1, "a")}]
    assert next(iter(one(outputs).logprobs[0])) == 98
    assert one(outputs).cumulative_logprob == -2.0
    assert position(TokenLogprobs([97], [-1.0], 5), lambda t: None) == {97: Logprob(-1.0, 5, None)}


def test_no_logprobs_unless_asked() -> None:
    outputs, _ = start(SamplingParams()).take([news("b", "length")])
    assert (one(outputs).logprobs, one(outputs).cumulative_logprob) == (None, None)


def test_prompt_logprobs_begin_with_none() -> None:
    collector = start(SamplingParams(prompt_logprobs=0))
    (output,), _ = collector.take([news("b", "length", prompt_logprobs=[TokenLogprobs([97], [-1.0], 1)], num_cached_tokens=4)])
    assert output.prompt_logprobs == [None, {97: Logprob(-1.0, 1, "a")}]
    assert output.num_cached_tokens == 4


def test_errors_reach_the_caller() -> None:
    (output,), _ = start(SamplingParams()).take([news("a", "error", error="rank 1 died")])
    assert (output.error, output.outputs[0].finish_reason, output.finished) == ("rank 1 died", "error", True)


def test_forgotten_requests_are_ignored() -> None:
    collector = start(SamplingParams())
    collector.forget(["r", "unknown"])
    assert collector.take([news("a", "abort")]) == ([], [])


def test_requests_do_not_mix() -> None:
    collector = start(SamplingParams(), "a")
    collector.start(job(SamplingParams(), "b"))
    outputs, _ = collector.take([news("1", name="a"), news("2", name="b"), news("3", "length", "a")])
    assert {o.request_id: o.outputs[0].text for o in outputs} == {"a": "13", "b": "2"}
