"""A hub of models for tests: a server of files that has one repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPOSITORY = "me/model"
COMMIT = "1" * 40


def make_handler(root: Path) -> type[BaseHTTPRequestHandler]:
    names = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())

    class Hub(BaseHTTPRequestHandler):
        """The part of a hub's API by which a repository's files are listed and downloaded."""

        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            info, resolve = f"/api/models/{REPOSITORY}", f"/{REPOSITORY}/resolve/"
            if path.startswith(f"{info}/tree/"):
                folder = path.removeprefix(f"{info}/tree/").partition("/")[2]
                self.answer_json([describe(name) for name in names if name.startswith(folder)])
            elif path.startswith(info):
                files = [{"rfilename": name} for name in names]
                self.answer_json({"id": REPOSITORY, "sha": COMMIT, "siblings": files})
            elif path.startswith(resolve):
                self.answer_file(path.removeprefix(resolve).partition("/")[2])
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def do_HEAD(self) -> None:
            self.do_GET()

        def answer_json(self, content: object) -> None:
            self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def answer_file(self, name: str) -> None:
            headers = {"X-Repo-Commit": COMMIT}
            if name not in names:
                self.answer(404, b"{}", headers | {"X-Error-Code": "EntryNotFound"})
                return
            data = (root / name).read_bytes()
            self.answer(200, data, headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for header, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    def describe(name: str) -> dict[str, object]:
        size = (root / name).stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": "1" * 40}

    return Hub


@contextmanager
def serve_hub(root: Path) -> Iterator[str]:
    """Serve a directory as the hub's only repository; yields the hub's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(root))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
