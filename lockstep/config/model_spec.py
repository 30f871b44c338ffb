"""What a model *is*, read from its config.json: the numbers every part of the engine and the planner needs.

A closed struct: nothing in a checkpoint's config is executed or passed on unread. No torch, no transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lockstep.config.errors import ConfigError

LayerKind = Literal["full", "sliding"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of one layer kind (transformers' `rope_parameters`)."""

    theta: float = 10000.0
    type: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """The architecture numbers of a decoder. Sizes are counts of elements; `head_dim` is per head."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    attention_bias: bool = False  # bias of q, k, v
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeSpec = field(default_factory=RopeSpec)
    rope_local: RopeSpec | None = None  # of sliding layers, where it differs (Gemma-3)
    sliding_window: int | None = None  # tokens a sliding layer sees, itself included
    layer_kinds: tuple[LayerKind, ...] = ()
    attention_scale: float = 0.0  # what q.k is multiplied by; 0 means head_dim ** -0.5
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    norm_plus_one: bool = False  # the norm weight is stored as w - 1 (Gemma)
    sandwich_norms: bool = False  # norms after attention and MLP too (Gemma-2, Gemma-3)
    dtype: str = "float32"  # of the checkpoint
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def scale(self) -> float:
        """The factor that q.k is multiplied by."""
        return self.attention_scale or self.head_dim**-0.5


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder. Raises ConfigError when missing or not an object."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"model={str(folder)!r} has no config.json: name a folder with a Hugging Face checkpoint.") from None
    except ValueError as e:
        raise ConfigError(f"{path} is not valid JSON ({e}): download the checkpoint again.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a JSON object: download the checkpoint again.")
    return raw
