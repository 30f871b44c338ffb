"""config.json of every architecture, in new and old spellings, against transformers' own reading; and what is refused."""

import dataclasses
import json
import math

import pytest

from lockstep.config.errors import ConfigError
from lockstep.config.hf import SUPPORTED_ARCHITECTURES, load_spec
from lockstep.config.model_spec import RopeSpec
from lockstep.testing.tiny import ARCHS, hf_config

NAMES = {
    "llama": "Llama",
    "llama3": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
}


def write(folder, config, generation=None):
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def new_style(arch, **overrides):
    """The config as transformers 5 writes it."""
    return {**hf_config(arch, **overrides).to_dict(), "architectures": [f"{NAMES[arch]}ForCausalLM"]}


LLAMA31 = {  # the published numbers of Llama 3.1 8B, as its config.json spells them
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip

GEMMA3_4B = {  # text_config of a multimodal checkpoint holds only what differs from the defaults
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eos_token_id": [1, 106], "model_type": "gemma3",
    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}, "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}  # fmt: skip


def minimal(**changes):
    base = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8,
            "num_hidden_layers": 2, "vocab_size": 100, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}  # fmt: skip
    return {key: value for key, value in {**base, **changes}.items() if value != "absent"}


@pytest.mark.parametrize("arch", ARCHS)
def test_agrees_with_transformers(arch, tmp_path):
    config = hf_config(arch)
    spec = load_spec(write(tmp_path, new_style(arch)))
    assert spec.architecture == f"{NAMES[arch]}ForCausalLM"
    assert (spec.hidden_size, spec.num_layers, spec.num_heads) == (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert spec.num_kv_heads == config.num_key_value_heads and spec.intermediate_size == config.intermediate_size
    assert spec.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert (spec.vocab_size, spec.max_position_embeddings) == (config.vocab_size, config.max_position_embeddings)
    assert spec.rms_norm_eps == config.rms_norm_eps and spec.tie_word_embeddings == config.tie_word_embeddings
    assert spec.eos_token_ids == (config.eos_token_id,) and spec.bos_token_id == config.bos_token_id
    if hasattr(config, "layer_types"):
        assert spec.layer_kinds == tuple(kind.removesuffix("_attention") for kind in config.layer_types)
    if "gemma" in arch:
        assert spec.scale == config.query_pre_attn_scalar**-0.5 and spec.embedding_scale == math.sqrt(config.hidden_size)
        assert spec.norm_plus_one and spec.sandwich_norms and spec.hidden_act == "gelu_pytorch_tanh"
        assert spec.logits_softcap == config.final_logit_softcapping
    else:
        assert spec.scale == spec.head_dim**-0.5 and spec.embedding_scale == 1.0
        assert not spec.norm_plus_one and not spec.sandwich_norms and spec.logits_softcap is None
    assert spec.qk_norm == (arch in ("qwen3", "gemma3"))
    assert spec.attention_softcap == (2.0 if arch == "gemma2" else None)
    biases = (spec.attention_bias, spec.attention_out_bias, spec.mlp_bias)
    assert biases == {"llama3": (True, True, True), "qwen2": (True, False, False)}.get(arch, (False, False, False))
    assert spec.sliding_window == (16 if "sliding" in spec.layer_kinds else None)


def old_style(new):
    """The same config as transformers 4 wrote it."""
    old = dict(new)
    rope = old.pop("rope_parameters")
    for key in ("layer_types", "dtype"):
        old.pop(key, None)
    nested = rope.get("full_attention")
    flat = dict(nested or rope)
    old["rope_theta"] = flat.pop("rope_theta")
    if nested:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = 3
    flat["type"] = flat.pop("rope_type")  # the oldest spelling
    old["rope_scaling"] = flat if flat["type"] != "default" else None
    old["torch_dtype"] = "float32"
    return old


@pytest.mark.parametrize("arch", ARCHS)
def test_old_spelling_means_the_same(arch, tmp_path):
    new = new_style(arch)
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    assert load_spec(write(tmp_path / "old", old_style(new))) == load_spec(write(tmp_path / "new", new))


def test_published_llama(tmp_path):
    spec = load_spec(write(tmp_path, LLAMA31, {"eos_token_id": [128001, 128009]}))
    assert spec.rope == RopeSpec(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert (spec.head_dim, spec.num_kv_heads, spec.dtype, spec.eos_token_ids) == (128, 8, "bfloat16", (128001, 128009))
    assert spec.rope_local is None and spec.layer_kinds == ("full",) * 32


def test_published_gemma3_multimodal(tmp_path):
    spec = load_spec(write(tmp_path, GEMMA3_4B))
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262208)
    assert spec.layer_kinds[:7] == ("sliding",) * 5 + ("full", "sliding") and len(spec.layer_kinds) == 34
    assert spec.rope == RopeSpec(1e6, "linear", 8.0) and spec.rope_local == RopeSpec(1e4)
    assert spec.tie_word_embeddings and spec.sliding_window == 1024 and spec.eos_token_ids == (1, 106) and spec.dtype == "bfloat16"


def test_defaults_of_a_small_config(tmp_path):
    spec = load_spec(write(tmp_path, minimal()))
    assert (spec.num_kv_heads, spec.head_dim, spec.rope, spec.dtype, spec.eos_token_ids) == (8, 8, RopeSpec(), "float32", ())


def test_end_tokens_come_from_generation_config_when_it_has_any(tmp_path):
    assert load_spec(write(tmp_path, minimal(eos_token_id=2), {"temperature": 1.0})).eos_token_ids == (2,)
    assert load_spec(write(tmp_path, minimal(eos_token_id=2), {"eos_token_id": 7})).eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("arch", "changes", "kinds", "window"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 32}, "fff", None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, "fss", 32),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}, "fff", None),
        ("mistral", {"sliding_window": None}, "fff", None),
        ("gemma2", {"num_hidden_layers": 5}, "sfsfs", 16),
        ("gemma2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "ffs", 16),
    ],
)
def test_windows(arch, changes, kinds, window, tmp_path):
    spec = load_spec(write(tmp_path, new_style(arch, **changes)))
    assert "".join(kind[0] for kind in spec.layer_kinds) == kinds and spec.sliding_window == window


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "architectures"]
)
def test_missing_key_is_named(key, tmp_path):
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        load_spec(write(tmp_path, minimal(**{key: "absent"})))


def test_unknown_architecture_lists_the_known(tmp_path):
    with pytest.raises(ConfigError, match="GPT2LMHeadModel") as error:
        load_spec(write(tmp_path, minimal(architectures=["GPT2LMHeadModel"])))
    assert all(name in str(error.value) for name in SUPPORTED_ARCHITECTURES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*quantized"),
        ({"num_experts": 8}, "num_experts=8.*mixture-of-experts"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"attention_sinks": True}, "attention sinks"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'.*default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs the key 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}, "needs the key 'low_freq_factor'"),
        ({"rope_scaling": [1]}, "must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "relu"}, "hidden_act='relu'.*silu"),
        ({"hidden_size": 0}, "hidden_size=0 must be"),
        ({"hidden_size": "64"}, "hidden_size='64' must be"),
        ({"vocab_size": True}, "vocab_size=True must be"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8 must be a multiple of num_key_value_heads=3"),
        ({"hidden_size": 68}, "hidden_size=68 must be a multiple"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"text_config": 3}, "text_config"),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "bias in Mistral"),
        ({"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention"]}, "one kind for each of num_hidden_layers=2"),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
    ],
)
def test_refused_by_name(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words) as error:
        load_spec(write(tmp_path, minimal(**changes)))
    assert str(tmp_path) in str(error.value), "the message says which file"


def test_refused_inside_text_config(tmp_path):
    config = json.loads(json.dumps(GEMMA3_4B))
    config["text_config"]["rope_scaling"]["rope_type"] = "yarn"
    with pytest.raises(ConfigError, match="yarn"):
        load_spec(write(tmp_path, config))
    config["text_config"]["quantization_config"] = {"bits": 4}
    with pytest.raises(ConfigError, match="quantization_config"):
        load_spec(write(tmp_path, config))


def test_false_or_null_features_are_fine(tmp_path):
    changes = {"quantization_config": None, "num_experts": 0, "attention_sinks": False, "partial_rotary_factor": 1.0, "rope_scaling": None}
    assert load_spec(write(tmp_path, minimal(**changes))) == load_spec(write(tmp_path, minimal()))


def test_folder_without_config_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="no config"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_spec(tmp_path)
    write(tmp_path, minimal())
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="generation_config"):
        load_spec(tmp_path)


def test_specs_are_values(tmp_path):
    spec = load_spec(write(tmp_path, minimal()))
    assert hash(spec) == hash(dataclasses.replace(spec))
