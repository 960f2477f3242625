"""Running the server, as operators and their tools see it: limits, metrics, probes, its end."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import LONG, PROMPT, Api, Server, check_error, measure_slowness, serve, wait_until
from test_faults import InFlight, children_of, is_alive, needs_proc

pytest_plugins = ["servers"]
KEY = "secret-ключ"
BODY_LIMIT = 2_000_000


@pytest.fixture(scope="module")
def server(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--ranks", "threads", "--tp-size", "4", "--dcp-size", "2", "--max-num-seqs", "2"]
    flags += [
        "--max-num-queued-requests",
        "3",
        "--max-body-bytes",
        str(BODY_LIMIT),
        "--served-model-name",
        "demo",
    ]
    with serve(
        demo, tmp_path_factory.mktemp("operations"), *flags, "--sse-keep-alive-interval", "0.02"
    ) as server:
        yield server


@pytest.fixture(scope="module")
def api(server: Server) -> Api:
    return Api(server.url, "demo")


def read_metrics(api: Api) -> dict[str, float]:
    """The metrics, by name and the labels that differ."""
    response = api.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = {
                k: v for k, v in sample.labels.items() if k not in ("engine", "model_name", "le")
            }
            values[" ".join([sample.name, *labels.values()])] = sample.value
    return values


def test_metrics_count_what_happened(api: Api) -> None:
    before = read_metrics(api)
    usage = api.complete([0, *range(5, 70)], max_tokens=7).usage
    again = api.complete(
        [0, *range(5, 70)], max_tokens=7, logit_bias={9: 100}, stop_token_ids=[9]
    ).usage
    after = read_metrics(api)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    cached = again.prompt_tokens_details.cached_tokens
    assert cached == 64 == grown("vllm:prefix_cache_hits_total")
    assert grown("vllm:prefix_cache_queries_total") == 2 * usage.prompt_tokens
    assert grown("vllm:prompt_tokens_total") == 2 * usage.prompt_tokens
    assert grown("vllm:generation_tokens_total") == 7 + 1
    assert (
        grown("vllm:request_success_total length") == grown("vllm:request_success_total stop") == 1
    )
    for histogram in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
    ):
        assert grown(f"vllm:{histogram}_count") == 2
        assert 0 <= grown(f"vllm:{histogram}_sum") < 10
    assert grown("vllm:inter_token_latency_seconds_count") == 6
    assert grown("vllm:request_generation_tokens_sum") == 8
    assert grown("vllm:request_prompt_tokens_sum") == 2 * usage.prompt_tokens
    assert grown("minidcp:step_seconds_count prefill") == 2
    assert grown("minidcp:step_seconds_count decode") >= 6
    assert grown("minidcp:exchange_bytes_total") > 0
    assert {after[f"minidcp:kv_tokens_capacity {rank}"] for rank in range(4)} == {2 * 8192 / 2}
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:num_preemptions_total"] == 0 == after["vllm:kv_cache_usage_perc"]


def test_drafts_are_not_mentioned_without_speculative_decoding(api: Api) -> None:
    """vLLM has these metrics only with it, too."""
    assert not [name for name in read_metrics(api) if "spec_decode" in name]
    assert api.http.get("/load").json()["drafts"] is None


def test_load_and_page(api: Api, server: Server) -> None:
    assert "KV cache by rank" in api.http.get("/").text
    assert len(set(api.http.get("/load").json()["kv_tokens"]["capacity"])) == 1
    requests = InFlight(server.url, max_tokens=200)
    load = api.http.get("/load").json()
    assert (load["running"], load["waiting"]) == (2, 0)
    used = load["kv_tokens"]["used"]
    # There are two DCP groups of two ranks.
    assert used[:2] == used[2:]
    assert used[0] - used[1] in (0, 1, 2)
    assert used[1] > 0
    blocks = load["kv_blocks"]
    assert blocks["live"] > 0
    assert blocks["live"] + blocks["cached"] + blocks["free"] == blocks["total"]
    assert requests.whole.result(60).status_code == 200
    wait_until(lambda: api.http.get("/load").json()["running"] == 0, 60, "they are still there")


def test_more_than_may_wait_get_503_with_retry_after(api: Api) -> None:
    with ThreadPoolExecutor(9) as threads:
        bodies = [api.body([5, n], max_tokens=40) for n in range(5, 14)]
        answers = list(
            threads.map(
                lambda body: httpx.post(f"{api.url}/v1/completions", json=body, timeout=60), bodies
            )
        )
    codes = sorted(answer.status_code for answer in answers)
    assert codes[:5] == [200] * 5 and set(codes[5:]) <= {200, 503} and 503 in codes
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.headers["retry-after"] == "1"
    assert "--max-num-queued-requests" in refused.json()["error"]["message"]
    # A request that could never wait, because there is not enough room for it.
    check_error(
        api.post(api.body([[5]] * 6)), 400, "n: 6 completions in one request; at most 5", "n"
    )
    check_error(api.post(api.body([[5]] * 4000, n=128)), 400, "n: 512000 completions", "n")
    with ThreadPoolExecutor(2) as threads:
        others = [
            threads.submit(api.complete, [[5, n], [6, n], [7, n]][: 3 - n], max_tokens=80)
            for n in (0, 1)
        ]
        wait_until(lambda: api.http.get("/load").json()["waiting"] == 3, 5, "they do not wait")
        streamed = api.post(api.body(stream=True))
        assert streamed.status_code == 503 and streamed.headers["retry-after"] == "1"
        assert all(other.result() for other in others)


def test_request_ids_are_echoed_and_logged(api: Api, server: Server) -> None:
    response = api.http.get("/version", headers={"x-request-id": "my-id-17"})
    assert response.headers["x-request-id"] == "my-id-17"
    assert re.fullmatch("[0-9a-f]{32}", api.http.get("/version").headers["x-request-id"])
    # The log is written by a thread of its own.
    wait_until(lambda: "my-id-17" in server.stderr.read_text(), 5, "there is no entry")
    lines = [line for line in server.stderr.read_text().splitlines() if "my-id-17" in line]
    entry = json.loads(lines[0][lines[0].index("{") :])
    assert (entry["method"], entry["path"], entry["status"]) == ("GET", "/version", 200)
    assert 0 <= entry["seconds"] < 5 and entry["client"] == "127.0.0.1"


def test_polls_are_not_logged_if_all_is_well(api: Api, server: Server) -> None:
    # Entries are written in order. When this one is there, so are those of earlier requests.
    api.http.get("/version", headers={"x-request-id": "before-polls"})
    wait_until(lambda: "before-polls" in server.stderr.read_text(), 5, "there is no entry")
    log = server.stderr.read_text()
    before = log.index("\n", log.index("before-polls"))
    for path in ("/health", "/load", "/metrics", "/health/"):
        assert api.http.get(path).status_code == 200
        assert api.http.head(path).status_code == 200
        assert api.http.post(path).status_code == 405
    assert api.http.get("/version").status_code == 200
    wait_until(lambda: '"/version"' in server.stderr.read_text()[before:], 5, "it is not logged")
    log = server.stderr.read_text()[before:]
    entries = [json.loads(line[line.index("{") :]) for line in log.splitlines() if "{" in line]
    assert [entry["status"] for entry in entries] == [405] * 4 + [200]


def test_silent_streams_get_comments_where_asked_for(api: Api) -> None:
    """With the flag, a waiting stream gets comments while two other requests run."""
    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(api.complete, [5, n], max_tokens=100) for n in (5, 6)]
        wait_until(
            lambda: read_metrics(api)["vllm:num_requests_running"] == 2, 5, "they do not run"
        )
        text = api.http.post("/v1/completions", json=api.body(stream=True)).text
        assert all(other.result() for other in others)
    assert text.count(": keep-alive\n\n") >= 1
    assert text.count("data: {") == 16


def test_health_generate_and_version(api: Api) -> None:
    before = read_metrics(api)["vllm:generation_tokens_total"]
    assert api.http.get("/health_generate").status_code == 200
    assert read_metrics(api)["vllm:generation_tokens_total"] == before + 1
    assert api.http.get("/version").json()["version"] == "0.1.0"


def test_a_second_ctrl_c_ends_at_once(demo: Path, tmp_path: Path) -> None:
    server = Server(demo, tmp_path, "--tp-size", "2")
    try:
        server.wait_until_healthy()
        ranks = children_of(server.process.pid)
        requests = InFlight(server.url)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: not server.accepts_connections(), 15, "it does not shut down")
        assert not requests.streamed.done()
        server.process.send_signal(signal.SIGINT)
        assert server.wait(15) in (130, -signal.SIGINT)
        assert not any(map(is_alive, ranks))
        assert requests.streamed.exception(5) is not None
    finally:
        server.kill()


def test_bodies_that_are_too_large(api: Api) -> None:
    check_error(api.post_bytes(b"[" * (BODY_LIMIT + 1)), 413, "--max-body-bytes")

    def chunks() -> Iterator[bytes]:  # without Content-Length, so the server must count
        for _ in range(30):
            yield b" " * (BODY_LIMIT // 10)

    with httpx.Client() as client:
        try:
            response = client.post(f"{api.url}/v1/completions", content=chunks())
            check_error(response, 413, "--max-body-bytes")
        except httpx.WriteError:
            pass  # the server answered and closed before everything was sent
    assert api.http.get("/health").status_code == 200


def test_a_prompt_of_megabytes_is_refused_without_tokenizing_it(api: Api) -> None:
    text = "word " * (BODY_LIMIT // 5 - 100)
    latencies: list[float] = []
    done = threading.Event()

    def probe() -> None:
        with httpx.Client(base_url=api.url) as client:
            while not done.is_set():
                start = time.monotonic()
                assert client.get("/health").status_code == 200
                latencies.append(time.monotonic() - start)

    with ThreadPoolExecutor(1) as threads:
        probing = threads.submit(probe)
        while not latencies:
            assert not probing.done(), probing.exception()
            time.sleep(0.01)
        for path, body in (
            ("/v1/completions", dict(prompt=text)),
            ("/v1/chat/completions", dict(messages=[dict(role="user", content=text)])),
            ("/tokenize", dict(prompt=text)),
        ):
            start = time.monotonic()
            check_error(
                api.post(body, path), 400, "This model's maximum context length is 8192 tokens"
            )
            seconds = time.monotonic() - start
            assert seconds < 2 or seconds < 2 * measure_slowness()
        done.set()
        probing.result()
    assert max(latencies) < 1 or max(latencies) < measure_slowness()


def test_slow_readers_hold_up_nobody(api: Api) -> None:
    body = json.dumps(api.body([5, 6], max_tokens=3000, stream=True, logprobs=20)).encode()
    with socket.create_connection((httpx.URL(api.url).host, httpx.URL(api.url).port)) as slow:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        slow.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert slow.recv(100).startswith(b"HTTP/1.1 200")  # it reads nothing after that
        for _ in range(3):
            assert api.complete(max_tokens=8).usage.completion_tokens == 8
    wait_until(
        lambda: read_metrics(api)["vllm:num_requests_running"] == 0,
        10,
        "the slow one is still there",
    )


def test_random_bodies_never_hurt(api: Api) -> None:
    """4,000 bodies: JSON with random fields and values, and random bytes."""
    rng = random.Random(5)
    names = [
        "prompt",
        "max_tokens",
        "temperature",
        "stop",
        "n",
        "logprobs",
        "echo",
        "stream",
        "model",
        "top_k",
    ]
    names += ["logit_bias", "seed", "messages", "tokens"]
    values = [
        None,
        True,
        -1,
        0,
        1,
        2.5,
        1e400,
        "x",
        "",
        [],
        [5],
        [[5]],
        {},
        {"5": 1},
        [None],
        "\ud800",
        10**30,
    ]
    paths = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
    codes = set()
    url = httpx.URL(api.url)
    connection = http.client.HTTPConnection(url.host, url.port)  # half of the time of httpx
    for i in range(4_000):
        body = {rng.choice(names): rng.choice(values) for _ in range(rng.randint(0, 5))}
        content = rng.randbytes(rng.randint(0, 40)) if i % 10 == 0 else json.dumps(body).encode()
        connection.request("POST", paths[i % 4], content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        codes.add(response.status)
        if response.status != 200:
            assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
    connection.close()
    assert codes <= {200, 400, 404} and {200, 400} <= codes


def test_api_key(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIDCP_API_KEY", KEY)
    server = Server(demo, tmp_path)
    try:
        server.wait_until_healthy()
        key = {"Authorization": b"Bearer " + KEY.encode()}
        for path in ("/health", "/metrics", "/"):
            assert httpx.get(server.url + path).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ""}):
            response = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["type"] == "authentication_error"
            assert (
                httpx.post(f"{server.url}/v1/completions", headers=headers, json={}).status_code
                == 401
            )
        assert httpx.get(f"{server.url}/v1/models", headers=key).status_code == 200
        assert KEY not in server.stdout.read_text() + server.stderr.read_text()
    finally:
        server.kill()


def test_503_until_the_model_is_there(demo: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(demo, tmp_path, "--port", str(port))
    codes: dict[str, set[int]] = {"/health": set(), "/v1/models": set(), "/version": set()}
    try:
        deadline = time.monotonic() + 60
        while 200 not in codes["/health"] and time.monotonic() < deadline:
            for path, seen in codes.items():
                try:
                    response = httpx.get(f"http://127.0.0.1:{port}{path}")
                except httpx.ConnectError:
                    continue
                seen.add(response.status_code)
                if response.status_code == 503:
                    assert "loading" in response.json()["error"]["message"]
                    assert response.headers["retry-after"]
        assert codes == {"/health": {503, 200}, "/v1/models": {503, 200}, "/version": {200}}
    finally:
        server.kill()


def test_request_timeout(demo: Path, tmp_path: Path) -> None:
    timeout = round(0.5 * measure_slowness(), 1)  # time for a few tokens
    server = Server(demo, tmp_path, "--request-timeout", str(timeout))
    try:
        server.wait_until_healthy()
        api = Api(server.url, str(demo))
        response = api.post(api.body(**LONG))
        assert (
            response.status_code == 504 and f"{timeout:g} s" in response.json()["error"]["message"]
        )
        lines = api.post(api.body(**LONG, stream=True)).text.split("\n\n")
        assert len(lines) > 5
        assert json.loads(lines[-3].removeprefix("data: "))["error"]["code"] == 504
        assert lines[-2] == "data: [DONE]"
        wait_until(
            lambda: read_metrics(api)["vllm:num_requests_running"] == 0, 3, "they are still there"
        )
        assert read_metrics(api)["vllm:request_success_total abort"] == 2
    finally:
        server.kill()


@pytest.mark.parametrize("patient", [True, False])
def test_sigterm_under_load(demo: Path, tmp_path: Path, patient: bool) -> None:
    """Running requests are finished. After --shutdown-timeout they get an error event."""
    timeout = 30 * measure_slowness() if patient else 0.5
    server = Server(demo, tmp_path, "--shutdown-timeout", str(timeout))
    try:
        server.wait_until_healthy()
        requests = InFlight(server.url, max_tokens=400 if patient else 8000)
        server.process.terminate()
        assert server.wait(30) in (0, -signal.SIGTERM)
        requests.streamed.result(5)
        answer = requests.whole.result(5)
        assert requests.lines[-1] == "data: [DONE]"
        last = json.loads(requests.lines[-2].removeprefix("data: "))
        if patient:
            assert answer.json()["usage"]["completion_tokens"] == 400 == len(requests.lines) - 1
            assert last["choices"][0]["finish_reason"] == "length"
        else:
            assert answer.status_code == 503 == last["error"]["code"]
            assert "shutting down" in last["error"]["message"]
    finally:
        server.kill()


@needs_proc
def test_health_notices_a_stuck_rank(demo: Path, tmp_path: Path) -> None:
    timeout = 2 * measure_slowness()  # no step that runs takes as long
    flags = ["--tp-size", "2", "--dcp-size", "2", "--engine-timeout", str(timeout)]
    server = Server(demo, tmp_path, *flags)
    try:
        server.wait_until_healthy()
        ranks = children_of(server.process.pid)
        requests = InFlight(server.url, max_tokens=300)
        os.kill(ranks[1], signal.SIGSTOP)
        start = time.monotonic()
        wait_until(
            lambda: httpx.get(f"{server.url}/health").status_code == 503,
            6 + timeout,
            "nobody notices",
        )
        assert time.monotonic() - start > 1
        assert "stuck" in httpx.get(f"{server.url}/health").json()["error"]["message"]
        os.kill(ranks[1], signal.SIGCONT)
        wait_until(
            lambda: httpx.get(f"{server.url}/health").status_code == 200, 10, "it does not recover"
        )
        assert requests.whole.result(60).json()["usage"]["completion_tokens"] == 300
    finally:
        server.kill()
        wait_until(lambda: not any(map(is_alive, ranks)), 10, "ranks are left")


def test_prompt_in_the_curl_that_is_printed(server: Server) -> None:
    line = next(line for line in server.stdout.read_text().splitlines() if line.startswith("curl"))
    body = json.loads(shlex.split(line)[-1])
    assert body["prompt"] == PROMPT
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
