"""Connections to web servers with a total time limit, and without access to the local network.

The timeout of a socket restarts with every byte. Therefore a watch shuts down the socket of each
exchange (a request and its response) that misses its deadline. Closing the watch aborts all
exchanges.

A host name is resolved once per connection, and only the checked addresses are used. Therefore a
name that resolves differently a moment later (DNS rebinding) does no harm.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.connection import create_connection
from urllib3.util.ssl_ import create_urllib3_context

from data_prep.download.address import DownloadError, is_public

POLL_SECONDS = 0.1


@dataclass
class Exchange:
    """A request and its response, on one thread."""

    deadline: float  # in seconds of time.monotonic
    socket: socket.socket | None = None  # duplicate of the connection's socket
    is_overdue: bool = False


class ConnectionWatch:
    """Ends overdue exchanges, from its own thread."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._lock = threading.Lock()
        self._exchanges: dict[int, Exchange] = {}  # by thread
        threading.Thread(target=self._end_overdue, daemon=True, name="connection watch").start()

    @contextmanager
    def exchange(self, seconds: float) -> Iterator[Exchange]:
        """Limits the duration of this thread's exchange to a number of seconds."""
        exchange = Exchange(time.monotonic() + seconds)
        with self._lock:
            self._exchanges[threading.get_ident()] = exchange
        try:
            yield exchange
        finally:
            with self._lock:
                del self._exchanges[threading.get_ident()]
                if exchange.socket is not None:
                    exchange.socket.close()

    def begin(self, connection: socket.socket) -> None:
        """Registers the connection that this thread's exchange uses.

        The socket is duplicated, because TLS replaces it and urllib3 closes it in between.
        """
        duplicate = socket.socket(fileno=os.dup(connection.fileno()))
        with self._lock:
            exchange = self._exchanges[threading.get_ident()]
            if exchange.socket is not None:
                exchange.socket.close()
            exchange.socket = duplicate
            if self.closed.is_set():
                _shut_down(duplicate)

    def close(self) -> None:
        """Ends all current and later exchanges."""
        with self._lock:
            self.closed.set()
            for exchange in self._exchanges.values():
                _shut_down(exchange.socket)

    def _end_overdue(self) -> None:
        while not self.closed.wait(POLL_SECONDS):
            now = time.monotonic()
            with self._lock:
                for exchange in self._exchanges.values():
                    if now > exchange.deadline:
                        exchange.is_overdue = True
                        _shut_down(exchange.socket)


def _shut_down(connection: socket.socket | None) -> None:
    if connection is not None:
        with contextlib.suppress(OSError):  # already ended
            connection.shutdown(socket.SHUT_RDWR)


class _WatchedConnection:
    """Mixin for urllib3's connection classes that registers each connection with the watch."""

    watch: ConnectionWatch
    private_hosts: bool

    def _new_conn(self) -> socket.socket:
        connection = _connect(self._dns_host, self.port, self.timeout, self.private_hosts)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.watch.begin(connection)
        return connection

    def putrequest(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:  # kept open from an earlier exchange
            self.watch.begin(self.sock)
        super().putrequest(*args, **kwargs)


def _connect(host: str, port: int, timeout: float, private_hosts: bool) -> socket.socket:
    addresses = _resolve(host, port)
    allowed = [address for address in addresses if private_hosts or is_public(address)]
    if not allowed:
        raise DownloadError(
            "download_private_host",
            f"{host} is at {addresses[0]}, which is not on the public internet; to allow such "
            "URLs, set download.private_hosts=true",
        )
    for address in allowed:
        try:
            return create_connection((address, port), timeout)
        except TimeoutError:
            error = DownloadError(
                "download_timeout", f"{host}: no connection in {timeout} s", is_transient=True
            )
        except OSError as failure:
            message = f"{host}: {failure.strerror or failure}"
            error = DownloadError("download_unreachable", message, is_transient=True)
    raise error


def _resolve(host: str, port: int) -> list[str]:
    """Returns the host's IP addresses, in order of preference."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DownloadError("download_unreachable", f"{host}: {error}", is_transient=True) from None
    return list(dict.fromkeys(address[0] for *_, address in found))


def build_connection_pools(
    watch: ConnectionWatch, *, private_hosts: bool, connections_per_host: int, num_hosts: int
) -> PoolManager:
    """Builds pools of watched connections; the caller handles redirects and retries.

    Args:
        watch: watch that ends overdue exchanges.
        private_hosts: whether to allow addresses outside the public internet.
        connections_per_host: maximum number of idle connections kept open per host.
        num_hosts: maximum number of hosts with idle connections.
    """
    options = {"watch": watch, "private_hosts": private_hosts}
    http = type("WatchedHTTPConnection", (_WatchedConnection, HTTPConnection), options)
    https = type("WatchedHTTPSConnection", (_WatchedConnection, HTTPSConnection), options)
    manager = PoolManager(num_hosts, maxsize=connections_per_host, ssl_context=_tls_context())
    manager.pool_classes_by_scheme = {
        "http": type("WatchedHTTPPool", (HTTPConnectionPool,), {"ConnectionCls": http}),
        "https": type("WatchedHTTPSPool", (HTTPSConnectionPool,), {"ConnectionCls": https}),
    }
    return manager


@lru_cache
def _tls_context() -> ssl.SSLContext:
    """Builds the context once, because reading the system's certificates is slow."""
    context = create_urllib3_context()
    context.load_default_certs()
    return context
