"""The prompts of a benchmark: token ids from a seeded generator, so that every engine is given the very same."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lockstep.cli.errors import UsageError

FIRST_ID = 100  # below are special tokens and single bytes in most vocabularies


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids, and how many tokens each must generate (end of sequence ignored, greedy)."""

    name: str
    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def shifted(self, by: int, vocab_size: int) -> Workload:
        """The same lengths with other tokens, so that a repetition finds nothing in a prefix cache."""
        first = min(FIRST_ID, vocab_size // 2)
        span = vocab_size - first
        prompts = [[first + (t - first + by) % span for t in p] for p in self.prompts]
        return Workload(self.name, prompts, self.output_lens)


def check_length(input_len: int, output_len: int, max_model_len: int) -> None:
    """Raises UsageError for requests that end before their last token: figures would count tokens that nobody made."""
    if input_len + output_len > max_model_len:
        raise UsageError(
            f"--input-len={input_len} and --output-len={output_len} make {input_len + output_len} tokens, more than the model's "
            f"{max_model_len} (--max-model-len): make one of them smaller."
        )


def random_prompts(vocab_size: int, lens: list[int], seed: int) -> list[list[int]]:
    """Prompts of the given lengths with ids uniform over the vocabulary, specials left out."""
    rng = random.Random(seed)
    first = min(FIRST_ID, vocab_size // 2)
    return [[rng.randrange(first, vocab_size) for _ in range(n)] for n in lens]


def fixed(vocab_size: int, batch: int, input_len: int, output_len: int, seed: int = 1) -> Workload:
    """A batch of equal requests."""
    prompts = random_prompts(vocab_size, [input_len] * batch, seed)
    return Workload(f"fixed{batch}x{input_len}+{output_len}", prompts, [output_len] * batch)


def mixed(vocab_size: int, num_prompts: int = 64, seed: int = 7, max_model_len: int | None = None) -> Workload:
    """Prompts of 32-512 and outputs of 16-256 tokens, uniform; shortened in proportion for a shorter model."""
    rng = random.Random(seed)
    scale = min(1.0, (max_model_len or 768) / 768)
    ins = [max(1, int(rng.randint(32, 512) * scale)) for _ in range(num_prompts)]
    outs = [max(1, int(rng.randint(16, 256) * scale)) for _ in range(num_prompts)]
    return Workload(f"mixed{num_prompts}", random_prompts(vocab_size, ins, seed + 1), outs)
