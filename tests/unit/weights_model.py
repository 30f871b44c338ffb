"""A small model of parallel layers, and its checkpoint on disk, for the tests of the weight loader."""

import json

import torch
from safetensors.torch import save_file
from torch import nn

from lockstep.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from lockstep.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from lockstep.layers.norm import RMSNorm
from lockstep.layers.qkv import QKVParallelLinear
from lockstep.weights.name_map import WeightRule, ignore, linear, per_layer

HIDDEN, DIM, HEADS, KV_HEADS, INNER, VOCAB, LAYERS = 32, 4, 8, 4, 52, 100, 2


class Rank:
    """A rank of a group that never communicates."""

    def __init__(self, size=1, rank=0):
        self.world_size, self.rank_in_group = size, rank


class Layer(nn.Module):
    def __init__(self, **place):
        super().__init__()
        self.qkv = QKVParallelLinear(HIDDEN, DIM, HEADS, KV_HEADS, bias=True, **place)
        self.out = RowParallelLinear(HEADS * DIM, HIDDEN, bias=True, units=HEADS, **place)
        self.gate_up = MergedColumnParallelLinear(HIDDEN, (INNER, INNER), bias=False, **place)
        self.down = RowParallelLinear(INNER, HIDDEN, bias=False, **place)
        self.norm = RMSNorm(HIDDEN, dtype=place.get("dtype"))


class Model(nn.Module):
    """`stage` (first, stop) holds some layers only, as a pipeline stage does. `tied` shares the head with the embedding."""

    def __init__(self, size=1, rank=0, dtype=torch.float32, stage=(0, LAYERS), tied=False):
        super().__init__()
        place = {"tp": Rank(size, rank), "dtype": dtype}
        self.owned = range(*stage)
        self.embed = VocabParallelEmbedding(VOCAB, HIDDEN, **place)
        self.layers = nn.ModuleDict({str(i): Layer(**place) for i in self.owned})
        self.head = ParallelLMHead(VOCAB, HIDDEN, **place)
        self.tied = tied
        if tied:
            self.head.tie_weights(self.embed)

    def weight_map(self):
        path, at = "model.layers.{i}", "layers.{i}"
        layer = [
            *[rule for x in "qkv" for rule in linear(f"{path}.self_attn.{x}_proj", f"{at}.qkv", x, bias=True)],
            *linear(f"{path}.self_attn.o_proj", f"{at}.out", bias=True),
            *linear(f"{path}.mlp.gate_proj", f"{at}.gate_up", 0),
            *linear(f"{path}.mlp.up_proj", f"{at}.gate_up", 1),
            *linear(f"{path}.mlp.down_proj", f"{at}.down"),
            *linear(f"{path}.norm", f"{at}.norm"),
        ]
        head = ignore("lm_head.weight") if self.tied else linear("lm_head", "head")
        return [WeightRule("model.embed_tokens.weight", "embed"), *head, *per_layer(layer, LAYERS, self.owned)]


def full_tensors(dtype=torch.float32):
    """The whole checkpoint, seeded; element values differ everywhere."""
    gen = torch.Generator().manual_seed(5)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        p = f"model.layers.{i}"
        for x, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{p}.self_attn.{x}_proj.weight"] = (heads * DIM, HIDDEN)
            shapes[f"{p}.self_attn.{x}_proj.bias"] = (heads * DIM,)
        shapes[f"{p}.self_attn.o_proj.weight"], shapes[f"{p}.self_attn.o_proj.bias"] = (HIDDEN, HEADS * DIM), (HIDDEN,)
        shapes[f"{p}.mlp.gate_proj.weight"] = shapes[f"{p}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{p}.mlp.down_proj.weight"], shapes[f"{p}.norm.weight"] = (HIDDEN, INNER), (HIDDEN,)
    return {name: torch.randn(shape, generator=gen).to(dtype) for name, shape in shapes.items()}


def write(folder, tensors, files=1):
    """Save as one file, or as an index over several."""
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    index = {}
    for n in range(files):
        part, file = names[n::files], f"model-{n + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder
