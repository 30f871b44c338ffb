"""Grammars where tokens are sampled: what may come, when it is complete, and that what goes wrong is one row's alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.config.source import DEMO_FOLDER
from lockstep.grammar.bounds import GrammarError
from lockstep.grammar.vocabulary import load_vocabulary
from lockstep.protocol import NewRequest, SamplingParams, StepPlan, StructuredOutputs
from lockstep.testing.tiny import VOCAB_SIZE, tokenizer
from lockstep.worker.batch import BatchState
from lockstep.worker.grammars import KEPT, Grammars, no_vocabulary
from lockstep.worker.sampler import Sampled, Sampler

EOS = VOCAB_SIZE - 3
WORDS = tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words")
    WORDS.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Any:
    return load_vocabulary(folder, VOCAB_SIZE, (EOS,))


@pytest.fixture
def bench(vocabulary: Any) -> Bench:
    return Bench(lambda: vocabulary)


class Bench:
    """A batch state and a sampler over logits that prefer what a test says."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.state = BatchState(8, 128, 16)
        self.grammars = Grammars(load)
        self.sampler = Sampler(self.grammars)
        self.step = 0

    def start(self, slot: int, *, outputs: str = "", freed: bool = False, **sampling: Any) -> None:
        params = SamplingParams(**({"temperature": 0.0} | sampling))
        tokens = [5, 6, 7, *ids(outputs)]
        new = NewRequest(slot, f"r{slot}", tokens, 3, [0, 1, 2, 3], params, 0, eos_token_ids=[] if params.ignore_eos else [EOS])
        self.apply([new], [slot] if freed else [])

    def apply(self, new: list[NewRequest], freed: list[int]) -> None:
        plan = StepPlan(self.step, [], [], [], [], new=new, freed=freed)
        self.state.apply(plan)
        self.grammars.apply(plan)

    def sample(self, *slots: int, logits: torch.Tensor | None = None) -> Sampled:
        """A token for each slot, appended; by default of random logits, others at every step."""
        self.step += 1
        if logits is None:
            logits = torch.randn(len(slots), VOCAB_SIZE, generator=torch.Generator().manual_seed(self.step))
        rows = np.array(slots, np.int64)
        found = self.sampler.sample(logits.clone(), self.state.sample_rows(rows))
        self.state.append(rows, found.tokens)
        return found

    def text(self, slot: int) -> str:
        tokens = self.state.tokens[slot, self.state.prompt_lens[slot] : self.state.lengths[slot]]
        return str(WORDS.decode([t for t in tokens.tolist() if t != EOS]))

    def run(self, slot: int, most: int = 60) -> tuple[str, str | None]:
        """(text, error) of the request once it has ended."""
        for _ in range(most):
            for _, error in self.sample(slot).ended:
                return self.text(slot), error
        raise AssertionError(f"not complete after {most} tokens: {self.text(slot)!r}")


def ids(text: str) -> list[int]:
    return list(WORDS(text, add_special_tokens=False)["input_ids"]) if text else []


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_texts_match_and_end_by_themselves(bench: Bench, temperature: float) -> None:
    for seed in range(5):
        for pattern in (r"[a-c]{3}-\d{2,4}", r"(yes|no)!"):
            bench.start(
                1,
                structured_outputs=StructuredOutputs(regex=pattern),
                temperature=temperature,
                seed=seed,
                freed=bool(bench.state.active[1]),
            )
            text, error = bench.run(1)
            assert error is None and re.fullmatch(pattern, text, re.ASCII)


def test_the_end_is_allowed_only_where_the_text_is_complete(bench: Bench) -> None:
    bench.start(0, structured_outputs=StructuredOutputs(regex="(ab)*"))
    wants_end = torch.zeros(1, VOCAB_SIZE)
    wants_end[0, EOS] = 9.0
    other = wants_end.clone()
    other[0, EOS] = -9.0
    assert bench.sample(0, logits=other).ended == []
    assert bench.text(0)[0] == "a"
    if bench.text(0) == "a":
        assert bench.sample(0, logits=wants_end).tokens[0] != EOS
    assert bench.text(0) == "ab"
    found = bench.sample(0, logits=wants_end)
    assert found.tokens.tolist() == [EOS] and found.ended == [(0, None)]


def test_special_tokens_are_no_text(bench: Bench) -> None:
    bench.start(0, structured_outputs=StructuredOutputs(regex=r"[<>|/a-z]{1,20}x"))
    for _ in range(5):
        wants_special = torch.zeros(1, VOCAB_SIZE)
        wants_special[0, VOCAB_SIZE - 5 :] = 9.0
        assert bench.sample(0, logits=wants_special).tokens[0] < VOCAB_SIZE - 5


def test_other_rows_keep_their_bits(bench: Bench) -> None:
    bench.start(0, structured_outputs=StructuredOutputs(regex="a+b"))
    bench.start(1, min_tokens=1)
    logits = torch.randn(3, VOCAB_SIZE)
    before = logits.clone()
    bench.start(2)
    rows = bench.state.sample_rows(np.array([0, 1, 2]))
    bench.grammars.restrict(logits[0], rows.altered[0])
    bench.grammars.restrict(logits[1], rows.altered[1])
    assert torch.equal(logits[1:], before[1:])
    allowed = torch.isfinite(logits[0])
    assert 0 < int(allowed.sum()) < VOCAB_SIZE and torch.equal(logits[0][allowed], before[0][allowed])


def test_a_request_that_comes_back_goes_on_where_it_was(bench: Bench) -> None:
    """After a preemption, or from a replica that died: its outputs come with it."""
    wanted = StructuredOutputs(regex=r"[a-z]{4}-[0-9]{4}-(up|down)")
    bench.start(0, structured_outputs=wanted)
    whole, _ = bench.run(0)
    for cut in range(len(whole)):
        bench.step = 0
        bench.start(0, structured_outputs=wanted, outputs=whole[:cut], freed=True)
        text, error = bench.run(0)
        assert error is None and text.startswith(whole[:cut]) and re.fullmatch(str(wanted.regex), text)


def test_outputs_that_do_not_match_are_an_error(bench: Bench) -> None:
    bench.start(0, structured_outputs=StructuredOutputs(regex="[0-9]+x"), outputs="zz")
    assert "do not match" in bench.sample(0).ended[0][1]


def test_a_slots_next_request_has_nothing_of_the_last(bench: Bench) -> None:
    bench.start(0, structured_outputs=StructuredOutputs(regex="(yes|no)"))
    bench.run(0)
    bench.start(0, min_tokens=1, freed=True)
    assert bench.sample(0).ended == []
    bench.start(0, structured_outputs=StructuredOutputs(regex="[0-9]{2}"), freed=True)
    assert re.fullmatch("[0-9]{2}", bench.run(0)[0])


def test_steps_in_flight_after_the_end_do_no_harm(bench: Bench) -> None:
    bench.start(0, structured_outputs=StructuredOutputs(regex="(yes|no)"))
    bench.run(0)
    assert [bench.sample(0).ended for _ in range(2)] == [[(0, None)]] * 2


def test_the_shortest_length_does_not_keep_a_complete_text_open(bench: Bench) -> None:
    bench.start(0, structured_outputs=StructuredOutputs(regex="(yes|no)"), min_tokens=12)
    assert bench.run(0)[0] in ("yes", "no")


@pytest.mark.parametrize(
    "wanted,params,said",
    [
        (StructuredOutputs(regex="[0-9]+"), {"allowed_token_ids": ids("a")}, "no token can be chosen"),
        (StructuredOutputs(grammar="start: <|nobody|>"), {}, "nobody"),
        (StructuredOutputs(json={"$ref": "#"}), {}, "no text at all"),
        (StructuredOutputs(json={"type": "array", "items": {}, "uniqueItems": True}), {}, "uniqueItems"),
    ],
)
def test_what_cannot_be_obeyed_ends_its_row_alone(bench: Bench, wanted: StructuredOutputs, params: dict[str, Any], said: str) -> None:
    bench.start(0, structured_outputs=StructuredOutputs(regex="[0-9]{9}"))
    bench.start(1, structured_outputs=wanted, **params)
    bench.start(2)
    found = bench.sample(0, 1, 2)
    assert [row for row, _ in found.ended] == [1] and said in str(found.ended[0][1])
    assert re.fullmatch("[0-9]{9}", bench.run(0)[0])


def test_a_sick_row_is_an_error_of_the_row(bench: Bench) -> None:
    """Logits without a number in them."""
    bench.start(0, structured_outputs=StructuredOutputs(regex="[0-9]+"))
    bench.start(1, structured_outputs=StructuredOutputs(regex="[0-9]+"))
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[0] = float("-inf")
    assert [row for row, _ in bench.sample(0, 1, logits=logits).ended] == [0]


def test_a_vocabulary_that_cannot_be_read_fails_those_who_need_it_only(tmp_path: Path) -> None:
    for load, said in ((no_vocabulary, "no tokenizer"), (lambda: load_vocabulary(tmp_path / "none", 300, (1,)), "cannot be used")):
        bench = Bench(load)
        bench.start(0, structured_outputs=StructuredOutputs(regex="a"))
        bench.start(1)
        found = bench.sample(0, 1)
        assert [row for row, _ in found.ended] == [0] and said in str(found.ended[0][1])


def test_grammars_are_compiled_once_and_kept_in_bounds(bench: Bench) -> None:
    for i in range(KEPT + 5):
        for _ in range(2):
            bench.start(0, structured_outputs=StructuredOutputs(regex=f"a{i}"), freed=bool(bench.state.active[0]))
    assert len(bench.grammars._compiled) == KEPT
    assert bench.run(0)[0] == f"a{KEPT + 4}"


def test_the_demos_vocabulary_has_every_token_of_a_text() -> None:
    from transformers import PreTrainedTokenizerFast

    vocabulary = load_vocabulary(DEMO_FOLDER, 4096, (0,))
    tokens = PreTrainedTokenizerFast.from_pretrained(str(DEMO_FOLDER))("def f(x):\n    return 'é😀'")["input_ids"]
    assert vocabulary.vocab_size == 4096 and vocabulary.decode_str(tokens) == "def f(x):\n    return 'é😀'"


def test_more_or_fewer_logits_than_tokens_do_not_matter(folder: Path) -> None:
    assert load_vocabulary(folder, VOCAB_SIZE + 13, (EOS,)).vocab_size == VOCAB_SIZE + 13
    assert load_vocabulary(folder, VOCAB_SIZE - 7, (EOS, VOCAB_SIZE - 6)).vocab_size == VOCAB_SIZE


def test_a_tokenizer_that_truncates_is_read_without_it(folder: Path, tmp_path: Path) -> None:
    import json

    form = json.loads((folder / "tokenizer.json").read_text())
    form["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(form))
    assert load_vocabulary(tmp_path, VOCAB_SIZE, (EOS,)).tokenize_str("abcdefg") == ids("abcdefg")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(GrammarError, match="cannot be used"):
        load_vocabulary(tmp_path, VOCAB_SIZE, (EOS,))
