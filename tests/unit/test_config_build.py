"""The tree by flat names, what the host has, and where a model's folder comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.config import devices, source
from lockstep.config.build import build_config, group_of
from lockstep.config.errors import ConfigError
from lockstep.config.tree import EngineConfig


def test_settings_reach_their_group() -> None:
    config = build_config(model="m", tensor_parallel_size=2, block_size=32, max_num_seqs=5, device="cpu")
    assert config.model.model == "m"
    assert config.parallel.tensor_parallel_size == 2
    assert config.cache.block_size == 32
    assert config.scheduler.max_num_seqs == 5
    assert config.runtime.device == "cpu"


def test_no_settings_are_the_defaults() -> None:
    assert build_config() == EngineConfig()


def test_every_field_has_one_group() -> None:
    assert group_of()["tensor_parallel_size"] == "parallel"
    assert len(group_of()) == sum(len(vars(getattr(EngineConfig(), g))) for g in set(group_of().values()))


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"'tensor_paralel_size' is not a setting.*Did you mean 'tensor_parallel_size'"):
        build_config(tensor_paralel_size=2)


def test_no_model_is_the_demo_model() -> None:
    assert source.find_folder("") == source.DEMO_FOLDER
    assert (source.DEMO_FOLDER / "config.json").is_file()


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model=.* is a file: name the folder"):
        source.find_folder(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c", "../x", "~/nothing-here"])
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        source.find_folder(name)


def hub_errors() -> list[tuple[type[Exception], str]]:
    from huggingface_hub import errors

    return [
        (errors.GatedRepoError, "gated"),
        (errors.RevisionNotFoundError, "not this revision"),
        (errors.RepositoryNotFoundError, "neither a local folder nor a model on the hub"),
        (errors.LocalEntryNotFoundError, "hub is out of reach"),
        (OSError, "could not be downloaded"),
    ]


@pytest.mark.parametrize("case", range(5))
def test_hub_failures_say_what_to_do(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, words = hub_errors()[case]

    def fail(*args: object, **kwargs: object) -> str:
        error = kind.__new__(kind)
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConfigError, match=words) as refused:
        source.find_folder("owner/name", "v1")
    assert "model='owner/name' (revision='v1')" in str(refused.value)


def test_only_data_files_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **kwargs: object) -> str:
        asked.update(kwargs, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert source.find_folder("owner/name", "main") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/name", "main")
    from fnmatch import fnmatch

    def wanted(path: str) -> bool:
        return any(fnmatch(path, p) for p in asked["allow_patterns"]) and not any(fnmatch(path, p) for p in asked["ignore_patterns"])  # type: ignore[attr-defined]

    assert all(map(wanted, ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt"]))
    assert not any(map(wanted, ["modeling_x.py", "pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "x.pt"]))


@pytest.mark.parametrize(
    ("visible", "nodes", "count"), [(None, 4, 4), ("0,1", 4, 2), ("", 4, 0), ("-1", 4, 0), ("0,-1,2", 4, 1), ("0", 0, 0)]
)
def test_cuda_devices_are_counted_without_torch(
    visible: str | None, nodes: int, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for i in range(nodes):
        (tmp_path / f"nvidia{i}").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path)
    monkeypatch.setattr(devices.env, "cuda_visible_devices", lambda: visible)
    assert devices.cuda_device_count() == count


def test_torch_build_is_read_from_its_files() -> None:
    import torch

    assert devices.torch_has_cuda() == (torch.version.cuda is not None)


def test_paths_and_torch_types_are_taken(tmp_path: Path) -> None:
    import torch

    config = build_config(model=tmp_path, dtype=torch.bfloat16)
    assert (config.model.model, config.model.dtype) == (str(tmp_path), "bfloat16")
