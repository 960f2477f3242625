"""Errors as clients see them: one JSON shape for all, and which exception gets which status. Errors
inside a stream of events have the same shape; `generation.py` writes those."""

import re
from functools import partial
from http import HTTPStatus
from typing import Any, Self

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from minidcp.config import shorten
from minidcp.engine.executor import EngineDeadError

from .async_engine import UnavailableError
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .responses_api import REFUSED_FIELDS, ResponsesRequest
from .unsupported import UNSUPPORTED_FIELDS

# What an error message may begin with, and an error's `param` may name.
FIELDS = {
    *UNSUPPORTED_FIELDS,
    *CompletionRequest.model_fields,
    *ChatRequest.model_fields,
    *TokenizeRequest.model_fields,
    *DetokenizeRequest.model_fields,
    *ResponsesRequest.model_fields,
    *REFUSED_FIELDS,
}
MAX_MESSAGE = 2000  # characters; whatever a message quotes
ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    503: "service_unavailable_error",
}
STATUSES: dict[type[Exception], int] = {
    UnavailableError: 503,
    EngineDeadError: 503,
    TimeoutError: 504,
    ClientDisconnect: 499,  # nobody reads this answer
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: int | None = None


class ErrorResponse(BaseModel):
    """Every error, whatever its status."""

    error: ErrorDetail

    @classmethod
    def make(cls, status: int, message: str, param: str | None = None) -> Self:
        if status in ERROR_TYPES:
            error_type = ERROR_TYPES[status]
        elif status < 500:
            error_type = "invalid_request_error"
        else:
            error_type = "internal_server_error"
        # A chat template may quote half of a surrogate pair, which UTF-8 cannot encode.
        message = message.encode(errors="backslashreplace").decode()
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]}..."
        return cls(error=ErrorDetail(message=message, type=error_type, param=param, code=status))


def error_response(
    status: int, message: str, param: str | None = None, headers: Any = None
) -> JSONResponse:
    return JSONResponse(ErrorResponse.make(status, message, param).model_dump(), status, headers)


def add_error_handlers(app: FastAPI) -> None:
    app.exception_handler(RequestValidationError)(handle_invalid_body)
    app.exception_handler(ValueError)(handle_value_error)
    app.exception_handler(HTTPException)(handle_http_error)
    for error_type, status in STATUSES.items():
        app.add_exception_handler(error_type, partial(handle_failure, status))
    app.exception_handler(Exception)(handle_defect)


async def handle_invalid_body(request: Request, invalid: RequestValidationError) -> JSONResponse:
    """The body does not match its model in `protocol.py`; clients hear of the first mismatch."""
    error = invalid.errors()[0]  # few, because lists are checked up to their first wrong item
    if error["type"] == "value_error":  # raised by a validator of ours
        return await handle_value_error(request, error["ctx"]["error"])
    if error["type"] == "json_invalid":
        return error_response(400, f"the body is not valid JSON: {error['ctx']['error']}")

    path = [str(part) for part in error["loc"] if part != "body"]
    if not path:
        return error_response(400, f"the body is {shorten(error['input'])}; send a JSON object")
    field = f"{path[0]} {shorten(error['input'])}"
    if error["type"] == "missing":
        field = ".".join(path)
    return error_response(400, f"{field}: {error['msg']}", path[0])


async def handle_value_error(_: Request, error: ValueError) -> JSONResponse:
    """A user error."""
    message = str(error)
    return error_response(400, message, find_field(message))


async def handle_http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = str(error.detail)
    if error.status_code == 404 and message == HTTPStatus.NOT_FOUND.phrase:  # there is no route
        message = (
            f"there is no {request.method} {shorten(request.url.path)} here; the API is under /v1, "
            "such as POST /v1/chat/completions"
        )
    # The headers of a 405 say which methods are allowed.
    return error_response(error.status_code, message, find_field(message), error.headers)


def find_field(message: str) -> str | None:
    """The field that is wrong. Our messages begin with it."""
    field = re.split(r"[ :\[]", message)[0]  # of tools[0].function.parameters it is tools
    return field if field in FIELDS else None


async def handle_failure(status: int, _: Request, error: Exception) -> JSONResponse:
    headers = {"Retry-After": "1"} if isinstance(error, UnavailableError) else None
    return error_response(status, str(error), headers=headers)


async def handle_defect(_: Request, __: Exception) -> JSONResponse:
    return error_response(500, "internal error; the server's log says more")
