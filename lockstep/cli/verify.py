"""`lockstep verify [MODEL] --tensor-parallel-size 1,2,3,4,8`: run the same requests under several splits and compare every bit.

One engine per combination of the listed sizes. In each, the same greedy requests run alone and together, so that batch
sizes, prefill chunks and cache hits differ too. What is compared: the logits of every sampled position with torch.equal,
and a digest of the residual stream after every layer at every position, which says where a difference began.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.cli import flags
from lockstep.cli.errors import UsageError
from lockstep.cli.session import note, settings
from lockstep.cli.verify_compare import Difference, Run, compare
from lockstep.config.tree import EngineConfig, opt
from lockstep.config.validate import resolve
from lockstep.observability import logging
from lockstep.protocol import SamplingParams
from lockstep.utils.interrupt import at_once

if TYPE_CHECKING:
    from lockstep.llm import LLM

# Settings that take a list here: engines of every combination are compared with the first.
LISTS = {
    "tensor_parallel_size": ("--tensor-parallel-size", "-tp"),
    "pipeline_parallel_size": ("--pipeline-parallel-size", "-pp"),
    "threads_per_rank": ("--threads-per-rank",),
    "max_num_batched_tokens": ("--max-num-batched-tokens",),
}


@dataclass(frozen=True)
class VerifyOptions:
    """What to run. Sizes of TP and PP, --threads-per-rank and --max-num-batched-tokens take lists, like 1,2,3."""

    max_tokens: int = opt(64, "Tokens to decode for each prompt.")
    num_prompts: int = opt(4, "Prompts, with random tokens; they run alone, and all together.")
    input_len: int = opt(100, "Tokens of the longest prompt; the others are shorter.")
    stagger: bool = opt(False, "Fewer tokens for each further prompt, so that every size of batch occurs.")
    quiet: bool = opt(False, "Print the table only.")

    def check(self) -> None:
        """Raises UsageError for a count below 1."""
        for name in ("max_tokens", "num_prompts", "input_len"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')}={getattr(self, name)} is invalid: it must be at least 1.")


def run(argv: list[str]) -> int:
    """Exit 0 when all runs agree to the last bit, 1 at the first that does not."""
    rest, lists = take_lists(argv)
    parsed = flags.parse("verify", rest, VerifyOptions, max_tokens=None, description=__doc__ or "", sampling=False)
    options, base = parsed.options, parsed.config
    options.check()
    if base.parallel.data_parallel_size > 1:
        raise UsageError(
            f"data_parallel_size={base.parallel.data_parallel_size}: replicas are whole engines, of which verify would compare one with "
            "itself; leave it out. That replicas answer alike shows `python examples/data_parallel.py`."
        )
    configs = [with_values(base, dict(zip(lists, values, strict=True))) for values in product(*lists.values())] if lists else [base]
    logging.configure(base.runtime.log_level)
    for config in configs:  # all of them before any is started
        resolve(config)
    with tempfile.TemporaryDirectory(prefix="lockstep-verify-") as folder:
        return verify(configs, options, Path(folder))


def verify(configs: list[EngineConfig], options: VerifyOptions, folder: Path) -> int:
    """Run every configuration, print a row for each run; the exit code."""
    reference: Run | None = None
    sizes = f"{'TP':>3} {'PP':>3} {'threads':>7} {'chunk':>6} {'requests':>9} {'cache':>6}"
    print(f"{sizes} {'positions':>10} {'logits':>7} {'seconds':>8}  identical")
    for number, config in enumerate(configs):
        for found in runs(config, options, folder, first=number == 0):
            reference = reference or found
            difference = compare(reference, found)
            verdict = "NO" if difference else "reference" if found is reference else "yes"
            print(f"{found.row()}  {verdict}", flush=True)
            if difference is not None:
                explain(difference, reference, found)
                return 1
    print("every run agrees with the first, bit for bit")
    return 0


def explain(difference: Difference, reference: Run, found: Run) -> None:
    """Say where the first difference is."""
    print(f"\n{found.name} differs from {reference.name}: {difference}")


def runs(config: EngineConfig, options: VerifyOptions, folder: Path, *, first: bool) -> Iterator[Run]:
    """This engine's runs: the first engine begins with requests that run alone, the others with all together.

    The second run of an engine finds prompts in its cache, where that is on. In the third only logits are recorded, so that the last
    layer leaves out the tokens that nobody asks for. In the fourth nobody records, and tokens are chosen without whole logits too.
    """
    with at_once():
        from lockstep.llm import LLM

    parallel = config.parallel
    note(f"starting TP={parallel.tensor_parallel_size} PP={parallel.pipeline_parallel_size} ...", options.quiet)
    with LLM(**settings(config)) as llm:
        vocab = llm.spec.vocab_size
        prompts = make_prompts(options, vocab, llm.config.model.max_model_len or 0)
        threads = llm.collective_rpc("num_threads")[0]
        for turn, together in enumerate((not first, first, True, True)):
            path = folder / f"{id(config)}-{turn}" if turn < 3 else None
            if turn == 2:
                llm.reset_prefix_cache()
            begin = time.monotonic()
            tokens = decode(llm, prompts, counts(options), path, together=together, layers=turn < 2)
            run = Run(
                tp=parallel.tensor_parallel_size,
                pp=parallel.pipeline_parallel_size,
                threads=threads,
                chunk=llm.config.scheduler.max_num_batched_tokens or 0,
                batch=len(prompts) if together else 1,
                cached=turn % 2 == 1 and bool(llm.config.cache.enable_prefix_caching),
                seconds=time.monotonic() - begin,
                tokens=tokens,
            )
            yield run if path is None else run.read(path)


def make_prompts(options: VerifyOptions, vocab: int, max_model_len: int) -> list[list[int]]:
    """Random token ids, seeded; lengths spread up to the longest."""
    longest = min(options.input_len, max_model_len - options.max_tokens)
    if longest < 1:
        raise UsageError(f"--max-tokens={options.max_tokens} leaves no room for a prompt in max_model_len={max_model_len}: lower it.")
    source = random.Random(0)
    lengths = [max(1, longest - i * longest // options.num_prompts) for i in range(options.num_prompts)]
    return [[source.randrange(vocab) for _ in range(length)] for length in lengths]


def counts(options: VerifyOptions) -> list[int]:
    """How many tokens to decode for each prompt."""
    n, most = options.num_prompts, options.max_tokens
    return [-(-most * (n - i) // n) if options.stagger else most for i in range(n)]


def decode(
    llm: LLM, prompts: list[list[int]], max_tokens: list[int], path: Path | None, *, together: bool, layers: bool = True
) -> list[list[int]]:
    """Decode every prompt greedily; the tokens chosen.

    path: the ranks record meanwhile, and save it there. layers: what layers compute too.
    """
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False, seed=i) for i, n in enumerate(max_tokens)]
    if path is not None:
        llm.collective_rpc("record", ("", layers))
    given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    if together:
        found = llm.generate(given, params, use_tqdm=False)
    else:
        found = [llm.generate(prompt, p, use_tqdm=False)[0] for prompt, p in zip(given, params, strict=True)]
    if path is not None:
        llm.collective_rpc("record", (str(path),))
    return [list(output.outputs[0].token_ids) for output in found]


def take_lists(argv: list[str]) -> tuple[list[str], dict[str, list[int]]]:
    """The list-valued settings out of a command line; what remains, and each setting's values."""
    rest, found = [], {}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name = next((name for name, spellings in LISTS.items() if flag in spellings), None)
        if name is None:
            rest.append(word)
            continue
        text = value if equals else next(words, "")
        try:
            found[name] = [int(part) for part in text.split(",")]
        except ValueError:
            raise UsageError(f"{flag}={text!r} is not a list of numbers: write them like 1,2,4.") from None
    return rest, found


def with_values(config: EngineConfig, values: dict[str, int]) -> EngineConfig:
    """`config` with one combination of the lists."""
    for name, value in values.items():
        group = "scheduler" if name == "max_num_batched_tokens" else "parallel"
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config
