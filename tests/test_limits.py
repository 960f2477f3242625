"""What one client may send: headers, bodies, lists, choices. Beyond that it is refused at once, by
name, and nobody else notices. Raw sockets, because clients' libraries have limits of their own."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from servers import PROMPT, Api, Server, check_error, serve
from test_faults import needs_proc

from minidcp.cli import main
from minidcp.config import ServeConfig

pytest_plugins = ["servers"]
KEY = "secret"
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
BODY_LIMIT = 16 << 20
MAX_CHOICES = 6


@pytest.fixture(scope="module")
def server(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--served-model-name", "demo", "--api-key", KEY]
    flags += ["--max-choices-per-request", str(MAX_CHOICES)]
    with serve(demo, tmp_path_factory.mktemp("limits"), *flags) as server:
        yield server


@pytest.fixture(scope="module")
def api(server: Server) -> Api:
    api = Api(server.url, "demo")
    api.http.headers["Authorization"] = f"Bearer {KEY}"
    return api


def send(server: Server, *parts: bytes | str) -> bytes:
    """What the server answers to these bytes, until it closes the connection or has answered."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before the end
            for part in parts:
                connection.sendall(part if isinstance(part, bytes) else part.encode())
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # closed without an answer
            while chunk := connection.recv(1 << 16):
                answer += chunk
        return answer


def check_refused(answer: bytes, status: int, words: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer[:500]
    assert b"connection: close" in head
    error = json.loads(body)["error"]
    assert error["code"] == status
    assert words in error["message"]


MANY = 100 << 20  # bytes: enough to notice where they are kept
LARGE_HEADS = [
    (["GET /", b"a" * 9000, " HTTP/1.1\r\nHost: x\r\n\r\n"], 414, "URL is longer than 8192"),
    (["GET /", b"a" * MANY], 414, "URL is longer than 8192"),
    (["GET / HTTP/1.1\r\nX: ", b"a" * MANY], 431, "headers are larger than 65536"),
    (["GET / HTTP/1.1\r\n", b"X", b"a" * MANY], 431, "headers are larger than 65536"),
    (["GET / HTTP/1.1\r\n", b"A: b\r\n" * (MANY // 6)], 431, "more than 100 headers"),
    (["GET / HTTP/1.1\r\n", b"A: b\r\n" * 101, "\r\n"], 431, "more than 100 headers"),
    (
        [HEAD, "Transfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n" * (MANY // 6)],
        431,
        "trailers are larger than 65536",
    ),
    (
        [HEAD, "Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"a" * MANY],
        431,
        "trailers are larger than 65536",
    ),
    (
        [HEAD, "Transfer-Encoding: chunked\r\n\r\n1;", b"a" * MANY],
        431,
        "chunk headers",
    ),
    (
        [HEAD, "Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 100_000],
        431,
        "chunk headers",
    ),
    (["nonsense\r\n\r\n"], 400, "Invalid HTTP request"),
]


@needs_proc
@pytest.mark.parametrize(
    ("parts", "status", "words"),
    LARGE_HEADS,
    ids=lambda value: repr(value)[:70] if isinstance(value, list) else None,
)
def test_heads_and_trailers_that_are_too_large(
    server: Server, parts: list, status: int, words: str
) -> None:
    """They are refused before a key is looked at, and nothing of them is kept."""
    before = read_peak(server)
    check_refused(send(server, *parts), status, words)
    assert read_peak(server) - before < 20
    assert httpx.get(f"{server.url}/health").status_code == 200


def read_peak(server: Server) -> int:
    """The most memory that the process has had since the last call, in megabytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) // 1024


def test_what_clients_and_proxies_send_is_not_too_large(server: Server, api: Api) -> None:
    close = "Connection: close\r\n\r\n"
    padding = "a" * 8000
    for parts in (
        [f"GET /health?{padding} HTTP/1.1\r\nHost: x\r\n", close],
        [f"GET /health HTTP/1.1\r\nHost: x\r\nCookie: {padding * 7}\r\n", close],
        ["GET /health HTTP/1.1\r\n", "X: y\r\n" * 98, close],
        ["GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 20, "GET /health HTTP/1.1\r\n", close],
    ):
        assert b" 200 OK" in send(server, *parts)

    body = json.dumps(api.body(max_tokens=1)).encode()
    chunks = b"".join(b"%x;a=b\r\n%c\r\n" % (1, byte) for byte in body)
    trailers = b"0\r\nX-Checksum: 1\r\n\r\n"
    head = f"{HEAD}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    assert b" 200 OK" in send(server, head, close, chunks, trailers)


def test_a_refusal_does_not_break_into_another_answer(server: Server) -> None:
    answer = send(server, "GET /version HTTP/1.1\r\nHost: x\r\n\r\nGET /", "a" * 100_000)
    assert answer.startswith(b"HTTP/1.1 401 ")  # the first request came without a key
    assert answer.count(b"HTTP/1.1") == 1
    many = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 100_000
    assert send(server, many).count(b"HTTP/1.1 200") < 1000


def fill(item: bytes, size: int = BODY_LIMIT - 1000) -> bytes:
    return b",".join([item] * (size // (len(item) + 1)))


MEGABYTE = 1 << 20
COMPLETIONS, CHAT, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/detokenize"
LARGE_BODIES: list[tuple[str, bytes, str]] = [
    (COMPLETIONS, b'{"prompt":"a","stop":[%s]}' % fill(b"1", MEGABYTE), "stop: has 524288 items"),
    (COMPLETIONS, b'{"prompt":[%s]}' % fill(b"1.5", MEGABYTE), "prompt 1.5: "),
    (COMPLETIONS, b'{"prompt":["a",%s]}' % fill(b"1", MEGABYTE), "prompt: has 524289 items"),
    (COMPLETIONS, b'{"prompt":[%s]}' % fill(b"5", MEGABYTE), "maximum context length"),
    (CHAT, b'{"messages":[%s]}' % fill(b"1", MEGABYTE), "messages: has 524288 items"),
    (DETOKENIZE, b'{"tokens":[%s]}' % fill(b'"a"', MEGABYTE), "tokens 'a': "),
    (DETOKENIZE, b'{"tokens":[%s]}' % fill(b"5", MEGABYTE), "tokens: 524288 token ids are more"),
    (COMPLETIONS, b'{"prompt":"a","stop":[%s]}' % fill(b"1"), "at most 1000000"),
    (COMPLETIONS, b'{"prompt":[%s]}' % fill(b"[]"), "at most 100000"),
    (CHAT, b'{"messages":[%s]}' % fill(b"{}"), "at most 100000"),
    (CHAT, b'{"messages":[%s]}' % fill(b'{"role":"user","content":"a"}'), "at most 100000"),
    (COMPLETIONS, b'{"prompt":"a","x":{%s}}' % fill(b'"a":1'), "at most 100000"),
    (COMPLETIONS, b'{"prompt":"%s"}' % fill(b'\\"'), "maximum context length"),
    (COMPLETIONS, b'{"prompt":"a","model":"%s"}' % fill(b"a"), "does not exist"),
    (COMPLETIONS, b'{"prompt":"%s' % fill(b"a"), "not valid JSON"),
]


@needs_proc
@pytest.mark.parametrize(
    ("path", "body", "words"), LARGE_BODIES, ids=[f"{p} {b[:40]!r}" for p, b, _ in LARGE_BODIES]
)
def test_bodies_of_megabytes(server: Server, api: Api, path: str, body: bytes, words: str) -> None:
    before = read_peak(server)
    response = api.post_bytes(body, path)
    assert response.status_code in (400, 404), response.text[:500]
    assert words in response.json()["error"]["message"]
    assert len(response.content) < 2000
    assert read_peak(server) - before < 200


LONG_LISTS = [
    ("stop", ["a"] * 65, "stop: has 65 items; at most 64 may be"),
    ("stop", "a" * 1001, "at most 1000 characters"),
    ("stop_token_ids", [5] * 1025, "stop_token_ids: has 1025 items; at most 1024 may be"),
    (
        "logit_bias",
        dict.fromkeys(range(4097), 1),
        "logit_bias: has 4097 items; at most 4096 may be",
    ),
    ("prompt", ["a"] * 4097, "prompt: has 4097 items; at most 4096 may be"),
    ("messages", [{"role": "user"}] * 4097, "messages: has 4097 items; at most 4096 may be"),
]


@pytest.mark.parametrize(
    ("field", "value", "words"), LONG_LISTS, ids=lambda value: repr(value)[:30]
)
def test_lists_are_bounded(api: Api, field: str, value: object, words: str) -> None:
    path = CHAT if field == "messages" else COMPLETIONS
    check_error(api.post(api.body(**{field: value}), path), 400, words, field)


def test_lists_of_the_largest_size(api: Api) -> None:
    stops = [f"zz{i}" for i in range(63)] + ["z" * 1000]
    biases = dict.fromkeys(range(512), 0)
    fields = dict(stop=stops, stop_token_ids=[9] * 1024, logit_bias=biases, max_tokens=2)
    assert api.post(api.body(**fields)).status_code == 200
    assert api.post({"tokens": [5] * 8192}, DETOKENIZE).status_code == 200
    check_error(api.post({"tokens": [5] * 8193}, DETOKENIZE), 400, "8193 token ids", "tokens")


def test_choices_of_one_request_are_bounded(api: Api) -> None:
    words = f"in one request, prompts times n; at most {MAX_CHOICES} may be (--max-choices-per"
    check_error(api.post(api.body([[5]] * 7)), 400, f"n: 7 completions {words}", "n")
    check_error(api.post(api.body([[5]] * 2, n=4)), 400, f"n: 8 completions {words}", "n")
    check_error(api.post(api.body(n=7, stream=True)), 400, f"n: 7 completions {words}", "n")
    answer = api.post(api.body([[5]] * 2, n=3, max_tokens=1))
    assert len(answer.json()["choices"]) == 6


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        (f"BEARER   {KEY}", 200),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        (f"Bearer{KEY}", 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        ("", 401),
    ],
)
def test_the_scheme_of_the_key(server: Server, header: str, status: int) -> None:
    response = httpx.get(f"{server.url}/v1/models", headers={"Authorization": header})
    assert response.status_code == status


@pytest.mark.parametrize("key", ["", " ", f" {KEY}", f"{KEY}\n"])
def test_a_key_that_no_client_could_send(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """It is refused. It must not open the server, and is not printed."""
    with pytest.raises(ValueError, match=r"--api-key: (is empty|has white space)"):
        ServeConfig(api_key=key)
    assert main(["serve", str(demo), "--port", "0", "--api-key", key]) == 2
    monkeypatch.setenv("MINIDCP_API_KEY", key)
    assert main(["serve", str(demo), "--port", "0"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("minidcp: error: --api-key: ")
    assert second.startswith("minidcp: error: MINIDCP_API_KEY: ")
    assert KEY not in first + second


def test_head_is_answered_as_get_without_a_body(api: Api) -> None:
    paths = "/ /health /health_generate /v1/models /v1/models/demo /tokenizer_info /metrics /load"
    for path in [*paths.split(), "/docs", "/openapi.json", "/version", "/v1/nothing"]:
        get = api.http.get(path)
        head = api.http.head(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers.get("content-type") == get.headers.get("content-type")
    assert api.http.head(COMPLETIONS).status_code == 405


def test_models_with_a_slash_at_the_end(api: Api) -> None:
    response = api.http.get("/v1/models/")
    assert response.status_code == 200
    assert response.json()["data"][0]["id"] == "demo"


def read_events(api: Api, **fields: object) -> list[dict]:
    """The events as httpx splits them into lines, which it does at more than line feeds."""
    body = api.body(stream=True, **fields)
    with api.http.stream("POST", COMPLETIONS, json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_line_readers_get_whole_events(api: Api) -> None:
    text = "a\u2028b\u2029c\u0085d\u000be中"
    first = read_events(api, prompt=text, echo=True, max_tokens=1)[0]
    assert first["choices"][0]["text"].startswith(text)


def test_an_echo_of_no_tokens_scores_the_prompt(api: Api) -> None:
    fields = dict(echo=True, logprobs=2, n=2)
    prompts = [PROMPT, "a b c"]
    longer = api.post(api.body(prompts, max_tokens=1, **fields)).json()
    scored = api.post(api.body(prompts, max_tokens=0, **fields)).json()
    assert scored["usage"]["completion_tokens"] == 0
    assert scored["usage"]["prompt_tokens"] == longer["usage"]["prompt_tokens"]
    for choice, other in zip(scored["choices"], longer["choices"], strict=True):
        assert choice["finish_reason"] == "length"
        assert other["text"].startswith(choice["text"])
        for name in ("tokens", "text_offset"):
            assert choice["logprobs"][name] == other["logprobs"][name][:-1]
        expected = pytest.approx(other["logprobs"]["token_logprobs"][1:-1], abs=1e-3)
        assert choice["logprobs"]["token_logprobs"][1:] == expected

    (event,) = read_events(api, echo=True, logprobs=2, max_tokens=0)
    (choice,) = event["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert choice["logprobs"]["tokens"] == scored["choices"][0]["logprobs"]["tokens"]
    (event,) = read_events(api, echo=True, max_completion_tokens=0)
    assert event["choices"][0]["text"] == PROMPT
    check_error(api.post(api.body(max_tokens=0)), 400, "max_tokens 0", "max_tokens")


def test_an_answer_without_content(api: Api, build_chat: Callable[[object], dict]) -> None:
    empty, null = (
        api.post(build_chat(content), CHAT).json()["choices"][0]["message"]["content"]
        for content in ("", None)
    )
    assert empty == null


@pytest.fixture
def build_chat(api: Api) -> Callable[[object], dict]:
    def build(content: object) -> dict:
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": content},
            {"role": "user", "content": "b"},
        ]
        body = api.body(messages=messages)
        del body["prompt"]
        return body

    return build
