"""The offline LLM end to end, with real ranks: what it writes is what transformers writes, whatever the split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep import LLM, SamplingParams
from lockstep.testing.tiny import make_tiny

PROMPTS = ["hello", "def add(a, b):\n    return", "naïve 你好 😀", "the quick brown fox jumps over the lazy dog " * 3]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """(model, tokenizer) of transformers, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), tensor_parallel_size=request.param, device="cpu", max_model_len=512, max_num_batched_tokens=64) as made:
        yield made


def greedy_of(reference: Any, prompt: str, count: int) -> list[int]:
    model, tokenizer = reference
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(ids))
    return list(out[0, ids.shape[1] :].tolist())


def test_greedy_tokens_and_text_are_transformers(llm: LLM, reference: Any) -> None:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = greedy_of(reference, prompt, 24)
        assert output.prompt_token_ids == reference[1](prompt)["input_ids"]
        assert output.outputs[0].token_ids == expected
        assert output.outputs[0].text == reference[1].decode(expected, skip_special_tokens=True)


def test_logprobs_are_those_of_the_logits(llm: LLM, reference: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    (output,) = llm.generate([PROMPTS[1]], params, use_tqdm=False)
    (done,) = output.outputs
    ids = output.prompt_token_ids + done.token_ids
    with torch.no_grad():
        table = torch.log_softmax(reference[0](torch.tensor([ids])).logits[0].double(), dim=-1)
    assert output.prompt_logprobs is not None
    assert done.logprobs is not None
    assert output.prompt_logprobs[0] is None
    got = [*output.prompt_logprobs[1:], *done.logprobs]
    for at, (chosen, entry) in enumerate(zip(ids[1:], got, strict=True)):
        assert entry is not None
        assert next(iter(entry)) == chosen
        assert math.isclose(entry[chosen].logprob, float(table[at, chosen]), abs_tol=1e-4)
        assert entry[chosen].rank == int((table[at] > table[at, chosen]).sum()) + 1
        top = table[at].topk(3 if at >= len(output.prompt_token_ids) - 1 else 2).indices.tolist()
        assert set(top) <= set(entry)
    total = sum(float(table[len(output.prompt_token_ids) - 1 + i, t]) for i, t in enumerate(done.token_ids))
    assert done.cumulative_logprob is not None
    assert math.isclose(done.cumulative_logprob, total, abs_tol=1e-3)


def test_a_stop_string_cuts_text_and_frees_the_engine(llm: LLM) -> None:
    (full,) = llm.generate([PROMPTS[1]], GREEDY, use_tqdm=False)
    text = full.outputs[0].text
    stop = text[10:13]
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=24, ignore_eos=True, stop=[stop, "never there"], include_stop_str_in_output=include
        )
        (cut,) = llm.generate([PROMPTS[1]], params, use_tqdm=False)
        assert cut.outputs[0].text == text[: text.index(stop) + len(stop) * include]
        assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
        assert full.outputs[0].token_ids[: len(cut.outputs[0].token_ids)] == cut.outputs[0].token_ids


def test_a_stop_token_is_reported_and_not_written(llm: LLM) -> None:
    (full,) = llm.generate([PROMPTS[0]], GREEDY, use_tqdm=False)
    ids = full.outputs[0].token_ids
    stop = next(t for i, t in enumerate(ids) if i >= 4 and t not in ids[:i])
    (cut,) = llm.generate(
        [PROMPTS[0]], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=[stop]), use_tqdm=False
    )
    (done,) = cut.outputs
    assert done.token_ids == ids[: ids.index(stop) + 1]
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    assert full.outputs[0].text.startswith(done.text)


def test_n_completions_differ_repeat_and_match_their_seed(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=11, max_tokens=12, ignore_eos=True)
    first, second = (llm.generate([PROMPTS[0]], params, use_tqdm=False)[0] for _ in range(2))
    assert [c.index for c in first.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in first.outputs}) == 4
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in second.outputs]
    alone = SamplingParams(n=1, temperature=1.0, seed=11, max_tokens=12, ignore_eos=True)
    crowd = llm.generate([PROMPTS[3], PROMPTS[0], PROMPTS[2]], alone, use_tqdm=False)
    assert crowd[1].outputs[0].token_ids == first.outputs[0].token_ids, "a seeded request does not depend on what runs beside it"


def test_bad_words_never_appear(llm: LLM) -> None:
    (full,) = llm.generate([PROMPTS[0]], GREEDY, use_tqdm=False)
    banned = next(w for t in full.outputs[0].token_ids if (w := llm.get_tokenizer().decode([t])).isascii() and w.strip())
    (clean,) = llm.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, bad_words=[banned]), use_tqdm=False)
    spelled = llm.get_tokenizer()(banned, add_special_tokens=False)["input_ids"]
    assert len(spelled) == 1
    assert spelled[0] in full.outputs[0].token_ids
    assert spelled[0] not in clean.outputs[0].token_ids


def test_streaming_says_the_same_in_pieces(llm: LLM) -> None:
    (whole,) = llm.generate([PROMPTS[2]], GREEDY, use_tqdm=False)
    seen = [o.outputs[0].text for o in llm.stream([PROMPTS[2]], GREEDY)]
    assert len(seen) == 24
    assert seen[-1] == whole.outputs[0].text


def test_chat_is_the_template_and_then_the_same_tokens(llm: LLM, reference: Any) -> None:
    talk = [{"role": "user", "content": "hello"}]
    (output,) = llm.chat(talk, GREEDY, use_tqdm=False)
    rendered = reference[1].apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert output.prompt == rendered
    (direct,) = llm.generate([{"prompt_token_ids": reference[1](rendered, add_special_tokens=False)["input_ids"]}], GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == direct.outputs[0].token_ids


def test_refused_requests_leave_the_engine_working(llm: LLM) -> None:
    for prompt, words in ((["x" * 5000], "max_model_len=512"), ([[1, 10**6]], "1000000"), ([""], "empty")):
        with pytest.raises(ValueError, match=words):
            llm.generate([PROMPTS[0], *prompt], GREEDY, use_tqdm=False)  # type: ignore[list-item]
    assert len(llm.generate([PROMPTS[0]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 24


def test_memory_shows_the_split(llm: LLM) -> None:
    ranks, size = llm.memory(), llm.config.parallel.tensor_parallel_size
    assert [m.rank for m in ranks] == list(range(size))
    assert all(m.weight_bytes > 0 and m.kv_bytes > 0 and m.peak_bytes > m.weight_bytes for m in ranks)


def test_two_engines_live_side_by_side(llm: LLM, folder: Path) -> None:
    before = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    with LLM(str(folder), device="cpu", max_model_len=256, tensor_parallel_size=2) as other:
        stream = llm.stream(PROMPTS, GREEDY)
        next(stream)
        theirs = other.generate(PROMPTS, GREEDY, use_tqdm=False)
        ours = {o.request_id: o.outputs[0].token_ids for o in stream if o.finished}
    assert [o.outputs[0].token_ids for o in theirs] == [o.outputs[0].token_ids for o in before]
    assert sorted(ours.values()) == sorted(o.outputs[0].token_ids for o in before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_gpu_writes_what_transformers_writes(folder: Path, reference: Any) -> None:
    with LLM(str(folder), device="cuda", dtype="float32", max_model_len=512, gpu_memory_utilization=0.2) as llm:
        assert llm.config.runtime.device == "cuda"
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy_of(reference, prompt, 24)
