"""HTTP/1.1 on one connection: uvicorn's protocol, with limits on all that surrounds a body. They
hold before anything looks at a key. `serve.py` uses it; `middleware.py` limits the body itself."""

import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .errors import ErrorResponse
from .middleware import access_log

# nginx and Apache have limits like these; docs/operations.md says so.
MAX_URL_BYTES = 8 << 10
MAX_HEAD_BYTES = 64 << 10  # request line and headers; also trailers, and what surrounds chunks
MAX_HEADERS = 100
MAX_PIPELINED = 32  # requests that wait on one connection for the answers to earlier ones

SLICE_BYTES = 16 << 10  # what is parsed between two checks
LINGER_SECONDS = 2.0  # for a refused client to finish sending and read the answer


class HttpProtocol(HttpToolsProtocol):
    """Refuses a URL that is too long with 414, and headers or trailers with 431."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_refused = False  # whether all that still comes is thrown away
        self.is_in_head = True
        # Bytes since the request or its body began, to within a slice.
        self.num_body_bytes = 0
        self.num_other_bytes = 0
        self.has_part_begun = False  # whether a request or a body began in this slice

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), SLICE_BYTES):
            if self.is_refused or self.transport.is_closing():
                return
            self.receive_slice(data[start : start + SLICE_BYTES])

    def receive_slice(self, data: bytes) -> None:
        self.has_part_begun = False
        num_body_bytes_before = self.num_body_bytes
        super().data_received(data)
        if self.is_refused:
            return
        if not self.has_part_begun:
            num_body_bytes = self.num_body_bytes - num_body_bytes_before
            self.num_other_bytes += len(data) - num_body_bytes
        if self.is_in_head:
            self.check_head()
        elif self.num_other_bytes > MAX_HEAD_BYTES + self.num_body_bytes:
            self.refuse(431, f"chunk headers and trailers are larger than {MAX_HEAD_BYTES} bytes")
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.close()  # an answer would have to wait for those to all of them

    def check_head(self) -> None:
        """Refuse a request whose URL or headers are too large, as far as they have come."""
        if len(getattr(self, "url", b"")) > MAX_URL_BYTES:
            self.refuse(414, f"the URL is longer than {MAX_URL_BYTES} bytes")
        elif self.headers is not None and len(self.headers) > MAX_HEADERS:
            self.refuse(431, f"the request has more than {MAX_HEADERS} headers")
        elif self.num_other_bytes > MAX_HEAD_BYTES:
            self.refuse(431, f"the request's headers are larger than {MAX_HEAD_BYTES} bytes")

    def refuse(self, status: int, message: str) -> None:
        """Answer with an error if it is this request's turn, and close the connection."""
        self.is_refused = True
        entry = {"client": (self.client or ["-"])[0], "status": status, "error": message}
        access_log.info(json.dumps(entry))

        cycle = self.cycle
        has_task = cycle is not None and not cycle.response_complete
        if has_task and self.is_in_head:
            cycle.keep_alive = False  # the answer to the request before this one is the last
            return
        if has_task and (cycle.response_started or self.pipeline):
            self.transport.close()
            return
        if has_task:
            cycle.disconnected = True
            cycle.message_event.set()

        body = ErrorResponse.make(status, message).model_dump_json().encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head % len(body) + body)
        # Closed at once, the connection would be reset, and the answer lost.
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """Called for what is not HTTP."""
        if not self.is_refused:
            self.refuse(400, msg)

    # What the parser calls.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.is_in_head = True
        self.begin_part()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.is_in_head:
            super().on_header(name, value)  # trailers are thrown away

    def on_headers_complete(self) -> None:
        self.check_head()
        if self.is_refused:
            return
        super().on_headers_complete()
        self.is_in_head = False
        self.begin_part()

    def on_body(self, body: bytes) -> None:
        self.num_body_bytes += len(body)
        if not self.is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.is_refused:
            super().on_message_complete()

    def begin_part(self) -> None:
        self.has_part_begun = True
        self.num_body_bytes = 0
        self.num_other_bytes = 0
