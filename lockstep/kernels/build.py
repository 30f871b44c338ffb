"""Compile the kernel library of one variant: once, into a cache that all processes of this user share.

The sources include neither torch nor anything else but Python's limited API, so a library serves every Python from 3.11
on and every torch, can be shipped in a wheel, and compiles in seconds. That is why this does not go through torch's own
builder, which would tie it to one torch (and whose lock file outlives a killed build).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from lockstep.kernels.variants import Variant, usable
from lockstep.observability.logging import get_logger
from lockstep.utils import env

SOURCES = Path(__file__).parent / "csrc"
SHIPPED = Path(__file__).parent / "lib"
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra",
    "-Wno-psabi", "-Wno-maybe-uninitialized", "-DPy_LIMITED_API=0x030B0000",
)  # fmt: skip
TIMEOUT_S = 600.0
OLD_S = 30 * 86400.0  # libraries of other versions stay this long after they were last read

_log = get_logger(__name__)


class BuildError(RuntimeError):
    """The kernels could not be compiled. The message says what is missing or the compiler's first error."""


def sources() -> list[Path]:
    """The files to compile."""
    return sorted(SOURCES.glob("*.cpp"))


def compiler() -> list[str]:
    """The C++ compiler's command: CXX if set, else g++, clang++ or c++. Raises BuildError when there is none."""
    chosen = env.cxx()
    if chosen:
        return shlex.split(chosen)
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler was found: install g++ (Debian: apt install g++), or name one in CXX")


def digest(variant: Variant) -> str:
    """Changes with the sources, flags and machine. (Not with the compiler: a built library goes on serving.)"""
    found = hashlib.sha256(repr((_FLAGS, variant.flags, platform.machine())).encode())
    for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def file_name(variant: Variant) -> str:
    return f"{variant.name}-{digest(variant)}.so"


def libraries(variant: Variant) -> Iterator[Path]:
    """Those that are there: the shipped one, then the one built before."""
    name = file_name(variant)
    for folder in (lambda: SHIPPED, cache_folder):
        if (path := folder() / name).is_file():
            yield path


def built(variant: Variant) -> Path | None:
    """The library if it was shipped or built before."""
    return next(libraries(variant), None)


def cache_folder() -> Path:
    """Where libraries are kept, private to this user."""
    wanted: Path | str = "the home folder"
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: this user has no home
        wanted = folder = env.cache_folder() / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"lockstep-{os.getuid()}" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.parent.stat().st_uid != os.getuid():
        raise BuildError(f"{folder.parent} belongs to somebody else: set LOCKSTEP_CACHE to a folder of your own")
    _warn_unwritable(str(wanted), str(folder))
    return folder


def build(variant: Variant, folder: Path | None = None, broken: Collection[Path] = ()) -> Path:
    """The library's path, compiled if it must be. Concurrent callers wait for one build. Raises BuildError.

    broken: libraries that are there but will not do.
    """
    if folder is None:
        found = next((path for path in libraries(variant) if path not in broken), None)
        if found is not None:
            return found
        folder = cache_folder()
    target = folder / file_name(variant)
    with _locked(folder / f"{variant.name}.lock"):
        for left in folder.glob(f"{variant.name}.tmp*"):  # of builds that were killed: no other runs now
            shutil.rmtree(left, ignore_errors=True)
        if target in broken or not target.is_file():
            _log.warning("compiling the CPU kernels (%s) into %s: once, about half a minute ...", variant.name, folder)
            with tempfile.TemporaryDirectory(dir=folder, prefix=f"{variant.name}.tmp") as scratch:
                result = _compile(variant, Path(scratch))
                with result.open("rb") as file:
                    os.fsync(file.fileno())  # else a power cut could leave the name and half of the library
                os.replace(result, target)
        _remove_old(variant, target)
    return target


@lru_cache
def _warn_unwritable(wanted: str, instead: str) -> None:
    _log.warning("%s cannot be written: the CPU kernels are kept in %s (LOCKSTEP_CACHE names another folder)", wanted, instead)


def _remove_old(variant: Variant, current: Path) -> None:
    """Remove this variant's libraries of other sources, once nobody has loaded them for a while."""
    for path in current.parent.glob(f"{variant.name}-*.so"):
        with contextlib.suppress(OSError):
            if path != current and time.time() - max(path.stat().st_atime, path.stat().st_mtime) > OLD_S:
                path.unlink()


def _compile(variant: Variant, scratch: Path) -> Path:
    cxx, include = compiler(), sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").is_file():
        raise BuildError(f"{include}/Python.h is missing: install Python's headers (Debian: apt install python3-dev)")
    common = [*cxx, *_FLAGS, *variant.flags, f'-DLOCKSTEP_VARIANT="{variant.name}"', f"-I{include}"]
    objects = [scratch / f"{path.stem}.o" for path in sources()]

    def one(pair: tuple[Path, Path]) -> None:
        _call([*common, "-c", str(pair[0]), "-o", str(pair[1])])

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(one, zip(sources(), objects, strict=True)))
    result = scratch / "library.so"
    _call([*cxx, "-shared", "-pthread", *map(str, objects), "-o", str(result)])
    return result


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else f'exit code {done.returncode}'}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes. The kernel lets go of it when the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":  # what `make setup` does, so that the first run need not
    try:
        print(build(usable()[0]))
    except BuildError as error:
        print(f"the CPU kernels were not built: {error}. Plain torch operations will run instead.")
