"""The HTTP endpoints. `protocol.py` has the bodies, `generation.py` what completions and chats do,
`errors.py` the errors. `serve.py` runs the application."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from openai.types.chat import ChatCompletion
from openai.types.responses import Response as OpenAIResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from minidcp import __version__
from minidcp.config import ServeConfig, require, shorten
from minidcp.request import SamplingParams

from . import protocol
from .async_engine import AsyncEngine
from .chat import ChatGeneration
from .errors import ErrorResponse, add_error_handlers
from .generation import CompletionGeneration
from .json_body import BodyParser
from .logprobs import LogprobsFormatter
from .middleware import Gate
from .responses_answer import ResponsesGeneration
from .responses_api import ResponsesRequest
from .side_work import SideWorker
from .tokenization import TokenizerService

OpenApiResponses = dict[int | str, dict[str, Any]]  # by status code
ERROR_RESPONSES: OpenApiResponses = {
    "4XX": {"model": ErrorResponse},
    "5XX": {"model": ErrorResponse},
}


def create_app(engine: AsyncEngine) -> FastAPI:
    """The application. Its lifespan starts and closes the engine's thread."""

    body_parser = BodyParser()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A busy event loop would keep the interpreter for 5 ms at a time (Python's default). The
        # engine's threads need it only briefly, but soon.
        sys.setswitchinterval(1e-4)
        # Reading a number takes time that grows with the square of its digits. This is the least
        # limit that Python takes.
        sys.set_int_max_str_digits(640)
        engine.start()
        yield
        await asyncio.to_thread(engine.close)
        body_parser.close()

    app = FastAPI(
        title="minidcp",
        version=__version__,
        lifespan=lifespan,
        responses=ERROR_RESPONSES,
        redirect_slashes=False,  # the gate takes a slash at the end away
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
    )
    app.router.route_class = body_parser.make_route_class()
    app.add_middleware(Gate, config=engine.config)
    add_cors(app, engine.config)
    add_error_handlers(app)

    tokenizer_service = TokenizerService(engine)
    add_generation_routes(app, engine, tokenizer_service)
    add_model_routes(app, engine)
    add_tokenizer_routes(app, engine, tokenizer_service)
    add_health_routes(app, engine)
    add_monitoring_routes(app, engine)
    add_pages(app)
    return app


def add_cors(app: FastAPI, config: ServeConfig) -> None:
    """Let pages of other origins call this server. It is outside the gate: browsers ask first, and
    send no key with that question."""
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )


def add_generation_routes(
    app: FastAPI, engine: AsyncEngine, tokenizer_service: TokenizerService
) -> None:
    shared = (engine, tokenizer_service, LogprobsFormatter(tokenizer_service), SideWorker())

    @app.post("/v1/completions", responses=describe_answer(protocol.Completion))
    async def complete(body: protocol.CompletionRequest, request: Request) -> Response:
        check_model(body.model, engine)
        return await CompletionGeneration(*shared, body).answer(request)

    @app.post("/v1/chat/completions", responses=describe_answer(ChatCompletion))
    async def complete_chat(body: protocol.ChatRequest, request: Request) -> Response:
        check_model(body.model, engine)
        return await ChatGeneration(*shared, body).answer(request)

    @app.post("/v1/responses", responses=describe_answer(OpenAIResponse))
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        check_model(body.model, engine)
        return await ResponsesGeneration(*shared, body).answer(request)


def add_model_routes(app: FastAPI, engine: AsyncEngine) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards = [describe_model(engine, name) for name in engine.model_names]
        return {"object": "list", "data": cards}

    @app.get("/v1/models/{model_name:path}")
    async def model(model_name: str) -> dict[str, Any]:
        check_model(model_name, engine)
        return describe_model(engine, model_name)


def add_tokenizer_routes(
    app: FastAPI, engine: AsyncEngine, tokenizer_service: TokenizerService
) -> None:
    @app.post("/tokenize")
    async def tokenize(body: protocol.TokenizeRequest) -> protocol.TokenizeResponse:
        check_model(body.model, engine)
        return await tokenizer_service.tokenize(body)

    @app.post("/detokenize")
    async def detokenize(body: protocol.DetokenizeRequest) -> dict[str, str]:
        check_model(body.model, engine)
        require(
            len(body.tokens) <= engine.max_model_len,
            f"tokens: {len(body.tokens)} token ids are more than the {engine.max_model_len} of the "
            "model's context length; send them in parts",
        )
        return {"prompt": await tokenizer_service.detokenize(body.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        tokenizer = tokenizer_service.require_tokenizer("tokenizer_info")
        special_tokens = tokenizer.special_tokens_map
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "special_tokens": {name: str(token) for name, token in special_tokens.items()},
            "has_chat_template": tokenizer.chat_template is not None,
        }


def add_health_routes(app: FastAPI, engine: AsyncEngine) -> None:
    @app.get("/health", response_class=Response)
    async def health() -> Response:
        engine.check_health()
        return Response()

    @app.get("/health_generate", response_class=Response)
    async def health_generate() -> Response:
        """Generates a token, on all ranks."""
        prompt = [0]
        params = SamplingParams(max_tokens=1, temperature=0.0)
        engine.validate(prompt, params)
        async for _ in engine.generate([(prompt, params)]):
            pass
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def add_monitoring_routes(app: FastAPI, engine: AsyncEngine) -> None:
    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        # Always the plain text format: in the OpenMetrics format, scrapers turn the colons of names
        # into underscores.
        return Response(
            generate_latest(engine.metrics.registry),
            media_type="text/plain; version=0.0.4; charset=utf-8",
        )

    @app.get("/load")
    async def load() -> dict[str, Any]:
        return engine.describe_load()


def add_pages(app: FastAPI) -> None:
    @app.get("/", response_class=FileResponse)
    async def status_page() -> Path:
        return Path(__file__).with_name("page.html")

    @app.get("/docs", response_class=FileResponse, include_in_schema=False)
    async def docs_page() -> Path:
        return Path(__file__).with_name("docs.html")


def check_model(requested: str | None, engine: AsyncEngine) -> None:
    """Raises a 404 if a request names another model than the one served here."""
    if requested is not None and requested not in engine.model_names:
        served = ", ".join(map(repr, engine.model_names))
        raise HTTPException(
            404, f"model {shorten(requested)} does not exist; this server has {served}"
        )


def describe_model(engine: AsyncEngine, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "minidcp",
        "root": engine.model_path,
        "max_model_len": engine.max_model_len,
    }


def describe_answer(answer_type: type[Any]) -> OpenApiResponses:
    """The OpenAPI entry of an endpoint that answers with an `answer_type` or a stream of events."""
    data = {
        "type": "string",
        "description": "a chunk or an error, as JSON; in the last event [DONE]",
    }
    event = {
        "type": "object",
        "description": "one of the events",
        "properties": {"data": data},
        "required": ["data"],
    }
    return {200: {"model": answer_type, "content": {"text/event-stream": {"schema": event}}}}
