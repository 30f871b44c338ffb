"""A node of fake workers, as a program: `python -m lockstep.testing.fake_node '{"tp": 2, "nnodes": 2, "node_rank": 1, ...}'`.

The object holds keywords of `fake_config`, and, for tests of refusals, `version`: what to say that lockstep's is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lockstep.cli.main import guarded
from lockstep.distributed import greeting
from lockstep.executor.factory import serve_node
from lockstep.observability import logging
from lockstep.testing.executors import FAKE_WORKER, SPEC, fake_config


def main(text: str) -> int:
    """Serve; the exit code, as the command line's."""
    settings = json.loads(text)
    version = settings.pop("version", None)
    if version:
        greeting.__version__ = version  # type: ignore[attr-defined]
    config = fake_config(**settings)
    logging.configure(config.runtime.log_level)

    def serve() -> int:
        serve_node(config, SPEC, Path("."), worker_cls=FAKE_WORKER)
        return 0

    return guarded(serve)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
