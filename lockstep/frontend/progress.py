"""The progress bar of offline generation, on standard error."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from lockstep.frontend.outputs import RequestOutput


class Progress:
    """`with Progress(total) as bar: bar.advance(output)`: requests done, and tokens per second so far."""

    def __init__(self, total: int, *, show: bool = True) -> None:
        self._total, self._show = total, show
        self._bar: Any = None
        self._tokens_in, self._tokens_out, self._start_s = 0, 0, time.monotonic()

    def __enter__(self) -> Progress:
        if self._show:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc="Processed prompts", unit="req", dynamic_ncols=True)
        return self

    def advance(self, output: RequestOutput) -> None:
        """One request is done."""
        if self._bar is None:
            return
        self._tokens_in += len(output.prompt_token_ids)
        self._tokens_out += sum(len(c.token_ids) for c in output.outputs)
        elapsed_s = max(time.monotonic() - self._start_s, 1e-9)
        self._bar.set_postfix_str(
            f"in {self._tokens_in / elapsed_s:.1f} tok/s, out {self._tokens_out / elapsed_s:.1f} tok/s", refresh=False
        )
        self._bar.update(1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
