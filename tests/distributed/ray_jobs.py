"""What tests of the ray backend run inside a Ray cluster: importable there by name."""

from __future__ import annotations

from typing import Any

from lockstep.config.build import build_config
from lockstep.config.errors import ConfigError
from lockstep.config.validate import resolve
from lockstep.testing.executors import decode_plan, fake_executor


def in_a_placement_group(sizes: dict[str, int]) -> dict[str, Any]:
    """Which backend is automatic here, what an executor of fake workers answers, and how many placement groups there are then."""
    import ray

    found: dict[str, Any] = {"backend": resolve(build_config(**sizes))[0].parallel.distributed_executor_backend}
    with fake_executor(2, backend="ray", startup_s=30) as executor:
        found["tokens"] = executor.execute_model(decode_plan(1)).result(20).tokens
        found["groups"] = len(ray.util.placement_group_table())
    try:
        with fake_executor(4, backend="ray"):
            pass
    except ConfigError as e:
        found["refused"] = str(e)
    found["initialized"] = ray.is_initialized()
    return found
