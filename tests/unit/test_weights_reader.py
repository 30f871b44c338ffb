"""Safetensors by offset: any slice equals torch's, damaged files say so, and nothing outside the folder is opened."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from lockstep.weights import reader
from lockstep.weights.checkpoint import Checkpoint, find_files
from lockstep.weights.errors import WeightError
from lockstep.weights.reader import SafetensorsFile

SHAPES = {"scalar": (), "vector": (13,), "matrix": (11, 7), "cube": (5, 4, 3), "empty": (0, 4)}


@pytest.fixture
def tensors():
    gen = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=gen) for name, shape in SHAPES.items()}


@pytest.fixture
def path(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("chunk", [1, 64, 16 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_slice(path, tensors, chunk, dtype, monkeypatch):
    monkeypatch.setattr(reader, "_CHUNK_BYTES", chunk)
    with SafetensorsFile(path) as file:
        assert set(file.entries) == set(SHAPES)
        for name, full in tensors.items():
            for dim in range(min(full.dim(), 2)):
                for start in range(full.shape[dim]):
                    for size in {1, full.shape[dim] - start, 0}:
                        want = full.narrow(dim, start, size)
                        got, ticks, before = torch.full(want.shape, 9.0, dtype=dtype), [], file.bytes_read
                        file.read_into(file.entries[name], dim, start, got, ticks.append)
                        assert torch.equal(got, want.to(dtype))
                        assert file.bytes_read - before == sum(ticks) == want.nbytes
        scalar = torch.zeros((), dtype=dtype)
        file.read_into(file.entries["scalar"], 0, 0, scalar)
        assert scalar == tensors["scalar"].to(dtype)


def test_into_a_view_leaves_the_rest_alone(path, tensors):
    with SafetensorsFile(path) as file:
        dest = torch.full((11, 9), 5.0)
        file.read_into(file.entries["matrix"], 0, 0, dest[:, 1:8])
        assert torch.equal(dest[:, 1:8], tensors["matrix"]) and (dest[:, [0, 8]] == 5).all()


def damage(path, how):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if how == "empty":
        return b""
    if how == "no header":
        return raw[: 8 + length // 2]
    if how == "not json":
        return raw[:8] + b"x" * length + raw[8 + length :]
    if how == "cut":
        return raw[:-4]
    if how == "html":
        return b"<!DOCTYPE html><html>not found</html>"
    if how == "list":
        header = [1]
    if how == "no offsets":
        del header["matrix"]["data_offsets"]
    if how == "shape":
        header["matrix"]["shape"] = [11, 8]
    if how == "negative":
        header["matrix"]["data_offsets"] = [-4, 304]
    if how == "backwards":
        header["matrix"]["data_offsets"] = header["matrix"]["data_offsets"][::-1]
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + raw[8 + length :]


@pytest.mark.parametrize("how", ["empty", "no header", "not json", "cut", "html", "list", "no offsets", "shape", "negative", "backwards"])
def test_a_damaged_file_is_named_with_the_remedy(path, how):
    path.write_bytes(damage(path, how))
    with pytest.raises(WeightError, match=r"model\.safetensors.*download the file again"):
        SafetensorsFile(path)


def test_a_file_cut_short_while_open(path):
    with SafetensorsFile(path) as file:
        os.truncate(path, file.header_bytes + 8)
        with pytest.raises(WeightError, match="ends inside tensor 'matrix'"):
            file.read_into(file.entries["matrix"], 0, 0, torch.empty(11, 7))


def test_no_descriptor_is_left_open(path):
    before = sorted(os.listdir("/proc/self/fd"))
    with SafetensorsFile(path) as file:
        file.close()
    path.write_bytes(damage(path, "cut"))
    with pytest.raises(WeightError):
        SafetensorsFile(path)
    with pytest.raises(WeightError):
        Checkpoint(path.parent)
    assert sorted(os.listdir("/proc/self/fd")) == before


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_wins_over_loose_files_and_over_copies(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"vector": torch.zeros(13)}, tmp_path / "b.safetensors")
    save_file({"stale": torch.zeros(1)}, tmp_path / "model.safetensors")
    index(tmp_path, {"matrix": "a.safetensors", "vector": "b.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        assert {name: file.path.name for name, (file, _) in checkpoint.tensors.items()} == {
            "matrix": "a.safetensors",
            "vector": "b.safetensors",
        }
        assert checkpoint.total_bytes == (77 + 13) * 4


def test_loose_files_are_joined_without_consolidated_copies(tmp_path, tensors):
    save_file({"vector": tensors["vector"]}, tmp_path / "a.safetensors")
    save_file({"matrix": tensors["matrix"]}, tmp_path / "b.safetensors")
    save_file(tensors, tmp_path / "consolidated.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"vector", "matrix"}
    save_file({"matrix": tensors["matrix"]}, tmp_path / "c.safetensors")
    with pytest.raises(WeightError, match=r"'matrix' is in b\.safetensors and c\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"matrix": "gone.safetensors"}, r"gone\.safetensors is missing"),
        ({"other": "a.safetensors"}, r"a\.safetensors has no tensor 'other'"),
        ({"matrix": "../a.safetensors"}, "not inside the folder"),
        ([1, 2], "not a safetensors index"),
    ],
)
def test_a_wrong_index(tmp_path, tensors, weight_map, words):
    save_file(tensors, tmp_path / "a.safetensors")
    index(tmp_path, weight_map)
    with pytest.raises(WeightError, match=words):
        Checkpoint(tmp_path)


def test_other_formats_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightError, match=r"pytorch_model\.bin.*safe_serialization=True"):
        find_files(tmp_path)
    with pytest.raises(WeightError, match="not a folder"):
        find_files(tmp_path / "none")
