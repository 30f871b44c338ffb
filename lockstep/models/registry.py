"""Which class computes which architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lockstep.config.model_spec import ModelSpec
from lockstep.models.decoder import DecoderModel
from lockstep.models.gemma2 import Gemma2Model
from lockstep.models.gemma3 import Gemma3Model
from lockstep.models.llama import LlamaModel
from lockstep.models.mistral import MistralModel
from lockstep.models.qwen2 import Qwen2Model
from lockstep.models.qwen3 import Qwen3Model

if TYPE_CHECKING:
    from lockstep.distributed.groups import ParallelGroups

MODELS: dict[str, type[DecoderModel]] = {
    "LlamaForCausalLM": LlamaModel,
    "MistralForCausalLM": MistralModel,
    "Qwen2ForCausalLM": Qwen2Model,
    "Qwen3ForCausalLM": Qwen3Model,
    "Gemma2ForCausalLM": Gemma2Model,
    "Gemma3ForCausalLM": Gemma3Model,
    "Gemma3ForConditionalGeneration": Gemma3Model,
}


def build_model(
    spec: ModelSpec,
    groups: ParallelGroups,
    dtype: torch.dtype,
    device: torch.device | str,
    backend: str = "torch",
    partition: str | None = None,
) -> DecoderModel:
    """The model of `spec.architecture` with this rank's parameters allocated, not filled.

    Raises ValueError for an architecture or attention backend that is not known, ConfigError when the groups cannot cut it.
    """
    if spec.architecture not in MODELS:
        raise ValueError(f"architecture {spec.architecture!r} is not supported. Supported: {', '.join(MODELS)}.")
    return MODELS[spec.architecture](spec, groups, dtype, device, backend, partition)
