"""Loading: right values for every split, exactly the owned bytes, and errors that name the tensor."""

import json
import re
from pathlib import Path

import pytest
import torch

from lockstep.weights.dummy import fill_dummy
from lockstep.weights.errors import WeightError
from lockstep.weights.loader import load_weights
from lockstep.weights.name_map import WeightRule, canonical, linear, per_layer
from lockstep.weights.plan import plan_tasks
from tests.unit.weights_model import HIDDEN, LAYERS, VOCAB, Model, full_tensors, write


def poison(model):
    """NaN everywhere a weight must come, so that a hole cannot hide. Vocabulary padding stays as the layer made it."""
    for task in plan_tasks(model):
        task.dest.fill_(float("nan"))
    return model


def slices(model, full):
    """(what each task should hold, what it holds)."""
    for task in plan_tasks(model):
        yield full[task.name].narrow(task.piece.dim, task.piece.src_start, task.piece.size), task.dest


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("tp", range(1, 9))
def test_every_rank_gets_its_slices_and_reads_no_other_byte(tmp_path, tp, files):
    full = full_tensors()
    write(tmp_path, full, files)
    read, checkpoint_bytes = 0, sum(t.nbytes for t in full.values())
    for rank in range(tp):
        model = poison(Model(tp, rank))
        report = load_weights(model, tmp_path)
        for want, got in slices(model, full):
            assert torch.equal(want, got)
        for param in model.parameters():
            assert not param.isnan().any()
        padding = model.embed.weight[model.embed.shard.filled.size :]
        assert torch.equal(padding, torch.zeros_like(padding))
        assert report.bytes_read == sum(want.nbytes for want, _ in slices(model, full))
        assert report.files == files and report.checkpoint_bytes == checkpoint_bytes
        read += report.bytes_read
    if tp in (1, 2, 4):  # no replicated KV: only norms and row-parallel biases are read by every rank
        shared = sum(t.nbytes for name, t in full.items() if "norm" in name or name.endswith("o_proj.bias"))
        assert read == checkpoint_bytes + (tp - 1) * shared


def read_bytes_of_this_thread():
    path = Path("/proc/thread-self/io")
    if not path.exists():
        pytest.skip("the kernel does not count a thread's reads")
    return int(re.search(r"rchar: (\d+)", path.read_text()).group(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_counts_the_same_bytes(tmp_path, dtype):
    """The report is not taken at its word: read() as the kernel saw it, headers included, nothing memory-mapped."""
    write(tmp_path, full_tensors(dtype), files=2)
    model = Model(2, 1, dtype=torch.float32)
    before = read_bytes_of_this_thread()
    overhead = read_bytes_of_this_thread() - before  # of reading the counter itself
    before = read_bytes_of_this_thread()
    report = load_weights(model, tmp_path)
    counted = read_bytes_of_this_thread() - before - overhead
    index = (tmp_path / "model.safetensors.index.json").stat().st_size
    assert report.bytes_read > 30_000 * dtype.itemsize / 4
    assert abs(counted - report.bytes_read - report.header_bytes - index) < 64  # digits of the counter itself


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_types_are_converted_to_the_parameters(tmp_path, stored, wanted):
    full = full_tensors(stored)
    write(tmp_path, full)
    model = Model(3, 1, dtype=wanted)
    report = load_weights(model, tmp_path)
    for want, got in slices(model, full):
        assert got.dtype == wanted and torch.equal(want.to(wanted), got)
    assert report.bytes_read == sum(want.nbytes for want, _ in slices(model, full))


@pytest.mark.parametrize(("tp", "rank"), [(1, 0), (2, 1), (3, 2), (8, 7)])
def test_what_is_packed_at_once_passes_through_one_buffer(tmp_path, tp, rank):
    """Each module is whole when its packer is called, biases and padding stay, and memory is only touched once."""
    full = full_tensors()
    write(tmp_path, full, files=2)
    model, reference = poison(Model(tp, rank)), Model(tp, rank)
    load_weights(reference, tmp_path)
    wanted, found, lent = dict(reference.named_parameters()), {}, set()

    def pack(name):
        for key, param in model.get_submodule(name).named_parameters(prefix=name):
            found[key] = param.data.clone()
            if param.dim() == 2 and "embed" not in name and "head" not in name:
                lent.add(param.data.untyped_storage().data_ptr())
                param.data = param.data.new_empty(0)

    names = [name for name, module in model.named_modules() if hasattr(module, "weight") and module.weight.dim() == 2]
    report = load_weights(model, tmp_path, packers={name: lambda name=name: pack(name) for name in names})
    assert set(found) == {key for key in wanted if key.rpartition(".")[0] in names} and len(names) > 8
    for key, value in wanted.items():
        assert torch.equal(found.get(key, model.get_parameter(key).data), value), key
    assert len(lent) == 1
    for key, param in model.named_parameters():
        assert wanted[key].dim() == 2 or torch.equal(param, wanted[key]), f"{key} was in the buffer"
    assert report.bytes_read == sum(want.nbytes for want, _ in slices(reference, full))


def test_a_stage_reads_its_layers_only_and_knows_the_others(tmp_path):
    full = full_tensors()
    write(tmp_path, full)
    model = poison(Model(stage=(1, 2)))
    report = load_weights(model, tmp_path)
    for want, got in slices(model, full):
        assert torch.equal(want, got)
    other = sum(t.nbytes for name, t in full.items() if "layers.0." in name)
    assert report.bytes_read == report.checkpoint_bytes - other


def test_tied_weights_do_not_read_the_head(tmp_path):
    full = full_tensors()
    write(tmp_path, full)
    model = Model(tied=True)
    report = load_weights(model, tmp_path)
    assert report.bytes_read == report.checkpoint_bytes - full["lm_head.weight"].nbytes
    assert torch.equal(model.head.weight[:VOCAB], full["model.embed_tokens.weight"])
    del full["lm_head.weight"]
    write(tmp_path, full)
    load_weights(Model(tied=True), tmp_path)


def test_progress_rises_to_the_total(tmp_path):
    write(tmp_path, full_tensors())
    seen = []
    report = load_weights(Model(2, 0), tmp_path, progress=lambda *now: seen.append(now))
    done = [n for n, _, _ in seen]
    assert done == sorted(done) and done[-1] == report.bytes_read
    assert {total for _, total, _ in seen} == {report.bytes_read}
    assert {name for _, _, name in seen} == set(full_tensors())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda full: full.pop("model.layers.1.self_attn.k_proj.weight"), ["lacks 1", "model.layers.1.self_attn.k_proj.weight"]),
        (lambda full: full.pop("model.layers.0.self_attn.q_proj.bias"), ["lacks 1", "model.layers.0.self_attn.q_proj.bias"]),
        (lambda full: full.update({"model.layers.2.norm.weight": torch.ones(HIDDEN)}), ["unexpected", "model.layers.2.norm.weight"]),
        (lambda full: full.update({"model.layers.0.norm.bias": torch.ones(HIDDEN)}), ["unexpected", "model.layers.0.norm.bias"]),
        (
            lambda full: full.update({"model.layers.0.mlp.down_proj.weight": torch.ones(HIDDEN, 51)}),
            ["model.layers.0.mlp.down_proj.weight", "[32, 51]", "[32, 52]", "config.json"],
        ),
        (
            lambda full: full.update({"model.embed_tokens.weight": torch.ones(VOCAB + 28, HIDDEN)}),
            ["model.embed_tokens.weight", "[128, 32]", "[100, 32]"],
        ),
        (
            lambda full: full.update({"lm_head.weight": torch.ones(VOCAB, HIDDEN, dtype=torch.int8)}),
            ["lm_head.weight", "I8", "not quantised"],
        ),
    ],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_what_does_not_fit_is_named(tmp_path, change, words, tp):
    full = full_tensors()
    change(full)
    write(tmp_path, full)
    for rank in range(tp):
        with pytest.raises(WeightError) as caught:
            load_weights(Model(tp, rank), tmp_path)
        for word in words:
            assert word in str(caught.value)
    assert issubclass(WeightError, ValueError)


def test_names_are_checked_before_anything_is_read(tmp_path):
    full = full_tensors()
    del full["model.layers.1.norm.weight"]
    write(tmp_path, full)
    model = poison(Model())
    with pytest.raises(WeightError):
        load_weights(model, tmp_path)
    assert all(got.isnan().all() for _, got in slices(model, full_tensors()))


def test_known_leftovers_are_passed_over(tmp_path):
    full = full_tensors()
    write(tmp_path, full | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    report = load_weights(Model(), tmp_path)
    assert report.bytes_read == sum(t.nbytes for t in full.values())


@pytest.mark.parametrize("style", [("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")])
def test_the_language_model_of_a_multimodal_checkpoint(tmp_path, style):
    full = full_tensors()
    body, head = style
    wrapped = {name.replace("model.", body, 1).replace("lm_head.", head, 1): t for name, t in full.items()}
    write(tmp_path, wrapped | {"vision_tower.patch.weight": torch.ones(3, 3), "model.vision_tower.patch.bias": torch.ones(3)})
    model = Model()
    load_weights(model, tmp_path)
    assert all(torch.equal(want, got) for want, got in slices(model, full))


def test_towers_are_unexpected_in_a_text_checkpoint(tmp_path):
    write(tmp_path, full_tensors() | {"vision_tower.patch.weight": torch.ones(3, 3)})
    with pytest.raises(WeightError, match=r"vision_tower\.patch\.weight"):
        load_weights(Model(), tmp_path)


def test_canonical_names_of_a_plain_checkpoint_are_its_own():
    assert canonical(["model.norm.weight", "lm_head.weight"]) == {
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }


class Broken(Model):
    """A model whose map was changed: its author's mistakes must not load."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def weight_map(self):
        return self.change(super().weight_map())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rules: [r for r in rules if r.shard_id != "k"], r"no rule fills layers\.0\.qkv"),
        (lambda rules: [r for r in rules if r.module != "layers.1.norm"], r"no rule fills layers\.1\.norm"),
        (lambda rules: [*rules, WeightRule("again", "embed")], "two rules fill embed.weight"),
        (lambda rules: [*rules, WeightRule("x", "embed", "scale")], r"embed\.scale, which does not exist"),
    ],
)
def test_a_map_with_a_hole_is_our_fault(change, words):
    with pytest.raises(AssertionError, match=words):
        plan_tasks(Broken(change))


def test_a_wrong_shard_id_is_refused():
    with pytest.raises(ValueError, match=r"shard_id='z'.*'q', 'k', 'v'"):
        plan_tasks(Broken(lambda rules: [*rules, WeightRule("x", "layers.0.qkv", "weight", "z")]))


def test_per_layer_names_and_stages():
    rules = per_layer(linear("m.{i}.w", "l.{i}", bias=True), 3, range(1, 2))
    assert [(r.name, r.module, r.here) for r in rules if r.param == "weight"] == [
        ("m.0.w.weight", "l.0", False),
        ("m.1.w.weight", "l.1", True),
        ("m.2.w.weight", "l.2", False),
    ]
    assert len(rules) == 6


def joined(tp, seed):
    """The dummy weights of all ranks put together as full tensors."""
    full = {name: torch.full_like(t, float("nan")) for name, t in full_tensors().items()}
    for rank in range(tp):
        model = poison(Model(tp, rank))
        fill_dummy(model, seed)
        for want, got in slices(model, full):
            assert torch.equal(want, got) or want.isnan().any()  # replicated parts agree
            want.copy_(got)
    return full


@pytest.mark.parametrize("tp", range(2, 9))
def test_dummy_weights_are_the_same_for_any_split(tp):
    one, many = joined(1, 3), joined(tp, 3)
    assert not any(t.isnan().any() for t in many.values())
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_dummy_weights_look_random_and_follow_the_seed():
    first, second = joined(1, 3), joined(1, 4)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[q], second[q]) and torch.equal(first[q], joined(1, 3)[q])
    assert torch.equal(first["model.layers.0.norm.weight"], torch.ones(HIDDEN))
    matrices = {name: t for name, t in first.items() if t.dim() == 2}
    every = torch.cat([t.flatten() for t in matrices.values()])
    assert abs(every.mean()) < 1e-3 and abs(every.std() - 0.02) < 1e-3
    assert len(every.unique()) > 0.99 * len(every)
    for t in matrices.values():  # no two rows or columns alike: correlations stay small
        for side in (t, t.T):
            assert (torch.corrcoef(side) - torch.eye(len(side))).abs().max() < 0.95
    assert first[q.replace("layers.0", f"layers.{LAYERS - 1}")].ne(first[q]).float().mean() > 0.99


def test_dummy_values_do_not_depend_on_how_they_are_stored():
    narrow, wide = Model(dtype=torch.bfloat16), Model()
    fill_dummy(narrow, 1)
    fill_dummy(wide, 1)
    assert torch.equal(narrow.layers["0"].down.weight, wide.layers["0"].down.weight.bfloat16())


def test_dummy_progress_covers_every_tensor():
    seen = []
    report = fill_dummy(Model(2, 1), 0, progress=lambda *now: seen.append(now))
    assert seen[-1][0] == seen[-1][1] == sum(t.dest.nbytes for t in plan_tasks(Model(2, 1)))
    assert {name for _, _, name in seen} == set(full_tensors()) and report.tensors == len(seen)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(WeightError, match=r"no model\.safetensors"):
        load_weights(Model(), tmp_path)
