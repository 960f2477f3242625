"""`minidcp serve`: runs the application until it is told to stop or the engine ends.
The endpoints are in `app.py`, and where it listens is in `listening.py`."""

import json
import math
import os
import shlex
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn

from minidcp.config import EngineConfig, ServeConfig, check_api_key
from minidcp.console import exit_at_once
from minidcp.engine.engine import LLMEngine
from minidcp.engine.executor import is_driver
from minidcp.engine.listener import StepListener

from .address_file import write_address_file
from .app import create_app
from .async_engine import AsyncEngine, UnavailableError
from .chat_template import read_template_file, set_chat_template
from .connection import TimedConnection, watch_connections
from .example_prompt import read_example_prompt
from .http_protocol import HttpProtocol
from .listening import find_reachable_host, format_url, open_listener

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(config: EngineConfig, options: ServeConfig) -> int:
    """Serve until told to stop. Returns the exit code: 0 after SIGTERM, 1 if a rank ended. Raises
    ValueError if the configuration or the checkpoint is wrong, or the address cannot be listened
    on, and KeyboardInterrupt after Ctrl-C."""
    if not is_driver():
        LLMEngine(config)  # this process is a rank: the constructor does not return
    options = replace(options, api_key=choose_api_key(options))
    model_name = options.served_model_name[0] if options.served_model_name else config.model
    chat_template = read_template_file(options.chat_template) if options.chat_template else None

    with open_listener(options) as listening:

        def load(listener: StepListener) -> LLMEngine:
            llm_engine = LLMEngine(config, listener=listener)
            if chat_template is not None:
                set_chat_template(llm_engine.tokenizer, chat_template)
            engine.example_prompt = read_example_prompt(Path(llm_engine.config.model))
            ranks = f"tp {config.tp_size}, dcp {config.dcp_size}"
            address = describe_address(listening, options)
            command = write_curl(listening, options, model_name, engine.example_prompt)
            print(f"Serving {model_name} on {address} ({ranks}). Try:\n\n{command}\n", flush=True)
            return llm_engine

        if not options.uds:
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
            timeout_keep_alive=math.ceil(engine.config.keep_alive_timeout),
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


def describe_address(listening: socket.socket, options: ServeConfig) -> str:
    if options.uds:
        return f"unix:{options.uds}"
    return format_url(options.host, listening.getsockname()[1])


def write_curl(listening: socket.socket, options: ServeConfig, model_name: str, prompt: str) -> str:
    """A command that users can paste to try the server."""
    if options.uds:
        target = f"--unix-socket {shlex.quote(options.uds)} http://localhost"
    else:
        host = find_reachable_host(listening, options.host)
        target = format_url(host, listening.getsockname()[1])
    fields = {"model": model_name, "prompt": prompt, "max_tokens": 64, "temperature": 0}
    body = shlex.quote(json.dumps(fields))
    key = "" if options.api_key is None else " -H 'Authorization: Bearer …'"
    return f"curl {target}/v1/completions{key} -H 'Content-Type: application/json' -d {body}"
