"""The C++ kernels as a Python module, or the reason why there are none.

`library()` is what callers use. Its functions take addresses (`tensor.data_ptr()`), numbers and handles; they are listed
at the end of each file in csrc/. Every operation has a plain-torch reference in `kernels.reference`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.kernels import build
from lockstep.kernels.variants import EMULATED, VARIANTS, Variant, usable
from lockstep.observability.logging import get_logger
from lockstep.utils import env

DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}  # simd.h: DType

_log = get_logger(__name__)


def choose() -> Variant | None:
    """The variant to run: `LOCKSTEP_KERNELS`, else the best that this CPU has; None for "torch".

    Raises ConfigError (a ValueError) for a name that is not known or that this CPU cannot run.
    """
    wanted = env.kernels()
    if wanted == "torch":
        return None
    fitting = usable()
    if not wanted:
        return fitting[0]
    for variant in (*VARIANTS, EMULATED):
        if variant.name == wanted:
            if variant in fitting or (variant is EMULATED and EMULATED.needs <= fitting[0].needs):
                return variant
            raise ConfigError(f"LOCKSTEP_KERNELS={wanted}: this CPU cannot run it. It runs {', '.join(v.name for v in fitting)} and torch.")
    raise ConfigError(f"LOCKSTEP_KERNELS={wanted} is not known: use one of {', '.join(v.name for v in VARIANTS)}, torch.")


@lru_cache(maxsize=1)
def library() -> Any | None:
    """The kernel module of this process, built on first use; None where there is none, which is said once in the log."""
    variant = choose()
    try:
        while variant is not None:
            found = _loaded(variant)
            if not (wrong := found.linear_selfcheck()):
                return found
            what = "the system does not let it use the tile registers" if wrong < 0 else "its products are wrong on this CPU"
            variant = _next(variant)
            _log.warning(
                "CPU kernels for %s are not used: %s. Next: %s.", found.variant(), what, variant.name if variant else "plain torch"
            )
    except (build.BuildError, OSError, ImportError) as error:
        _log.warning(
            "CPU kernels are not available (%s). Plain torch operations run instead: slower, and not bit for bit the same across splits.",
            error,
        )
    return None


def _loaded(variant: Variant) -> Any:
    """The variant's module, built if it must be: also where a library is there that does not load, cut short by a full disk say."""
    broken = []
    for path in build.libraries(variant):
        try:
            return load(path)
        except (OSError, ImportError) as error:
            _log.warning("%s cannot be loaded (%s): it is built anew", path, error)
            broken.append(path)
    return load(build.build(variant, broken=broken))


def _next(variant: Variant) -> Variant | None:
    """The best variant after this one that the CPU runs."""
    later = usable()
    later = later[later.index(variant) + 1 :] if variant in later else later
    return later[0] if later else None


def load(path: Path) -> Any:
    """The module in the library at `path`."""
    loader = importlib.machinery.ExtensionFileLoader("_lockstep_kernels", str(path))
    spec = importlib.util.spec_from_file_location("_lockstep_kernels", str(path), loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
