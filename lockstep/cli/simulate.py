"""`lockstep simulate tp|pipeline|data|experts|context|collectives ...`: one kind of parallelism, played through on paper.

  tp           a product cut over ranks, step by step; weight memory by rank
  collectives  all-reduce as messages, what it costs, and where tensor parallelism belongs
  pipeline     stages and micro-batches as a grid; how much of it idles
  data         replicas under load, and what the router's rule is worth
  experts      popular experts, and what spreading them does
  context      one long sequence over ranks, and the merge that makes it whole

Nothing is measured and no model is loaded: every number is worked out from the settings. --svg FILE draws it, --json prints
all of it as one JSON object (exact fractions as text, "3/11"). docs/learn/ explains each of them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

from lockstep.cli.errors import UsageError
from lockstep.config.build import nearest
from lockstep.config.errors import ConfigError
from lockstep.config.tree import opt
from lockstep.planner.words import wrapped

# name -> module with Options, simulate, report and picture. `data` routes by the server's rules, so it stands up here.
SIMULATORS = {
    "tp": "lockstep.planner.teach.tp",
    "collectives": "lockstep.planner.teach.collectives",
    "pipeline": "lockstep.planner.teach.pipeline",
    "data": "lockstep.cli.simulate_data",
    "experts": "lockstep.planner.teach.experts",
    "context": "lockstep.planner.teach.context",
}


@dataclass(frozen=True)
class Output:
    """What to make of the result."""

    svg: str = opt("", "Write the picture to this file.")
    json: bool = opt(False, "Print one JSON object with everything on standard output, instead of the text.")


@dataclass(frozen=True)
class Simulated:
    """A finished simulation: the module that made it, its result, and what to make of it."""

    module: Any
    result: Any
    output: Output

    def report(self) -> str:
        """The result as text."""
        return str(self.module.report(self.result))

    def picture(self) -> str:
        """The result as SVG."""
        return str(self.module.picture(self.result))


def run(argv: list[str]) -> int:
    """Run one simulator. Raises UsageError for a name that is none, and for a file that cannot be written."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    done = simulated(argv)
    if done.output.svg:
        if not done.output.svg.endswith(".svg"):
            raise UsageError(f"--svg={done.output.svg} is written as SVG: give it a name that ends in .svg.")
        try:
            Path(done.output.svg).write_text(done.picture())
        except OSError as e:
            raise UsageError(f"--svg={done.output.svg} cannot be written ({e.strerror}): name a file in a folder that is there.") from None
    print(json.dumps({"simulator": argv[0], **plain(done.result)}) if done.output.json else done.report())
    return 0


def simulated(argv: list[str]) -> Simulated:
    """What `lockstep simulate *argv` comes to, before anything is printed."""
    import tyro
    from tyro.conf import OmitArgPrefixes

    from lockstep.cli.flags import options_form

    name, rest = argv[0], argv[1:]
    if name not in SIMULATORS:
        raise UsageError(f"{name!r} is not a simulator: there are {', '.join(SIMULATORS)}.{nearest(name, SIMULATORS)}")
    module = import_module(SIMULATORS[name])
    forms = {name: options_form(module.Options), "output": options_form(Output)}
    command = dataclasses.make_dataclass("Command", [(key, form, dataclasses.field(default_factory=form)) for key, form in forms.items()])
    if {"-h", "--help"} & set(rest):
        print(lesson(module.Options), end="\n\n")
    found: Any = tyro.cli(command, prog=f"lockstep simulate {name}", args=rest, description="", config=(OmitArgPrefixes,))
    return Simulated(module, solve(module, module.Options(**vars(getattr(found, name)))), Output(**vars(found.output)))


def lesson(options: type) -> str:
    """What the simulator is about: its module's docstring, prose filled to the terminal's width, numbered steps on lines of their own."""
    lines: list[str] = []
    for line in (import_module(options.__module__).__doc__ or "").strip().split("\n"):
        step, in_step = line[:1].isdigit(), bool(lines) and lines[-1][:1].isdigit()
        if lines and lines[-1] and line.strip() and (line.startswith("  ") or not (step or in_step)):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.strip())
    return wrapped("\n".join(lines), shutil.get_terminal_size().columns, 0)


def solve(module: Any, options: Any) -> Any:
    """The simulator's result. Raises UsageError, with settings spelled as the flags that set them."""
    try:
        return module.simulate(options)
    except ConfigError as e:
        names = "|".join(f.name for f in dataclasses.fields(options))
        raise UsageError(re.sub(rf"\b({names})(?=[=:])", lambda m: "--" + m[1].replace("_", "-"), str(e))) from None


def plain(value: Any) -> Any:
    """A result as JSON knows it: dataclasses as objects with their properties, fractions as "p/q", whole ones as integers."""
    if isinstance(value, Fraction):
        return value.numerator if value.denominator == 1 else str(value)
    if dataclasses.is_dataclass(value):
        derived = [name for name, member in vars(type(value)).items() if isinstance(member, property)]
        return {name: plain(getattr(value, name)) for name in [f.name for f in dataclasses.fields(value)] + derived}
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, tuple | list) else value
