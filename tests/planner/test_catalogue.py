"""Devices and clusters by name, by string and by file; what is wrong with them is said in words."""

import json

import pytest

from lockstep.config.errors import ConfigError
from lockstep.planner import catalogue, ops
from lockstep.planner.entry import from_entry, to_entry
from lockstep.planner.hardware import ZERO_CALIBRATION, make_cluster

SIX = {
    "name": "NewGPU",
    "flops": {"bfloat16": "400e12"},
    "memory_bandwidth": "2.0e12",
    "capacity_bytes": 64 << 30,
    "scale_up": {"bandwidth": 200e9, "latency_s": 4e-6},
    "scale_out": {"bandwidth": 25e9, "latency_s": 20e-6},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "name"),
    [("2x8xH100", 2, 8, "H100"), ("8xh200", 1, 8, "H200"), ("1xA100", 1, 1, "A100"), ("cpu", 1, 1, "CPU"), ("4xH100-SXM5", 1, 4, "H100")],
)
def test_cluster_strings(text, nodes, per_node, name):
    found = catalogue.cluster(text)
    assert (found.nodes, found.devices_per_node, found.device.name) == (nodes, per_node, name)
    assert found.devices == nodes * per_node


@pytest.mark.parametrize("text", ["", "8x", "8 H100", "x8xH100", "2x2x2xH100"])
def test_what_is_no_cluster_is_refused(text):
    with pytest.raises(ConfigError, match=r"2x8xH100|six numbers|catalogue"):
        catalogue.cluster(text)


def test_no_devices_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        catalogue.cluster("0x8xH100")


def test_an_unknown_device_is_told_of_six_numbers():
    with pytest.raises(ConfigError, match=r"'H999' is not in the catalogue.*H100.*six numbers.*lockstep calibrate"):
        catalogue.device("H999")


def test_every_entry_prices_every_operation():
    for name in catalogue.names():
        cluster = make_cluster(catalogue.device(name), 2)
        assert ops.gemm_s(cluster.device, 16, 4096, 4096, "fp8") > 0, name
        assert ops.gemm_s(cluster.device, 16, 4096, 4096, "float32") > ops.gemm_s(cluster.device, 0, 1, 1), name
        assert ops.moe_s(cluster.device, 16, 4096, 1024, 64, 4) > 0, name
        assert ops.decode_attention_s(cluster.device, 4, 1000, 8, 8, 128) > 0, name
        assert cluster.device.source, name


def test_measured_devices_say_so():
    assert {n for n in catalogue.names() if catalogue.device(n).calibrated} == {"H100", "A100", "A100-VIDUR"}
    assert catalogue.device("H200").band == ZERO_CALIBRATION


def test_six_numbers_make_a_device():
    device = from_entry(SIX, catalogue.device_shipped)
    assert device.peak("bfloat16") == 400e12
    assert device.peak("fp8") == 400e12  # computes in what it has
    assert not device.calibrated and device.band == ZERO_CALIBRATION
    assert device.scale_up.seconds(1.0, 0.0) == pytest.approx(4e-6)
    assert device.gemm == catalogue.device_shipped("H100").gemm
    twice = from_entry(SIX | {"memory_bandwidth": 4e12}, catalogue.device_shipped)
    assert ops.decode_attention_s(twice, 64, 4096, 32, 8, 128) < ops.decode_attention_s(device, 64, 4096, 32, 8, 128)


def test_a_yaml_cluster(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "nodes: 2\ndevices_per_node: 4\ninter: {bandwidth: 100e9, latency_s: 5e-6}\ndevice:\n  name: NewGPU\n  flops: 400e12\n"
        "  memory_bandwidth: 2e12\n  capacity_bytes: 68719476736\n  scale_up: {bandwidth: 200e9, latency_s: 4e-6}\n"
    )
    found = catalogue.cluster(str(path))
    assert str(found) == "2x4xNewGPU"
    assert (found.inter.bandwidth, found.intra.bandwidth) == (100e9, 200e9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bandwidth": None}, "memory_bandwidth is None: it must be a number above 0"),
        ({"capacity_bytes": -1}, "capacity_bytes is -1"),
        ({"flops": {"bf16": 1e12}}, "flops lists 'bf16': it must be one of bfloat16"),
        ({"flop": 1}, "has unknown keys flop"),
        ({"scale_up": {"bandwidth": 1e9}}, "scale_up is .*needs `bandwidth`"),
    ],
)
def test_wrong_entries_are_told_which_key(change, message):
    with pytest.raises(ConfigError, match=message):
        from_entry(SIX | change, catalogue.device_shipped)


def test_missing_keys_and_files(tmp_path):
    with pytest.raises(ConfigError, match="lacks memory_bandwidth"):
        from_entry({k: v for k, v in SIX.items() if k != "memory_bandwidth"}, catalogue.device_shipped)
    with pytest.raises(ConfigError, match="cannot be read"):
        catalogue.cluster(str(tmp_path / "none.yaml"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        catalogue.cluster(str(tmp_path / "list.json"))
    (tmp_path / "odd.json").write_text(json.dumps({"device": "H100", "node": 2}))
    with pytest.raises(ConfigError, match="unknown keys node"):
        catalogue.cluster(str(tmp_path / "odd.json"))


def test_a_device_calibrated_here_wins_and_comes_back_equal():
    shipped = catalogue.device("H100")
    entry = to_entry(shipped) | {"name": "CPU", "memory_bandwidth": 5e10}
    mine = from_entry(entry, catalogue.device_shipped)
    path = catalogue.user_file("cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_entry(mine)))
    again = catalogue.cluster("cpu").device
    assert to_entry(again) == to_entry(mine)
    assert again.memory_bandwidth == 5e10
    assert catalogue.device_shipped("cpu").memory_bandwidth == 1.5e10
