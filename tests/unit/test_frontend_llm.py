"""The offline LLM over a fake executor: order, parameters, errors and clean ends, in milliseconds."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lockstep.llm
from lockstep import LLM, SamplingParams
from lockstep.cluster import factory
from lockstep.config.errors import ConfigError
from lockstep.engine.errors import RequestError
from lockstep.executor.contract import ExecutorError
from lockstep.frontend.errors import PromptError
from lockstep.protocol import RequestOutputKind
from lockstep.testing.fakes import FakeExecutor
from lockstep.testing.tiny import make_tiny

LONG = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama"))


@pytest.fixture
def start(folder: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """LLMs whose ranks are fake: `start(fail_at_step=3)`. The executor is `llm._client.core.executor`."""

    def make(settings: dict[str, Any] | None = None, **fake: Any) -> LLM:
        def executor(config: Any, spec: Any, where: Path) -> FakeExecutor:
            return FakeExecutor(vocab_size=spec.vocab_size, max_concurrent_batches=2, lag=1, **fake)

        monkeypatch.setattr(factory, "make_executor", executor)
        return LLM(folder, device="cpu", max_model_len=64, **(settings or {}))

    return make


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [c.token_ids for o in outputs for c in o.outputs]


def test_outputs_come_in_the_prompts_order_however_long_each_takes(start: Callable[..., LLM]) -> None:
    with start() as llm:
        lengths = [9, 1, 5, 2]
        outputs = llm.generate([f"prompt {i}" for i in range(4)], [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths])
    assert [o.prompt for o in outputs] == [f"prompt {i}" for i in range(4)]
    assert [len(t) for t in tokens(outputs)] == lengths
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)


def test_one_prompt_several_prompts_and_none(start: Callable[..., LLM]) -> None:
    with start() as llm:
        greedy = SamplingParams(max_tokens=3, seed=1)
        ids = llm.get_tokenizer()("hello")["input_ids"]
        whole = [llm.generate(form, greedy) for form in ("hello", ids, ["hello"], [ids], {"prompt": "hello"}, [{"prompt_token_ids": ids}])]
        assert len({tuple(tokens(outputs)[0]) for outputs in whole}) == 1
        assert all(len(outputs) == 1 for outputs in whole)
        assert llm.generate([]) == []


def test_the_default_is_the_ecosystems(start: Callable[..., LLM]) -> None:
    with start() as llm:
        (output,) = llm.generate("hello")
        assert len(output.outputs[0].token_ids) <= 16


def test_n_completions_are_inside_one_output(start: Callable[..., LLM]) -> None:
    with start() as llm:
        (output,) = llm.generate("hello", SamplingParams(n=3, max_tokens=4, ignore_eos=True))
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3


def test_the_same_engine_seed_gives_the_same_tokens(start: Callable[..., LLM]) -> None:
    def run(seed: int) -> list[list[int]]:
        with start({"seed": seed}) as llm:
            return tokens(llm.generate(["a", "a"], LONG))

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1)[0] != run(1)[1], "two requests without a seed have their own"


def test_a_request_seed_is_its_own_whatever_runs_beside_it(start: Callable[..., LLM]) -> None:
    seeded = SamplingParams(max_tokens=6, seed=5, ignore_eos=True)
    with start() as llm:
        alone = tokens(llm.generate("a", seeded))
        assert tokens(llm.generate(["b", "a", "c"], [LONG, seeded, LONG]))[1] == alone[0]


def test_a_stop_string_ends_its_request_and_frees_its_blocks(start: Callable[..., LLM]) -> None:
    with start() as llm:
        (full,) = llm.generate("hello", SamplingParams(max_tokens=30, seed=3, ignore_eos=True))
        text = full.outputs[0].text
        stop = text[8:10]
        (cut,) = llm.generate("hello", SamplingParams(max_tokens=30, seed=3, ignore_eos=True, stop=stop))
        assert cut.outputs[0].text == text[: text.index(stop)]
        assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
        assert len(cut.outputs[0].token_ids) < 30
        llm.generate("x", SamplingParams(max_tokens=1))
        assert (llm.stats().running, llm.stats().waiting) == (0, 0)


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        (["ok", ""], None, "empty prompt"),
        (["ok", "x" * 400], None, "max_model_len=64"),
        (["ok", [1, 99999]], None, "99999"),
        (["ok", 5], None, "prompt"),
        (["ok", "ok"], [SamplingParams()], "sampling_params has 1 entries for 2 prompts"),
        (["ok"], SamplingParams(logit_bias={99999: 1.0}), "99999"),
    ],
)
def test_a_bad_request_is_refused_before_any_runs(start: Callable[..., LLM], prompts: Any, params: Any, words: str) -> None:
    with start() as llm:
        with pytest.raises((RequestError, PromptError), match=words):
            llm.generate(prompts, params)
        assert llm._client.core.executor.issued == 0  # type: ignore[attr-defined]
        assert tokens(llm.generate("ok", SamplingParams(max_tokens=2, ignore_eos=True))), "the engine still works"


def test_a_refused_prompt_is_named_by_its_place_and_no_bar_is_shown(start: Callable[..., LLM], capsys: pytest.CaptureFixture[str]) -> None:
    with start() as llm:
        llm.generate(["a", "b", "c"], LONG, use_tqdm=False)
        capsys.readouterr()
        for prompts, words in (
            (["ok", ""], r"^prompts\[1\]: an empty prompt"),
            (["ok", "ok", "x" * 400], r"^prompts\[2\]: the prompt has \d+ tokens, .*max_model_len=64"),
            (["ok", [1, 99999]], r"^prompts\[1\]: prompt holds token id 99999"),
            (["ok", 5], r"^prompts\[1\]: prompt is a int"),
            ("", r"^an empty prompt"),
        ):
            with pytest.raises((RequestError, PromptError), match=words):
                llm.generate(prompts, LONG)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("form", ["\ud800", {"prompt": "\ud800"}, ["ok", "a\udc00"]])
def test_half_a_surrogate_pair_is_no_text(start: Callable[..., LLM], form: Any) -> None:
    which = r"prompts\[1\]: prompt has the lone surrogate '\\udc00' at position 1" if isinstance(form, list) else "^prompt has the lone"
    with start() as llm, pytest.raises(PromptError, match=which):
        llm.generate(form)


def test_half_a_surrogate_pair_in_a_conversation_or_a_bad_word(start: Callable[..., LLM]) -> None:
    with start() as llm:
        with pytest.raises(PromptError, match="messages has the lone surrogate"):
            llm.chat([{"role": "user", "content": "\ud800"}])
        with pytest.raises(PromptError, match="bad_words has the lone surrogate"):
            llm.generate("ok", SamplingParams(bad_words=["\ud800"]))


@pytest.mark.parametrize("given", [{"temperature": 0}, [{"temperature": 0}], {}, "greedy", 3])
def test_sampling_params_of_another_kind_are_named(start: Callable[..., LLM], given: Any) -> None:
    with start() as llm, pytest.raises(PromptError, match=r"sampling_params=.* is a \w+: give SamplingParams"):
        llm.generate("ok", given)


def test_impossible_parameters_are_value_errors() -> None:
    with pytest.raises(ValueError, match="temperature=-1"):
        SamplingParams(temperature=-1)


def test_priorities_are_one_per_prompt(start: Callable[..., LLM]) -> None:
    with start({"scheduling_policy": "priority", "max_num_seqs": 1, "async_scheduling": False}) as llm:
        order = [llm._inputs.job(p, LONG, priority=i) for p, i in (("a", 2), ("b", 0), ("c", 1))]
        finished = [o.request_id for o in llm._run(order) if o.finished]
        assert finished == [order[1].request_id, order[2].request_id, order[0].request_id]
        assert len(llm.generate(["a", "b"], LONG, priority=[1, 0])) == 2
        with pytest.raises(PromptError, match="priority has 1 entries for 2 prompts"):
            llm.generate(["a", "b"], LONG, priority=[1])


def test_unknown_and_impossible_settings(folder: str) -> None:
    with pytest.raises(TypeError, match=r"'block_sise' is not a setting.*'block_size'"):
        LLM(folder, block_sise=3)
    with pytest.raises(ConfigError, match="block_size=3"):
        LLM(folder, block_size=3)


@pytest.mark.parametrize("fail_on", ["issue", "result"])
def test_a_rank_that_dies_in_the_middle_raises_to_the_caller(start: Callable[..., LLM], fail_on: str) -> None:
    with start(fail_at_step=3, fail_on=fail_on) as llm:
        with pytest.raises(ExecutorError, match="rank 0 died in step 3"):
            llm.generate(["a", "b"], LONG)
        with pytest.raises(ExecutorError, match="rank 0 died in step 3"):
            llm.generate("again", LONG)


def test_one_sick_request_is_an_error_in_its_output(start: Callable[..., LLM]) -> None:
    with start(sick=lambda name, at: name == "1" and at > 5) as llm:
        good, bad = llm.generate(["a", "b"], LONG)
    assert (good.error, good.outputs[0].finish_reason) == (None, "length")
    assert bad.outputs[0].finish_reason == "error"
    assert bad.error


def test_interrupting_generate_leaves_nothing_running(start: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    with start() as llm:
        step, calls = llm._client.step, []

        def interrupted() -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return step()

        monkeypatch.setattr(llm._client, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], LONG)
        assert len(tokens(llm.generate("c", LONG))[0]) == 12
        assert (llm.stats().running, llm.stats().waiting) == (0, 0)


def test_streams_are_cumulative_or_deltas(start: Callable[..., LLM]) -> None:
    with start() as llm:
        params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
        seen = [o.outputs[0] for o in llm.stream("hello", params)]
        assert [len(c.token_ids) for c in seen] == list(range(1, 9))
        assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(seen))
        delta = SamplingParams(max_tokens=8, seed=1, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        parts = [o.outputs[0] for o in llm.stream("hello", delta)]
        assert "".join(p.text for p in parts) == seen[-1].text == llm.generate("hello", params)[0].outputs[0].text
        assert [t for p in parts for t in p.token_ids] == seen[-1].token_ids


def test_a_stream_left_early_is_aborted(start: Callable[..., LLM]) -> None:
    with start() as llm:
        stream = llm.stream(["a", "b"], LONG)
        next(stream)
        with pytest.raises(RuntimeError, match="unfinished"):
            llm.generate("c", LONG)
        stream.close()
        llm.generate("c", LONG)
        assert (llm.stats().running, llm.stats().waiting) == (0, 0)


def test_chat_renders_the_template_and_answers(start: Callable[..., LLM]) -> None:
    with start() as llm:
        talk = [{"role": "user", "content": "hello"}]
        (output,) = llm.chat(talk, LONG)
        expected = llm.get_tokenizer().apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        assert output.prompt == expected
        assert len(llm.chat([talk, talk, talk], LONG)) == 3
        (bare,) = llm.chat(talk, LONG, add_generation_prompt=False)
        assert expected.startswith(bare.prompt)
        assert bare.prompt != expected
        (own,) = llm.chat(talk, LONG, chat_template="{{ messages[0].content }}!{{ more }}", chat_template_kwargs={"more": "?"})
        assert own.prompt == "hello!?"


def test_the_progress_bar_is_on_standard_error_and_can_be_off(start: Callable[..., LLM], capsys: pytest.CaptureFixture[str]) -> None:
    with start() as llm:
        capsys.readouterr()
        llm.generate(["a", "b"], LONG, use_tqdm=False)
        assert capsys.readouterr() == ("", "")
        llm.generate(["a", "b"], LONG)
        shown = capsys.readouterr()
        assert "2/2" in shown.err
        assert "tok/s" in shown.err
        assert shown.out == ""


def test_shutdown_stops_the_executor_and_later_calls_say_so(start: Callable[..., LLM]) -> None:
    llm = start()
    executor: Any = llm._client.core.executor
    llm.shutdown()
    llm.shutdown()
    assert executor.is_shut_down
    with pytest.raises(ExecutorError, match="shut down"):
        llm.generate("a", LONG)


def test_a_dropped_llm_stops_its_executor(start: Callable[..., LLM]) -> None:
    llm = start()
    executor: Any = llm._client.core.executor
    del llm
    gc.collect()
    assert executor.is_shut_down


def test_an_executor_does_not_outlive_a_failed_start(start: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    made: list[FakeExecutor] = []
    start().shutdown()
    make = factory.make_executor

    def remember(*args: Any) -> FakeExecutor:
        made.append(make(*args))  # type: ignore[arg-type]
        return made[0]

    def broken(where: Path) -> Any:
        raise ConfigError("no tokenizer")

    monkeypatch.setattr(factory, "make_executor", remember)
    monkeypatch.setattr(lockstep.llm, "load_tokenizer", broken)
    with pytest.raises(ConfigError, match="no tokenizer"):
        LLM(folder, device="cpu")
    assert made[0].is_shut_down


def test_memory_and_stats_are_the_engines(start: Callable[..., LLM]) -> None:
    with start() as llm:
        llm.generate(["a", "b"], LONG)
        assert [m.rank for m in llm.memory()] == [0]
        assert llm.stats().generated_tokens == 24
        assert llm.config.scheduler.max_num_seqs, "the configuration has every automatic value"


def test_the_memory_plan_is_logged_for_those_who_ask(start: Callable[..., LLM], capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lockstep")
    before = (logger.level, logger.propagate, list(logger.handlers))
    try:
        start().shutdown()
        assert "KV cache:" not in capsys.readouterr().err
        start({"log_level": "info"}).shutdown()
        assert "KV cache:" in capsys.readouterr().err
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers[:] = before[1], before[2]
