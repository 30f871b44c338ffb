"""Fill a model from a checkpoint folder. Each rank reads only the bytes it owns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lockstep.weights.checkpoint import Checkpoint
from lockstep.weights.errors import WeightError
from lockstep.weights.name_map import canonical, is_ignored
from lockstep.weights.plan import LoadableModel, Task, plan_tasks
from lockstep.weights.staging import Staging

Progress = Callable[[int, int, str], None]  # (bytes done, bytes to do, tensor)


@dataclass(frozen=True)
class LoadReport:
    """What loading cost this rank. `bytes_read` counts tensor bytes; `checkpoint_bytes` is the whole checkpoint's."""

    bytes_read: int
    header_bytes: int
    checkpoint_bytes: int
    tensors: int
    files: int
    seconds: float


def load_weights(
    model: LoadableModel, folder: str | Path, *, progress: Progress | None = None, packers: Mapping[str, Callable[[], None]] | None = None
) -> LoadReport:
    """Fill every parameter of `model` from the safetensors in `folder`, converted to the parameters' types.

    `progress(bytes_done, bytes_total, tensor)` is called as data arrives, at least every 16 MiB. `packers`: by module name,
    what to call once the module's parameters are there; it must let go of its matrices (see `Staging`).
    Raises WeightError (a ValueError) when a tensor is missing, not known, or has the wrong shape or type, and when a
    file is damaged. Names and shapes are checked before anything is read.
    """
    started = time.monotonic()
    tasks = plan_tasks(model)
    with Checkpoint(Path(folder)) as checkpoint, torch.no_grad():
        names = canonical(checkpoint.tensors)
        _check_names(model, tasks, names, checkpoint)
        _check_shapes(tasks, names, checkpoint)
        _read(tasks, names, checkpoint, progress, packers or {})
        return LoadReport(
            bytes_read=checkpoint.bytes_read,
            header_bytes=checkpoint.header_bytes,
            checkpoint_bytes=checkpoint.total_bytes,
            tensors=len(tasks),
            files=len(checkpoint.files),
            seconds=time.monotonic() - started,
        )


def _some(names: Iterable[str]) -> str:
    """A few names and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more


def _check_names(model: LoadableModel, tasks: list[Task], names: dict[str, str], checkpoint: Checkpoint) -> None:
    missing = {task.name for task in tasks} - names.keys()
    if missing:
        raise WeightError(
            f"{checkpoint.folder} lacks {len(missing)} tensor(s) that the model needs: {_some(missing)}."
            " Check that config.json belongs to this checkpoint, and download missing files."
        )
    rules = model.weight_map()
    known = {rule.name for rule in rules if rule.module is not None}
    unknown = {name for name in names if name not in known and not is_ignored(name, rules)}
    if unknown:
        raise WeightError(
            f"{checkpoint.folder} has {len(unknown)} unexpected tensor(s) that this model does not use: {_some(unknown)}."
            " Check that `architectures` in config.json names the right model; adapters and quantised weights are not supported."
        )


def _check_shapes(tasks: list[Task], names: dict[str, str], checkpoint: Checkpoint) -> None:
    for task in tasks:
        file, entry = checkpoint.tensors[names[task.name]]
        if entry.shape != task.piece.full_shape:
            raise WeightError(
                f"tensor {task.name!r} in {file.path.name} has shape {list(entry.shape)}, but the model's {task.target} needs"
                f" {list(task.piece.full_shape)}: check that config.json belongs to this checkpoint."
            )


def _read(
    tasks: list[Task], names: dict[str, str], checkpoint: Checkpoint, progress: Progress | None, packers: Mapping[str, Callable[[], None]]
) -> None:
    entries = {task.name: checkpoint.tensors[names[task.name]] for task in tasks}
    place = {name: (str(file.path), entry.start) for name, (file, entry) in entries.items()}
    modules: dict[str, list[Task]] = {}
    for task in sorted(tasks, key=lambda task: place[task.name]):
        modules.setdefault(task.module, []).append(task)  # in file order: a disk sees one forward sweep, nearly
    total = sum(task.dest.numel() * entry.nbytes // max(1, _numel(entry.shape)) for task in tasks for _, entry in [entries[task.name]])
    staging = Staging([modules[name] for name in packers if name in modules])
    done = 0
    for module, its_tasks in modules.items():
        if module in packers:
            staging.lend(its_tasks)
        for task in its_tasks:
            file, entry = entries[task.name]

            def tick(nbytes: int, name: str = task.name) -> None:
                nonlocal done
                done += nbytes
                if progress is not None:
                    progress(done, total, name)

            file.read_into(entry, task.piece.dim, task.piece.src_start, task.dest, tick)
        if module in packers:
            packers[module]()
    assert done == total, f"read {done} of {total} bytes"


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
