"""`lockstep <verb> ...`: finds the verb, runs it, and turns what can go wrong into one line and an exit code.

Exit codes: 0 done, 1 the engine failed, 2 the command line or a setting is wrong, 130 interrupted, 143 terminated, 141 the reader of
standard output went away.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from importlib import import_module

from lockstep.cli.errors import UsageError, show_error
from lockstep.config.build import nearest
from lockstep.config.errors import ConfigError
from lockstep.utils.ctrl_c import INTERRUPTED, WORD
from lockstep.utils.interrupt import TERMINATED, Terminated, at_once
from lockstep.version import __version__

# verb -> (module, what it is for). Modules are imported only for the verb that is asked for.
VERBS = {
    "generate": ("lockstep.cli.generate", "complete prompts, as text or as JSON lines"),
    "serve": ("lockstep.cli.serve", "an OpenAI-compatible server"),
    "chat": ("lockstep.cli.chat", "talk with the model in the terminal"),
    "complete": ("lockstep.cli.complete", "complete prompts in the terminal, by a running server"),
    "run-batch": ("lockstep.cli.run_batch", "answer a file of requests, in the form of OpenAI's Batch API"),
    "demo": ("lockstep.cli.demo", "the embedded model on two ranks, and proof that the split changes nothing"),
    "verify": ("lockstep.cli.verify", "run a model under several splits and compare every bit"),
    "bench": ("lockstep.cli.bench.main", "measure: latency, throughput, a server under load, collectives"),
    "plan": ("lockstep.cli.plan", "which split of a model over which devices, at what speed and cost"),
    "calibrate": ("lockstep.cli.calibrate", "measure this machine for the planner, in less than a minute"),
    "simulate": ("lockstep.cli.simulate", "parallelism on paper: tp, collectives, pipeline, data, experts, context"),
    "top": ("lockstep.cli.top", "the ranks of a running server, live"),
    "collect-env": ("lockstep.cli.collect_env", "versions, processor and variables, for a bug report"),
    "doctor": ("lockstep.cli.doctor", "what this machine has, and whether ranks can talk"),
}
LATER = ("trace", "worker")

USER_ERRORS = ("ConfigError", "WeightError")  # that ranks raise

USAGE = f"""lockstep {__version__}: one model, many devices, the same answer.

usage: lockstep <command> [MODEL] [options]

commands:
{chr(10).join(f"  {verb:<11} {words}" for verb, (_, words) in VERBS.items())}
  version     print the version

`lockstep <command> --help` lists a command's options. Without MODEL, the embedded demo model is used (`plan` must be given one):
  lockstep generate --prompt "def add(a, b):" --tensor-parallel-size 2
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us: nobody wants to read it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        code = guarded(lambda: dispatch(argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `lockstep generate | head`: its reader has enough
        _silence()
        return 141
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT) or e.filename is not None:
            raise
        _silence()
        show_error(f"what is printed cannot be written ({e.strerror}): make room where standard output goes.")
        return 1


def _silence() -> None:
    """Standard output to nowhere: what it still holds is not written at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def dispatch(argv: list[str]) -> int:
    """Import the verb's module and run it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    verb, rest = argv[0], argv[1:]
    if verb in ("version", "--version", "-V"):
        print(f"lockstep {__version__}")
        return 0
    if verb in LATER:
        raise UsageError(f"`lockstep {verb}` is not available yet in this version: there are {', '.join(VERBS)}.")
    if verb not in VERBS:
        raise UsageError(f"{verb!r} is not a command: there are {', '.join((*VERBS, 'version'))}.{nearest(verb, VERBS)}")
    with at_once():
        module = import_module(VERBS[verb][0])
    return int(module.run(rest) or 0)


def guarded(run: Callable[[], int]) -> int:
    """Run, and show expected errors as one line. Anything else is our fault and keeps its traceback."""
    from lockstep.engine.errors import RequestError
    from lockstep.executor.contract import ExecutorError
    from lockstep.frontend.errors import PromptError

    try:
        return run()
    except (ConfigError, RequestError, PromptError) as e:
        show_error(str(e))
        return 2
    except ExecutorError as e:
        show_error(str(e))
        if e.error_type in USER_ERRORS:  # a rank met what the user must put right: its traceback would say no more
            return 2
        for line in e.log_tail:
            if line not in str(e):
                print(f"  | {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(WORD, file=sys.stderr)
        return INTERRUPTED
    except Terminated:
        print("terminated", file=sys.stderr)
        return TERMINATED


if __name__ == "__main__":
    sys.exit(main())
