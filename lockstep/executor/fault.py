"""Faults that tests inject into a rank: LOCKSTEP_FAULT=`phase:rank:action`. Nothing happens when it is unset.

phase: import, rendezvous, init, load, call, prefill (a step in which a request computes several tokens), decode.
action: kill (SIGKILL), stop (SIGSTOP), raise (RuntimeError), exit (exit code 3), sleep=SECONDS, slow=SECONDS (sleep, and so in
every step from then on).
"""

from __future__ import annotations

import os
import signal
import time

from lockstep.config.errors import ConfigError
from lockstep.protocol import StepPlan
from lockstep.utils import env

PHASES = ("import", "rendezvous", "init", "load", "call", "prefill", "decode")


class Fault:
    """The fault of one rank, if it has one. Strikes once, but for slow."""

    def __init__(self, text: str, rank: int) -> None:
        """Raises ConfigError when `text` is not `phase:rank:action`."""
        self._phase = self._action = ""
        if not text:
            return
        phase, _, rest = text.partition(":")
        where, _, action = rest.partition(":")
        known = action in ("kill", "stop", "raise", "exit") or action.startswith(("sleep=", "slow="))
        if phase not in PHASES or not where.isdigit() or not known:
            raise ConfigError(
                f"LOCKSTEP_FAULT={text!r} is invalid: it must be phase:rank:action, phase one of {', '.join(PHASES)}, "
                "action kill, stop, raise, exit, sleep=SECONDS or slow=SECONDS."
            )
        if int(where) == rank:
            self._phase, self._action = phase, action

    @classmethod
    def from_environment(cls, rank: int) -> Fault:
        return cls(env.debug_fault(), rank)

    def strike(self, phase: str) -> None:
        """Do what was asked if `phase` is when."""
        if phase != self._phase:
            return
        action = self._action
        if not action.startswith("slow="):
            self._phase = ""
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "exit":
            os._exit(3)
        elif action == "raise":
            raise RuntimeError("injected fault")
        else:
            time.sleep(float(action.partition("=")[2]))

    def strike_step(self, plan: StepPlan) -> None:
        """As `strike`, in a step: prefill or decode."""
        if self._phase:
            self.strike("prefill" if any(n > 1 for n in plan.num_tokens) else "decode")
