"""A running server, as commands ask it: by the standard library alone, so that they start at once."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from lockstep.cli.errors import UsageError
from lockstep.cli.tls import certificate_problem
from lockstep.utils import env, net

URL = "http://127.0.0.1:8000"
KEY_HELP = "the server's key (default: the environment's LOCKSTEP_API_KEY for a server on this host, else OPENAI_API_KEY)"
MOST_BYTES = 16 << 20
STREAM_S = 600.0  # that a stream may be silent


class Unreadable(Exception):
    """The server did not give what it was asked for; the message says why, and what to do."""


class Server:
    """Where it is, and what it wants to see before it answers."""

    def __init__(self, url: str, api_key: str, tls: ssl.SSLContext | None = None) -> None:
        """tls: for https. Raises UsageError for an address that is none, and for a key that no header can have."""
        self.base = address(url)
        self._headers = {"Authorization": f"Bearer {sendable(api_key)}"} if api_key else {}
        self._opener = build_opener(ProxyHandler({}), HTTPSHandler(context=tls))

    def read(self, path: str, timeout_s: float = 10.0) -> Any:
        """The JSON of a GET. Raises Unreadable."""
        try:
            with self._open(Request(f"{self.base}{path}", headers=self._headers), path, timeout_s) as answer:
                found = answer.read(MOST_BYTES)
        except (OSError, HTTPException) as e:
            raise self._unreachable(e) from None
        try:
            return json.loads(found)
        except ValueError:
            raise Unreadable(f"{self.base} answered something else than JSON for {path}: is it a lockstep server?") from None

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a POST, up to [DONE]. Left early, it hangs up, which ends the request. Raises Unreadable."""
        headers = {**self._headers, "Content-Type": "application/json"}
        request = Request(f"{self.base}{path}", json.dumps({**body, "stream": True}).encode(), headers)
        try:
            with self._open(request, path, STREAM_S) as answer:
                for line in answer:
                    if line.startswith(b"data:"):
                        if line[5:].strip() == b"[DONE]":
                            return
                        yield self._event(path, line[5:])
        except (OSError, HTTPException) as e:
            raise self._unreachable(e) from None
        raise Unreadable(f"{self.base} hung up before the end of its answer.")

    def _event(self, path: str, data: bytes) -> dict[str, Any]:
        try:
            found = json.loads(data)
        except ValueError:
            raise Unreadable(f"{self.base} streamed something else than JSON for {path}: is it an OpenAI-compatible server?") from None
        if not isinstance(found, dict) or "error" in found:
            raise Unreadable(f"{self.base}: {_told(data) or 'its stream is none of events'}")
        return found

    def _open(self, request: Request, path: str, timeout_s: float) -> IO[bytes]:
        try:
            found: IO[bytes] = self._opener.open(request, timeout=timeout_s)
            return found
        except HTTPError as e:
            if e.code in (401, 403):
                raise Unreadable(f"{self.base} wants a key (HTTP {e.code}): give it with --api-key.") from None
            if told := _told(e.read(MOST_BYTES)):
                raise Unreadable(f"{self.base} answered HTTP {e.code}: {told}") from None
            raise Unreadable(f"{self.base} answered HTTP {e.code} for {path}: is it a lockstep server of this version?") from None

    def _unreachable(self, error: Exception) -> Unreadable:
        reason = getattr(error, "reason", None) or error
        if problem := certificate_problem(reason):
            return Unreadable(f"{self.base}: {problem}")
        return Unreadable(f"{self.base} cannot be reached ({reason}): is `lockstep serve` running there?")


def address(url: str) -> str:
    """The server's address, without a path that belongs to its API. Raises UsageError for what is none."""
    url = url if "://" in url else f"http://{url}"
    wrong = UsageError(f"URL={url!r} is no address of a server: give one like {URL}.")
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna"), parts.path.encode("ascii")
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of an unclosed bracket, a port that is no number, text that no request can have
        raise wrong from None
    if not known or not url.isprintable() or " " in url:
        raise wrong
    return url.rstrip("/").removesuffix("/v1")


def key_for(url: str, given: str | None) -> str:
    """The key to send to a server: the given one, else the environment's; empty means none.

    LOCKSTEP_API_KEY is a server's own secret: it goes to a server on this host. OPENAI_API_KEY goes to any.
    """
    if given is not None:
        return given
    try:
        here = net.is_loopback(urlsplit(address(url)).hostname or "")
    except UsageError:  # whoever connects says it, by the name of its flag
        here = False
    return next(iter(env.api_keys() if here else ()), "") or env.openai_api_key()


def sendable(api_key: str) -> str:
    """The same key. Raises UsageError, which does not show it, for one that no header can have."""
    at = next((at for at, one in enumerate(api_key, 1) if not (one.isascii() and one.isprintable())), None)
    if at is not None:
        raise UsageError(f"api_key (or OPENAI_API_KEY) cannot be sent: its character {at} is not printable ASCII; give the key as it is.")
    return api_key


def _told(body: bytes) -> str:
    """The message of an error in OpenAI's form; "" where it is none."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""
