"""Structured outputs through the whole engine: they fit, whatever the split, the batch, and what happens on the way."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lockstep import LLM, SamplingParams, StructuredOutputs
from lockstep.frontend.errors import PromptError
from lockstep.testing.tiny import make_tiny
from tests.parity.structured_cases import CASES, check, params

SEEDS = range(6)
SMALL: dict[str, Any] = {"device": "cpu", "max_model_len": 160, "num_gpu_blocks_override": 120, "block_size": 16}
SPLITS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
    "synchronous": {"async_scheduling": False},
    "tight": {"num_gpu_blocks_override": 13, "max_num_batched_tokens": 24, "max_num_seqs": 6},  # preempted, and prefilled in chunks
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return {"demo": "", "tiny": str(make_tiny("llama", tmp_path_factory.mktemp("tiny")))}


def workload() -> tuple[list[str], list[str], list[SamplingParams]]:
    """(names, prompts, parameters): every case greedy and sampled, with unconstrained requests between."""
    names, sampling = [], []
    for i, name in enumerate(CASES):
        names += [name, name, ""]
        sampling += [
            params(name, temperature=0),
            params(name, temperature=1.2, seed=i),
            SamplingParams(temperature=0, max_tokens=20, seed=i),
        ]
    return names, [f"number {i} is" for i in range(len(names))], sampling


@pytest.fixture(scope="module")
def alone(folders: Any) -> Any:
    """What one rank gives, by model: all at once, and one after the other."""

    def run(model: str) -> list[list[int]]:
        names, prompts, sampling = workload()
        with LLM(folders[model], **SMALL) as llm:
            together = llm.generate(prompts, sampling, use_tqdm=False)
            single = [llm.generate(p, s, use_tqdm=False)[0] for p, s in zip(prompts, sampling, strict=True)]
        ended = [check(name, output) for name, output in zip(names, together, strict=True) if name]
        assert sum(ended) >= len(ended) // 2, "most were cut off: nothing is shown"
        tokens = [output.outputs[0].token_ids for output in together]
        assert tokens == [output.outputs[0].token_ids for output in single], "company changed an answer"
        return tokens

    return cache(run)


@pytest.mark.parametrize(("model", "split"), [*(("demo", split) for split in SPLITS), ("tiny", "tp2")])
def test_no_split_changes_a_token(model: str, split: str, folders: Any, alone: Any) -> None:
    _, prompts, sampling = workload()
    with LLM(folders[model], **(SMALL | SPLITS[split])) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, sampling, use_tqdm=False)]
        assert split != "tight" or llm.stats().preemptions
    assert tokens == alone(model)


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM("", **SMALL) as llm:
        yield llm


@pytest.mark.parametrize("name", CASES)
def test_what_ends_by_itself_fits(demo: LLM, name: str) -> None:
    sampling = [params(name, temperature=t, seed=seed, max_tokens=140) for seed in SEEDS for t in ((0, 0.7) if seed == 0 else (0.7, 1.5))]
    outputs = demo.generate(["{"] * len(sampling), sampling, use_tqdm=False)
    assert sum(check(name, output) for output in outputs)


def test_the_text_keeps_its_last_token_and_streams_as_one(demo: LLM) -> None:
    wanted = params("choice", temperature=0)
    (whole,) = demo.generate("the colour", wanted, use_tqdm=False)
    *_, last = demo.stream("the colour", wanted)
    assert last.outputs[0].text == whole.outputs[0].text and last.finished and last.outputs[0].stop_reason is None


def test_n_completions_each_have_their_own_state(demo: LLM) -> None:
    (output,) = demo.generate("x", params("regex", n=4, temperature=1.5, seed=3), use_tqdm=False)
    assert len({one.text for one in output.outputs}) > 1
    for one in output.outputs:
        assert CASES["regex"][1](one.text) and one.finish_reason == "stop"


def test_logprobs_are_the_models_own(demo: LLM) -> None:
    (output,) = demo.generate("x", params("regex", temperature=0, logprobs=2), use_tqdm=False)
    (done,) = output.outputs
    assert done.logprobs is not None and len(done.logprobs) == len(done.token_ids)
    assert any(next(iter(position.values())).rank > 1 for position in done.logprobs), "the grammar never had a say"


@pytest.mark.parametrize("split", [{}, {"pipeline_parallel_size": 2}], ids=["one", "pp2"])
def test_a_request_taken_over_goes_on_in_its_grammar(split: dict[str, Any]) -> None:
    """As a replica gets it whose sibling died: with the tokens that have come."""
    with LLM("", **SMALL, **split) as llm:
        wanted = params("person", temperature=1.0, seed=4)
        (whole,) = llm.generate("{", wanted, use_tqdm=False)
        tokens = whole.outputs[0].token_ids
        assert len(tokens) > 6
        job = llm._inputs.job("{", wanted, request_id="again")
        for cut in (1, len(tokens) // 2, len(tokens) - 1):
            request = msgspec.structs.replace(job.requests[0], request_id=f"again-{cut}", output_token_ids=tokens[:cut])
            llm._client.add_request(request)
            rest, reason = list[int](), None
            while reason is None:
                for news in llm._client.step():
                    rest += news.new_token_ids
                    reason = news.finish_reason
            assert (tokens[:cut] + rest, reason) == (tokens, whole.outputs[0].finish_reason)


def test_what_only_the_ranks_find_out_ends_one_request(demo: LLM) -> None:
    """The engine runs on, and the others' tokens are the same."""
    wrong = SamplingParams(structured_outputs=StructuredOutputs(grammar="start: <|nobody-knows|>"))
    plain = SamplingParams(temperature=0, max_tokens=8)
    before = demo.generate("def", plain, use_tqdm=False)[0].outputs[0].token_ids
    bad, good = demo.generate(["def", "def"], [wrong, plain], use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error" and "nobody-knows" in str(bad.error) and bad.outputs[0].token_ids == []
    assert good.outputs[0].token_ids == before and demo.stats().kv_blocks_used == 0


def test_what_cannot_be_is_refused_before_anything_runs(demo: LLM) -> None:
    with pytest.raises(PromptError, match=r"(?s)prompts\[1\]: structured_outputs cannot be kept to: .*unclosed group"):
        demo.generate(["a", "b"], [SamplingParams(), SamplingParams(structured_outputs=StructuredOutputs(regex="(a"))], use_tqdm=False)
    assert demo.generate("a", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_a_tokenizer_of_another_folder_is_read_from_there(folders: Any, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in Path(folders["tiny"]).iterdir():
        if not path.name.startswith("tokenizer"):
            (bare / path.name).symlink_to(path)
    with LLM(str(bare), tokenizer=folders["tiny"], **SMALL) as llm:
        assert check("regex", llm.generate("x", params("regex", temperature=0), use_tqdm=False)[0])
