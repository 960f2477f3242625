"""Connections that cannot be held forever: by a client that sends nothing, or reads nothing. And a
client that has only closed its sending half gets its answer. `serve.py` starts the watch."""

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Collection
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from minidcp.config import ServeConfig

logger = logging.getLogger("minidcp")

CHECK_SECONDS = 0.2  # how often connections are looked at
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# What a connection waits for, and a value that changes with every new wait for the same thing.
Wait = tuple[str, object]
REQUEST = "it sent no whole request"
IDLE = "it sent nothing after an answer"  # for this, uvicorn has a timer of its own
READER = "it did not read"


class TimedConnection(HttpToolsProtocol):
    """`check` must be called regularly; it closes the connection when a wait has been too long."""

    wait: Wait | None = None
    wait_since = 0.0
    num_pauses = 0  # of sending: how often the client had too much to read
    is_half_closed = False  # whether the client will send nothing more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.wait = REQUEST, None
        self.wait_since = time.monotonic()  # also tells which is older

    def check(self, now: float, config: ServeConfig) -> None:
        if self.is_half_closed and self.is_reset():
            self.transport.abort()
            return

        wait = self.find_wait()
        if wait != self.wait:
            self.wait = wait
            self.wait_since = now
            return
        if wait is None:
            return

        reason, _ = wait
        limits = {IDLE: 0.0, REQUEST: config.receive_timeout, READER: config.send_timeout}
        limit = limits[reason]
        if 0 < limit <= now - self.wait_since:
            address = self.client[0] if self.client else "a client"
            logger.info("closed the connection of %s: %s for %g s", address, reason, limit)
            # What is not sent yet would keep a connection that is only closed.
            self.transport.abort()

    def find_wait(self) -> Wait | None:
        """What the client must do now. None: it is the server's turn."""
        if self.flow.write_paused or self.transport.is_closing():
            return READER, self.num_pauses
        if self.timeout_keep_alive_task is not None:
            return IDLE, self.cycle
        if not self.has_request:
            return REQUEST, self.cycle
        return None

    @property
    def has_request(self) -> bool:
        """Whether a request has arrived whole that is not answered yet."""
        if self.pipeline:
            return True
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def pause_writing(self) -> None:
        self.num_pauses += 1
        super().pause_writing()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client will send nothing more. Returns whether the connection stays open.

        A client that has left looks the same until something is sent to it: then a reset comes
        back. HTTP allows an interim response at any time before the answer, except to clients of
        HTTP/1.0, which are taken to have left.
        """
        if not self.has_request or self.cycle.scope["http_version"] != "1.1":
            return False
        self.is_half_closed = True
        self.cycle.keep_alive = False  # the answer will be the last one
        if not self.cycle.response_started and not self.pipeline:
            self.transport.write(CONTINUE)
        return True

    def is_reset(self) -> bool:
        """Whether the client's end has refused data. The event loop notices only when it writes."""
        connection: Any = self.transport.get_extra_info("socket")
        error: int = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return error != 0


def watch_connections(connections: Collection[object], config: ServeConfig) -> None:
    """Check all connections from now on, as long as the event loop runs."""
    loop = asyncio.get_running_loop()
    max_connections = count_descriptors() * 3 // 4  # the process needs some for itself

    def check_all() -> None:
        loop.call_later(CHECK_SECONDS, check_all)
        timed = [item for item in connections if isinstance(item, TimedConnection)]
        for connection in timed:
            connection.check(time.monotonic(), config)
        close_idle(timed, len(timed) - max_connections)

    check_all()


def close_idle(connections: list[TimedConnection], count: int) -> None:
    """Close so many connections that have no request, to make room for new ones: those that have
    been waiting longest."""
    if count <= 0:
        return
    idle = [c for c in connections if c.wait is not None and c.wait[0] in (REQUEST, IDLE)]
    idle.sort(key=lambda connection: connection.wait_since)
    for connection in idle[:count]:
        connection.transport.abort()
    logger.warning("too many connections; closed %d that had no request", len(idle[:count]))


def count_descriptors() -> int:
    """How many files and connections the process may have open."""
    limit = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1
    return limit if limit >= 0 else sys.maxsize
