"""Llama (Touvron et al. 2023; Llama 3: Grattafiori et al. 2024): the plain decoder whose names the others share."""

from __future__ import annotations

from typing import ClassVar

from lockstep.models.decoder import DecoderModel
from lockstep.weights.name_map import WeightRule, linear


class LlamaModel(DecoderModel):
    """Pre-norm, rotary embedding, grouped-query attention, SwiGLU. Biases where the config asks for them."""

    norms: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")

    def layer_rules(self) -> list[WeightRule]:
        spec, source, target = self.spec, "model.layers.{i}", "layers.{i}"
        attention, mlp = f"{source}.self_attn", f"{source}.mlp"
        rules = [WeightRule(f"{source}.{norm}.weight", f"{target}.{norm}") for norm in self.norms]
        for part in ("q", "k", "v"):
            rules += linear(f"{attention}.{part}_proj", f"{target}.self_attn.qkv_proj", part, bias=spec.attention_bias)
        rules += linear(f"{attention}.o_proj", f"{target}.self_attn.o_proj", bias=spec.attention_out_bias)
        for number, name in enumerate(("gate_proj", "up_proj")):
            rules += linear(f"{mlp}.{name}", f"{target}.mlp.gate_up_proj", number, bias=spec.mlp_bias)
        rules += linear(f"{mlp}.down_proj", f"{target}.mlp.down_proj", bias=spec.mlp_bias)
        if spec.qk_norm:
            rules += [WeightRule(f"{attention}.{norm}.weight", f"{target}.self_attn.{norm}") for norm in ("q_norm", "k_norm")]
        return rules
