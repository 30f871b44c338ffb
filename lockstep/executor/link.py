"""One end of the connection between the leader and the agent of another host."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import threading
import time
from collections.abc import Callable

from lockstep.executor import node_wire
from lockstep.executor.node_wire import BEAT_S, Frames, Message
from lockstep.utils import net

_RECEIVE_BYTES = 1 << 20
_LATE_S = 1.0  # who looks at the clock less often than this was held up itself, and may not blame the other side
_FAREWELL_S = 1.0
_UNANSWERED = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


class LinkLost(ConnectionError):
    """The other side is gone. The message says how it was noticed."""


class Link:
    """Any thread sends; one thread, which also watches the socket, receives, beats and looks at the clock."""

    def __init__(self, connection: socket.socket, silence_s: float, wake: Callable[[], None] = lambda: None) -> None:
        """silence_s: how long the other side may say nothing. wake: called when there is something left for `flush`."""
        self.socket, self.frames, self.silence_s = connection, Frames(), silence_s
        connection.setblocking(False)
        net.prepare_link(connection, silence_s)
        self.early: list[Message] = []  # that came with the end of the greeting
        self._wake = wake
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._broken = ""
        self._heard = self._looked = time.monotonic()
        self._beaten = 0.0

    def send(self, message: Message) -> None:
        """As `send_frame`. Raises FrameError for a message that is too long."""
        self.send_frame(node_wire.frame(message))

    def send_frame(self, data: bytes) -> None:
        """Send, or queue what the connection does not take now. Never waits, never raises for a connection that is lost:
        who receives learns of that. Messages arrive in the order of the calls."""
        with self._lock:
            if not self._unsent:
                data = data[self._send_some(data) :]
            if not data or self._broken:
                return
            self._unsent += data
        self._wake()

    def flush(self) -> None:
        """Send more of what is queued."""
        with self._lock:
            if self._unsent:
                sent = self._send_some(self._unsent)
                del self._unsent[:sent]

    @property
    def waits(self) -> bool:
        """Whether something is queued."""
        return bool(self._unsent)

    def _send_some(self, data: bytes | bytearray) -> int:
        sent = 0
        try:
            with memoryview(data) as view:
                while sent < len(data):
                    sent += self.socket.send(view[sent : sent + _RECEIVE_BYTES])
        except BlockingIOError:
            pass
        except OSError as e:
            self._broken = self._broken or _words(e)
            return len(data)  # nobody will get it
        return sent

    def receive(self) -> list[Message]:
        """What has come. Raises LinkLost at the end of the connection or when what came is not ours."""
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError as e:
            raise LinkLost(_words(e)) from None
        if not data:
            raise LinkLost("the connection was closed")
        self._heard = time.monotonic()
        try:
            return list(self.frames.feed(data))
        except node_wire.FrameError as e:
            raise LinkLost(f"it sent {e}") from None

    def keep(self, beat: Callable[[], node_wire.Beat]) -> None:
        """Send `beat()` when it is time. Raises LinkLost when the other side has been silent for too long, or cannot be reached."""
        now = time.monotonic()
        if now - self._looked > _LATE_S:
            self._heard = max(self._heard, now - self.silence_s / 2)
        self._looked = now
        if now - self._heard > self.silence_s:
            raise LinkLost(f"no sign of life for {now - self._heard:.1f} s")
        if self._broken:
            raise LinkLost(self._broken)
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            self.send(beat())

    def silent_s(self) -> float:
        """Seconds since anything came."""
        return time.monotonic() - self._heard

    def part(self, last: Message) -> None:
        """Say a last word and end our side: `gone` says when the other side has taken it. Never waits, never raises."""
        with contextlib.suppress(OSError, ValueError):
            self.send(last)
            self.socket.shutdown(socket.SHUT_WR)

    def gone(self) -> bool:
        """Forget what has come; whether the other side has ended too. Never waits."""
        try:
            return not self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self, last: Message | None = None, *, linger: bool = False) -> None:
        """Say a last word, if there is one, and close. Never raises; may be called twice.

        linger: give the other side a moment to take what was said, as is done for a last word.
        """
        with contextlib.suppress(OSError, ValueError):
            if (last is not None or linger) and self.socket.fileno() >= 0:
                if last is not None:
                    self.send(last)
                until = time.monotonic() + _FAREWELL_S
                with selectors.DefaultSelector() as one:
                    one.register(self.socket, selectors.EVENT_WRITE)
                    while self.waits and not self._broken and time.monotonic() < until:
                        one.select(0.05)
                        self.flush()
                # What was not read here would make the kernel throw away what was sent: end our side, then read.
                self.socket.shutdown(socket.SHUT_WR)
                with selectors.DefaultSelector() as one:
                    one.register(self.socket, selectors.EVENT_READ)
                    while time.monotonic() < until and one.select(max(0.0, until - time.monotonic())) and self.socket.recv(_RECEIVE_BYTES):
                        pass
        self.socket.close()


def _words(error: OSError) -> str:
    if error.errno in _UNANSWERED:
        return f"it cannot be reached any more ({error.strerror})"
    return "the connection was reset" if error.errno in (errno.ECONNRESET, errno.EPIPE) else f"the connection failed ({error.strerror})"
