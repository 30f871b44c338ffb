"""Devices and clusters by name, by string and by file; what is wrong with them is said in words."""

import json

import pytest

from lockstep.config.errors import ConfigError
from lockstep.planner import catalogue, ops, quantity
from lockstep.planner.entry import from_entry, to_entry
from lockstep.planner.hardware import ZERO_CALIBRATION, make_cluster, measured_inside

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


def test_a_cluster_of_a_number_without_end_is_refused():
    with pytest.raises(ConfigError, match="cannot be read"):
        catalogue.cluster("9" * 5000 + "xH100")


def test_a_cluster_of_an_unknown_device_is_told_what_a_cluster_is():
    with pytest.raises(ConfigError, match=r"cluster 'foo': .* not in the catalogue.* NODESxDEVICESxDEVICE, as in 2x8xH100"):
        catalogue.cluster("foo")


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("16xH100", "did you mean 2x8xH100"),
        ("2x12xH100", "did you mean 3x8xH100"),
        ("1x12xH100", "did you mean 1x8xH100"),
        ("8xTPU-v5e", "did you mean 8x1xTPU-v5e"),
        ("0xH100", "at least 1"),
        ("2x0xH100", "at least 1"),
        ("this", "run `lockstep calibrate` first"),
    ],
)
def test_nodes_are_of_the_size_that_they_are_made_in(text, words):
    with pytest.raises(ConfigError, match=words):
        catalogue.cluster(text)


def written(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_may_say_that_nodes_are_larger(tmp_path):
    found = catalogue.cluster(written(tmp_path, "device: H100\ndevices_per_node: 16\n"))
    assert (found.nodes, found.devices_per_node) == (1, 16)
    assert str(catalogue.cluster("8XH100")) == "1x8xH100"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("device: H100\n  nodes: 2\n", "in line 2"),
        ("device: H100\ninter: 0.5\n", r"inter is 0.5: write it like \{bandwidth: 25e9, latency_s: 20e-6\} or \{scale: 0.5\}"),
        ("device: H100\ninter: 25e9\n", "inter is '25e9': write it like"),
        ("device: H100\ninter: {scale: fast}\n", "inter scale is 'fast': it must be a number above 0"),
        (
            "device: H100\ninter: {bandwidth: 25, latency_s: 2e-5}\n",
            r"inter bandwidth is 25: it must be at least 1e\+07; its unit",
        ),
        ("device: H100\ninter: {bandwidth: 25e9, latency_s: 20}\n", "inter latency_s is 20: it must be at most 1; its unit is seconds"),
        ("device: H100\ninter: {bandwidth: 25e9, latency_s: 2e-5, scale: 2}\n", "needs `bandwidth`"),
        ("device: H100\nnodes: two\n", "nodes is 'two': it must be a number above 0"),
        ("device: H100\nnodes: 1.5\n", "nodes is 1.5: it must be a whole number"),
        ("device: H100\ndevices_per_node: 0\n", "devices_per_node is 0"),
        ("device: 5\n", "device is 5: write it like"),
        ("device: {like: H100, memory_bandwidth: 2.0}\n", r"memory_bandwidth is 2.0: it must be at least 1e\+09; its unit is bytes/s"),
        ("device: {like: H100, capacity_bytes: 80}\n", "capacity_bytes is 80: it must be at least"),
        ("device: {like: H100, flops: {bfloat16: 989}}\n", "flops of bfloat16 is 989: it must be at least"),
        ("device: {like: H100, band: 3}\n", "band is 3: write it like {operation: 0.2"),
        ("device: {like: H100, band: {operation: 0, tpot: 0.3, ttft: 0.5}}\n", "band operation is 0: it must be a number above 0"),
        (
            "device: {like: H100, band: {operation: 0.1, tpot: 30, ttft: 0.5}}\n",
            "band tpot is 30: it must be at most 1; its unit is a share",
        ),
        ("device: {like: H100, band: {operation: 0.1}}\n", "band, fits or tried"),
        ("device: {like: H999}\n", "'H999' is not in the catalogue"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_words(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        catalogue.cluster(written(tmp_path, text))


def test_a_json_file_that_is_none(tmp_path):
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ConfigError, match=r"mine.json cannot be read"):
        catalogue.cluster(str(tmp_path / "mine.json"))


@pytest.mark.parametrize(
    ("value", "rule", "number"),
    [
        ("64GiB", quantity.CAPACITY, 64 << 30), ("80GB", quantity.CAPACITY, 80e9), ("2TB/s", quantity.MEMORY_BANDWIDTH, 2e12),
        ("2.0e12", quantity.MEMORY_BANDWIDTH, 2e12), ("400 TFLOPS", quantity.FLOPS, 400e12), ("400T", quantity.FLOPS, 400e12),
        ("4us", quantity.LATENCY, 4e-6), ("0.02ms", quantity.LATENCY, 2e-5), (8, quantity.COUNT, 8),
    ],
)  # fmt: skip
def test_units(value, rule, number):
    assert quantity.read("x", "y", value, rule) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize(
    "value",
    ["64iB", "1.2.3", "fast", "", None, True, float("nan"), float("inf"), -1, 10**400, pytest.param(-(10**5000), id="huge"), "64GiBs"],
)
def test_what_is_no_size(value):
    with pytest.raises(ConfigError, match="must be a number above 0"):
        quantity.read("x", "y", value, quantity.CAPACITY)


def test_links_and_devices_may_be_changed_in_part(tmp_path):
    plain = catalogue.cluster("2x8xH100")
    half = catalogue.cluster(written(tmp_path, "nodes: 2\ndevice: H100\ninter: {scale: 0.5}\n"))
    assert half.inter == plain.inter.scaled(0.5) and half.inter.bandwidth == plain.inter.bandwidth / 2
    assert half.inter.launch_s == plain.inter.launch_s and half.intra == plain.intra
    fast = catalogue.cluster(written(tmp_path, "device: {like: H100, memory_bandwidth: 6.7TB/s, scale_out: {scale: 2}}\n")).device
    base = plain.device
    assert fast.name == "MY-H100" and fast.memory_bandwidth == 2 * base.memory_bandwidth
    assert (fast.flops, fast.gemm, fast.scale_up) == (base.flops, base.gemm, base.scale_up)
    assert fast.collectives == measured_inside(base.collectives) != base.collectives, "exchanges over other links are not those measured"
    assert fast.scale_out == base.scale_out.scaled(2)
    assert base.calibrated and not fast.calibrated and fast.band == ZERO_CALIBRATION
    dear = catalogue.cluster(written(tmp_path, "device: {like: H100, name: Ours, price_per_hour: 3}\n")).device
    assert (dear.name, dear.price_per_hour, dear.calibrated, dear.band) == ("Ours", 3, True, base.band)
    slow = catalogue.cluster(written(tmp_path, "device: {like: H100, scale_up: {bandwidth: 50e9, latency_s: 5us}}\n")).device
    assert slow.scale_up.bandwidth == 50e9 and not slow.collectives and not slow.calibrated
