"""Prompts on their way in: their forms, the fan-out of n, seeds, end tokens, bad words, conversations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lockstep.config.build import build_config
from lockstep.config.model_spec import ModelSpec
from lockstep.config.source import tokenizer_folder
from lockstep.frontend.chat import conversations, render
from lockstep.frontend.errors import PromptError
from lockstep.frontend.inputs import InputProcessor
from lockstep.frontend.tokenizer import decoder_of, eos_ids, load_in_background, load_tokenizer, special_ids
from lockstep.protocol import SamplingParams
from lockstep.testing.tiny import make_tiny

SPEC = ModelSpec("LlamaForCausalLM", 8, 1, 1, 1, 8, 8, 400, 64, eos_token_ids=(5,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def processor(tokenizer: Any, folder: Path, seed: int = 0) -> InputProcessor:
    return InputProcessor(build_config(seed=seed), SPEC, folder, tokenizer)


def test_text_and_ids_and_dicts_are_the_same_prompt(tokenizer: Any, folder: Path) -> None:
    ids = tokenizer("hello there")["input_ids"]
    make = processor(tokenizer, folder)
    forms: list[Any] = ["hello there", ids, tuple(ids), {"prompt": "hello there"}, {"prompt_token_ids": ids}]
    jobs = [make.job(form, SamplingParams()) for form in forms]
    assert all(job.prompt_token_ids == ids for job in jobs)
    assert [job.prompt for job in jobs] == ["hello there", None, None, "hello there", None]
    assert all(job.requests[0].prompt_token_ids == ids for job in jobs)
    assert make.job({"prompt_token_ids": ids, "prompt": "as told"}, SamplingParams()).prompt == "as told"


def test_arrays_of_ids_become_plain_integers(tokenizer: Any, folder: Path) -> None:
    import numpy as np

    job = processor(tokenizer, folder).job(np.array([3, 4]), SamplingParams())  # type: ignore[arg-type]
    assert job.prompt_token_ids == [3, 4]
    assert {type(t) for t in job.prompt_token_ids} == {int}


@pytest.mark.parametrize("prompt", [5, None, [1.5], ["a", "b"], {"text": "x"}, {}, {"prompt": "x", "extra": 1}, {"prompt": 3}])
def test_what_is_no_prompt_is_refused(prompt: Any, tokenizer: Any, folder: Path) -> None:
    with pytest.raises(PromptError, match="prompt"):
        processor(tokenizer, folder).job(prompt, SamplingParams())


def test_n_completions_are_n_requests_with_one_seed(tokenizer: Any, folder: Path) -> None:
    job = processor(tokenizer, folder).job("hi", SamplingParams(n=3, seed=7), priority=2, arrival_s=1.5)
    assert [r.request_id for r in job.requests] == ["0.0", "0.1", "0.2"]
    assert [r.choice for r in job.requests] == [0, 1, 2]
    assert {(r.seed, r.priority, r.arrival_s) for r in job.requests} == {(7, 2, 1.5)}


def test_only_one_of_n_computes_the_prompts_logprobs(tokenizer: Any, folder: Path) -> None:
    job = processor(tokenizer, folder).job("hi", SamplingParams(n=3, prompt_logprobs=1))
    assert [r.sampling.prompt_logprobs for r in job.requests] == [1, None, None]
    assert job.sampling.prompt_logprobs == 1


def test_drawn_seeds_repeat_with_the_engines_seed_and_differ_between_requests(tokenizer: Any, folder: Path) -> None:
    def seeds(engine_seed: int) -> list[int]:
        make = processor(tokenizer, folder, engine_seed)
        return [make.job("hi", SamplingParams()).requests[0].seed for _ in range(50)]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 100
    assert all(0 <= s < 2**63 for s in seeds(3))


def test_request_ids_count_up_unless_given(tokenizer: Any, folder: Path) -> None:
    make = processor(tokenizer, folder)
    ids = [make.job("hi", SamplingParams(), request_id=name).request_id for name in (None, "mine", None)]
    assert ids == ["0", "mine", "2"]


def test_cache_salt_is_handed_on(tokenizer: Any, folder: Path) -> None:
    job = processor(tokenizer, folder).job({"prompt": "hi", "cache_salt": "s"}, SamplingParams())
    assert job.requests[0].cache_salt == "s"


def test_end_tokens_are_those_of_model_generation_config_and_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert eos_ids(tokenizer, tmp_path, (5,)) == sorted({5, 7, tokenizer.eos_token_id})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert eos_ids(tokenizer, tmp_path, ()) == sorted({9, tokenizer.eos_token_id})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [399, 400, 9999]}))
    job = processor(tokenizer, tmp_path).job("hi", SamplingParams())
    assert job.requests[0].eos_token_ids == sorted({5, 399, tokenizer.eos_token_id}), "ids the model cannot produce are left out"


def test_bad_words_are_spelled_with_and_without_a_space(tokenizer: Any, folder: Path) -> None:
    job = processor(tokenizer, folder).job("hi", SamplingParams(bad_words=["there"]))
    spelled = job.requests[0].sampling.bad_words_token_ids
    assert spelled is not None
    texts = {decoder_of(tokenizer)(ids) for ids in spelled}
    assert texts == {"there", " there"}
    assert job.sampling.bad_words_token_ids is None, "the caller's parameters stay as they were"


def test_stop_strings_need_text(tokenizer: Any, folder: Path) -> None:
    with pytest.raises(PromptError, match=r"stop=\['x'\] needs text.*detokenize=False"):
        processor(tokenizer, folder).job("hi", SamplingParams(stop="x", detokenize=False))


# --- tokenizers ---


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_ids_and_text_are_those_of_the_automatic_choice(arch: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make_tiny(arch, tmp_path / arch)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ["hello world", "  two  spaces\n\ttab", "naïve 你好 😀", "", "<bos> <s> </s>"]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        ids = ours(text)["input_ids"]
        assert decoder_of(ours)(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert decoder_of(ours, False)(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.eos_token_id == theirs.eos_token_id


def test_the_demo_models_tokenizer_matches_the_automatic_choice() -> None:
    from transformers import AutoTokenizer

    from lockstep.config.source import DEMO_FOLDER

    ours, theirs = load_tokenizer(DEMO_FOLDER), AutoTokenizer.from_pretrained(DEMO_FOLDER)
    source = Path(__file__).read_text()[:4000]
    assert ours(source)["input_ids"] == theirs(source)["input_ids"]
    assert decoder_of(ours)(ours(source)["input_ids"]) == source
    talk = [{"role": "user", "content": "hello"}]
    assert render(ours, talk)["prompt_token_ids"] == list(theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"])


def test_special_ids_are_what_decoding_skips(tokenizer: Any) -> None:
    every = range(len(tokenizer))
    decode, keep = decoder_of(tokenizer, True), decoder_of(tokenizer, False)
    skipped = {i for i in every if decode([i]) == "" and keep([i]) != ""}
    assert special_ids(tokenizer) == skipped
    assert tokenizer.eos_token_id in skipped


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer in .* cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"tokenizer in .* cannot be loaded"):
        load_tokenizer(tmp_path)


def test_the_tokenizer_may_be_another_folders(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    other.mkdir()
    assert tokenizer_folder(build_config().model, own) == own
    assert tokenizer_folder(build_config(tokenizer=str(other)).model, own) == other


def test_background_loading_hands_on_values_and_errors() -> None:
    assert load_in_background(lambda: 3).result(timeout=30) == 3
    with pytest.raises(ZeroDivisionError):
        load_in_background(lambda: 1 // 0).result(timeout=30)


def test_background_loading_waits_for_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(0.2)\nready = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "slow_module", raising=False)
    assert load_in_background(lambda: sys.modules["slow_module"].ready, "slow_module").result(timeout=30)


# --- conversations ---


def test_one_conversation_or_several() -> None:
    talk = [{"role": "user", "content": "a"}]
    assert conversations(talk) == [talk]
    assert conversations([talk, talk]) == [talk, talk]
    with pytest.raises(PromptError, match="messages is empty"):
        conversations([])


def test_a_template_of_ones_own(tokenizer: Any) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ extra }}"
    talk = [{"role": "user", "content": "a"}]
    assert render(tokenizer, talk, True, template, {"extra": "!"})["prompt"] == "[user]a>!"
    made = render(tokenizer, talk, False, template)
    assert made["prompt"] == "[user]a"
    assert made["prompt_token_ids"] == tokenizer("[user]a", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("message", [{"content": "x"}, {"role": "user"}, {"role": 3, "content": "x"}, "text"])
def test_a_message_needs_role_and_content(message: Any, tokenizer: Any) -> None:
    with pytest.raises(PromptError, match=r"messages\[1\]"):
        render(tokenizer, [{"role": "user", "content": "x"}, message])


def test_a_template_that_refuses_is_the_callers_error(tokenizer: Any) -> None:
    with pytest.raises(PromptError, match=r"cannot render these messages.*no system"):
        render(tokenizer, [{"role": "system", "content": "x"}], True, "{{ raise_exception('no system') }}")


def test_no_template_is_an_error_that_says_what_to_do(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(PromptError, match=r"no chat template: give chat_template"):
        render(tokenizer, [{"role": "user", "content": "x"}])


def test_an_older_folder_without_tokenizer_json_is_read_too(folder: Path, tmp_path: Path) -> None:
    made = json.loads((folder / "tokenizer.json").read_text())
    merges = [" ".join(m) if isinstance(m, list) else m for m in made["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(made["model"]["vocab"] | {"<|endoftext|>": len(made["model"]["vocab"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    older = load_tokenizer(tmp_path)
    ids = older("hello naïve 你好")["input_ids"]
    assert len(ids) > 3
    assert decoder_of(older)(ids) == "hello naïve 你好"


class NoBackend:
    """A tokenizer without a compiled backend, as pure-Python ones are."""

    def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces, "cleaning up would make the text of a prefix differ"
        return "".join(map(chr, ids)) + ("" if skip_special_tokens else "!")


def test_a_tokenizer_without_backend_decodes_without_clean_up() -> None:
    assert decoder_of(NoBackend())([97, 98]) == "ab"
    assert decoder_of(NoBackend(), False)([97]) == "a!"
