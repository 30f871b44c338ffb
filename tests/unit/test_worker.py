"""One worker with a tiny model, run by plans made by hand."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.config.defaults import default_token_budget
from lockstep.config.validate import resolve
from lockstep.distributed.groups import ParallelGroups
from lockstep.distributed.packing import packed_bytes
from lockstep.distributed.progress import ProgressBoard
from lockstep.layers.linear import MergedColumnParallelLinear
from lockstep.protocol import NewRequest, SamplingParams, StepPlan, StepResult, TokenLogprobs
from lockstep.testing.tiny import VOCAB_SIZE, load_hf, make_tiny
from lockstep.worker import kv, logprobs, memory, profile
from lockstep.worker.batch import BatchState
from lockstep.worker.model_runner import ModelRunner
from lockstep.worker.worker import Worker
from tests.parity.generate_cases import ROOMY, engine_config

BLOCK = ROOMY["block_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


def loaded(folder: Path, progress: Any = None, **model: Any) -> Worker:
    config = engine_config(folder, 1, ROOMY)
    config, spec, path = resolve(replace(config, model=replace(config.model, **model)))
    worker = Worker(config, spec, path, 0, 0, ParallelGroups.solo(), progress)
    worker.init_device()
    worker.load_model()
    return worker


@pytest.fixture
def worker(folder: Path) -> Worker:
    worker = loaded(folder)
    worker.memory()
    worker.initialize_kv_cache(32)
    return worker


def start(slot: int, prompt: list[int], block: int, **sampling: Any) -> NewRequest:
    """A request in its own blocks from `block` on, enough for all it will hold here."""
    blocks = list(range(block, block + 4))
    params = SamplingParams(**({"temperature": 0.0} | sampling))
    return NewRequest(slot, f"r{slot}", prompt, len(prompt), blocks, params, params.seed or 0)


def prompt_of(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCAB_SIZE, n).tolist()


def run(worker: Worker, step: int, rows: list[tuple[int, int, int, bool]], **kw: Any) -> StepResult:
    result = worker.execute_model(StepPlan(step, *[list(c) for c in zip(*rows, strict=True)], **kw))
    assert result is not None and result.step == step and result.compute_s > 0
    return result


def decode(worker: Worker, slot: int, length: int, n: int) -> list[int]:
    """n more tokens of the request in `slot`, which holds `length` tokens of which the last is not computed."""
    return [run(worker, 100 + i, [(slot, length - 1 + i, 1, True)]).tokens[0] for i in range(n)]


def test_plans_by_hand_give_the_models_own_tokens(worker: Worker, folder: Path) -> None:
    """Two requests, one prefilled in three chunks while the other decodes; then one slot is given back and used again."""
    a, b = prompt_of(20, 1), prompt_of(7, 2)
    model = load_hf(folder)
    model.generation_config.eos_token_id = None

    def want(prompt: list[int], n: int) -> list[int]:
        return model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)[0, len(prompt) :].tolist()

    got_b = run(worker, 0, [(0, 0, 9, False), (1, 0, 7, True)], new=[start(0, a, 0), start(1, b, 4)]).tokens
    got_b += run(worker, 1, [(1, 7, 1, True), (0, 9, 8, False)]).tokens
    both = run(worker, 2, [(0, 17, 3, True), (1, 8, 1, True)]).tokens
    got_a, got_b = both[:1], got_b + both[1:]
    got_a += decode(worker, 0, 21, 4)
    assert got_a == want(a, 5) and got_b == want(b, 3)
    again = run(worker, 3, [(0, 0, 7, True)], freed=[0, 1], new=[start(0, b, 8)]).tokens + decode(worker, 0, 8, 2)
    assert again == got_b
    assert run(worker, 4, [(1, 0, 3, False)], new=[start(1, a, 4)]).tokens == []


def test_a_plan_that_only_frees(worker: Worker) -> None:
    run(worker, 0, [(0, 0, 5, True)], new=[start(0, prompt_of(5), 0)])
    result = worker.execute_model(StepPlan(1, [], [], [], [], freed=[0]))
    assert result is not None and result.tokens == [] and not worker.runner.state.active.any()


def test_prompt_logprobs_over_chunks_equal_the_models_own(worker: Worker, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * 4 * VOCAB_SIZE)  # four rows of logits at once
    prompt = prompt_of(19, 3)
    with torch.inference_mode():
        expected = torch.log_softmax(load_hf(folder)(torch.tensor([prompt])).logits[0].double(), -1)
    found: list[TokenLogprobs] = []
    new = [start(2, prompt, 0, prompt_logprobs=3, logprobs=2), start(5, prompt_of(4), 4)]
    for step, (at, count) in enumerate([(0, 6), (6, 1), (7, 12)]):
        rows = [(5, 0, 4, True), (2, at, count, False)] if step == 0 else [(2, at, count, step == 2)]
        result = run(worker, step, rows, new=new if step == 0 else [])
        for slot, entries in result.prompt_logprobs:
            assert slot == 2
            found += entries
    assert len(found) == len(prompt) - 1
    for position, entry in enumerate(found):
        row = expected[position]
        assert entry.token_ids[0] == prompt[position + 1]
        assert entry.token_ids[1:] == row.topk(3).indices.tolist()
        assert entry.logprobs == pytest.approx([float(row[t]) for t in entry.token_ids], abs=1e-4)
        assert entry.rank == int((row > row[prompt[position + 1]]).sum()) + 1
    assert result.logprobs is not None and result.logprobs[0] is not None
    assert result.logprobs[0].token_ids == [result.tokens[0], *expected[-1].topk(2).indices.tolist()]


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "repetition_penalty": 1.2, "logprobs": 2, "min_tokens": 6}


def test_a_sampled_request_alone_and_in_company(folder: Path) -> None:
    """Its tokens depend on the seed, not on the slot, the step numbers or its neighbours."""

    def tokens(neighbours: int) -> list[int]:
        worker = loaded(folder)
        worker.initialize_kv_cache(64)
        prompt = prompt_of(9, 4)
        others = [start(s, prompt_of(5 + s, s), 4 * s, temperature=1.0, seed=s) for s in range(neighbours)]
        mine = start(neighbours, prompt, 4 * neighbours, **SAMPLED)
        rows = [(s, 0, 5 + s, True) for s in range(neighbours)] + [(neighbours, 0, 9, True)]
        out = [run(worker, 0, rows, new=[*others, mine]).tokens[-1]]
        for i in range(8):
            rows = [(s, 5 + s + i, 1, True) for s in range(neighbours)] + [(neighbours, 9 + i, 1, True)]
            out.append(run(worker, i + 1, rows).tokens[-1])
        return out

    assert tokens(0) == tokens(5)


def test_memory_is_exact(folder: Path) -> None:
    worker = loaded(folder)
    before = worker.memory()
    norms = sum(p.numel() * 4 for p in dict(worker.model.named_parameters()).values())
    packed = [m for m in worker.model.modules() if getattr(m, "packed", None) is not None]
    by_hand = norms + sum(
        packed_bytes(m.packed.shape[0], [m.packed.shape[1]], 4, gated=isinstance(m, MergedColumnParallelLinear)) for m in packed
    )
    assert len(packed) == 3 * 4 + 1  # four products a layer, and the head
    assert before.weight_bytes == by_hand and before.kv_bytes == 0
    assert before.kv_bytes_per_block == 3 * 2 * BLOCK * 4 * 8 * 4  # layers, K and V, tokens, KV heads, head_dim, fp32
    assert 0 < before.free_bytes < memory.host_available_bytes()
    worker.initialize_kv_cache(11)
    after = worker.memory()
    assert after.kv_bytes == 11 * before.kv_bytes_per_block and after.free_bytes == before.free_bytes
    assert after.peak_bytes > after.weight_bytes
    summary = worker.memory_summary()
    assert summary["kv_bytes"] == after.kv_bytes and summary["activation_bytes"] > 0


def test_the_share_and_the_ranks_divide_what_is_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_available_bytes", lambda: 1 << 30)
    config = engine_config(folder, 1, ROOMY)
    cpu = torch.device("cpu")
    assert profile.room_bytes(config, cpu, 1) == 1 << 29
    assert profile.room_bytes(replace(config, cache=replace(config.cache, gpu_memory_utilization=0.25)), cpu, 2) == 1 << 27


def test_dummy_weights_are_seeded(folder: Path) -> None:
    digests = [loaded(folder, load_format="dummy", seed=seed).parameter_digest() for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]
    assert loaded(folder).parameter_digest() not in digests


def test_progress_names_phase_step_and_kind(folder: Path) -> None:
    board = ProgressBoard.create(1)
    worker = loaded(folder, board.cell(0))
    assert board.read(0).phase == "loaded"
    worker.initialize_kv_cache(8)
    run(worker, 41, [(0, 0, 5, True)], new=[start(0, prompt_of(5), 0)])
    assert (board.read(0).phase, board.read(0).step, board.read(0).note) == ("step", 41, "prefill")
    decode(worker, 0, 6, 1)
    assert board.read(0).note == "decode"


def test_out_of_order_is_our_bug(folder: Path) -> None:
    config, spec, path = resolve(engine_config(folder, 1, ROOMY))
    worker = Worker(config, spec, path, 0, 0, ParallelGroups.solo(), None)
    with pytest.raises(AssertionError, match="load_model comes first"):
        worker.memory()
    with pytest.raises(AssertionError, match="initialize_kv_cache comes first"):
        worker.execute_model(StepPlan(0, [], [], [], []))


def resident_rise(work: Callable[[], Any]) -> int:
    """Bytes that resident memory rises while `work` runs."""
    gc.collect()
    meter = memory.PeakMeter(torch.device("cpu"))
    with meter.measure():
        work()
    return meter.extra_bytes


def test_peak_meter_sees_a_tensor_that_is_gone_again() -> None:
    assert resident_rise(lambda: torch.ones(40 << 20, dtype=torch.uint8).sum()) >= 39 << 20
    assert resident_rise(lambda: None) < 8 << 20


@pytest.mark.parametrize("block_size", [16, 8])  # kernels; torch operations, as a block is not a whole number of chunks
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_the_bound_on_activations_holds_and_is_no_fantasy(arch: str, block_size: int, tmp_path: Path) -> None:
    """The arithmetic against what a largest step really takes, on a model wide enough to be measured."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 4096}
    config = engine_config(make_tiny(arch, tmp_path, **sizes), 1, {**ROOMY, "budget": 2048, "block_size": block_size}, length=4096)
    config, spec, path = resolve(config)
    worker = Worker(config, spec, path, 0, 0, ParallelGroups.solo(), None)
    worker.init_device()
    worker.load_model()
    step = profile.LargestStep.of(config, spec)
    assert step == profile.LargestStep(tokens=2048, rows=16, length=4096)
    native = worker.model.native
    assert (native is not None) == (block_size == 16)
    bound = profile.forward_bytes(step, spec, 1, 0, 4) if native is None else native.nbytes
    for _ in range(3):  # what other threads of this process take meanwhile is measured too, so once under the bound is enough
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what this process freed earlier and would use again is not measured
        measured = profile.measured_bytes(worker.model, spec, config, worker.groups, torch.device("cpu"))
        if measured <= bound:
            break
    shown = f"measured {measured / 2**20:.1f} MiB, bound {bound / 2**20:.1f} MiB"
    assert measured <= bound, shown
    if native is None:  # the upper side has slack for what is not given back even so
        assert bound <= 8 * measured, shown
    else:  # its buffers: the stream, its normed form, queries with keys and values, heads, MLP columns; and its slots
        heads = 2 * spec.num_heads + 2 * spec.num_kv_heads
        assert bound < 2048 * 4 * (2 * 512 + heads * 64 + 1536 + 2 * 64) + (9 << 20), shown
    assert default_token_budget(config, spec) == 2048


@pytest.mark.cuda
def test_on_a_gpu_memory_is_measured(folder: Path) -> None:
    config = replace(engine_config(folder, 1, ROOMY), runtime=replace(engine_config(folder, 1, ROOMY).runtime, device="cuda"))
    config, spec, path = resolve(config)
    worker = Worker(config, spec, path, 0, 0, ParallelGroups.solo("cuda"), None)
    worker.init_device()
    worker.load_model()
    found = worker.memory()
    free, total = torch.cuda.mem_get_info()
    assert 0 < found.free_bytes <= 0.9 * total and found.weight_bytes == memory.weight_bytes(worker.model)
    assert worker.memory_summary()["activation_bytes"] > 0
    worker.initialize_kv_cache(32)
    assert run(worker, 0, [(0, 0, 9, True)], new=[start(0, prompt_of(9, 4), 0, **SAMPLED)]).tokens
    assert free > 0


def test_allocate_makes_what_was_counted() -> None:
    layers = [kv_shape(2, 16), kv_shape(1, 8)]
    tensors = kv.allocate(layers, 7, 4, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert [tuple(t.shape) for t in tensors] == [(2, 7, 4, 2, 16), (2, 7, 4, 1, 8)]
    assert sum(t.numel() * t.element_size() for t in tensors) == 7 * kv.bytes_per_block(layers, 4, torch.bfloat16)


def kv_shape(heads: int, dim: int) -> Any:
    from lockstep.attention.layer import KVLayerSpec

    return KVLayerSpec(heads, dim)


def test_rehearsal_touches_no_request(worker: Worker) -> None:
    state = worker.runner.state
    before = (state.lengths.copy(), state.tokens.copy(), state.active.copy())
    worker.runner.rehearse([3, 1], [30, 9])
    assert all(np.array_equal(x, y) for x, y in zip(before, (state.lengths, state.tokens, state.active), strict=True))
    assert isinstance(worker.runner, ModelRunner) and isinstance(state, BatchState)
