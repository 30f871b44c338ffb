"""A model as the planner sees it: the numbers that decide FLOPs, bytes and messages. Wider than what the engine runs.

Dense, grouped-query, latent (MLA) and sliding-window attention, dense and mixture-of-experts layers. Parameter counts are
exact: they equal what instantiating the model gives (tests/planner).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lockstep.config.errors import ConfigError, UnsupportedError
from lockstep.config.model_spec import ModelSpec
from lockstep.planner.hardware import DTYPE_BYTES

UNPRICED = ("rope_scaling", "rope_parameters", "partial_rotary_factor", "hidden_act", "hidden_activation")


@dataclass(frozen=True)
class Mla:
    """Latent attention (DeepSeek): what is cached is one vector of kv_rank + rope_dim per token, for all heads."""

    kv_rank: int
    q_rank: int  # 0: queries are projected directly
    nope_dim: int
    rope_dim: int
    v_dim: int

    @property
    def cached(self) -> int:
        """Elements cached per token and layer."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class Moe:
    """Routed experts. `layers` says for each layer whether it has them."""

    experts: int
    per_token: int
    columns: int  # of each expert
    shared_columns: int  # of all shared experts together
    layers: tuple[bool, ...]
    bias: bool = False  # experts and router have biases (gpt-oss)


@dataclass(frozen=True, eq=False)
class ModelShape:
    """The architecture numbers. Sizes count elements; `windows[i]` is what layer i sees, 0 for everything.

    Compared and hashed by identity, so that prices can be kept by shape.
    """

    name: str
    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    dtype: str = "bfloat16"
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False  # one learned number per head (gpt-oss)
    norms: int = 2  # per layer
    windows: tuple[int, ...] = ()
    mla: Mla | None = None
    moe: Moe | None = None
    quantized: str = ""  # how the public checkpoint is stored, where not in `dtype`
    spec: ModelSpec | None = None  # where the engine itself can read this model
    lacks: str = ""  # what of it the engine does not compute, where it knows the architecture

    @property
    def q_head_dim(self) -> int:
        """Width of one query head."""
        return self.mla.nope_dim + self.mla.rope_dim if self.mla else self.head_dim

    @property
    def v_head_dim(self) -> int:
        """Width of one head's result."""
        return self.mla.v_dim if self.mla else self.head_dim

    @property
    def itemsize(self) -> int:
        """Bytes of an activation, and of a weight that is not quantized."""
        return int(DTYPE_BYTES[self.dtype])

    def window(self, layer: int) -> int:
        """What layer `layer` sees: a number of tokens, 0 for all."""
        return self.windows[layer] if self.windows else 0

    def routed(self, layer: int) -> bool:
        """Whether this layer has experts."""
        return self.moe is not None and self.moe.layers[layer]

    @cached_property
    def kinds(self) -> tuple[tuple[bool, int], ...]:
        """(has experts, window) of each layer: layers of one kind cost the same."""
        return tuple((self.routed(i), self.window(i)) for i in range(self.num_layers))

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that one token adds to the KV cache of a whole layer (keys and values)."""
        return self.mla.cached if self.mla else 2 * self.num_kv_heads * self.head_dim

    @cached_property
    def params(self) -> int:
        """All parameters, as instantiated: embedding and head once where tied."""
        from lockstep.planner.memory import whole_model_params

        return whole_model_params(self)

    @cached_property
    def active_params(self) -> int:
        """Parameters that one token meets: all but the experts it is not sent to."""
        if self.moe is None:
            return self.params
        idle = self.moe.experts - self.moe.per_token
        return self.params - sum(self.moe.layers) * idle * expert_params(self)


def expert_params(shape: ModelShape) -> int:
    """Parameters of one routed expert: gate, up and down, with their biases."""
    assert shape.moe is not None
    columns = shape.moe.columns
    return 3 * shape.hidden_size * columns + (2 * columns + shape.hidden_size if shape.moe.bias else 0)


def from_spec(spec: ModelSpec, name: str) -> ModelShape:
    """The shape of a model that the engine runs."""
    return ModelShape(
        name=name,
        architecture=spec.architecture,
        hidden_size=spec.hidden_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position_embeddings,
        dtype=spec.dtype,
        tied=spec.tie_word_embeddings,
        qkv_bias=spec.attention_bias,
        out_bias=spec.attention_out_bias,
        mlp_bias=spec.mlp_bias,
        qk_norm=spec.qk_norm,
        norms=4 if spec.sandwich_norms else 2,
        windows=tuple(spec.sliding_window or 0 if kind == "sliding" else 0 for kind in spec.layer_kinds),
        spec=spec,
    )


class Keys:
    """Looks keys of a config.json up, and names what is missing."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def count(self, *names: str, default: int | None = None) -> int:
        """The first of these keys that is there, as a whole number of at least 1 (0 only where it is the default)."""
        for name in names:
            value = self.raw.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (value == 0 and default != 0):
                raise ConfigError(f"{self.where}: {name}={value!r} must be a whole number of at least 1.")
            return value
        if default is None:
            kind = self.raw.get("model_type")
            other = f", or model_type={kind!r} has other names for its sizes than are known here" if kind else ""
            raise ConfigError(f"{self.where}: the key {names[0]!r} is missing: this is not a complete model config{other}.")
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.raw.get(name, default))


def from_config(raw: dict[str, Any], name: str) -> ModelShape:
    """The shape that a config.json describes, also of architectures that only the planner knows (MoE, MLA).

    Raises ConfigError for a missing or impossible key.
    """
    from pathlib import Path

    from lockstep.config.hf import SUPPORTED_ARCHITECTURES, spec_of

    method = str((raw.get("quantization_config") or {}).get("quant_method") or "")
    names = raw.get("architectures") or []
    if any(n in SUPPORTED_ARCHITECTURES for n in names):
        plain = {k: v for k, v in raw.items() if k != "quantization_config"}
        try:
            return replace(from_spec(spec_of(plain, Path(name)), name), quantized=method)
        except UnsupportedError as e:
            lacks = e.what
        try:  # with what has no price left out, the architecture's own defaults count
            return replace(from_spec(spec_of(_priced(plain), Path(name)), name), quantized=method, spec=None, lacks=lacks)
        except UnsupportedError:
            return replace(_wide(_flat(raw, name), name), quantized=method, lacks=lacks)
    return replace(_wide(_flat(raw, name), name), quantized=method)


def _flat(raw: dict[str, Any], name: str) -> Keys:
    inner = raw.get("text_config")
    return Keys({**raw, **inner} if isinstance(inner, dict) else raw, name)


def _priced(raw: dict[str, Any]) -> dict[str, Any]:
    """A config without the keys that change what is computed, and not how long it takes."""
    kept = {key: value for key, value in raw.items() if key not in UNPRICED}
    return kept | ({"text_config": _priced(kept["text_config"])} if isinstance(kept.get("text_config"), dict) else {})


def _wide(c: Keys, name: str) -> ModelShape:
    hidden, heads, layers = c.count("hidden_size"), c.count("num_attention_heads"), c.count("num_hidden_layers")
    kv_heads = c.count("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ConfigError(f"{name}: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}.")
    architecture = str((c.raw.get("architectures") or ["unknown"])[0])
    bias = c.flag("attention_bias") or architecture.startswith("Qwen2")
    gpt_oss = architecture.startswith("GptOss")
    return ModelShape(
        name=name,
        architecture=architecture,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=c.count("head_dim", default=max(1, hidden // heads)),
        intermediate_size=c.count("intermediate_size", "moe_intermediate_size"),
        vocab_size=c.count("vocab_size"),
        max_position_embeddings=c.count("max_position_embeddings"),
        dtype=_dtype(c),
        tied=c.flag("tie_word_embeddings"),
        qkv_bias=bias,
        out_bias=bias and not architecture.startswith("Qwen2"),
        mlp_bias=c.flag("mlp_bias"),
        qk_norm=architecture.startswith("Qwen3"),
        sinks=gpt_oss,
        windows=_windows(c, layers),
        mla=_mla(c),
        moe=_moe(c, layers, bias=gpt_oss),
    )


def _dtype(c: Keys) -> str:
    name = str(c.raw.get("dtype") or c.raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"{c.where}: dtype={name!r} is not supported. Supported: float32, bfloat16, float16.")
    return name


def _windows(c: Keys, layers: int) -> tuple[int, ...]:
    window, kinds = c.raw.get("sliding_window"), c.raw.get("layer_types")
    if not window or c.raw.get("use_sliding_window") is False:
        return ()
    if isinstance(kinds, list) and len(kinds) == layers:
        return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)
    if c.raw.get("model_type") == "gpt_oss":  # every other layer, the first one sliding
        return tuple(0 if i % 2 else int(window) for i in range(layers))
    return (int(window),) * layers


def _mla(c: Keys) -> Mla | None:
    if not c.raw.get("kv_lora_rank"):
        return None
    return Mla(
        c.count("kv_lora_rank"),
        c.count("q_lora_rank", default=0),
        c.count("qk_nope_head_dim"),
        c.count("qk_rope_head_dim"),
        c.count("v_head_dim"),
    )


def _moe(c: Keys, layers: int, *, bias: bool) -> Moe | None:
    experts = c.count("num_experts", "num_local_experts", "n_routed_experts", default=0)
    if not experts:
        return None
    columns = c.count("moe_intermediate_size", "intermediate_size")
    dense_first, step = c.count("first_k_dense_replace", default=0), c.count("decoder_sparse_step", default=1)
    plain = set(c.raw.get("mlp_only_layers") or ())
    shared = c.count("n_shared_experts", default=0) * columns or c.count("shared_expert_intermediate_size", default=0)
    routed = tuple(i >= dense_first and i not in plain and (i + 1) % step == 0 for i in range(layers))
    return Moe(experts, c.count("num_experts_per_tok", "experts_per_token"), columns, shared, routed, bias)
