"""Nobody runs a tile instruction without the system's permission."""

from __future__ import annotations

import errno

import pytest

from lockstep.kernels import amx, variants
from lockstep.kernels.variants import VARIANTS, cpu_flags, usable

SAPPHIRE = VARIANTS[0].needs | {"avx2", "fma", "f16c", "bmi2"}


@pytest.mark.parametrize(("refusal", "best"), [("", "amx"), ("refused", "avx512bf16")])
def test_a_process_that_is_refused_tiles_runs_the_next_best(refusal: str, best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(variants, "cpu_flags", lambda: SAPPHIRE)
    monkeypatch.setattr(amx, "refusal", lambda: asked.append(1) or refusal)
    assert usable(machine="x86_64")[0].name == best and asked


def test_other_cpus_are_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> str:
        raise AssertionError

    monkeypatch.setattr(amx, "refusal", never)
    assert usable(SAPPHIRE, "x86_64")[0].name == "amx"  # what could run there, not here
    monkeypatch.setattr(variants, "cpu_flags", lambda: SAPPHIRE - {"amx_tile", "amx_bf16"})
    assert usable(machine="x86_64")[0].name == "avx512bf16"


class Libc:
    """Stands in for the C library: the system call answers `result`."""

    def __init__(self, result: int) -> None:
        self.result, self.calls = result, []  # type: ignore[var-annotated]

    def syscall(self, *args: int) -> int:
        self.calls.append(args)
        return self.result


@pytest.mark.parametrize(("result", "words"), [(0, ""), (-1, "refuses AMX tiles to this process (Operation not permitted)")])
def test_the_system_is_asked_for_tile_data(result: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Libc(result)
    monkeypatch.setattr(amx.ctypes, "CDLL", lambda *_, **__: libc)
    monkeypatch.setattr(amx.ctypes, "get_errno", lambda: errno.EPERM)
    said = amx._ask()
    assert (words in said if words else said == "") and libc.calls == [(158, 0x1023, 18)]


@pytest.mark.skipif("amx_tile" in cpu_flags(), reason="for CPUs without tiles")
def test_a_system_without_tiles_refuses_them() -> None:
    assert amx.refusal() != ""
