"""A line in the log every ten seconds in which there was work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lockstep.cluster.contract import EngineClient
from lockstep.observability.logging import get_logger

if TYPE_CHECKING:
    from lockstep.frontend.request_metrics import EngineNumbers

EVERY_S = 10.0

_log = get_logger(__name__)


class StatsLog:
    """Writes it. `turn` is called all the time."""

    def __init__(self, now_s: float) -> None:
        self._due_s, self._since_s = now_s + EVERY_S, now_s
        self._prompt = self._generated = 0

    def turn(self, now_s: float, client: EngineClient, engines: Mapping[int, EngineNumbers]) -> None:
        """Write the line if it is time."""
        if now_s < self._due_s:
            return
        prompt = sum(numbers.prompt_tokens for numbers in engines.values())
        generated = sum(numbers.generation_tokens for numbers in engines.values())
        seconds = now_s - self._since_s
        stats = [one.stats for one in client.live() if one.stats is not None]
        running, waiting = sum(s.running for s in stats), sum(s.waiting for s in stats)
        blocks, used = sum(s.kv_blocks for s in stats), sum(s.kv_blocks_used for s in stats)
        asked, found = sum(s.prefix_query_tokens for s in stats), sum(s.prefix_hit_tokens for s in stats)
        if prompt > self._prompt or generated > self._generated or running or waiting:
            _log.info(
                "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, Waiting: %d reqs, "
                "KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
                *((prompt - self._prompt) / seconds, (generated - self._generated) / seconds, running, waiting),
                *(100 * used / max(1, blocks), 100 * found / max(1, asked)),
            )
        self._due_s, self._since_s, self._prompt, self._generated = now_s + EVERY_S, now_s, prompt, generated
