"""`minidcp serve`: listens, and runs the application until it is told to stop or the engine ends.
The endpoints are in `app.py`."""

import json
import os
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType

import uvicorn

from minidcp.config import EngineConfig, ServeConfig, check_api_key
from minidcp.console import exit_at_once
from minidcp.engine.engine import LLMEngine, StepListener
from minidcp.engine.executor import is_driver

from .address_file import write_address_file
from .app import create_app
from .async_engine import AsyncEngine, UnavailableError
from .connection import TimedConnection, watch_connections
from .http_protocol import HttpProtocol

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(config: EngineConfig, options: ServeConfig) -> int:
    """Serve until told to stop. Returns the exit code: 0 after SIGTERM, 1 if a rank ended. Raises
    ValueError if the configuration or the checkpoint is wrong, or the address cannot be listened
    on, and KeyboardInterrupt after Ctrl-C."""
    if not is_driver():
        LLMEngine(config)  # this process is a rank: the constructor does not return
    options = replace(options, api_key=choose_api_key(options))
    model_name = options.served_model_name or config.model

    with listen(options.host, options.port) as listening:
        port = listening.getsockname()[1]
        address = format_url(options.host, port)
        reachable = format_url(find_reachable_host(listening, options.host), port)

        def load(listener: StepListener) -> LLMEngine:
            llm_engine = LLMEngine(config, listener=listener)
            ranks = f"tp {config.tp_size}, dcp {config.dcp_size}"
            command = write_curl(reachable, model_name, needs_key=options.api_key is not None)
            print(f"Serving {model_name} on {address} ({ranks}). Try:\n\n{command}\n", flush=True)
            return llm_engine

        write_address_file(listening)
        engine = AsyncEngine(load, options, model_name)
        server = Server(engine)
        try:
            server.run(sockets=[listening])
        finally:
            engine.close()  # a second Ctrl-C skips the end of the lifespan, which closes it too

    if engine.failure is not None:
        if not engine.has_loaded:
            raise engine.failure
        return 1
    if signal.SIGINT in server.signals:
        raise KeyboardInterrupt
    return 0


def choose_api_key(options: ServeConfig) -> str | None:
    """The key that clients must send; None if they need none."""
    if options.api_key is not None:
        return options.api_key
    key = os.environ.get("MINIDCP_API_KEY")
    check_api_key(key, "MINIDCP_API_KEY")
    return key


class Connection(HttpProtocol, TimedConnection):
    """A connection with limits on what is sent, and on how long it may wait for a client."""


class Server(uvicorn.Server):
    """Takes no new connections once it is told to stop or the engine has ended. Requests that run
    then have --shutdown-timeout seconds to finish."""

    def __init__(self, engine: AsyncEngine) -> None:
        # uvicorn must wait a little longer than the requests may take. It wants a finite integer.
        graceful_seconds = int(min(engine.config.shutdown_timeout, 1e6)) + 5
        config = uvicorn.Config(
            create_app(engine),
            http=Connection,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=graceful_seconds,
        )
        super().__init__(config)
        self.engine = engine
        self.signals: list[int] = []  # that said to stop

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Have `handle_exit` called for signals. uvicorn's own version sends them to the process
        again at the end, which would then end by a signal instead of with exit code 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        watch_connections(self.server_state.connections, self.engine.config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called when a signal says to stop."""
        self.signals.append(sig)
        if not self.engine.has_loaded and self.engine.failure is None:
            # No request has been accepted. Loading cannot be interrupted, and may take minutes.
            # Ranks end when their connections do.
            exit_at_once(130 if sig == signal.SIGINT else 0)
        super().handle_exit(sig, frame)
        if self.started:  # before that there is perhaps no event loop
            error = UnavailableError("the server is shutting down")
            self.engine.interrupt_later(self.engine.config.shutdown_timeout, error)

    async def on_tick(self, counter: int) -> bool:
        """Called about ten times a second; True ends the server."""
        if self.engine.failure is not None:
            return True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Port 0 lets the system choose."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family = addresses[0][0]
        is_ipv6 = family == socket.AF_INET6
        return socket.create_server((host, port), family=family, dualstack_ipv6=is_ipv6)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({error})") from None


def find_reachable_host(listening: socket.socket, host: str) -> str:
    """A host that clients on other machines can use. It is `host`, unless that means "every
    address": then it is the one that this machine sends from."""
    if listening.getsockname()[0] not in ("0.0.0.0", "::"):
        return host
    # To connect a UDP socket sends nothing. The addresses are those reserved for documentation.
    probes = [(socket.AF_INET, "192.0.2.1")]
    if listening.family == socket.AF_INET6:
        probes.append((socket.AF_INET6, "2001:db8::1"))
    for family, address in probes:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
    return "localhost"  # there is no network


def format_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def write_curl(address: str, model_name: str, needs_key: bool) -> str:
    """A command that users can paste to try the server."""
    body = json.dumps({"model": model_name, "prompt": "Once upon a time", "max_tokens": 32})
    key = " -H 'Authorization: Bearer …'" if needs_key else ""
    return f"curl {address}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'"
