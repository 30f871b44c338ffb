"""Which checkpoint tensor fills which parameter: a list of rules that a model declares.

A model returns every rule of the whole checkpoint, also those of other pipeline stages (`here=False`), so that a tensor
nobody knows is found on every rank. Several rules may name the same tensor (tied weights on two stages).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

ShardId = str | int | None


@dataclass(frozen=True)
class WeightRule:
    """Checkpoint tensor `name` fills `param` of the submodule at path `module` (part `shard_id` of it).

    `module=None` says that tensors matching the pattern `name` are known and not wanted. `here=False`: another
    pipeline stage holds it.
    """

    name: str
    module: str | None
    param: str = "weight"
    shard_id: ShardId = None
    here: bool = True


# Buffers that old checkpoints carry and every engine recomputes.
ALWAYS_IGNORED = ("*.rotary_emb.inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached", "*.attn.bias", "*.attn.masked_bias")

# How multimodal wrappers prefix the language model's tensors, and what their other towers are called.
_WRAPPER_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_TOWERS = ("vision_tower.*", "multi_modal_projector.*", "model.vision_tower.*", "model.multi_modal_projector.*")


def ignore(*patterns: str) -> list[WeightRule]:
    """Rules for tensors that may be in the checkpoint and are not wanted. Patterns as in a shell: `*`, `?`."""
    return [WeightRule(pattern, None) for pattern in patterns]


def linear(name: str, module: str, shard_id: ShardId = None, *, bias: bool = False) -> list[WeightRule]:
    """The rules of one linear layer of the checkpoint: its weight, and its bias if it has one."""
    params = ("weight", "bias") if bias else ("weight",)
    return [WeightRule(f"{name}.{param}", module, param, shard_id) for param in params]


def per_layer(template: Iterable[WeightRule], num_layers: int, owned: range | None = None) -> list[WeightRule]:
    """The rules of every layer from one layer's: `{i}` in names and module paths becomes the layer's number.

    Layers outside `owned` (default: all) belong to other pipeline stages.
    """
    rules = list(template)
    return [
        replace(
            rule,
            name=rule.name.replace("{i}", str(i)),
            module=None if rule.module is None else rule.module.replace("{i}", str(i)),
            here=rule.here and (owned is None or i in owned),
        )
        for i in range(num_layers)
        for rule in rules
    ]


def elsewhere(rules: Iterable[WeightRule], here: bool = False) -> list[WeightRule]:
    """The same rules, held by another pipeline stage unless `here`."""
    return [replace(rule, here=rule.here and here) for rule in rules]


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Plain name of each checkpoint tensor -> its name in the file.

    A multimodal checkpoint's language model gets the names it would have alone; its other towers are left out.
    """
    found = list(names)
    if not any(name.startswith(prefix) for name in found for prefix, _ in _WRAPPER_PREFIXES):
        return {name: name for name in found}
    plain: dict[str, str] = {}
    for name in found:
        if any(fnmatchcase(name, tower) for tower in _TOWERS):
            continue
        short = next((new + name[len(old) :] for old, new in _WRAPPER_PREFIXES if name.startswith(old)), name)
        plain[short] = name
    return plain


def is_ignored(name: str, rules: Iterable[WeightRule]) -> bool:
    """Whether a rule, or the general list, says that this tensor is known and not wanted."""
    patterns = [*ALWAYS_IGNORED, *(rule.name for rule in rules if rule.module is None)]
    return any(fnmatchcase(name, pattern) for pattern in patterns)
