"""Parity tests run with every collective of every rank compared: a divergence fails them with both call sites."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def compared_collectives() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCKSTEP_CHECK_COLLECTIVES", "1")
        yield
