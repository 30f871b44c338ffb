"""Addresses and listening sockets.

A free port is never probed, closed and bound again: somebody else may take it in between. It is bound once and the open
socket is handed to whoever will serve on it.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket

LOOPBACK = "127.0.0.1"


class Listener:
    """A bound, listening TCP socket, ready to be handed to another process.

    The parent makes it, passes `fileno()` to the child that serves (subprocess `pass_fds`, or fork) and `port` to the
    others. Connections made before the server takes over wait in the backlog; none is refused.
    """

    def __init__(self, host: str = LOOPBACK, port: int = 0, backlog: int = 1024) -> None:
        """Raises OSError, with the address in its text, when the port is taken or is none."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Lets a restart bind over sockets in TIME_WAIT; on Linux it never lets two live listeners share a port.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(backlog)
        except OverflowError:
            self._socket.close()
            raise OSError(errno.EINVAL, f"cannot listen on {host}:{port}: a port is a number up to 65535") from None
        except OSError as error:
            self._socket.close()
            raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
        self.host = host
        self.port = int(self._socket.getsockname()[1])

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> tuple[socket.socket, str]:
        """-> (connection, the peer's address). For a server that lives in this process. Does not wait: BlockingIOError for nobody."""
        self._socket.setblocking(False)
        connection, peer = self._socket.accept()
        return connection, str(peer[0])

    def detach(self) -> int:
        """Give the descriptor away: the caller owns it now."""
        return self._socket.detach()

    def close(self) -> None:
        """Close this process's copy; the port stays held while another process has one. May be called twice."""
        self._socket.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_loopback(host: str) -> bool:
    """Whether `host` (name or address) means this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_any(host: str) -> bool:
    """Whether `host` is an address that stands for all of this machine's (0.0.0.0), which nobody can connect to."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:  # a name
        return False


def source_address(peer: str, port: int = 9) -> str:
    """The local address from which this host's kernel would reach `peer`. Sends nothing. Raises OSError without a route."""
    family = socket.getaddrinfo(peer, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, port))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the network interface that has `address`, None when no interface does."""
    import psutil  # costs 20 ms, and only launchers of several hosts need it

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in entries):
            return str(name)
    return None


def address_of(interface: str) -> str | None:
    """The address of a network interface, IPv4 where it has one; None when it has none or does not exist."""
    import psutil

    entries = psutil.net_if_addrs().get(interface, [])
    found = sorted((e.family != socket.AF_INET, e.address.split("%")[0]) for e in entries if e.family in (socket.AF_INET, socket.AF_INET6))
    return str(found[0][1]) if found else None


def prepare_link(link: socket.socket, silence_s: float) -> None:
    """A connection of small messages between hosts: nothing waits for more to send, and an unanswered byte ends it in time.

    Where nothing is sent the kernel asks: a host that does not answer for `silence_s` is an error on the socket either way.
    """
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every_s = max(1, round(silence_s / 5))
    for name, value in (
        ("TCP_KEEPIDLE", every_s),
        ("TCP_KEEPINTVL", every_s),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", int(silence_s * 1000)),
    ):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def loopback_interface() -> str:
    """`lo` on Linux, `lo0` on macOS and BSD."""
    with contextlib.suppress(OSError):
        for _, name in socket.if_nameindex():
            if name in ("lo", "lo0"):
                return name
    return "lo"


def resolve(host: str) -> str:
    """`host` as an address, IPv4 where it has one. Raises OSError when the name is unknown."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    addresses = sorted((info[0] != socket.AF_INET, str(info[4][0])) for info in found)
    return addresses[0][1]


def is_open(fd: int) -> bool:
    """Whether `fd` is a descriptor of this process."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
