"""How much of each step of a served model is operations: a calibration subtracts it from what the whole step took.

While it runs it only keeps what clocks say, and adds up afterwards: some microseconds a step, where small steps take 200.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from lockstep.models.decoder import DecoderModel

F64 = npt.NDArray[np.float64]


class StepClock:
    """Notes of every step, until `close`, its operations, and its logits and choice of tokens."""

    def __init__(self, model: DecoderModel) -> None:
        native = model.native
        assert native is not None, "only the kernels' own program times its operations"
        self._undo = ExitStack()
        self._operations: list[tuple[F64, F64]] = []
        self._choices: list[float] = []
        forward, choose = native.forward, model.compute_top_tokens

        def noted_forward(*args: Any, **kwargs: Any) -> Any:
            found = forward(*args, **kwargs)
            self._operations.append(native.clocks())
            self._choices.append(0.0)
            return found

        def noted_choose(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            found = choose(*args, **kwargs)
            self._choices[-1] += time.perf_counter() - began
            return found

        native.time_operations(True)
        self._undo.callback(native.time_operations, False)
        self._shadow(native, "forward", noted_forward)
        self._shadow(model, "compute_top_tokens", noted_choose)

    def _shadow(self, owner: Any, method: str, noted: Callable[..., Any]) -> None:
        if method in vars(owner):  # somebody else's, who is first
            self._undo.callback(vars(owner).__setitem__, method, vars(owner)[method])
        else:
            self._undo.callback(vars(owner).pop, method)
        vars(owner)[method] = noted

    def close(self) -> list[float]:
        """Leave the model as it was. Seconds of each step."""
        self._undo.close()
        ran = [float((ended - began)[ended > 0].sum()) for began, ended in self._operations]
        return [operations + choice for operations, choice in zip(ran, self._choices, strict=True)]
