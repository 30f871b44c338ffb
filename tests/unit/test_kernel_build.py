"""Which library is chosen, how it comes to be, and what happens where it cannot. Sources here are tiny, so builds are short."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lockstep.kernels import amx, build, library, variants
from lockstep.kernels.variants import EMULATED, VARIANTS, cpu_flags, usable

GENERIC = VARIANTS[-1]
TINY = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "word.h"
static PyObject* variant(PyObject*, PyObject*) { return PyUnicode_FromString(LOCKSTEP_VARIANT WORD); }
static PyObject* selfcheck(PyObject*, PyObject*) { return PyLong_FromLong(0); }
static PyMethodDef methods[] = {
    {"variant", variant, METH_NOARGS, nullptr}, {"linear_selfcheck", selfcheck, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_lockstep_kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__lockstep_kernels() { return PyModule_Create(&module); }
"""
try:
    build.compiler()
    NO_COMPILER = ""
except build.BuildError as error:
    NO_COMPILER = str(error)
needs_compiler = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER)


@pytest.fixture(autouse=True)
def own_world(tmp_path, monkeypatch):
    """A cache and sources of this test, nothing shipped, the best variant; `library()` as a new process sees it."""
    for name in ("LOCKSTEP_KERNELS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "module.cpp").write_text(TINY)
    (folder / "word.h").write_text('#define WORD "!"\n')
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "lib")
    monkeypatch.setattr(library, "library", library.library.__wrapped__)
    return tmp_path


def cpuinfo(vendor: str, flags: str) -> str:
    """As Linux shows it, of two cores."""
    core = f"vendor_id\t: {vendor}\nmodel name\t: A CPU: with a colon\nflags\t\t: {flags}\nbugs\t\t: spectre_v1\n\n"
    return "".join(f"processor\t: {i}\n{core}" for i in range(2))


V3 = "fpu sse2 ssse3 fma cx16 sse4_2 movbe popcnt xsave avx f16c abm bmi1 avx2 bmi2"
V4 = V3 + " avx512f avx512dq avx512cd avx512bw avx512vl"
CPUS = {
    "Sapphire Rapids": (V4 + " avx512_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8", ["amx", "avx512bf16", "avx512", "avx2"]),
    "Zen 5": (V4 + " avx512ifma avx512_bf16 avx512_vnni", ["avx512bf16", "avx512", "avx2"]),
    "Skylake server": (V4, ["avx512", "avx2"]),
    "Haswell": (V3, ["avx2"]),
    "Xeon Phi": (V3 + " avx512f avx512pf avx512er avx512cd", ["avx2"]),
    "Sandy Bridge": ("fpu sse2 sse4_2 avx", []),
    "Piledriver": ("fpu sse2 sse4_2 avx fma f16c", []),
}


@pytest.mark.parametrize(("flags", "names"), CPUS.values(), ids=CPUS)
def test_what_a_cpu_can_run(flags, names):
    found = usable(cpu_flags(cpuinfo("GenuineIntel", flags)), "x86_64")
    assert [variant.name for variant in found] == [*names, "generic"]


def test_an_arm_cpu_runs_the_generic_library():
    text = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm aes asimddp sve bf16\nCPU implementer\t: 0x41\n"
    flags = cpu_flags(text)
    assert "asimd" in flags and [v.name for v in usable(flags, "aarch64")] == ["generic"]
    # Names of features mean nothing on another architecture.
    assert [v.name for v in usable(frozenset(V4.split()), "aarch64")] == ["generic"]


@pytest.mark.parametrize("text", ["", "processor : 0\n", "flags\n"])
def test_a_cpu_that_says_nothing_runs_the_generic_library(text):
    assert [v.name for v in usable(cpu_flags(text), "x86_64")] == ["generic"]


def test_this_cpus_features_are_those_of_its_first_core():
    path = Path("/proc/cpuinfo")
    if path.exists():
        assert cpu_flags() == cpu_flags(path.read_text()) != frozenset()


def test_lockstep_kernels_chooses(monkeypatch):
    monkeypatch.setattr(variants, "cpu_flags", lambda: frozenset(CPUS["Zen 5"][0].split()))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert library.choose() is VARIANTS[1]
    for name, chosen in (
        ("avx512", VARIANTS[2]),
        (" AVX2 ", VARIANTS[3]),
        ("generic", GENERIC),
        ("amx-emulated", EMULATED),
        ("torch", None),
    ):
        monkeypatch.setenv("LOCKSTEP_KERNELS", name)
        assert library.choose() is chosen
    monkeypatch.setenv("LOCKSTEP_KERNELS", "amx")
    with pytest.raises(ValueError, match=r"amx: this CPU cannot run it. It runs avx512bf16, avx512, avx2, generic and torch"):
        library.library()
    monkeypatch.setenv("LOCKSTEP_KERNELS", "sse9")
    with pytest.raises(ValueError, match="sse9 is not known: use one of amx, avx512bf16, avx512, avx2, generic, torch"):
        library.library()


def test_the_emulated_tiles_need_a_cpu_that_has_the_rest(monkeypatch):
    monkeypatch.setattr(variants, "cpu_flags", lambda: frozenset(V3.split()))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("LOCKSTEP_KERNELS", "amx-emulated")
    with pytest.raises(ValueError, match="this CPU cannot run it"):
        library.choose()
    monkeypatch.setattr(variants, "cpu_flags", lambda: frozenset(CPUS["Sapphire Rapids"][0].split()))
    monkeypatch.setattr(amx, "refusal", lambda: "")
    assert library.choose() is EMULATED


def test_torch_is_asked_for_silently(monkeypatch, caplog):
    monkeypatch.setenv("LOCKSTEP_KERNELS", "torch")
    assert library.library() is None and not caplog.records


def test_no_compiler_is_said_once(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nonexistent/c++ -pipe")
    cached = library.lru_cache(maxsize=1)(library.library)
    with caplog.at_level(logging.WARNING):
        assert cached() is None and cached() is None
    assert sum("not available" in record.message for record in caplog.records) == 1
    assert "CPU kernels are not available (/nonexistent/c++ could not be run" in caplog.text and "Plain torch" in caplog.text


def test_a_machine_without_any_compiler_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler was found: install g\+\+"):
        build.build(GENERIC)


def test_missing_headers_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CXX", "c++")
    with pytest.raises(build.BuildError, match=r"Python\.h is missing: install Python's headers"):
        build.build(GENERIC)


@needs_compiler
def test_libraries_that_nobody_has_read_for_long_are_removed(own_world):
    current = build.build(GENERIC)
    fresh, old, other = (current.with_name(name) for name in ("generic-1.so", "generic-2.so", "avx2-3.so"))
    for path in (fresh, old, other):
        path.write_text("")
    for path in (old, other):
        os.utime(path, (time.time() - 2 * build.OLD_S,) * 2)
    current.unlink()
    assert build.build(GENERIC) == current
    assert sorted(current.parent.glob("*.so")) == sorted([current, fresh, other]), "another variant's is not this build's to judge"


@needs_compiler
def test_a_library_is_built_once_and_follows_its_sources(own_world, monkeypatch):
    first = build.build(GENERIC)
    assert first.parent == own_world / "cache" / "kernels" and library.load(first).variant() == "generic!"
    assert sorted(p.name for p in first.parent.iterdir()) == [first.name, "generic.lock"], "something is left of the build"
    monkeypatch.setenv("CXX", "/nonexistent")
    assert build.build(GENERIC) == first == build.built(GENERIC)  # it is there: nothing is compiled
    (build.SOURCES / "word.h").write_text('#define WORD "?"\n')
    assert build.built(GENERIC) is None
    monkeypatch.delenv("CXX")
    assert library.load(build.build(GENERIC)).variant() == "generic?" and first.is_file()
    (build.SOURCES / "word.h~").write_text("an editor's copy")
    assert build.built(GENERIC) is not None


@needs_compiler
def test_variants_machines_and_flags_have_libraries_of_their_own(monkeypatch):
    names = {build.file_name(v) for v in (*VARIANTS, EMULATED)}
    assert len(names) == len(VARIANTS) + 1
    here = build.digest(GENERIC)
    monkeypatch.setattr(platform, "machine", lambda: "riscv128")
    assert build.digest(GENERIC) != here  # a home folder may be shared by machines of several kinds


def test_the_digest_does_not_depend_on_where_the_sources_lie(own_world, monkeypatch):
    here = build.digest(GENERIC)
    moved = own_world / "elsewhere" / "csrc"
    moved.parent.mkdir()
    build.SOURCES.rename(moved)
    monkeypatch.setattr(build, "SOURCES", moved)
    assert build.digest(GENERIC) == here


@needs_compiler
def test_a_shipped_library_goes_first_and_needs_no_compiler_and_no_cache(own_world, monkeypatch):
    build.SHIPPED.mkdir()
    build.build(GENERIC, build.SHIPPED)
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("LOCKSTEP_KERNELS", "generic")
    monkeypatch.setattr(build, "cache_folder", lambda: pytest.fail("no cache is needed"))
    module = library.library()
    assert module.variant() == "generic!" and Path(module.__file__).parent == build.SHIPPED


@needs_compiler
def test_a_library_of_another_system_is_built_anew(own_world, monkeypatch):
    """Shipped for a newer system, or left in the cache by a machine that died: either way this one gets its own."""
    monkeypatch.setenv("LOCKSTEP_KERNELS", "generic")
    build.SHIPPED.mkdir()
    shipped, cached = build.SHIPPED / build.file_name(GENERIC), build.cache_folder() / build.file_name(GENERIC)
    shipped.write_text("not for here")
    cached.write_text("cut off")
    assert Path(library.library().__file__) == cached
    monkeypatch.setenv("CXX", "/nonexistent")
    assert Path(library.library().__file__) == cached, "built again, though the cached one is good"


@needs_compiler
def test_the_compilers_first_error_is_told(own_world, monkeypatch, caplog):
    (build.SOURCES / "bad.cpp").write_text("int fine;\nint broken = nothing_of_this_name;\nint worse = neither_this;\n")
    with pytest.raises(build.BuildError, match=r"failed: .*bad\.cpp:2:.*error.*nothing_of_this_name") as told:
        build.build(GENERIC)
    assert "neither_this" not in str(told.value)
    monkeypatch.setenv("LOCKSTEP_KERNELS", "generic")
    assert library.library() is None and "nothing_of_this_name" in caplog.text
    assert [p.name for p in build.cache_folder().iterdir()] == ["generic.lock"]


@needs_compiler
def test_an_error_of_the_linker_is_told():
    (build.SOURCES / "a.cpp").write_text("int twice = 1;\n")
    (build.SOURCES / "b.cpp").write_text("int twice = 2;\n")
    with pytest.raises(build.BuildError, match=r"multiple definition of `?twice"):
        build.build(GENERIC)


def test_a_compiler_that_hangs_is_given_up(own_world, monkeypatch):
    slow = own_world / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(build, "TIMEOUT_S", 0.2)
    began = time.monotonic()
    with pytest.raises(build.BuildError, match="timed out"):
        build.build(GENERIC)
    assert time.monotonic() - began < 30


def counting_compiler(folder: Path) -> tuple[Path, Path]:
    """(a compiler that is slow, the file to which it adds a line each time)."""
    script, log = folder / "counting", folder / "calls"
    script.write_text(f'#!/bin/sh\necho "$$" >> {log}\nsleep 0.3\nexec {" ".join(build.compiler())} "$@"\n')
    script.chmod(0o755)
    return script, log


BUILD = """
import sys
from pathlib import Path
from lockstep.kernels import build, library
from lockstep.kernels.variants import VARIANTS
build.SOURCES, build.SHIPPED = Path(sys.argv[1]), Path(sys.argv[2])
print(library.load(build.build(VARIANTS[-1])).variant())
"""


def builder(**environment: str) -> subprocess.Popen[str]:
    args = [sys.executable, "-c", BUILD, str(build.SOURCES), str(build.SHIPPED)]
    return subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})


@needs_compiler
def test_processes_that_start_together_compile_once(own_world):
    script, log = counting_compiler(own_world)
    running = [builder(CXX=str(script)) for _ in range(3)]
    assert [process.communicate(timeout=120)[0] for process in running] == ["generic!\n"] * 3
    assert len(log.read_text().split()) == 2, "one source, one link"


@needs_compiler
def test_a_killed_build_blocks_nobody_and_its_rest_is_removed(own_world):
    stuck = own_world / "stuck"
    stuck.write_text(f"#!/bin/sh\necho $$ > {own_world}/pid\nexec sleep 100\n")
    stuck.chmod(0o755)
    killed = builder(CXX=str(stuck))
    try:
        deadline = time.monotonic() + 60
        while not ((own_world / "pid").exists() and (own_world / "pid").read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        killed.kill()
        killed.communicate(timeout=60)
    os.kill(int((own_world / "pid").read_text()), 9)  # the compiler, which outlived it
    left = [p.name for p in build.cache_folder().iterdir() if p.is_dir()]
    assert left and left[0].startswith("generic.tmp")
    assert library.load(build.build(GENERIC)).variant() == "generic!"
    assert not [p for p in build.cache_folder().iterdir() if p.is_dir()]


def test_a_cache_that_cannot_be_written_is_replaced_by_a_private_folder(own_world, monkeypatch):
    (own_world / "file").write_text("")
    monkeypatch.setenv("LOCKSTEP_CACHE", str(own_world / "file" / "cache"))  # nobody, not even root, makes a folder in a file
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(own_world / "tmp"))
    folder = build.cache_folder()
    assert folder == own_world / "tmp" / f"lockstep-{os.getuid()}" / "kernels" and folder.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(build.os, "getuid", lambda: 12345)
    (own_world / "tmp" / "lockstep-12345").mkdir()
    with pytest.raises(build.BuildError, match="belongs to somebody else: set LOCKSTEP_CACHE"):
        build.cache_folder()


def test_a_user_without_a_home_has_a_cache_all_the_same(own_world, monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LOCKSTEP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(own_world / "tmp"))
    assert build.cache_folder().is_relative_to(own_world / "tmp")


def test_finding_a_built_library_is_quick(monkeypatch):
    """Each process does it at its start: read the CPU's features, hash the sources, look."""
    monkeypatch.setattr(build, "SOURCES", Path(build.__file__).parent / "csrc")
    took = []
    for _ in range(20):
        began = time.perf_counter()
        build.built(library.choose() or GENERIC)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.01


class Wheel:
    """What hatchling hands to the hook, and what the hook says."""

    def __init__(self, root: Path, target: str = "wheel") -> None:
        pytest.importorskip("hatchling")
        spec = importlib.util.spec_from_file_location("hatch_build", Path(__file__).parents[2] / "hatch_build.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        from hatchling.bridge.app import Application

        self.warnings: list[str] = []
        app = Application()
        app.display_warning = lambda text="", **_: self.warnings.append(text)  # type: ignore[method-assign]
        self.data: dict = {"force_include": {}, "pure_python": True}
        self.hook = module.KernelBuildHook(str(root), {}, None, None, str(root), target, app)

    def make(self, version: str) -> None:
        self.hook.initialize(version, self.data)

    @property
    def is_pure(self) -> bool:
        return self.data == {"force_include": {}, "pure_python": True}


ROOT = Path(__file__).parents[2]


@needs_compiler
def test_a_wheel_has_every_library_of_this_architecture(monkeypatch):
    wheel = Wheel(ROOT)
    wheel.make("standard")
    wanted = [v for v in VARIANTS if v.machine in ("", platform.machine())]
    found = wheel.data["force_include"]
    skipped = len(wheel.warnings)  # this compiler may be too old for some
    assert len(found) + skipped == len(wanted) and build.file_name(GENERIC) in {Path(path).name for path in found}
    assert all(to == f"lockstep/kernels/lib/{Path(path).name}" and Path(path).is_file() for path, to in found.items())
    assert wheel.data["pure_python"] is False and wheel.data["tag"].startswith("cp311-abi3-") and "-" not in wheel.data["tag"][12:]
    wheel.hook.finalize("standard", wheel.data, "")
    assert not any(Path(path).exists() for path in found)


@pytest.mark.parametrize(
    ("target", "version", "kernels"), [("wheel", "editable", ""), ("sdist", "standard", ""), ("wheel", "standard", "torch")]
)
def test_what_needs_no_libraries_compiles_none(target, version, kernels, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_KERNELS", kernels)
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("compiles"))
    wheel = Wheel(ROOT, target)
    wheel.make(version)
    assert wheel.is_pure and not wheel.warnings


def test_a_wheel_made_without_a_compiler_is_pure_and_says_so(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    wheel = Wheel(ROOT)
    wheel.make("standard")
    assert wheel.is_pure and "no C++ compiler was found" in wheel.warnings[0]
    monkeypatch.setenv("CXX", "/nonexistent")
    wheel = Wheel(ROOT)
    wheel.make("standard")
    assert wheel.is_pure and len(wheel.warnings) == len([v for v in VARIANTS if v.machine in ("", platform.machine())])
