"""The HTTP endpoints. Bodies are in `protocol.py`, what generates is in `generation.py`."""

import asyncio
import json
import reprlib
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from os import environ
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from openai.types.chat import ChatCompletion
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from minidcp import __version__
from minidcp.config import EngineConfig, ServeConfig
from minidcp.engine.engine import LLMEngine
from minidcp.engine.executor import EngineDeadError, is_driver
from minidcp.request import SamplingParams

from . import protocol
from .async_engine import AsyncEngine, UnavailableError
from .generation import Chat, Generation
from .middleware import Gate
from .tokenization import Tokenization

Responses = dict[int | str, dict[str, Any]]  # of an OpenAPI operation
ERRORS: Responses = {code: {"model": protocol.ErrorResponse} for code in ("4XX", "5XX")}


def documented(answer: type[Any]) -> Responses:
    """The OpenAPI entry of an endpoint that answers whole or as a stream of events."""
    data = {"type": "string", "description": "a chunk or an error, as JSON; in the last event [DONE]"}
    event = {"type": "object", "description": "one of the events", "properties": {"data": data}, "required": ["data"]}
    return {200: {"model": answer, "content": {"text/event-stream": {"schema": event}}}}


def create_app(engine: AsyncEngine) -> FastAPI:
    """The application; its lifespan starts and closes the engine's thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sys.setswitchinterval(1e-4)  # the engine's threads need the interpreter briefly, the loop at times all the time
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="minidcp", version=__version__, lifespan=lifespan, responses=ERRORS)
    app.add_middleware(Gate, config=engine.config)
    add_error_handlers(app)
    spelling, name = Tokenization(engine), engine.model_name

    def check_model(body: protocol.Body) -> None:
        if body.model is not None and body.model != name:
            raise HTTPException(404, f"model {body.model!r} does not exist; this server has {name!r}")

    @app.post("/v1/completions", responses=documented(protocol.Completion))
    async def complete(body: protocol.CompletionRequest, request: Request) -> Response:
        check_model(body)
        return await Generation(engine, spelling, body).answer(request)

    @app.post("/v1/chat/completions", responses=documented(ChatCompletion))
    async def complete_chat(body: protocol.ChatRequest, request: Request) -> Response:
        check_model(body)
        return await Chat(engine, spelling, body).answer(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [await model(name)]}

    @app.get("/v1/models/{model_name:path}")
    async def model(model_name: str) -> dict[str, Any]:
        check_model(protocol.Body(model=model_name))
        card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "minidcp"}
        return card | {"root": engine.engine.config.model, "max_model_len": engine.engine.max_model_len}

    @app.post("/tokenize")
    async def tokenize(body: protocol.TokenizeRequest) -> protocol.TokenizeResponse:
        check_model(body)
        return await spelling.tokenize(body)

    @app.post("/detokenize")
    async def detokenize(body: protocol.DetokenizeRequest) -> dict[str, str]:
        check_model(body)
        return {"prompt": await spelling.detokenize(body.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        tokenizer = spelling.require_tokenizer("tokenizer_info")
        names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        info = {"tokenizer_class": type(tokenizer).__name__, "vocab_size": len(tokenizer), "special_tokens": names}
        return info | {"has_chat_template": tokenizer.chat_template is not None}

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        engine.check_health()
        return Response()

    @app.get("/health_generate", response_class=Response)
    async def health_generate() -> Response:
        """Generates a token, on all ranks."""
        params = SamplingParams(max_tokens=1, temperature=0.0)
        engine.engine.validate([0], params)
        async for _ in engine.generate([([0], params)]):
            pass
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        # Always the plain format: in the other one, scrapers turn the colons of names into underscores.
        return Response(generate_latest(engine.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/load")
    async def load() -> dict[str, Any]:
        return engine.metrics.describe_load(engine.engine, name)

    @app.get("/", response_class=FileResponse)
    async def status_page() -> Path:
        return Path(__file__).with_name("page.html")

    return app


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "value_error":  # raised in protocol.py
            return await user_error(request, first["ctx"]["error"])
        if first["type"] == "json_invalid":
            return protocol.error_response(400, f"the body is not valid JSON: {first['ctx']['error']}")
        where = [str(part) for part in first["loc"] if part != "body"]
        if not where:
            return protocol.error_response(400, str(first["msg"]))
        what = ".".join(where) if first["type"] == "missing" else f"{where[0]} {reprlib.repr(first['input'])}"
        return protocol.error_response(400, f"{what}: {first['msg']}", where[0])

    @app.exception_handler(HTTPException)  # headers: a 405 says what is allowed
    async def http_error(_: Request, error: HTTPException) -> Response:
        return protocol.error_response(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(ValueError)
    async def user_error(_: Request, error: ValueError) -> Response:
        field = str(error).replace(":", " ").split(" ")[0]  # our messages begin with it
        return protocol.error_response(400, str(error), field if field in protocol.FIELDS else None)

    async def failure(status: int, _: Request, error: Exception) -> Response:
        headers = {"Retry-After": "1"} if isinstance(error, UnavailableError) else None
        return protocol.error_response(status, str(error), headers=headers)

    # Nobody reads the last.
    for kind, status in ((UnavailableError, 503), (EngineDeadError, 503), (TimeoutError, 504), (ClientDisconnect, 499)):
        app.add_exception_handler(kind, partial(failure, status))

    @app.exception_handler(Exception)
    async def defect(_: Request, __: Exception) -> Response:
        return protocol.error_response(500, "internal error; the server's log says more")


class Server(uvicorn.Server):
    """Told to stop, or when the engine ends, it takes no new connections; requests have `shutdown_timeout` seconds."""

    def __init__(self, engine: AsyncEngine) -> None:
        app, wait = create_app(engine), int(min(engine.config.shutdown_timeout, 1e6)) + 5
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=wait))
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.started:  # else there are no requests, and perhaps no loop
            wait, error = self.engine.config.shutdown_timeout, UnavailableError("the server is shutting down")
            self.engine.loop.call_soon_threadsafe(self.engine.loop.call_later, wait, self.engine.interrupt, error)

    async def on_tick(self, counter: int) -> bool:
        return self.engine.failure is not None or await super().on_tick(counter)


def serve(config: EngineConfig, options: ServeConfig) -> int:
    """Serve until told to stop; returns the exit code, 1 if a rank ended. Raises ValueError if the configuration or the
    checkpoint is wrong, or the address cannot be listened on."""
    if not is_driver():
        LLMEngine(config)  # does not return
    options = replace(options, api_key=options.api_key or environ.get("MINIDCP_API_KEY"))
    name = options.served_model_name or config.model
    with listen(options.host, options.port) as listening:
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{listening.getsockname()[1]}"

        def load() -> LLMEngine:
            engine = LLMEngine(config)
            body = json.dumps({"model": name, "prompt": "Once upon a time", "max_tokens": 32})
            key = " -H 'Authorization: Bearer …'" if options.api_key else ""
            curl = f"curl {address}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'"
            where = f"{address} (tp {config.tp_size}, dcp {config.dcp_size})"
            print(f"Serving {name} on {where}. Try:\n\n{curl}\n", flush=True)
            return engine

        engine = AsyncEngine(load, options, name)
        try:
            Server(engine).run(sockets=[listening])
        finally:  # a second Ctrl-C skips the lifespan's end
            engine.close()
    sys.stdout.flush()
    if engine.loaded is None and engine.failure is not None:
        raise engine.failure
    return 1 if engine.failure is not None else 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 lets the system choose."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({error})") from None
