"""The parser of the verbs that have few flags."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lockstep.cli.errors import UsageError
from lockstep.config.build import nearest

UNKNOWN = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """argparse's; a mistake is a UsageError, which is shown in one line, not below a page of usage."""

    def error(self, message: str) -> NoReturn:
        if message.startswith(UNKNOWN):
            word = message.removeprefix(UNKNOWN).partition(" ")[0]
            near = nearest(word, [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")])
            message = f"{self.prog} has no {word}.{near}"
        else:
            message = message.removeprefix("argument ") + "."
        raise UsageError(f"{message} See {self.prog} --help.")
