"""The HTTP endpoints. Bodies are in `protocol.py`; the engine's thread is in `async_engine.py`."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from minidcp.config import EngineConfig
from minidcp.engine.engine import LLMEngine
from minidcp.engine.executor import EngineDeadError, is_driver
from minidcp.request import OutputDelta, SamplingParams, TokenLogprobs

from .async_engine import AsyncEngine
from .protocol import (
    UNSUPPORTED,
    Choice,
    CompletionRequest,
    CompletionResponse,
    ErrorResponse,
    Logprobs,
    ModelCard,
    ModelList,
    PromptTokensDetails,
    Usage,
)

logger = logging.getLogger("minidcp")
T = TypeVar("T")
SHUTDOWN_SECONDS = 30  # for running requests after SIGTERM


def create_app(engine: AsyncEngine, model_name: str) -> FastAPI:
    """The application; its lifespan starts and closes the engine's thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="minidcp", lifespan=lifespan)
    completions = Completions(engine, model_name)
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "value_error":  # raised in protocol.py
            return await user_error(request, first["ctx"]["error"])
        if first["type"] == "json_invalid":
            return error_response(400, f"the body is not valid JSON: {first['ctx']['error']}")
        where = [str(part) for part in first["loc"] if part != "body"]
        message = f"{where[0]}: {first['msg']}" if where else str(first["msg"])
        return error_response(400, message, where[0] if where else None)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        response = error_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})  # 405 says what is allowed
        return response

    @app.exception_handler(ValueError)
    async def user_error(_: Request, error: ValueError) -> Response:
        field = str(error).replace(":", " ").split(" ")[0]  # our messages begin with it
        known = field in CompletionRequest.model_fields or field in UNSUPPORTED
        return error_response(400, str(error), field if known else None)

    @app.exception_handler(EngineDeadError)
    async def dead(_: Request, error: EngineDeadError) -> Response:
        return error_response(503, f"the engine has stopped: {error}")

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def defect(_: Request, __: Exception) -> Response:
        return error_response(500, "internal error; the server's log says more")

    @app.get("/", include_in_schema=False)
    async def status_page() -> HTMLResponse:
        return HTMLResponse(page)

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

    @app.post("/v1/completions", response_model=CompletionResponse)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await completions.answer(body, request)

    return app


class Completions:
    """POST /v1/completions."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self.engine, self.model_name = engine, model_name

    async def answer(self, body: CompletionRequest, request: Request) -> Response:
        if body.model is not None and body.model != self.model_name:
            message = f"model {body.model!r} does not exist; this server has {self.model_name!r}"
            raise HTTPException(404, message)
        params = body.sampling_params()
        prompts = [await self.engine.tokenize(prompt) for prompt in body.prompts()]
        if not prompts:
            raise ValueError("prompt: is empty; give at least one")
        for tokens in prompts:
            self.engine.engine.validate(tokens, params)
        completion_id = f"cmpl-{uuid.uuid4().hex}"
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            events = self.stream(completion_id, prompts, params, usage)
            return StreamingResponse(events, media_type="text/event-stream")
        whole = self.collect(completion_id, prompts, params)
        response = await unless_disconnected(request, whole)
        return JSONResponse(response.model_dump())

    async def collect(
        self, completion_id: str, prompts: list[list[int]], params: SamplingParams
    ) -> CompletionResponse:
        choices = [self.new_choice(i, params) for i in range(len(prompts))]
        count = cached = 0
        async for index, delta in self.run(prompts, params):
            choice = choices[index]
            choice.text += delta.text
            if choice.logprobs is not None and delta.logprobs is not None:
                self.add_logprobs(choice.logprobs, delta.logprobs)
            count += len(delta.token_ids)
            if delta.finish_reason is not None:
                choice.finish_reason = delta.finish_reason.value
                cached += delta.cached_tokens
        return CompletionResponse(
            id=completion_id,
            model=self.model_name,
            choices=choices,
            usage=count_usage(prompts, count, cached),
        )

    async def stream(
        self, completion_id: str, prompts: list[list[int]], params: SamplingParams, include_usage: bool
    ) -> AsyncIterator[str]:
        """One event per token; clients measure latency by events, so those with empty text count too."""
        head = CompletionResponse(id=completion_id, model=self.model_name, choices=[])
        offsets = [0] * len(prompts)
        count = cached = 0
        try:
            async for index, delta in self.run(prompts, params):
                choice = self.new_choice(index, params)
                choice.text = delta.text
                if choice.logprobs is not None and delta.logprobs is not None:
                    self.add_logprobs(choice.logprobs, delta.logprobs)
                    choice.logprobs.text_offset = [offsets[index]]
                    offsets[index] += len(choice.logprobs.tokens[0])
                count += len(delta.token_ids)
                if delta.finish_reason is not None:
                    choice.finish_reason = delta.finish_reason.value
                    cached += delta.cached_tokens
                yield event(head.model_copy(update={"choices": [choice]}).model_dump_json(exclude={"usage"}))
            if include_usage:
                usage = count_usage(prompts, count, cached)
                yield event(head.model_copy(update={"usage": usage}).model_dump_json())
        except EngineDeadError as error:
            yield event(ErrorResponse.of(503, f"the engine has stopped: {error}").model_dump_json())
        yield event("[DONE]")

    async def run(
        self, prompts: list[list[int]], params: SamplingParams
    ) -> AsyncIterator[tuple[int, OutputDelta]]:
        """The deltas of all prompts as they come, with the prompt's index."""
        merged: asyncio.Queue[tuple[int, OutputDelta | Exception | None]] = asyncio.Queue()

        async def pump(index: int, tokens: list[int]) -> None:
            try:
                async for delta in self.engine.generate(tokens, params):
                    merged.put_nowait((index, delta))
                merged.put_nowait((index, None))
            except Exception as error:
                merged.put_nowait((index, error))

        pumps = [asyncio.create_task(pump(i, tokens)) for i, tokens in enumerate(prompts)]
        try:
            left = len(pumps)
            while left:
                index, item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield index, item
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def new_choice(self, index: int, params: SamplingParams) -> Choice:
        return Choice(index=index, text="", logprobs=None if params.logprobs is None else Logprobs())

    def add_logprobs(self, logprobs: Logprobs, entry: TokenLogprobs) -> None:
        tokenizer = self.engine.engine.tokenizer
        ids = {entry.token_id, *(token for token, _ in entry.top)}
        logprobs.add(entry, {i: str(tokenizer.decode([i])) if tokenizer else f"token_id:{i}" for i in ids})


async def unless_disconnected(request: Request, answer: Awaitable[T]) -> T:
    """The answer, or ClientDisconnect (and the answer's cancellation) if the client leaves before."""

    async def wait_for_leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(answer), asyncio.create_task(wait_for_leaving())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def event(data: str) -> str:
    """One server-sent event."""
    return f"data: {data}\n\n"


def count_usage(prompts: list[list[int]], completion: int, cached: int) -> Usage:
    prompt = sum(map(len, prompts))
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def error_response(status: int, message: str, param: str | None = None) -> Response:
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
