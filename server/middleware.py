"""What every request passes first: its id, the API key, the limit on its body, the access log. This
is plain ASGI: middleware that reads bodies in a task of its own would hide a client's leaving."""

import json
import logging
import secrets
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minidcp.config import ServeConfig

from .errors import error_response

access_log = logging.getLogger("minidcp.access")

# These need no key: probes and scrapers have none, the page at / asks its user for it, and the
# documentation is the same for everybody. An empty path is a proxy's prefix, and leads to the page.
OPEN_PATHS = ("", "/", "/health", "/metrics", "/docs", "/openapi.json")
# Polled every second or so by the page, probes and scrapers. If all is well, nobody looks for it in
# the log.
POLLED_PATHS = ("/health", "/load", "/metrics")


class Gate:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app = app
        self.config = config
        self.too_large = f"the body is larger than --max-body-bytes {config.max_body_bytes}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        scope["root_path"] = self.config.root_path
        start = time.monotonic()
        path = find_path(scope)
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id") or uuid.uuid4().hex
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            refusal = self.check_headers(path, headers)
            if refusal is not None:
                await refusal(scope, receive, send_with_id)
            elif path == "":
                # The page's addresses are relative to the slash.
                page = RedirectResponse(f"{scope['root_path']}/")
                await page(scope, receive, send_with_id)
            else:
                inner = {**scope, "path": scope.get("root_path", "") + path}
                await self.app(as_get(inner), self.limit_body(receive), send_with_id)
        finally:
            is_quiet = path in POLLED_PATHS and 200 <= status < 400
            if not is_quiet:
                log_access(scope, request_id, status, time.monotonic() - start)

    def check_headers(self, path: str, headers: Headers) -> Response | None:
        """The answer to a request that is refused for its headers alone, or None. The body is then
        not read, so the connection cannot be used for another request and is closed."""
        if path not in OPEN_PATHS and not self.has_key(headers):
            return error_response(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                headers={"connection": "close", "www-authenticate": "Bearer"},
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.config.max_body_bytes:
            return error_response(413, self.too_large, headers={"connection": "close"})
        return None

    def has_key(self, headers: Headers) -> bool:
        """Whether a request has the API key, or none is needed."""
        key = self.config.api_key
        if key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_right = secrets.compare_digest(given.strip().encode("latin-1"), key.encode())
        return is_right and scheme.lower() == "bearer"  # RFC 9110: in any case

    def limit_body(self, receive: Receive) -> Receive:
        """Wrap `receive` to raise a 413 when the body gets too large. Chunked bodies need this,
        because they have no Content-Length."""
        num_received = 0

        async def receive_limited() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self.config.max_body_bytes:
                raise HTTPException(413, self.too_large)
            return message

        return receive_limited


def find_path(scope: Scope) -> str:
    """The path as routes have it: without the proxy's prefix, which the proxy may have taken away
    already, and without a slash at the end. It is empty for the prefix alone."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    if path == prefix:
        return ""
    if path.startswith(f"{prefix}/"):
        path = path.removeprefix(prefix)
    return path.rstrip("/") or "/"


def as_get(scope: Scope) -> Scope:
    """A HEAD request as the GET that it asks about. uvicorn, which has the original scope, sends
    the answer's headers and leaves out its body."""
    if scope["method"] != "HEAD":
        return scope
    return {**scope, "method": "GET"}


def log_access(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    client = scope.get("client") or ["-"]
    entry = {
        "request_id": request_id,
        "client": client[0],
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(seconds, 4),
    }
    access_log.info(json.dumps(entry))
