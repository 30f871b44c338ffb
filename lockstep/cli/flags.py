"""The command line's flags, generated from the configuration tree and the sampling parameters.

No flag is declared twice: a field of `config/tree.py` is a flag with its help text and short forms. Parsing imports
neither torch nor transformers, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from lockstep.cli.errors import UsageError
from lockstep.cli.refused import refuse_unavailable
from lockstep.config.build import GROUPS, build_config, is_size
from lockstep.config.tree import EngineConfig
from lockstep.protocol import SamplingParams

Options = TypeVar("Options")

# SamplingParams is a message, not a form: its help texts live here. A test compares the two lists.
SAMPLING_HELP = {
    "n": "Completions of each prompt.",
    "temperature": "Randomness: 0 always takes the most likely token.",
    "top_p": "Sample from the likeliest tokens that reach this probability together.",
    "top_k": "Sample from this many likeliest tokens; 0 is all.",
    "min_p": "Leave out tokens less likely than this share of the likeliest one's probability.",
    "seed": "Seed of every request, and of everything else random; default: 0, with a seed of its own for each request.",
    "stop": "End a completion where this text appears.",
    "stop_token_ids": "End a completion at this token id; several: repeated, or 1,2,3.",
    "include_stop_str_in_output": "Keep the text that ended a completion.",
    "ignore_eos": "Go on after the model's own end token.",
    "max_tokens": "Most tokens of a completion; None is all that fits.",
    "min_tokens": "No end before this many tokens.",
    "logprobs": "Report the chosen tokens' log-probabilities, and those of this many likeliest ones.",
    "prompt_logprobs": "The same for the prompt's tokens.",
    "repetition_penalty": "Above 1: tokens seen in prompt or output become less likely.",
    "presence_penalty": "Above 0: tokens already in the output become less likely.",
    "frequency_penalty": "Above 0: tokens become less likely with each time they are in the output.",
    "logit_bias": 'Added to the scores of tokens, as JSON: {"1234": -100}.',
    "allowed_token_ids": "Choose only this token id; several: repeated, or 1,2,3.",
    "bad_words": "Never write this word.",
    "detokenize": "Turn the tokens into text.",
    "skip_special_tokens": "Leave special tokens out of the text.",
}
REPEATED_IDS = ("stop_token_ids", "allowed_token_ids")
REPEATED_TEXT = ("stop", "bad_words")


@dataclass
class Parsed(Generic[Options]):
    """What a command line said."""

    config: EngineConfig
    sampling: SamplingParams
    options: Options


def parse(
    verb: str, argv: list[str], options: type[Options], *, max_tokens: int | None, description: str, sampling: bool = True
) -> Parsed[Options]:
    """The flags of `lockstep <verb> [MODEL] ...`: the verb's own options, engine settings and, if it has them, sampling parameters.

    Exits with code 2 on an unknown flag or a value of the wrong kind (naming the nearest flag), 0 after --help. Raises
    UsageError for flags of the ecosystem that this version does not have, and for impossible sampling parameters.
    """
    refuse_unavailable(argv)
    form = command_form(verb, options, max_tokens, sampling=sampling)
    found: Any = tyro.cli(form, prog=f"lockstep {verb}", args=argv, description=description, config=(OmitArgPrefixes,))
    chosen = {name: value for group in GROUPS for name, value in vars(getattr(found, group)).items()}
    if found.model_folder is not None:
        if chosen["model"] and chosen["model"] != found.model_folder:
            raise UsageError(f"two models were named, {found.model_folder!r} and --model={chosen['model']!r}: name one.")
        chosen["model"] = found.model_folder
    params = SamplingParams()
    if sampling:  # one --seed for both: a request's may be negative, the engine's not
        params = sampling_params(vars(found.sampling))
        chosen["seed"] = (params.seed or 0) % 2**63
    return Parsed(build_config(**chosen), params, options(**vars(getattr(found, _group(verb)))))


def command_form(verb: str, options: type, max_tokens: int | None, *, sampling: bool = True) -> type:
    """The dataclass that tyro turns into a parser: one field for each group of flags, the verb's own first."""
    model = Annotated[Positional[str | None], arg(name="model", metavar="MODEL", help=_help_of("model"), help_behavior_hint="")]
    parts: list[Any] = [("model_folder", model, dataclasses.field(default=None))]
    groups = {_group(verb): options_form(options)} | ({"sampling": sampling_form(max_tokens)} if sampling else {})
    groups |= {name: group_form(cls, skip=("seed",) if sampling else ()) for name, cls in GROUPS.items()}
    parts += [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in groups.items()]
    return dataclasses.make_dataclass("Command", parts)


def _group(verb: str) -> str:
    """The verb as a field name."""
    return verb.replace(" ", "_").replace("-", "_")


def group_form(cls: type, skip: tuple[str, ...] = ()) -> type:
    """A group of the configuration tree as a form."""
    hints = get_type_hints(cls)
    chosen = [f for f in dataclasses.fields(cls) if f.name not in skip]
    return _form(cls, [_flag(f.name, hints[f.name], f.default, f.metadata["help"], f.metadata["alias"]) for f in chosen])


def options_form(cls: type) -> type:
    """A verb's own options as a form; list fields are flags to repeat."""
    hints = get_type_hints(cls)
    made = []
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        made.append(_flag(f.name, hints[f.name], default, f.metadata["help"], f.metadata.get("alias", ())))
    return _form(cls, made)


def sampling_form(max_tokens: int | None) -> type:
    """The sampling parameters as a form."""
    hints = get_type_hints(SamplingParams)
    defaults = {f.name: f.default for f in msgspec.structs.fields(SamplingParams)} | {"max_tokens": max_tokens}
    made = []
    for name, help_text in SAMPLING_HELP.items():
        if name in REPEATED_IDS + REPEATED_TEXT:
            made.append(_flag(name, list[str], [], help_text))
        elif name == "logit_bias":
            made.append(_flag(name, str | None, None, help_text))
        else:
            made.append(_flag(name, hints[name], defaults[name], help_text))
    form = _form(SamplingParams, made)
    form.__doc__ = "How each token is chosen, and where a completion ends."
    return form


def sampling_params(values: dict[str, Any]) -> SamplingParams:
    """The parameters of a filled form. Raises UsageError when one is impossible."""
    given = {name: value for name, value in values.items() if value not in (None, [])} | {"max_tokens": values["max_tokens"]}
    for name in REPEATED_IDS:
        if name in given:
            given[name] = _ids(name, given[name])
    if "logit_bias" in given:
        given["logit_bias"] = _biases(given["logit_bias"])
    try:
        return SamplingParams(**given)
    except ValueError as e:
        raise UsageError(str(e)) from None


def flag_names(options: type, *, sampling: bool = True) -> list[str]:
    """Every flag of a verb, long and short, sorted; what the frozen list in the tests is compared with."""
    names: set[str] = set()
    forms = [options_form(options), *(group_form(cls) for cls in GROUPS.values())] + ([sampling_form(None)] if sampling else [])
    for form in forms:
        for f in dataclasses.fields(form):
            names.add("--" + f.name.replace("_", "-"))
            names.update(f.metadata["alias"])
    return sorted(names)


def _flag(name: str, hint: Any, default: Any, help_text: str, alias: tuple[str, ...] = ()) -> tuple[str, Any, Any]:
    optional, metavar = type(None) in get_args(hint), None
    if optional:
        metavar = "|".join(t.__name__.upper() for t in get_args(hint) if t is not type(None)).replace("STR", "TEXT")
    if is_size(name):  # written with or without a unit; `build_config` reads it
        hint, metavar = str | None if optional else str, "SIZE"
    choices = _choices(hint)
    marks: list[Any] = [_choice_of(choices, optional)] if choices else []
    metavar = None if choices else metavar
    marks += [arg(help=help_text, aliases=alias or None, metavar=metavar, help_behavior_hint="" if optional and default is None else None)]
    if isinstance(default, list):
        marks = [arg(help=help_text, aliases=alias or None, metavar="TEXT", help_behavior_hint="(repeatable)"), UseAppendAction]
    annotated: Any = Annotated[(hint, *marks)]
    extra: dict[str, Any] = {"metadata": {"alias": alias}}
    if isinstance(default, list):
        return name, annotated, dataclasses.field(default_factory=list, **extra)
    return name, annotated, dataclasses.field(default=default, **extra)


def _choices(hint: Any) -> tuple[str, ...]:
    """The words of a Literal, or of a Literal or None, in the order in which they are declared; () for anything else."""
    kinds = [kind for kind in (get_args(hint) if get_origin(hint) is not Literal else (hint,)) if kind is not type(None)]
    return get_args(kinds[0]) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else ()


def _choice_of(choices: tuple[str, ...], optional: bool) -> Any:
    """How such a flag is read: None is what it is without the flag, and no word to write."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value in choices or (optional and value is None),
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


def _form(cls: type, made: list[tuple[str, Any, Any]]) -> type:
    form = dataclasses.make_dataclass(cls.__name__, made)
    form.__doc__ = cls.__doc__
    return form


def _help_of(name: str) -> str:
    """The help text of a field of the tree."""
    return next(str(f.metadata["help"]) for cls in GROUPS.values() for f in dataclasses.fields(cls) if f.name == name)


def _ids(name: str, texts: list[str]) -> list[int]:
    try:
        return [int(part) for text in texts for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"{name}={' '.join(texts)!r} is not a list of token ids: write integers, like 1,2,3.") from None


def _biases(text: str) -> dict[int, float]:
    try:
        return msgspec.json.decode(text, type=dict[int, float])
    except (msgspec.DecodeError, json.JSONDecodeError) as e:
        raise UsageError(f'logit_bias={text!r} is not a JSON object of token id to number, like {{"1234": -100}}: {e}.') from None
