"""Each variant of the kernels as a module of its own, for the tests of them all."""

from __future__ import annotations

from typing import Any

import pytest

from lockstep.kernels import build, library
from lockstep.kernels.variants import Variant


def load_or_skip(variant: Variant) -> Any:
    """The variant's module. Skips the test where no compiler can build it."""
    try:
        lib = library.load(build.build(variant))
    except build.BuildError as error:
        pytest.skip(str(error))
    assert lib.variant() == variant.name, f"{lib.variant()} was loaded for {variant.name}"
    return lib
