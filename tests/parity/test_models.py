"""Every architecture agrees with transformers in fp32, at any TP size, however its tokens are chunked."""

import random

import pytest
import torch

from lockstep.config.hf import load_spec
from lockstep.distributed.groups import ParallelGroups
from lockstep.models.registry import build_model
from lockstep.testing import oracle
from lockstep.testing.ranks import run_ranks
from lockstep.testing.tiny import ARCHS, VOCAB_SIZE, make_tiny
from lockstep.weights.loader import load_weights

LENGTHS = [5, 45, 17, 1, 33, 64]  # below, at and above the windows of 16 and the blocks of 16
PROMPTS = [3, 40, 16, 1, 33, 50]
TOLERANCE = 1e-4

full = pytest.mark.full


def sequences(seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Checkpoint folder and transformers' logits of an architecture, made when first asked for."""
    made = {}

    def get(arch, **overrides):
        key = (arch, *sorted(overrides.items()))
        if key not in made:
            folder = make_tiny(arch, tmp_path_factory.mktemp(arch), **overrides)
            made[key] = folder, oracle.reference_logits(folder, sequences())
        return made[key]

    return get


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_close(found, wanted, what=""):
    assert len(found) == len(wanted)
    for row, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape and a.dtype == torch.float32
        worst = (a - b).abs().max().item()
        assert worst < TOLERANCE, f"{what} row {row}: {worst}"  # false for NaN too


def schedules():
    return [[LENGTHS], oracle.prefill_then_decode(LENGTHS, PROMPTS), oracle.random_chunks(LENGTHS, seed=1)]


def check_split(folder, reference, tp):
    reports = run_ranks("tests.parity.model_jobs:logits", tp, str(folder), sequences(), schedules(), timeout=120)
    for name, found in zip(("prefill", "decode", "chunked"), reports[0][0], strict=True):
        assert_close(found, reference, name)
    layers = load_spec(folder).num_layers
    for rank, (found, in_forward, in_head) in enumerate(reports):
        assert rank == 0 or found == [None] * 3, "only rank 0 has logits"
        assert in_forward == ["all_reduce"] * (1 + 2 * layers), "one for the embedding, two a layer"
        assert in_head == ["gather"]


@pytest.mark.parametrize("arch", ARCHS)
def test_whole(arch, tiny):
    folder, reference = tiny(arch)
    model = oracle.load_model(folder)
    for chunks in [*schedules(), oracle.random_chunks(LENGTHS, seed=2, most=60)]:
        assert_close(oracle.run_chunks(model, sequences(), chunks), reference)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("arch", ARCHS)
def test_split(arch, tp, tiny):
    check_split(*tiny(arch), tp)


@pytest.mark.parametrize(
    ("arch", "tp"),
    [("llama", 3), ("gemma3", 7)] + [pytest.param(arch, tp, marks=full) for arch in ARCHS for tp in (3, 5, 6, 7, 8)],
)
def test_uneven_split(arch, tp, tiny):
    check_split(*tiny(arch), tp)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_kv_heads_of_their_own(arch, tiny):
    """As many KV heads as query heads: groups of one, which an uneven cut leaves even."""
    folder, reference = tiny(arch, num_key_value_heads=8)
    check_split(folder, reference, 3)


@pytest.mark.parametrize(("arch", "tp"), [("llama", 2), ("gemma2", 4)] + [pytest.param(a, t, marks=full) for a in ARCHS for t in (1, 2, 4)])
def test_greedy_tokens(arch, tp, tiny):
    folder, _ = tiny(arch)
    prompts = [s[:n] for s, n in zip(sequences(3), (5, 30, 16, 1, 9, 20), strict=True)]
    wanted = oracle.reference_greedy(folder, prompts, 24)
    assert any(len(set(row)) > 4 for row in wanted), "the reference is stuck on a token and proves little"
    assert run_ranks("tests.parity.model_jobs:greedy", tp, str(folder), prompts, 24, timeout=120) == [wanted] * tp


class Stage:
    """A pipeline group as one stage sees it."""

    def __init__(self, rank, size):
        self.rank_in_group, self.world_size = rank, size


def stage_model(folder, rank, size):
    groups = ParallelGroups.solo()
    object.__setattr__(groups, "pp", Stage(rank, size))
    model = build_model(load_spec(folder), groups, torch.float32, "cpu")
    load_weights(model, folder)
    return model


@pytest.mark.parametrize("arch", ["llama", "llama3", "gemma3"])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_give_the_same_bits(arch, stages, tiny):
    """Stages chained by hand compute exactly what one model does, and hold exactly its parameters between them."""
    folder, _ = tiny(arch)
    whole = oracle.load_model(folder)
    models = [stage_model(folder, rank, stages) for rank in range(stages)]
    rows = [oracle.PagedRows(model, LENGTHS) for model in models]
    alone = oracle.PagedRows(whole, LENGTHS)
    parts = [[s[:n] for s, n in zip(sequences(), PROMPTS, strict=True)], [s[n:] for s, n in zip(sequences(), PROMPTS, strict=True)]]
    for tokens in parts:
        state = None
        for stage in rows:
            state = stage.step(tokens, state)
            if stage is not rows[-1]:
                assert set(state) == {"hidden_states", "residual"}
        assert torch.equal(models[-1].compute_logits(state), alone.logits(tokens))
    names = [set(dict(model.named_parameters())) for model in models]
    tied = {"embed_tokens.weight"} if whole.spec.tie_word_embeddings else set()
    assert set.union(*names) == set(dict(whole.named_parameters()))
    for i, mine in enumerate(names):
        for other in names[i + 1 :]:
            assert mine & other <= tied
    assert ("embed_tokens.weight" in names[-1]) == bool(tied) and "embed_tokens.weight" in names[0]
    assert sum(len(model.kv_layers()) for model in models) == whole.spec.num_layers


def test_a_later_stage_needs_the_one_before(tiny):
    model = stage_model(tiny("llama")[0], 1, 2)
    with pytest.raises(AssertionError, match="needs the result"):
        oracle.PagedRows(model, [4]).step([[1, 2, 3, 4]])


def test_unknown_architecture(tiny):
    import dataclasses

    spec = dataclasses.replace(load_spec(tiny("llama")[0]), architecture="GPT2LMHeadModel")
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*LlamaForCausalLM"):
        build_model(spec, ParallelGroups.solo(), torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_near(dtype, tiny):
    """The same weights in a 16-bit type: activations, masks and the cache follow the type, results stay in its range."""
    for arch in ("llama", "gemma2"):
        folder, reference = tiny(arch)
        found = oracle.run_chunks(oracle.load_model(folder, dtype=dtype), sequences(), schedules()[1])
        for a, b in zip(found, reference, strict=True):
            assert torch.isfinite(a).all() and (a - b).abs().mean() < 0.15


def test_multimodal_wrapper_names(tiny, tmp_path):
    """A Gemma-3 checkpoint with image towers around it: its text part is the same model."""
    import json

    from safetensors.torch import load_file, save_file

    folder, reference = tiny("gemma3")
    config = json.loads((folder / "config.json").read_text())
    wrapped = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config, "vision_config": {}, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(wrapped))
    tensors = {f"language_model.{name}": t for name, t in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, "vision_tower.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert_close(oracle.run_chunks(oracle.load_model(tmp_path), sequences(), [LENGTHS]), reference)


@pytest.mark.cuda
@pytest.mark.parametrize("arch", ARCHS)
def test_cuda_agrees(arch, tiny):
    folder, reference = tiny(arch)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        model = oracle.load_model(folder, device="cuda")
        for chunks in schedules():
            found = oracle.run_chunks(model, sequences(), chunks)
            assert_close([f.cpu() for f in found], reference)
        half = oracle.run_chunks(oracle.load_model(folder, dtype=torch.bfloat16, device="cuda"), sequences(), schedules()[1])
        assert all(torch.isfinite(a).all() and (a.cpu() - b).abs().mean() < 0.15 for a, b in zip(half, reference, strict=True))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
