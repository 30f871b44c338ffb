"""Why there is no plan: which rule leaves no layout with the axes that were given, or how much memory is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from lockstep.planner.hardware import Cluster
from lockstep.planner.search import Candidate, Search
from lockstep.planner.space import MOST_CONTEXT, TOKENS_PER_CONTEXT_RANK, depths, lies_evenly, repeats, replicas_at_once
from lockstep.planner.startable import listed
from lockstep.planner.words import count
from lockstep.utils.sizes import size

AXES = ("tp", "pp", "dp", "ep", "cp", "dcp")


def refusal(search: Search, everything: list[Candidate], wanted: Mapping[str, int]) -> str:
    """Why none of `everything` is a plan. wanted: the axes that were given."""
    return _nothing_fits(search, everything, wanted) if everything else _no_layout(search, wanted)


def _no_layout(search: Search, wanted: Mapping[str, int]) -> str:
    s = search.pricer.setting
    sizes = {axis: wanted.get(axis, 1) for axis in AXES}
    given = ", ".join(f"{axis}={n}" for axis, n in wanted.items()) or "one device"
    rules = [*_of_axes(search, **sizes), *(_of_nodes if search.grows else _of_ranks)(search, **sizes)]
    rule = rules[0] if rules else "each of the axes is possible, but not all of them together; give fewer of them."
    return f"no layout of {s.shape.name} on {s.cluster} has {given}: {rule}"


def _of_axes(search: Search, tp: int, pp: int, dp: int, ep: int, cp: int, dcp: int) -> Iterator[str]:
    """What the model rules out."""
    shape, prompt = search.pricer.setting.shape, search.work.input_len
    heads, layers = min(shape.num_heads, shape.intermediate_size), shape.num_layers
    if tp > heads:
        yield f"the model has {shape.num_heads} query heads to share out; use tp={heads} at most."
    if pp > layers:
        yield f"the model has {layers} layers; use pp={layers} at most."
    if cp & (cp - 1):
        yield f"context groups are of 2, 4, 8 ... ranks; use cp={1 << cp.bit_length() - 1}."
    most = min(MOST_CONTEXT, max(1, prompt // TOKENS_PER_CONTEXT_RANK))
    if cp > most:
        at_most = 1 << most.bit_length() - 1
        yield f"a context rank must have {TOKENS_PER_CONTEXT_RANK} of the prompt's {prompt} tokens or more; use cp={at_most} at most."
    if ep > 1 and shape.moe is None:
        yield "the model has no experts; leave ep out."
    elif shape.moe and ep > shape.moe.experts:
        yield f"the model has {shape.moe.experts} experts; use ep={shape.moe.experts} at most."
    if dcp > 1 and (dcp & (dcp - 1) or repeats(shape, tp) % dcp):
        least = dcp if shape.mla else dcp * shape.num_kv_heads
        yield f"ranks that share a request's cache (2, 4, 8 ... of them) must repeat the same KV heads; use tp={least} or a multiple of it."


def _of_nodes(search: Search, tp: int, pp: int, dp: int, ep: int, cp: int, dcp: int) -> Iterator[str]:
    """What the cluster rules out."""
    del dcp
    s = search.pricer.setting
    d, stage, replica = s.cluster.devices_per_node, tp * cp, tp * cp * pp
    if replica > s.cluster.devices:
        yield f"a replica of tp x cp x pp = {replica} devices is more than the {s.cluster.devices} there are."
    if tp > d and tp % d:
        yield f"over nodes a TP group takes all {d} devices of each; use tp={d} or less, or a multiple of {d}."
    if pp not in depths(s.shape, s.shape.num_layers):
        largest = -(-s.shape.num_layers // pp)
        same = -(-s.shape.num_layers // largest)
        yield f"its largest stage has {count(largest, 'layer')}, as with fewer stages; use pp={same}."
    if replica > d and replica % d:
        yield f"a replica of tp x cp x pp = {replica} devices is neither inside a node of {d} nor on whole nodes."
    if replica > d and not (lies_evenly(tp, d) and lies_evenly(stage, d)):
        yield f"a replica over nodes would have groups of tp={tp}, cp={cp} cut up by the border of a node of {d} devices."
    there = replicas_at_once(replica, s.cluster)
    if dp > there:
        yield f"there is room for {count(there, 'replica')} of {count(replica, 'device')}."
    if ep > 1:
        yield "an expert group is all TP and context ranks of 1, 2, 4, 8 ... replicas, as many on each node, and dp a multiple of these."


def _of_ranks(search: Search, tp: int, pp: int, dp: int, ep: int, cp: int, dcp: int) -> Iterator[str]:
    """What the calibration of this machine rules out."""
    if max(ep, cp, dcp) > 1:
        yield "ranks that share a calibrated machine are planned with tp, pp and dp alone."
    measured = sorted({layout.devices for layout in search.layouts})
    ranks = listed([str(n) for n in measured])
    yield f"`lockstep calibrate` measured {ranks} ranks, and tp x pp x dp = {tp * pp * dp} or more is none of them."


def _nothing_fits(search: Search, everything: list[Candidate], wanted: Mapping[str, int]) -> str:
    """How much is missing on the layout that lacks least, and what would fit."""
    s = search.pricer.setting
    least = min(everything, key=lambda c: (c.lacking, c.layout))
    remedies = []
    if not s.weight_dtype:
        narrow = search.with_setting(replace(s, weight_dtype="int8"))  # what the engine runs of 8 bits
        there = s.device.platform == "cpu"
        remedies += ["int8" if there else "int8 (not startable on a GPU)"] * any(narrow.room(c.layout, c.chunk)[0] for c in everything)
    here = s.cluster.devices_per_node  # nodes with more devices first, as many as they come with, then more nodes
    sizes = [(1, here * factor) for factor in (2, 4, 8) if s.cluster.nodes == 1 and here * factor <= s.device.per_node]
    sizes += [(s.cluster.nodes * factor, max([here, *(each for _, each in sizes)])) for factor in (2, 4, 8, 16, 32)]
    for nodes, each in sizes if search.grows else ():
        larger = Cluster(nodes, each, s.device, s.cluster.intra, s.cluster.inter)
        wide = search.with_setting(replace(s, cluster=larger))
        fitting = [c.layout for c in wide.all(lambda x: x.dp == 1 and x.cp == 1 and x.dcp == 1) if c.fits]
        if fitting:
            first = min(fitting, key=lambda x: (x.devices, -x.tp))
            used = -(-first.devices // each)
            remedies.append(f"{first} on {count(used, 'node')} ({count(used * each, 'device')})")
            break
    if wanted and any(c.fits for c in search.all()):
        free = min((c.layout for c in search.all() if c.fits), key=lambda x: (x.devices, -x.tp))
        remedies.insert(0, str(free))
    words = " or ".join(remedies)
    stored = f" with {s.weight_dtype} weights{' (as published)' if s.shape.quantized else ''}" if s.weight_dtype else ""
    return (
        f"{s.shape.name}{stored} does not fit on {s.cluster}: {least.layout} needs {size(least.lacking)} more per rank for one request of "
        f"{search.work.longest} tokens" + (f"; {words} fits." if words else "; use fewer tokens or more devices.")
    )
