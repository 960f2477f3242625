"""`minidcp serve`: listens, and runs the application until it is told to stop or the engine ends.
The endpoints are in `app.py`."""

import json
import socket
import sys
from dataclasses import replace
from os import environ
from types import FrameType

import uvicorn

from minidcp.config import EngineConfig, ServeConfig
from minidcp.engine.engine import LLMEngine, StepListener
from minidcp.engine.executor import is_driver

from .app import create_app
from .async_engine import AsyncEngine, UnavailableError
from .connection import TimedConnection, watch_connections


def serve(config: EngineConfig, options: ServeConfig) -> int:
    """Serve until told to stop. Returns the exit code, 1 if a rank ended. Raises ValueError if the
    configuration or the checkpoint is wrong, or the address cannot be listened on."""
    if not is_driver():
        LLMEngine(config)  # this process is a rank: the constructor does not return
    options = replace(options, api_key=options.api_key or environ.get("MINIDCP_API_KEY"))
    model_name = options.served_model_name or config.model

    with listen(options.host, options.port) as listening:
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{listening.getsockname()[1]}"

        def load(listener: StepListener) -> LLMEngine:
            llm_engine = LLMEngine(config, listener=listener)
            ranks = f"tp {config.tp_size}, dcp {config.dcp_size}"
            command = write_curl(address, model_name, needs_key=bool(options.api_key))
            print(f"Serving {model_name} on {address} ({ranks}). Try:\n\n{command}\n", flush=True)
            return llm_engine

        engine = AsyncEngine(load, options, model_name)
        try:
            Server(engine).run(sockets=[listening])
        finally:
            engine.close()  # a second Ctrl-C skips the end of the lifespan, which closes it too

    sys.stdout.flush()
    if engine.failure is None:
        return 0
    if not engine.has_loaded:
        raise engine.failure
    return 1


class Server(uvicorn.Server):
    """Takes no new connections once it is told to stop or the engine has ended. Requests that run
    then have --shutdown-timeout seconds to finish."""

    def __init__(self, engine: AsyncEngine) -> None:
        # uvicorn must wait a little longer than the requests may take. It wants a finite integer.
        graceful_seconds = int(min(engine.config.shutdown_timeout, 1e6)) + 5
        config = uvicorn.Config(
            create_app(engine),
            http=TimedConnection,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=graceful_seconds,
        )
        super().__init__(config)
        self.engine = engine

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        watch_connections(self.server_state.connections, self.engine.config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called when a signal says to stop."""
        super().handle_exit(sig, frame)
        if self.started:  # before that there are no requests, and perhaps no event loop
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


def write_curl(address: str, model_name: str, needs_key: bool) -> str:
    """A command that users can paste to try the server."""
    body = json.dumps({"model": model_name, "prompt": "Once upon a time", "max_tokens": 32})
    key = " -H 'Authorization: Bearer …'" if needs_key else ""
    return f"curl {address}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'"
