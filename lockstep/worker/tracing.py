"""Spans inside a rank's step, in its timeline: layers or operations, collectives, logits.

Nothing of this is in the way while nobody records: `watch` puts it there, and closing what it returns takes it away.
On a GPU the spans are those of the CPU that hands out the work.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from lockstep.distributed.groups import ParallelGroups
from lockstep.models.decoder import DecoderModel
from lockstep.observability.timeline import Timeline, now_s
from lockstep.worker.meter import COLLECTIVES

_PARTS = re.compile(r"embed_tokens|norm|layers\.\d+(\.(self_attn|mlp))?")


def watch(model: DecoderModel, groups: ParallelGroups, timeline: Timeline) -> ExitStack:
    """Record the parts of `model`'s steps in `timeline` until the result is closed."""
    undo = ExitStack()
    native = model.native
    if native is not None:
        native.time_operations(True)
        undo.callback(native.time_operations, False)
    else:
        for name, module in model.named_modules():
            if _PARTS.fullmatch(name):
                _watch_module(module, name, timeline, undo)
    for method in ("compute_logits", "compute_top_tokens"):
        _watch_method(model, method, "logits", "layer", timeline, undo)
    for group in dict.fromkeys((groups.tp, groups.pp, groups.dp, groups.pcp, groups.dcp, groups.ep, groups.world)):
        if group is not None and group.world_size > 1:
            for communicator in dict.fromkeys((group.communicator, group.cpu_communicator)):
                for method in COLLECTIVES:
                    _watch_method(communicator, method, f"{group.name}.{method.rstrip('_')}", "collective", timeline, undo)
    return undo


def add_operations(model: DecoderModel, timeline: Timeline) -> None:
    """Record the operations of the step that the kernels have just run."""
    if timeline.on and model.native is not None and (found := model.native.operation_times()):
        timeline.add_spans(*zip(*found, strict=True), "layer")


def _watch_module(module: nn.Module, name: str, timeline: Timeline, undo: ExitStack) -> None:
    began: list[float] = []

    def before(*_: Any) -> None:
        began.append(now_s())

    def after(*_: Any) -> None:
        timeline.add_span(name, began.pop(), now_s(), "layer")

    undo.callback(module.register_forward_pre_hook(before).remove)
    undo.callback(module.register_forward_hook(after).remove)


def _watch_method(owner: Any, method: str, name: str, category: str, timeline: Timeline, undo: ExitStack) -> None:
    """Shadow `owner.method` by one that records itself. Calls inside calls of the same owner are recorded too."""
    plain: Callable[..., Any] = getattr(owner, method)
    shadow = vars(owner).get(method)  # the meter's

    def recorded(*args: Any, **kwargs: Any) -> Any:
        began_s = now_s()
        try:
            return plain(*args, **kwargs)
        finally:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            known = {} if first is None else {"bytes": first.nbytes}
            timeline.add_span(name, began_s, now_s(), category, **known)

    setattr(owner, method, recorded)
    if shadow is None:
        undo.callback(delattr, owner, method)
    else:
        undo.callback(setattr, owner, method, shadow)
