"""The search, the corrections beside a formula, and that the shipped constants are what the script gives."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from lockstep.planner import catalogue, families, samples
from lockstep.planner.fit import errors, halves, minimise
from lockstep.testing import planner_tables as tables

ROOT = Path(__file__).parents[2]


def test_halves_take_every_other_size():
    fitted, held = halves([3, 1, 2, 2, 4], float)
    assert (fitted, held) == ([3, 1], [2, 2, 4])


def test_errors_of_nothing_are_refused():
    with pytest.raises(ValueError, match="0 predictions for 0 measurements"):
        errors([], [])


def test_the_search_finds_the_constants_that_made_the_data():
    rows = [(x, 3e-6 + x / 2e11) for x in (1e3, 1e5, 1e6, 1e7, 1e8)]
    found = minimise(lambda c: errors([c[0] + x / c[1] for x, _ in rows], [y for _, y in rows]).mape, (1e-5, 1e11))
    assert found == pytest.approx([3e-6, 2e11], rel=1e-3)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        families.fit_family(families.decode(), catalogue.device_shipped("H100"), [])


def close(a, b, where=""):
    """Where two JSON trees differ: numbers by more than 1 %, since the search's last steps hang on the C library's logarithm."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [f"{where}: keys"] if a.keys() != b.keys() else [d for k in a for d in close(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, list) and isinstance(b, list):
        return (
            [f"{where}: length"]
            if len(a) != len(b)
            else [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in close(x, y, f"{where}/{i}")]
        )
    if isinstance(a, float) and isinstance(b, float):
        return [] if math.isclose(a, b, rel_tol=0.01) else [f"{where}: {a} {b}"]
    return [] if a == b else [f"{where}: {a!r} {b!r}"]


def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import fit_planner
    finally:
        sys.path.pop(0)
    return fit_planner


@pytest.mark.parametrize("op", ["all_reduce", "all_gather"])
def test_shipped_constants_are_fitted_to_the_first_half(op):
    device = catalogue.device_shipped("H100")
    for name, ranks, measured in tables.collectives():
        if name == op:
            again = script().fitted(device, measured).collectives[op][ranks]
            assert vars(again) == pytest.approx(vars(device.collectives[op][ranks]), rel=0.01)


def test_shipped_decode_constants_are_what_the_script_gives():
    device = catalogue.device_shipped("H100")
    assert vars(script().fitted(device, tables.attention("decode")).decode) == pytest.approx(vars(device.decode), rel=0.01)


@pytest.mark.full
def test_the_whole_catalogue_is_what_the_script_gives():
    made = script().files()
    assert not close(json.loads(catalogue.SHIPPED.read_text(encoding="utf-8")), json.loads(made.pop(catalogue.SHIPPED)))
    assert set(samples.FOLDER.iterdir()) == set(made)
    assert [path for path, data in made.items() if not script().is_shipped(path, data)] == []


def test_packed_rows_are_compared_unpacked(tmp_path):
    """Another build of zlib gives other bytes for the same rows; other rows are told."""
    rows, path = {"gemm bfloat16": [[1, 2, 3, float(f"{i}e-6")] for i in range(1, 200)]}, tmp_path / "mine.json.gz"
    path.write_bytes(gzip.compress(msgspec.json.encode(rows), 1, mtime=0))
    assert path.read_bytes() != samples.packed(rows) and script().is_shipped(path, samples.packed(rows))
    rows["gemm bfloat16"][7][3] *= 2
    assert not script().is_shipped(path, samples.packed(rows))
    assert not script().is_shipped(tmp_path / "none.json.gz", samples.packed(rows))


def test_the_report_is_the_committed_one():
    """benchmarks/results/planner_accuracy.txt says what the constants of today give."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "planner_accuracy.py")], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == (ROOT / "benchmarks" / "results" / "planner_accuracy.txt").read_text(encoding="utf-8").split()
