"""The HTTP endpoints. Bodies are in `protocol.py`; the engine's thread is in `async_engine.py`."""

from __future__ import annotations

import asyncio
import json
import logging
import reprlib
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from minidcp import __version__
from minidcp.config import EngineConfig
from minidcp.engine.engine import LLMEngine
from minidcp.engine.executor import EngineDeadError, is_driver

from .async_engine import AsyncEngine
from .chat import Chat
from .completions import Completions
from .protocol import (
    UNSUPPORTED,
    Body,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
    Version,
)
from .tokenization import Tokenization

logger = logging.getLogger("minidcp")
# What a message may begin with and an error's `param` name.
BODIES = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
FIELDS = {*UNSUPPORTED, *(name for body in BODIES for name in body.model_fields)}
SHUTDOWN_SECONDS = 30  # for running requests after SIGTERM


def create_app(engine: AsyncEngine, model_name: str) -> FastAPI:
    """The application; its lifespan starts and closes the engine's thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    errors: dict[int | str, dict[str, Any]] = {code: {"model": ErrorResponse} for code in ("4XX", "5XX")}
    app = FastAPI(title="minidcp", version=__version__, lifespan=lifespan, responses=errors)
    tokenization = Tokenization(engine)
    completions = Completions(engine, tokenization, model_name)
    chat = Chat(engine, tokenization, model_name)

    def check_model(body: Body) -> None:
        if body.model is not None and body.model != model_name:
            message = f"model {body.model!r} does not exist; this server has {model_name!r}"
            raise HTTPException(404, message)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "value_error":  # raised in protocol.py
            return await user_error(request, first["ctx"]["error"])
        if first["type"] == "json_invalid":
            return error_response(400, f"the body is not valid JSON: {first['ctx']['error']}")
        where = [str(part) for part in first["loc"] if part != "body"]
        if not where:
            return error_response(400, str(first["msg"]))
        missing = first["type"] == "missing"
        what = ".".join(where) if missing else f"{where[0]} {reprlib.repr(first['input'])}"
        return error_response(400, f"{what}: {first['msg']}", where[0])

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        response = error_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})  # 405 says what is allowed
        return response

    @app.exception_handler(ValueError)
    async def user_error(_: Request, error: ValueError) -> Response:
        field = str(error).replace(":", " ").split(" ")[0]  # our messages begin with it
        return error_response(400, str(error), field if field in FIELDS else None)

    @app.exception_handler(EngineDeadError)
    async def dead(_: Request, error: EngineDeadError) -> Response:
        return error_response(503, f"the engine has stopped: {error}")

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def defect(_: Request, __: Exception) -> Response:
        return error_response(500, "internal error; the server's log says more")

    @app.get("/health")
    async def health() -> Response:
        if engine.death is not None:
            raise engine.death
        return Response()

    @app.get("/v1/models")
    async def models() -> ModelList:
        inner = engine.engine
        card = ModelCard(id=model_name, root=inner.config.model, max_model_len=inner.max_model_len)
        return ModelList(data=[card])

    @app.get("/version")
    async def version() -> Version:
        return Version(version=__version__)

    @app.post("/v1/completions", response_model=CompletionResponse)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        check_model(body)
        return await completions.answer(body, request)

    @app.post("/v1/chat/completions", response_model=ChatCompletion | ChatCompletionChunk)
    async def complete_chat(body: ChatRequest, request: Request) -> Response:
        check_model(body)
        return await chat.answer(body, request)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        check_model(body)
        return await tokenization.tokenize(body)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        check_model(body)
        return await tokenization.detokenize(body)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        return tokenization.describe()

    return app


def error_response(status: int, message: str, param: str | None = None) -> Response:
    message = message.encode(errors="backslashreplace").decode()  # templates quote halves of characters
    return JSONResponse(ErrorResponse.of(status, message, param).model_dump(), status_code=status)


def serve(config: EngineConfig, host: str, port: int, model_name: str | None) -> int:
    """Serve until told to stop; returns the exit code, 1 if a rank ended.

    Raises:
        ValueError: the configuration or the checkpoint is wrong, or the address cannot be listened on.
    """
    name = model_name or config.model
    if not is_driver():
        LLMEngine(config)  # does not return
    listening = listen(host, port)  # before minutes of loading
    with listening:
        engine = LLMEngine(config)

        def stop() -> None:
            logger.error("a rank has ended; stopping: %s", async_engine.death)
            server.should_exit = True

        async_engine = AsyncEngine(engine, on_death=stop)
        settings = uvicorn.Config(
            create_app(async_engine, name), log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS
        )
        server = uvicorn.Server(settings)
        listening.listen()  # so that nobody who reads the address is refused
        address = f"http://{host}:{listening.getsockname()[1]}"
        body = json.dumps({"model": name, "prompt": "Once upon a time", "max_tokens": 32})
        print(
            f"Serving {name} on {address} (tp {config.tp_size}, dcp {config.dcp_size}). Try:\n\n"
            f"curl {address}/v1/completions -H 'Content-Type: application/json' -d '{body}'\n",
            flush=True,
        )
        server.run(sockets=[listening])
    sys.stdout.flush()
    return 1 if async_engine.death is not None else 0


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 lets the system choose."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({error})") from None
    return bound
