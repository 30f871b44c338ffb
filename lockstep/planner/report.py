"""A plan as text for the terminal."""

from __future__ import annotations

from lockstep.planner.answer import Plan
from lockstep.planner.explain import Runner
from lockstep.planner.pareto import Asked, as_text
from lockstep.planner.promises import LIKELY, SURE, Promise
from lockstep.planner.terms import Term, total_s
from lockstep.planner.words import count, dollars, ms, rate_of, wrapped
from lockstep.utils.sizes import size

MOST_LINES, SHOWN_LINES = 8, 3  # commands that are all printed; of more, the first ones that are
MOST_RANKS = 6  # kinds of ranks
INDENT = 16  # of what goes on below a named line
DRAWING = 64  # characters across, where the terminal is wide enough
SYMBOLS = """\
F, BW: FLOP/s and memory bandwidth of a device; e_f, e_b: the shares of them that kernels reach; t0: a launch
m, n, k: rows, columns and depth of a product; pairs: (query, key) pairs of the mask; T: tokens; h: hidden size
E, k: experts, and those of a token; S: bytes of a message; B: bytes/s of its link; n: ranks of a group; p: stages; tp: TP size
table: the formula, corrected by measured samples around (docs/planner.md#samples); +-: its expected error
launch, step, knee: a collective's start, its further steps, and the size from which it needs all of them
serving: B: running requests of a replica; m: micro-batches; occupancy: how long a prompt keeps the slowest stage busy"""


def report(plan: Plan, *, explain: bool = False, draw: bool = True, width: int | None = None) -> str:
    """The whole answer. explain: every term of both times, with formula and source. draw: the trade-off as a drawing.

    width: characters of a line; None: as long as they come. Commands are never cut, so that they can be copied.
    """
    parts = [headline(plan), promises(plan), numbers(plan), memory(plan), admitted(plan), runners(plan)]
    if explain:
        parts += [table("TPOT", plan.tpot_terms)] if plan.work.streams else []
        parts += [table("TTFT", plan.ttft_terms), links(plan), f"what the letters say\n{_indented(SYMBOLS)}"]
    fitted = [wrapped(part, width, INDENT) for part in parts if part]
    if draw and plan.work.streams:
        fitted.append(
            as_text(plan.pareto, plan.mark, Asked.of(plan.work, plan.devices), min(DRAWING, (width or DRAWING + INDENT) - INDENT))
        )
    return "\n\n".join([*fitted, start(plan)])


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))


def headline(plan: Plan) -> str:
    """What is proposed, and whether it keeps what was asked for."""
    w = plan.work
    asked = [f"{w.input_len} + {w.output_len} tokens"]
    asked += [f"{w.rate:g} requests/s"] if w.rate else []
    asked += [f"TTFT {ms(w.ttft_s)}"] if w.ttft_s else []
    asked += [f"TPOT {ms(w.tpot_s)}"] if w.tpot_s else []
    lines = [
        f"{plan.model} on {plan.cluster}, {', '.join(asked)}",
        f"  plan: {plan.layout}" + f", {count(plan.devices, 'device')}" * (plan.layout.devices > 1),
    ]
    if not plan.meets:
        lines.append(f"  the nearest plan; it misses: {'; '.join(plan.misses)}")
    if plan.enough:
        more = f"{count(plan.enough.nodes, 'node')} ({count(plan.enough.devices, 'device')})"
        lines.append(f"  {more} would carry {w.rate:g} requests/s: {plan.enough.layout}")
    return "\n".join(lines + [f"  note: {note}" for note in plan.notes])


def promises(plan: Plan) -> str:
    """Every promise beside its prediction; empty where nothing was promised."""
    return "\n".join(["promises, of means (not of percentiles)", *map(_promise, plan.promises)]) if plan.promises else ""


def _promise(p: Promise) -> str:
    if p.name == "rate":
        most = f"{rate_of(p.predicted)} requests/s at most" if p.predicted else "no rate at all within the latencies"
        words = f"{most}, {p.asked:g} asked"
    else:
        words = f"{ms(p.predicted)}, {ms(p.asked)} asked"
    error = {SURE: f" of {p.error:.0%}", LIKELY: f" (within its error of {p.error:.0%} it may be missed)"}.get(p.verdict, "")
    return f"  {'rate' if p.name == 'rate' else p.name.upper():<13} {words}: {p.verdict}{error}"


def _tpot(plan: Plan) -> str:
    return ms(plan.tpot_s) if plan.work.streams else "-"


def numbers(plan: Plan) -> str:
    """Speed and cost, and how sure they are."""
    running, of = min(plan.layout.pp, plan.point.concurrency), "token" if plan.work.streams else "prompt"
    keep = f"{running} micro-batches keep" if running > 1 else "1 micro-batch keeps"
    busy = f"; {'in steady decode ' * plan.work.streams}{keep} each of {plan.layout.pp} stages busy "
    return "\n".join(
        [
            f"  TTFT (mean)   {ms(plan.ttft_s)}",
            f"  TPOT (mean)   {_tpot(plan)} at {count(plan.point.concurrency, 'request')} a replica"
            + (f"{busy}{plan.utilisation:.0%} of the time" if plan.layout.pp > 1 else ""),
            *(
                [f"  longest gap   {ms(plan.longest_gap_s)} between two tokens, while a chunk of another prompt runs"]
                if plan.work.streams
                else []
            ),
            f"  throughput    {rate_of(plan.rate)} requests/s, {plan.tokens_per_device_s:,.1f} output tokens/s per device",
            *_cost(plan),
            f"  error         TTFT {plan.band['ttft']:.0%}, TPOT {plan.band['tpot']:.0%}: how far off such predictions are on average",
            f"  operations    {plan.by_samples:.0%} of their time in a {of} priced by measured samples, "
            f"the rest by formula: {plan.band['operation']:.0%} off on average",
            f"  constants     {plan.basis}",
            f"  looked at     {count(plan.considered, 'layout')} in {plan.seconds * 1e3:,.0f} ms",
        ]
    )


def _cost(plan: Plan) -> list[str]:
    """Of the devices used, and of whole nodes where that is more."""
    if plan.per_hour is None or plan.nodes_per_hour is None or plan.cost_per_million is None or plan.nodes_per_million is None:
        return ["  cost          no price known: give --price, in dollars per device-hour"]
    lines = [
        f"  cost          {dollars(plan.per_hour)} an hour for {count(plan.devices, 'device')}, "
        f"{dollars(plan.cost_per_million)} per million output tokens"
    ]
    if plan.rented > plan.devices:
        lines.append(
            f"  whole nodes   {dollars(plan.nodes_per_hour)} an hour for {count(plan.nodes, 'node')} of "
            f"{count(plan.rented // plan.nodes, 'device')}, {dollars(plan.nodes_per_million)} per million output tokens"
        )
    return lines


def memory(plan: Plan) -> str:
    """The fullest rank, to the byte."""
    m = plan.memory
    rows = [("weights", m.weights), ("KV cache", plan.kv_bytes), ("activations", m.activations), ("buffers", m.buffers)]
    lines = [f"  {name:<13} {amount:>16,} B  {size(amount)}" for name, amount in rows]
    lines.append(f"  {'room for KV':<13} {plan.kv_room:>16,} B  {size(plan.kv_room)}, {m.kv_per_token:,} B a token")
    requests = f"{count(plan.limits.max_num_seqs, 'request')} of {count(plan.work.tokens, 'token')}"
    return "\n".join([f"memory of the fullest rank ({requests})", *lines, *_ranks(plan)])


def _ranks(plan: Plan) -> list[str]:
    """A line for ranks that hold the same, where not all do."""
    if len(plan.ranks) == 1:
        return []
    rows = [(str(group), group.memory.fixed, group.memory.kv_per_token) for group in plan.ranks]
    width = max(len(name) for name, _, _ in rows[:MOST_RANKS])
    lines = [f"  {name:<{width}} {fixed:>16,} B without KV cache, {each:,} B a token" for name, fixed, each in rows[:MOST_RANKS]]
    left = len(rows) - MOST_RANKS
    return ["of each rank", *lines, *([f"  ... and {left} more kinds: --json has all"] if left > 0 else [])]


def admitted(plan: Plan) -> str:
    """The largest load, within each promise that was made."""
    w, of = plan.work, f"largest load of this plan ({count(plan.devices, 'device')})"
    made = [
        (name, words) for name, words, asked in (("ttft", "TTFT alone", w.ttft_s), ("tpot", "TPOT alone", w.streams and w.tpot_s)) if asked
    ]
    if not made:
        return f"{of}: {rate_of(plan.admits['both'])} requests/s"
    rows = [f"  {words:<13} {rate_of(plan.admits[name])} requests/s" for name, words in [*made, *([("both", "both")] * (len(made) > 1))]]
    return "\n".join([f"{of} within", *rows])


def runners(plan: Plan) -> str:
    """Why others lost, a line each; and where TP over nodes loses to stages."""
    lines = [f"  {runner.layout!s:<26} {_at(runner, plan)}{runner.reason}" for runner in plan.runners]
    cross = [f"  {plan.crossover}"] if plan.crossover else []
    return "\n".join(["runners-up", *(lines or ["  none was looked at"]), *cross])


def _at(runner: Runner, plan: Plan) -> str:
    if runner.point is None:
        return ""
    tpot = f", TPOT {ms(runner.point.tpot_s)}" if plan.work.streams else ""
    return f"TTFT {ms(runner.point.ttft_s)}{tpot}: "


def table(name: str, terms: list[Term]) -> str:
    """What a time is made of; the rows add up to it."""
    total = total_s(terms)
    rows = sorted(terms, key=lambda t: -abs(t.seconds))
    lines = [
        f"  {t.seconds * 1e3:>10.3f} ms {t.seconds / total:>6.1%}  {t.name:<34} {_work(t):<26} {_method(t):<14} {_formula(t)}" for t in rows
    ]
    return "\n".join([f"{name}: sections in brackets are of {_pages(terms)}", *lines, f"  {total * 1e3:>10.3f} ms 100.0%  in all"])


def _formula(term: Term) -> str:
    """And the section that tells of it."""
    return f"{term.formula}  [{term.source.rpartition('#')[2]}]"


def _method(term: Term) -> str:
    """What priced it, and how far off that is on average."""
    return term.method + (f" +-{term.error_s / term.seconds:.0%}" if term.error_s else "")


def _pages(terms: list[Term]) -> str:
    return " and ".join(sorted({t.source.partition("#")[0] for t in terms}))


def _work(term: Term) -> str:
    parts = [f"{term.flops / 1e9:,.1f} GFLOP"] if term.flops else []
    return ", ".join(parts + ([f"{term.bytes / 1e6:,.1f} MB"] if term.bytes else []))


def links(plan: Plan) -> str:
    """The numbers of the fabric: what one device sends in one direction, and how late a message starts."""
    rows = [
        f"  {name:<14} {link.bandwidth / 1e9:,.1f} GB/s each way per device, {(link.launch_s + link.step_s) * 1e6:,.1f} us"
        for name, link in plan.links.items()
    ]
    return "\n".join(["links", *rows])


def start(plan: Plan) -> str:
    """The commands; of many that differ in the node and its number alone, the first ones and the last."""
    lines = [f"  {c.node}:\n{c.line}" for c in plan.commands]
    if len(lines) > MOST_LINES:
        left = len(lines) - SHOWN_LINES - 1
        own = [flag for flag in ("-dpr", "--node-rank", "--port") if f" {flag} " in plan.commands[-1].line]
        nodes = f"{plan.commands[SHOWN_LINES].node} to {plan.commands[-2].node}{''.join(f', each with its own {flag}' for flag in own[:1])}"
        more = f"  ... and likewise {left} more ({nodes}): --json has every line"
        lines = [*lines[:SHOWN_LINES], more, lines[-1]]
    return "\n".join(["start it with", *lines])
