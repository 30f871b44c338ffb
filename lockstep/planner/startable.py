"""What this version of the engine lacks to run a plan, and in which type the weights are taken to be stored."""

from __future__ import annotations

from collections.abc import Mapping

from lockstep.planner.layer import Setting
from lockstep.planner.layout import Layout
from lockstep.planner.model import ModelShape

PUBLISHED = {"fp8": "fp8", "fbgemm_fp8": "fp8", "mxfp4": "mxfp4"}  # quant_method of a config.json -> what is priced
PLATFORMS = ("cuda", "cpu")
NONE = "none"


def weight_dtype(shape: ModelShape, quantization: str) -> str:
    """How weights are stored: what was asked for ("none": the model's own type), else as published where that has a price."""
    if quantization:
        return "" if quantization == NONE else quantization
    found = PUBLISHED.get(shape.quantized, "")
    return "" if found == "mxfp4" and shape.moe is None else found


def assumed(shape: ModelShape, stored: str) -> str:
    """In words, how the weights are priced where a reader may expect otherwise; empty where there is nothing to say."""
    if not shape.quantized:
        return ""
    if stored and stored == weight_dtype(shape, ""):
        experts = " (experts only)" if stored == "mxfp4" else ""
        return f"weights as published, in {stored}{experts}; --quantization none prices them in {shape.dtype}"
    return f"the public checkpoint is quantized ({shape.quantized}); priced in {stored or shape.dtype}, see --quantization"


def missing(setting: Setting, layout: Layout) -> list[str]:
    """What this version of the engine does not run, in words: empty where the printed command starts the plan."""
    shape, stored, device = setting.shape, setting.weight_dtype, setting.device
    found = [name for name, there in (("MoE", shape.moe), ("MLA", shape.mla)) if there is not None]
    if not found and shape.spec is None:
        found.append(shape.lacks or shape.architecture)
    found += axes_missing({"ep": layout.ep, "cp": layout.cp, "dcp": layout.dcp})
    if shape.quantized or stored in ("fp8", "mxfp4"):
        found.append(f"{shape.quantized or stored} weights")
    elif stored == "int8" and device.platform != "cpu":
        found.append("int8 weights on a GPU (its int8 kernels are for CPUs)")
    if device.platform not in PLATFORMS:
        found.append(f"devices like {device.name}")
    return found


def axes_missing(sizes: Mapping[str, int]) -> list[str]:
    """Of axes with these sizes, the kinds of parallelism that this version of the engine does not run."""
    expert, context = sizes.get("ep", 1), sizes.get("cp", 1) * sizes.get("dcp", 1)
    return ["expert parallelism"] * (expert > 1) + ["context parallelism"] * (context > 1)


def listed(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
