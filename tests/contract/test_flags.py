"""The command line's flags are a promise: the set is frozen here, and a change is a decision somebody took."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lockstep.cli import flags
from lockstep.cli.chat import ChatOptions
from lockstep.cli.generate import GenerateOptions
from lockstep.cli.refused import UNAVAILABLE
from lockstep.config.build import GROUPS, group_of
from lockstep.config.serve import BatchOptions, ServeOptions
from lockstep.protocol import SamplingParams

FROZEN = Path(__file__).with_name("flags.txt")
VERBS = {"generate": GenerateOptions, "chat": ChatOptions, "serve": ServeOptions, "run-batch": BatchOptions}
NO_SAMPLING = {"serve", "run-batch"}  # each request brings its own
NOT_FLAGS = {"bad_words_token_ids", "output_kind", "structured_outputs"}  # written by the frontend, or a form of its own


def listed() -> dict[str, list[str]]:
    """verb -> flags, of the committed file."""
    found: dict[str, list[str]] = {}
    for line in FROZEN.read_text().splitlines():
        if line and not line.startswith("#"):
            verb, flag = line.split()
            found.setdefault(verb, []).append(flag)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_flags_are_those_of_the_committed_list(verb: str) -> None:
    assert flags.flag_names(VERBS[verb], sampling=verb not in NO_SAMPLING) == listed()[verb], (
        f"changed on purpose? then change {FROZEN.name} too"
    )


def test_the_ecosystems_names_and_short_forms_are_there() -> None:
    names = set(listed()["generate"])
    for flag in (
        *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp", "-pcp", "-dcp", "-ep"),
        *("--distributed-executor-backend", "--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--block-size"),
        *("--gpu-memory-utilization", "--kv-cache-memory-bytes", "--dtype", "--seed", "--load-format", "--enable-prefix-caching"),
        *("--max-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--stop", "--json", "--prompt"),
    ):
        assert flag in names


def test_every_field_of_the_configuration_is_a_flag() -> None:
    names = set(listed()["generate"])
    assert {"--" + name.replace("_", "-") for name in group_of()} <= names
    for cls in GROUPS.values():
        for field in dataclasses.fields(cls):
            assert field.metadata["help"].endswith("."), f"{field.name} needs a sentence of help"
            assert set(field.metadata["alias"]) <= names


def test_every_sampling_parameter_is_a_flag_with_help() -> None:
    assert set(flags.SAMPLING_HELP) == set(SamplingParams.__struct_fields__) - NOT_FLAGS
    assert all(text.endswith(".") for text in flags.SAMPLING_HELP.values())


def test_no_flag_is_both_there_and_refused() -> None:
    there = {flag for names in listed().values() for flag in names}
    assert not there & set(UNAVAILABLE)
    assert not any(name.startswith("--no-") for name in UNAVAILABLE)


def test_no_two_fields_share_a_flag() -> None:
    taken: dict[str, str] = {}
    forms = [
        flags.options_form(GenerateOptions),
        flags.sampling_form(1),
        *(flags.group_form(cls, skip=("seed",)) for cls in GROUPS.values()),
    ]
    for form in forms:
        for field in dataclasses.fields(form):
            for flag in ("--" + field.name.replace("_", "-"), *field.metadata["alias"]):
                assert taken.setdefault(flag, field.name) == field.name
