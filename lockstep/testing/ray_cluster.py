"""A Ray cluster of its own for tests, as a program: `python -m lockstep.testing.ray_cluster CPUS FOLDER`.

Prints the cluster's address, and ends it when standard input ends. (`ray stop` would end those of others too.)
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def ray_cluster(cpus: int = 4) -> Iterator[str]:
    """Its address, while it runs; the environment of this process names it, and has its token (Ray would put one into the home)."""
    folder = tempfile.mkdtemp(prefix="lsray", dir="/tmp")  # its sockets' paths must be short
    names = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in (*names, "RAY_ADDRESS")}
    os.environ.update(names)
    os.environ.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "lockstep.testing.ray_cluster", str(cpus), folder]
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    assert owner.stdin is not None and owner.stdout is not None
    try:
        address = owner.stdout.readline().strip()
        if not address:
            log.seek(0)
            raise RuntimeError(f"Ray did not start: {log.read()}")
        os.environ["RAY_ADDRESS"] = address
        yield address
    finally:
        owner.stdin.close()
        owner.wait(60)
        owner.stdout.close()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def main(cpus: str, folder: str) -> None:
    """Start one, and wait for the end of standard input."""
    import ray

    ray.init(
        address="local",
        num_cpus=int(cpus),
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=100 << 20,
        configure_logging=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
