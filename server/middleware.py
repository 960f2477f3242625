"""What every request passes first: its id, the API key, the size of its body, the access log. Plain ASGI: anything
that wraps bodies in tasks would hide it when a client leaves."""

import json
import logging
import secrets
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minidcp.config import ServeConfig

from .protocol import error_response

access = logging.getLogger("minidcp.access")
OPEN = ("/", "/health", "/metrics")  # need no key: probes, scrapers, and the page, which asks for it


class Gate:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app, self.config = app, config
        self.too_large = 413, f"the body is larger than --max-body-bytes {config.max_body_bytes}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given, start, status = Headers(scope=scope), time.monotonic(), 0
        request_id = given.get("x-request-id") or uuid.uuid4().hex
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.config.max_body_bytes:
                raise HTTPException(*self.too_large)
            return message

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if (refusal := self.refuse(scope["path"], given)) is not None:
                # The body is not read: the connection cannot be used for another request.
                headers = {"connection": "close"} | ({"www-authenticate": "Bearer"} if refusal[0] == 401 else {})
                await error_response(*refusal, headers=headers)(scope, receive, noting_send)
            else:
                await self.app(scope, limited_receive, noting_send)
        finally:
            line = {"request_id": request_id, "client": (scope.get("client") or ["-"])[0], "method": scope["method"]}
            line |= {"path": scope["path"], "status": status, "seconds": round(time.monotonic() - start, 4)}
            access.info(json.dumps(line))

    def refuse(self, path: str, headers: Headers) -> tuple[int, str] | None:
        """Status and message for a request that needs no look at its body."""
        key = self.config.api_key
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if key and path not in OPEN and not secrets.compare_digest(given.encode("latin-1"), key.encode()):
            return 401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.config.max_body_bytes:
            return self.too_large
        return None
