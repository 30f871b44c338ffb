"""`lockstep bench throughput`: many requests at once, how many tokens a second; beside transformers if asked."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from lockstep.cli.bench import machine, workload
from lockstep.cli.bench.peer import TransformersPeer
from lockstep.cli.bench.profile import PROFILE_HELP, check_folder, record
from lockstep.cli.bench.result import Reporter
from lockstep.cli.bench.workload import Workload
from lockstep.cli.errors import UsageError
from lockstep.cli.session import settings
from lockstep.config.tree import EngineConfig, opt
from lockstep.llm import LLM
from lockstep.protocol import SamplingParams


@dataclass(frozen=True)
class ThroughputArgs:
    """What to run."""

    num_prompts: int = opt(64, "Requests, all sent at once.")
    input_len: int | None = opt(None, "Tokens of every prompt; default: mixed, 32 to 512.")
    output_len: int | None = opt(None, "Tokens of every output; default: mixed, 16 to 256.")
    repetitions: int = opt(3, "Counted runs; the median is the figure.")
    compare: Literal["none", "transformers"] = opt("none", "A peer to run in turn with, in the same call.")
    peer_batch_size: int = opt(32, "Batch size of the peer.")
    profile: str | None = opt(None, PROFILE_HELP)
    json: bool = opt(False, "Print one JSON line per result on standard output.")

    def workload(self, vocab_size: int, max_model_len: int) -> Workload:
        """The requests. Raises UsageError when a count or a length is below 1, or a request too long for the model."""
        for name in ("num_prompts", "repetitions", "peer_batch_size", "input_len", "output_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')}={value} is invalid: it must be at least 1.")
        if self.input_len is None and self.output_len is None:
            return workload.mixed(vocab_size, self.num_prompts, max_model_len=max_model_len)
        lengths = self.input_len or 128, self.output_len or 128
        workload.check_length(*lengths, max_model_len)
        return workload.fixed(vocab_size, self.num_prompts, *lengths)


def run_ours(llm: LLM, work: Workload) -> tuple[float, list[list[int]]]:
    """Seconds to finish the workload, and the tokens of each request."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in work.output_lens]
    prompts = [{"prompt_token_ids": p} for p in work.prompts]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    took_s = time.perf_counter() - start
    return took_s, [list(o.outputs[0].token_ids) for o in outputs]


def throughput(config: EngineConfig, folder: Path, work: Workload, vocab_size: int, args: ThroughputArgs, report: Reporter) -> None:
    """Run the workload `repetitions` times, ours and the peer's in turn, and report medians and their ratio."""
    check_folder(args.profile)
    report.note(f"{work.name}: {len(work.prompts)} prompts, {work.input_tokens} tokens in, {work.output_tokens} out")
    start = time.perf_counter()
    ours, peers, alike, noise = [], [], [], []
    with LLM(**settings(config)) as llm:
        report.emit("lockstep", "startup", [time.perf_counter() - start], "s")
        peer = _peer(config, folder, args, machine_cores=report.machine["cores"])
        try:
            run_ours(llm, workload.fixed(vocab_size, 2, 32, 4))
            for i in range(args.repetitions):
                again = work.shifted(i + 1, vocab_size)
                watch = machine.Noise()
                seconds, tokens = run_ours(llm, again)
                ours.append(work.output_tokens / seconds)
                if peer is not None:
                    seconds, theirs = peer.run(again)
                    peers.append(work.output_tokens / seconds)
                    alike.append(sum(a == b for a, b in zip(tokens, theirs, strict=True)) / len(tokens))
                noise.append(watch.other_cores())
        finally:
            if peer is not None:
                peer.close()
        ratio_in = (work.input_tokens + work.output_tokens) / work.output_tokens
        more = {"workload": work.name, "input_tokens": work.input_tokens, "output_tokens": work.output_tokens, "other_cores": max(noise)}
        more["peak_rss_mib"] = machine.peak_rss_mib()
        record(llm, args.profile, report, lambda: run_ours(llm, work))
        report.emit("lockstep", "output_tokens_per_s", ours, "tok/s", total_tokens_per_s=round(median(ours) * ratio_in, 2), **more)
    if peer is not None:
        report.emit("transformers", "output_tokens_per_s", peers, "tok/s", version=peer.version, batch_size=args.peer_batch_size)
        ratios = [a / b for a, b in zip(ours, peers, strict=True)]
        report.emit("lockstep/transformers", "ratio", ratios, "x", identical_outputs=round(median(alike), 4))


def _peer(config: EngineConfig, folder: Path, args: ThroughputArgs, machine_cores: int) -> TransformersPeer | None:
    if args.compare == "none":
        return None
    return TransformersPeer(folder, config.model.dtype, machine_cores, args.peer_batch_size)
