"""A plan as text for the terminal."""

from __future__ import annotations

from lockstep.planner.answer import Plan
from lockstep.planner.explain import Runner
from lockstep.planner.pareto import as_text
from lockstep.planner.terms import Term, total_s
from lockstep.utils.sizes import size

MOST_LINES, SHOWN_LINES = 8, 3  # commands that are all printed; of more, the first ones that are


def report(plan: Plan, *, explain: bool = False, draw: bool = True) -> str:
    """The whole answer. explain: every term of both times, with formula and source. draw: the trade-off as a drawing."""
    parts = [headline(plan), numbers(plan), memory(plan), admitted(plan), runners(plan)]
    if explain:
        parts += [table("TPOT", plan.tpot_terms)] if plan.work.streams else []
        parts += [table("TTFT", plan.ttft_terms), links(plan)]
    if draw and plan.work.streams:
        parts.append(as_text(plan.pareto, plan.mark))
    return "\n\n".join([*parts, start(plan)])


def headline(plan: Plan) -> str:
    """What is proposed, and whether it keeps what was asked for."""
    w, devices = plan.work, plan.devices
    asked = [f"{w.input_len} + {w.output_len} tokens"]
    asked += [f"{w.rate:g} requests/s"] if w.rate else []
    asked += [f"TTFT {w.ttft_s:g} s"] if w.ttft_s else []
    asked += [f"TPOT {w.tpot_s * 1e3:g} ms"] if w.tpot_s else []
    lines = [f"{plan.model} on {plan.cluster}, {', '.join(asked)}", f"  plan: {plan.layout}, {_devices(devices)}"]
    if not plan.meets:
        lines.append(f"  the nearest plan; it misses: {'; '.join(plan.misses)}")
    return "\n".join(lines + [f"  note: {note}" for note in plan.notes])


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count > 1)}"


def numbers(plan: Plan) -> str:
    """Speed and cost, and how sure they are."""
    cost = "no price known: give --price" if plan.cost_per_million is None else f"${plan.cost_per_million:.2f} per million output tokens"
    paid = "" if plan.price_per_hour is None else f" (at ${plan.price_per_hour:g} per device-hour)"
    steady = f"; a stage works {plan.utilisation:.0%} of the time, min(1, m/p) in steady decode" if plan.layout.pp > 1 else ""
    tpot = f"{plan.tpot_s * 1e3:,.2f} ms" if plan.work.streams else "-"
    sure = "calibrated" if plan.calibrated else "not calibrated: run `lockstep calibrate` on the machines"
    return "\n".join(
        [
            f"  TTFT          {plan.ttft_s * 1e3:,.1f} ms",
            f"  TPOT          {tpot} at {plan.point.concurrency} requests a replica{steady}",
            f"  longest gap   {plan.longest_gap_s * 1e3:,.1f} ms between two tokens, while a chunk of another prompt runs",
            f"  throughput    {plan.rate:,.3g} requests/s, {plan.tokens_per_device_s:,.1f} output tokens/s per device",
            f"  cost          {cost}{paid}",
            f"  error         TTFT {plan.band['ttft']:.0%}, TPOT {plan.band['tpot']:.0%} expected on average; {sure}",
            f"  looked at     {plan.considered} layouts in {plan.seconds * 1e3:,.0f} ms",
        ]
    )


def memory(plan: Plan) -> str:
    """The fullest rank, to the byte."""
    m = plan.memory
    rows = [("weights", m.weights), ("KV cache", plan.kv_bytes), ("activations", m.activations), ("buffers", m.buffers)]
    lines = [f"  {name:<13} {count:>16,} B  {size(count)}" for name, count in rows]
    lines.append(f"  {'room for KV':<13} {plan.kv_room:>16,} B  {size(plan.kv_room)}, {m.kv_per_token:,} B a token")
    seqs, tokens = plan.limits.max_num_seqs, plan.limits.max_model_len
    return "\n".join([f"memory of the fullest rank ({seqs} requests of {tokens} tokens)", *lines])


def admitted(plan: Plan) -> str:
    """The largest load within each promise."""
    words = {"ttft": "TTFT alone", "tpot": "TPOT alone", "both": "all promises"}
    rows = [f"  {words[name]:<13} {rate:,.3g} requests/s" for name, rate in plan.admits.items() if plan.work.streams or name != "tpot"]
    return "\n".join([f"largest load of this plan ({_devices(plan.devices)}) within", *rows])


def runners(plan: Plan) -> str:
    """Why others lost, a line each; and where TP over nodes loses to stages."""
    lines = [f"  {runner.layout!s:<26} {_at(runner, plan)}{runner.reason}" for runner in plan.runners]
    cross = [f"  {plan.crossover}"] if plan.crossover else []
    return "\n".join(["runners-up", *(lines or ["  none was looked at"]), *cross])


def _at(runner: Runner, plan: Plan) -> str:
    if runner.point is None:
        return ""
    tpot = f", TPOT {runner.point.tpot_s * 1e3:.1f} ms" if plan.work.streams else ""
    return f"TTFT {runner.point.ttft_s * 1e3:,.0f} ms{tpot}: "


def table(name: str, terms: list[Term]) -> str:
    """What a time is made of; the rows add up to it."""
    total = total_s(terms)
    rows = sorted(terms, key=lambda t: -abs(t.seconds))
    lines = [
        f"  {t.seconds * 1e3:>10.3f} ms {t.seconds / total:>6.1%}  {t.name:<34} {_work(t):<26} {t.formula}  [{t.source.rpartition('#')[2]}]"
        for t in rows
    ]
    return "\n".join([f"{name}: sections in brackets are of {_pages(terms)}", *lines, f"  {total * 1e3:>10.3f} ms 100.0%  in all"])


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
    lines = [f"  {c.node}: {c.line}" for c in plan.commands]
    if len(lines) > MOST_LINES:
        left = len(lines) - SHOWN_LINES - 1
        own = [flag for flag in ("-dpr", "--node-rank", "--port") if f" {flag} " in plan.commands[-1].line]
        nodes = f"{plan.commands[SHOWN_LINES].node} to {plan.commands[-2].node}{''.join(f', each with its own {flag}' for flag in own[:1])}"
        more = f"  ... and likewise {left} more ({nodes}): --json has every line"
        lines = [*lines[:SHOWN_LINES], more, lines[-1]]
    return "\n".join(["start it with", *lines])
