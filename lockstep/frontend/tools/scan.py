"""JSON read character by character, so that a call's arguments can be shown while they are written."""

from __future__ import annotations

import json
from typing import Literal

from lockstep.frontend.tools.base import Accept, Parsed

SPACE = " \t\r\n"
ARGUMENTS = ("arguments", "parameters")


class Value:
    """One JSON value: feed it its characters, until `take` says that one ended it. Nothing but its extent is checked."""

    def __init__(self) -> None:
        self.text = ""
        self._depth, self._quoted, self._escaped = 0, False, False

    def take(self, char: str) -> Literal["more", "last", "after"]:
        """Whether the value goes on, ended with this character, or had ended before it."""
        if self._quoted:
            return self._in_string(char)
        if self._depth == 0 and self.text and char in ",}]" + SPACE:
            return "after"
        self.text += char
        if char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return "last" if self._depth <= 0 else "more"
        return "more"

    def _in_string(self, char: str) -> Literal["more", "last"]:
        self.text += char
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._quoted = False
            return "last" if self._depth == 0 else "more"
        return "more"


class Call:
    """One `{"name": ..., "arguments": {...}}`, its keys in any order.

    Once the function is known and its arguments begin, the call is `told`; what is no call by then is `broken`, and none of it
    has been shown.
    """

    def __init__(self, index: int, accept: Accept) -> None:
        self.text = ""  # all that was read
        self.told = self.done = self.broken = False
        self._index, self._accept = index, accept
        self._expects: Literal["open", "key", "colon", "value", "comma"] = "open"
        self._key, self._value = "", Value()
        self._name: str | None = None
        self._arguments: str | None = None  # to be shown; None before they begin
        self._given = False  # arguments are complete; a second key of the name says nothing

    def feed(self, text: str, out: Parsed) -> str:
        """Read up to the end of the object; what is left of `text`."""
        for at, char in enumerate(text):
            if self.done or self.broken:
                return text[at:]
            self.text += char
            self._read(char, out)
        return ""

    def _read(self, char: str, out: Parsed) -> None:
        if self._expects == "value" and (self._value.text or char not in SPACE):
            self._read_value(char, out)
        elif self._expects == "key" and (self._value.text or char == '"'):
            if self._value.take(char) == "last":
                self._key, self._expects = self._word(), "colon"
        elif char not in SPACE:
            self._punctuation(char, out)

    def _punctuation(self, char: str, out: Parsed) -> None:
        if (self._expects, char) in (("open", "{"), ("comma", ",")):
            self._expects, self._value = "key", Value()
        elif (self._expects, char) == ("colon", ":"):
            self._expects, self._value = "value", Value()
        elif (self._expects, char) in (("key", "}"), ("comma", "}")):
            self._end(out)
        else:
            self.broken = True

    def _read_value(self, char: str, out: Parsed) -> None:
        state = self._value.take(char)
        streams = self._key in ARGUMENTS and not self._given and self._value.text.startswith("{")
        if streams and state != "after":
            self._arguments = (self._arguments or "") + char
        if state != "more":
            self._expects = "comma"
            self._take_value(streams)
        self._tell(out)
        if state == "after" and char not in SPACE:
            self._punctuation(char, out)

    def _take_value(self, streamed: bool) -> None:
        """A value is complete: the name, or arguments that are not written as an object."""
        if self._key == "name":
            self._name = self._word()
            self.broken = self.broken or not self._accept(self._name)
        elif self._key in ARGUMENTS and not self._given:
            self._given = True
            if self._value.text.startswith('"'):
                self._arguments = self._word()
            elif self._value.text == "null":
                self._arguments = "{}"
            else:
                self.broken = self.broken or not streamed

    def _tell(self, out: Parsed) -> None:
        if self.broken or self._name is None or self._arguments is None:
            return
        out.call(self._index, None if self.told else self._name, self._arguments)
        self.told, self._arguments = True, ""

    def _end(self, out: Parsed) -> None:
        if self._name is None:
            self.broken = True
            return
        if not self.told:
            self._arguments = self._arguments or "{}"
        self._tell(out)
        self.done = True

    def _word(self) -> str:
        """The value as text; a string that is no JSON is nothing."""
        try:
            found = json.loads(self._value.text)
        except ValueError:
            found = None
        if not isinstance(found, str):
            self.broken = not self.told
            return ""
        return found


class Calls:
    """`[call, call, ...]`, as models write it that give all calls at once, and as a schema makes them."""

    def __init__(self, accept: Accept, first: int = 0) -> None:
        self.count = first  # of the calls so far
        self.done = self.broken = False
        self.text = ""
        self._accept, self._call, self._open, self._told = accept, Call(first, accept), False, False

    @property
    def told(self) -> bool:
        """Whether any of it has been shown as a call."""
        return self._told or self._call.told

    def feed(self, text: str, out: Parsed) -> str:
        """Read up to the end of the list; what is left of `text`."""
        while text and not self.done and not self.broken:
            text = self._step(text, out)
        return text

    def _step(self, text: str, out: Parsed) -> str:
        if not self._open:
            self._open, self.broken = text[0] == "[", text[0] not in "[" + SPACE
        elif self._call.text:
            rest = self._call.feed(text, out)
            self.text += text[: len(text) - len(rest)]
            self.broken = self._call.broken
            if self._call.done:
                self.count, self._told = self.count + 1, True
                self._call = Call(self.count, self._accept)
            return rest
        elif text[0] == "{":
            self._call.feed("{", out)
        else:
            self.done, self.broken = text[0] == "]", text[0] not in "]," + SPACE
        self.text += text[0]
        return text[1:]
