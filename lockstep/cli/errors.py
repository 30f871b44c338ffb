"""Mistakes of the command line, and how any expected error is shown: one line, no traceback."""

from __future__ import annotations

import re
import sys
from dataclasses import fields

from lockstep.config.build import group_of
from lockstep.config.errors import ConfigError
from lockstep.config.serve import BatchOptions, ServeOptions
from lockstep.protocol import SamplingParams
from lockstep.utils import env


class UsageError(ConfigError):
    """The command line asks for something that cannot be."""


def show_error(message: str) -> None:
    """`error: ...` on standard error, in red on a terminal, with settings spelled as the flags that set them."""
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and not env.no_color() else ("", "")
    print(f"{red}error: {as_flags(message)}{plain}", file=sys.stderr, flush=True)


def as_flags(message: str) -> str:
    """`block_size=3 ...` as `--block-size=3 ...`: what the user typed is what the message names."""
    served = (f.name for cls in (ServeOptions, BatchOptions) for f in fields(cls))
    names = sorted({*group_of(), *SamplingParams.__struct_fields__, *served}, key=len, reverse=True)
    words = "|".join(name for name in names if "_" in name)
    plain = "|".join(name for name in names if "_" not in name)
    pattern = rf"(?<![\w/.'-])(?:(?:{words})(?![\w/])|(?:{plain})(?==))"
    return re.sub(pattern, lambda m: "--" + m.group(0).replace("_", "-"), message)
