"""Reads a Hugging Face config.json into a ModelSpec.

Each architecture is one `_Family`: its defaults (those transformers fills in) and what its model code does that no key says.
Both spellings are read: transformers 5 (`rope_parameters`, `layer_types`, `dtype`) and before (`rope_theta`, `rope_scaling`,
`sliding_window_pattern`, `torch_dtype`). What we cannot compute is refused by name, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from lockstep.config.errors import ConfigError, UnsupportedError
from lockstep.config.model_spec import LayerKind, ModelSpec, RopeSpec, read_config_json

ROPE_TYPES = ("default", "linear", "llama3")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
_KINDS: dict[str, LayerKind] = {"full_attention": "full", "sliding_attention": "sliding"}

# Keys that change the computation in ways no layer here implements; a false, empty or null value is fine.
_REFUSED = {
    "quantization_config": "quantized checkpoints",
    "num_experts": "mixture-of-experts layers",
    "num_local_experts": "mixture-of-experts layers",
    "n_routed_experts": "mixture-of-experts layers",
    "attention_sinks": "attention sinks",
    "use_attention_sinks": "attention sinks",
    "use_bidirectional_attention": "bidirectional attention",
    "attention_chunk_size": "chunked attention",
    "no_rope_layers": "layers without rotary embedding",
    "cross_attention_layers": "cross attention",
    "is_encoder_decoder": "encoder-decoder models",
    "num_kv_shared_layers": "layers that share their KV cache",
    "hidden_size_per_layer_input": "per-layer embeddings",
}


@dataclass(frozen=True)
class _Family:
    """How one architecture's config is read. `defaults` stand in for absent keys; `fixed` are ModelSpec fields it implies."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    act_key: str = "hidden_act"
    bias_on_out: bool = True  # attention_bias also means a bias of the output projection
    window: str = "none"  # none | all (every layer slides) | flag (only if use_sliding_window) | pattern (alternating)
    pattern: int = 0  # default period of full layers, for "pattern"
    theta: float = 10000.0
    theta_local: float | None = None  # sliding layers have a rope of their own
    refused: Mapping[str, str] = field(default_factory=dict)


_GEMMA_FIXED = {"norm_plus_one": True, "sandwich_norms": True}
_GEMMA2 = _Family(
    defaults={"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
              "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
              "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192},
    fixed=_GEMMA_FIXED, act_key="hidden_activation", window="pattern", pattern=2,
)  # fmt: skip
_GEMMA3 = _Family(
    defaults={"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "num_attention_heads": 8,
              "num_key_value_heads": 4, "vocab_size": 262208, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
              "max_position_embeddings": 131072},
    fixed={**_GEMMA_FIXED, "qk_norm": True}, act_key="hidden_activation", window="pattern", pattern=6, theta=1e6, theta_local=1e4,
    refused={"attn_logit_softcapping": "soft-capped attention in Gemma-3"},
)  # fmt: skip

_FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(defaults={"max_position_embeddings": 2048}),
    "MistralForCausalLM": _Family(
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        window="all",
        refused={"attention_bias": "a bias in Mistral attention", "mlp_bias": "a bias in the Mistral MLP"},
    ),
    "Qwen2ForCausalLM": _Family(
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768},
        fixed={"attention_bias": True},
        bias_on_out=False,
        window="flag",
    ),
    "Qwen3ForCausalLM": _Family(
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "max_position_embeddings": 32768,
        },
        fixed={"qk_norm": True},
        window="flag",
    ),
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,  # its text part only
}

SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)


class _Reader:
    """Looks keys up with the family's defaults, checks their types, and names the file in every error."""

    def __init__(self, raw: Mapping[str, Any], family: _Family, path: Path) -> None:
        self.raw, self.family, self.path = raw, family, path

    def get(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key)
        if value is None and key not in self.raw:
            value = self.family.defaults.get(key)
        return default if value is None else value

    def fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.path}: {message}")

    def unsupported(self, what: str, rest: str = "") -> UnsupportedError:
        return UnsupportedError(f"{self.path}: {what} is not supported.{rest}", what)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise self.fail(f"the key {key!r} is missing: this is not a complete checkpoint config, download it again.")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(f"{key}={value!r} must be a whole number of at least 1.")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        value = self.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise self.fail(f"{key}={value!r} must be a number above 0.")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(f"{key}={value!r} must be true or false.")
        return value


def load_spec(folder: str | Path) -> ModelSpec:
    """The ModelSpec of the checkpoint in `folder`, from its config.json (and the end tokens of generation_config.json).

    Raises ConfigError for an architecture not in SUPPORTED_ARCHITECTURES, a missing or impossible key, and any feature that
    this engine does not compute, by name.
    """
    return spec_of(read_config_json(folder), Path(folder) / "config.json")


def spec_of(outer: dict[str, Any], path: Path) -> ModelSpec:
    """`load_spec` of a config that is already read; `path` is what errors name."""
    architecture = _architecture(outer, path)
    family = _FAMILIES[architecture]
    inner = outer.get("text_config")
    if inner is not None and not isinstance(inner, dict):
        raise ConfigError(f"{path}: text_config must be an object.")
    raw = {**{k: v for k, v in outer.items() if k in _INHERITED}, **inner} if inner is not None else outer
    _refuse(outer, family, path)
    _refuse(raw, family, path)
    return _build(architecture, _Reader(raw, family, path))


# What a nested text_config takes from around it when it does not say so itself.
_INHERITED = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "tie_word_embeddings")


def _architecture(raw: Mapping[str, Any], path: Path) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or not names:
        raise ConfigError(f"{path}: the key 'architectures' is missing: it must name one of {', '.join(SUPPORTED_ARCHITECTURES)}.")
    for name in names:
        if name in _FAMILIES:
            return str(name)
    raise ConfigError(f"{path}: architectures={names!r} is not supported. Supported: {', '.join(SUPPORTED_ARCHITECTURES)}.")


def _refuse(raw: Mapping[str, Any], family: _Family, path: Path) -> None:
    for key, what in {**_REFUSED, **family.refused}.items():
        if raw.get(key):
            raise UnsupportedError(
                f"{path}: {key}={_short(raw[key])} asks for {what}, which lockstep does not compute: use a checkpoint without.", what
            )
    auto = raw.get("auto_map")
    if isinstance(auto, dict) and "AutoModelForCausalLM" in auto:
        raise ConfigError(f"{path}: auto_map names model code inside the checkpoint, which is never run: use a checkpoint without.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _build(architecture: str, c: _Reader) -> ModelSpec:
    family = c.family
    hidden, heads, layers = c.count("hidden_size"), c.count("num_attention_heads"), c.count("num_hidden_layers")
    kv_heads = c.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise c.fail(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}.")
    if c.get("head_dim") is None and hidden % heads:
        raise c.fail(f"hidden_size={hidden} must be a multiple of num_attention_heads={heads} where head_dim is not given.")
    act = c.get(family.act_key, "silu")
    if act not in ACTIVATIONS:
        raise c.unsupported(f"{family.act_key}={act!r}", f" Supported: {', '.join(ACTIVATIONS)}.")
    attention_bias = bool(family.fixed.get("attention_bias", False)) or c.flag("attention_bias")
    max_len = c.count("max_position_embeddings")
    kinds, window = _layer_kinds(c, layers)
    rope, rope_local = _ropes(c, max_len)
    scalar = c.number("query_pre_attn_scalar")
    gemma = "norm_plus_one" in family.fixed
    return ModelSpec(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=c.count("head_dim", hidden // heads),
        intermediate_size=c.count("intermediate_size"),
        vocab_size=c.count("vocab_size"),
        max_position_embeddings=max_len,
        rms_norm_eps=c.number("rms_norm_eps", 1e-6) or 1e-6,
        tie_word_embeddings=c.flag("tie_word_embeddings"),
        hidden_act=act,
        **{
            **family.fixed,
            "attention_bias": attention_bias,
            "attention_out_bias": attention_bias and family.bias_on_out,
            "mlp_bias": c.flag("mlp_bias"),
        },
        rope=rope,
        rope_local=rope_local,
        sliding_window=window,
        layer_kinds=kinds,
        attention_scale=scalar**-0.5 if gemma and scalar else 0.0,
        attention_softcap=c.number("attn_logit_softcapping") if gemma else None,
        logits_softcap=c.number("final_logit_softcapping") if gemma else None,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        dtype=_dtype(c),
        eos_token_ids=_eos(c),
        bos_token_id=c.get("bos_token_id"),
    )


def _layer_kinds(c: _Reader, layers: int) -> tuple[tuple[LayerKind, ...], int | None]:
    """Kind of each layer, and the window of the sliding ones (None when there is none)."""
    mode = c.family.window
    window = c.count("sliding_window") if mode != "none" and c.get("sliding_window") is not None else None
    if mode == "none" or window is None or (mode == "flag" and not c.flag("use_sliding_window")):
        if c.raw.get("sliding_window") and mode == "none":
            raise c.fail(f"sliding_window={c.raw['sliding_window']} is not something this architecture has: remove the key.")
        return tuple([_KINDS["full_attention"]] * layers), None
    kinds: tuple[LayerKind, ...]
    if mode == "all":
        kinds = tuple([_KINDS["sliding_attention"]] * layers)
    elif c.get("layer_types") is not None:
        kinds = _named_kinds(c, layers)
    elif mode == "flag":
        first = c.get("max_window_layers", 0)
        kinds = tuple("sliding" if i >= first else "full" for i in range(layers))
    else:
        period = c.count("sliding_window_pattern", c.family.pattern)
        kinds = tuple("sliding" if (i + 1) % period else "full" for i in range(layers))
    return kinds, window if "sliding" in kinds else None


def _named_kinds(c: _Reader, layers: int) -> tuple[LayerKind, ...]:
    names = c.get("layer_types")
    if not isinstance(names, list) or len(names) != layers:
        raise c.fail(f"layer_types must list one kind for each of num_hidden_layers={layers} layers.")
    unknown = sorted({str(n) for n in names} - set(_KINDS))
    if unknown:
        raise c.fail(f"layer_types has {', '.join(map(repr, unknown))}, which lockstep does not compute. Supported: {', '.join(_KINDS)}.")
    return tuple(_KINDS[n] for n in names)


def _ropes(c: _Reader, max_len: int) -> tuple[RopeSpec, RopeSpec | None]:
    """The rope of full layers, and of sliding layers where theirs differs."""
    theta = c.number("rope_theta", c.family.theta) or c.family.theta
    local_theta = c.number("rope_local_base_freq", c.family.theta_local)
    if c.get("partial_rotary_factor", 1.0) != 1.0:
        raise c.unsupported(f"partial_rotary_factor={c.get('partial_rotary_factor')} (rotating a part of each head)")
    params = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if not isinstance(params, dict):
        raise c.fail("rope_parameters (or rope_scaling) must be an object.")
    nested = {k: params.get(k) or {} for k in _KINDS} if any(k in params for k in _KINDS) else None
    full = _rope(c, nested["full_attention"] if nested else params, theta, max_len)
    if nested is None and local_theta is None:
        return full, None
    local = _rope(c, nested["sliding_attention"] if nested else {}, local_theta or theta, max_len)
    return full, None if local == full else local


def _rope(c: _Reader, params: Mapping[str, Any], theta: float, max_len: int) -> RopeSpec:
    if not isinstance(params, dict):
        raise c.fail("each entry of rope_parameters must be an object.")
    kind = params.get("rope_type", params.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise c.unsupported(f"rope type {kind!r}", f" Supported: {', '.join(ROPE_TYPES)}.")
    if params.get("partial_rotary_factor", 1.0) != 1.0:
        raise c.unsupported("partial_rotary_factor (rotating a part of each head)")

    def value(key: str, default: float | None = None) -> float:
        number = params.get(key, default)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
            raise c.fail(f"rope type {kind!r} needs the key {key!r} as a number above 0, got {number!r}.")
        return float(number)

    theta = value("rope_theta", theta)
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, type="linear", factor=value("factor"))
    return RopeSpec(
        theta=theta,
        type="llama3",
        factor=value("factor"),
        low_freq_factor=value("low_freq_factor"),
        high_freq_factor=value("high_freq_factor"),
        original_max_position_embeddings=int(value("original_max_position_embeddings", max_len)),
    )


def _dtype(c: _Reader) -> str:
    name = str(c.get("dtype") or c.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise c.fail(f"dtype={name!r} is not supported. Supported: float32, bfloat16, float16.")
    return name


def _eos(c: _Reader) -> tuple[int, ...]:
    """End tokens: those of generation_config.json where it names any, as transformers' generate does, else the config's."""
    found: Any = None
    try:
        generation = json.loads((c.path.parent / "generation_config.json").read_text(encoding="utf-8"))
        found = generation.get("eos_token_id") if isinstance(generation, dict) else None
    except FileNotFoundError:
        pass
    except ValueError as e:
        raise c.fail(f"generation_config.json beside it is not valid JSON ({e}): download the checkpoint again.") from None
    if found is None:
        found = c.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise c.fail(f"eos_token_id={found!r} must be a token id or a list of them.")
    return tuple(ids)


assert set(_KINDS.values()) == set(get_args(LayerKind))
