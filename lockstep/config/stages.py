"""How a model's layers may be dealt out to pipeline stages: the rules, without the arithmetic (`distributed.partition`)."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.config.errors import ConfigError

PARTITIONS = ("balanced", "even", "reference")


def check_stages(num_layers: int, pp: int, how: str | Sequence[int] | None = None) -> None:
    """Raise ConfigError where so many layers cannot be dealt out to `pp` stages in this way: a rule's name, or counts."""
    if pp < 1:
        raise ConfigError(f"pipeline_parallel_size={pp} must be at least 1.")
    if pp > num_layers:
        raise ConfigError(f"pipeline_parallel_size={pp} is larger than num_hidden_layers={num_layers}: use at most {num_layers}.")
    if how is not None and how not in PARTITIONS:
        explicit_counts(how, num_layers, pp)


def explicit_counts(how: str | Sequence[int], num_layers: int, pp: int) -> list[int]:
    """The layers of each stage as written: "5,6,6,5" or a list. Raises ConfigError when they do not fit."""
    named = f"pipeline_layer_partition={how!r}"
    try:
        counts = [int(part) for part in (how.split(",") if isinstance(how, str) else how)]
    except ValueError:
        raise ConfigError(
            f"{named}: Invalid partition string. Write one number of layers per stage, such as 5,6,6,5, or one of {', '.join(PARTITIONS)}."
        ) from None
    if len(counts) != pp:
        raise ConfigError(f"{named}: len(partitions)={len(counts)} does not match pp_size={pp}: give one number of layers per stage.")
    if sum(counts) != num_layers:
        raise ConfigError(f"{named}: sum(partitions)={sum(counts)} does not match num_hidden_layers={num_layers}.")
    if min(counts) < 1:
        raise ConfigError(f"{named} has a stage with fewer than one layer: give each stage at least one.")
    return counts
