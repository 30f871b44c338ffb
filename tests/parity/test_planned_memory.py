"""What the planner says a rank holds, and what it holds: to the byte for weights and KV cache, within 2 % for all that is the engine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.kernels.library import library
from lockstep.llm import LLM
from lockstep.planner import cpu_memory
from lockstep.planner.cpu_memory import StepSizes
from lockstep.planner.layout import Layout
from lockstep.planner.memory import kv_bytes_per_token
from lockstep.planner.model import from_spec
from lockstep.protocol import SamplingParams
from lockstep.testing.tiny import make_tiny

ROWS = 5  # sampled in one step at most
CASES = [
    # what, architecture, split, settings of the model, settings of the engine
    ("dense", "qwen3", {}, {}, {}),
    ("dense over two ranks", "llama3", {"tensor_parallel_size": 2}, {}, {}),
    ("more ranks than KV heads", "qwen2", {"tensor_parallel_size": 3}, {"num_key_value_heads": 2}, {}),
    ("tied embeddings", "llama", {"tensor_parallel_size": 2}, {}, {}),
    ("tied embeddings at both ends", "llama", {"pipeline_parallel_size": 2}, {}, {}),
    ("uneven stages", "mistral", {"pipeline_parallel_size": 2}, {"num_hidden_layers": 5}, {"pipeline_layer_partition": "4,1"}),
    ("both", "qwen3", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, {"num_hidden_layers": 4}, {}),
    ("int8", "qwen2", {"tensor_parallel_size": 2}, {}, {"quantization": "int8"}),
    ("sandwich norms, two kinds of rotation", "gemma3", {}, {}, {}),
]


def granule() -> int:
    """What the kernels of this machine fill an atom up to."""
    found = library()
    assert found is not None, "these are rules of the CPU kernels"
    return cpu_memory.AMX_GRANULE if "amx" in found.variant() else cpu_memory.PAIR


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("what", "arch", "split", "model", "engine"), CASES, ids=[case[0] for case in CASES])
def test_planned_is_allocated(what: str, arch: str, split: dict, model: dict, engine: dict, dtype: str, tmp_path: Path) -> None:
    folder = make_tiny(arch, tmp_path / "model", dtype=dtype, **model)
    settings = {
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "num_gpu_blocks_override": 40,
        "threads_per_rank": 1,
    }
    with LLM(str(folder), dtype=dtype, **split, **settings, **engine) as llm:
        # Every prompt is computed in the first step: all sample in it.
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        llm.generate([[1 + i, 2, 3] for i in range(ROWS * llm.config.parallel.pipeline_parallel_size)], params, use_tqdm=False)
        found, shape = llm.memory(), from_spec(llm.spec, what)
    tp, pp = split.get("tensor_parallel_size", 1), split.get("pipeline_parallel_size", 1)
    layout, how = Layout(tp=tp, pp=pp), engine.get("pipeline_layer_partition", "balanced")
    narrow = engine.get("quantization", "")
    assert len(found) == layout.devices
    for memory in found:
        stage, rank = divmod(memory.rank, tp)
        sizes = StepSizes(tokens=256, slots=8, rows=ROWS, length=128)
        weights = cpu_memory.weight_bytes(shape, layout, stage, rank, how=how, weight_dtype=narrow, granule=granule())
        assert memory.weight_bytes == weights
        assert memory.kv_bytes == kv_bytes_per_token(shape, layout, stage, rank, how) * 16 * 40
        planned = cpu_memory.owned_bytes(shape, layout, stage, rank, sizes, 40, how=how, weight_dtype=narrow, granule=granule())
        assert planned == pytest.approx(memory.owned_bytes, rel=0.02)
