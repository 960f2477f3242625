"""The status page in headless Chromium. Most tests are against a scripted server: what it shows of
/load, and how a prompt streams in, stops and fails. The last ones are against the real server, with
an API key and behind a prefix.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys
from servers import Local, run_local

from minidcp.config import ServeConfig

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip(
        "no chromium and chromedriver on PATH: the status page is not tested in a browser "
        "(Debian: apt-get install chromium chromium-driver)",
        allow_module_level=True,
    )
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",
]
DONE = b"data: [DONE]\n\n"
EXAMPLE = "Question: 1 + 1?\nAnswer:"

pytest_plugins = ["servers"]


def token(text: str, finish_reason: str | None = None) -> bytes:
    """One event of a stream, with one token."""
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode()


def chat_token(text: str, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


def refuse(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status_code=status)


class Script:
    """A server that sends what a test puts into `pieces`, piece by piece. None ends the stream."""

    def __init__(self) -> None:
        self.load: dict[str, Any] = {
            "model": "demo",
            "version": "0.1.0",
            "uptime_seconds": 10.0,
            "running": 3,
            "waiting": 0,
            "prompt_tokens": 1234,
            "generated_tokens": 4567,
            "cached_tokens": 100,
            "drafts": None,
            "kv_blocks": {"total": 40, "live": 10, "cached": 6, "free": 24},
            "kv_tokens": {"capacity": [640] * 8, "used": [160, 160, 160, 159, 159, 159, 159, 159]},
            "latency": {
                "span_seconds": 10.0,
                "time_to_first_token": {"count": 0, "p50": None, "p99": None},
                "inter_token": {"count": 0, "p50": None, "p99": None},
            },
            "config": {
                "tp_size": 8,
                "dcp_size": 8,
                "block_size": 16,
                "exchange_policy": "by_batch",
                "device": "cuda",
                "comm": "nccl",
                "cuda_graph": True,
            },
            "asked": {"tp_size": 8, "exchange_policy": "auto", "num_blocks": None},
            "setup": {
                "attention": "fa3",
                "groups": "TorchGroup",
                "exchange": "a2a, narrow from 16 rows on",
                "graph_sizes": [1, 2, 4],
            },
            "sampling_defaults": {},
            "has_chat_template": True,
            "example_prompt": EXAMPLE,
        }
        self.load_error: tuple[int, str] | None = None
        self.error: tuple[int, str] | None = None
        self.key: str | None = None
        self.pieces: deque[bytes | None] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.num_polls = 0
        self.client_left = threading.Event()
        self.port = 0
        self.start()

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/")
        async def page() -> Response:
            return HTMLResponse(
                files("minidcp_server").joinpath("page.html").read_text(encoding="utf-8")
            )

        @app.get("/load")
        async def load(request: Request) -> Response:
            self.num_polls += 1
            if self.is_locked_for(request):
                return refuse(401, "wrong key")
            return refuse(*self.load_error) if self.load_error else JSONResponse(self.load)

        @app.post("/v1/completions")
        @app.post("/v1/chat/completions")
        async def complete(request: Request) -> Response:
            self.paths.append(request.url.path)
            if self.is_locked_for(request):
                return refuse(401, "the API key is missing or wrong")
            self.bodies.append(await request.json())
            if self.error:
                return refuse(*self.error)
            return StreamingResponse(self.stream(), media_type="text/event-stream")

        return app

    def is_locked_for(self, request: Request) -> bool:
        return self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}"

    async def stream(self) -> AsyncIterator[bytes]:
        try:
            while True:
                while not self.pieces:
                    await asyncio.sleep(0.005)
                piece = self.pieces.popleft()
                if piece is None:
                    return
                yield piece
        except asyncio.CancelledError:
            self.client_left.set()
            raise

    def start(self) -> None:
        listening = socket.create_server(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        settings = uvicorn.Config(self.app(), log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [listening]}, daemon=True
        )
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


class Page:
    """What a person sees and does on the page."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url
        driver.get(url)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def text(self, element: str) -> str:
        """The visible text of an element, which is empty if it is hidden."""
        return self.driver.find_element("id", element).text

    def click(self, element: str) -> None:
        self.driver.find_element("id", element).click()

    def fill(self, element: str, text: str) -> None:
        field = self.driver.find_element("id", element)
        field.clear()
        field.send_keys(text)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 5) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                f"not after {seconds} s: {what}. The page:\n{self.body()}"
            )
            time.sleep(0.02)

    def body(self) -> str:
        return self.driver.find_element("tag name", "body").text

    def poll(self) -> None:
        """Ask for /load now, instead of within a second."""
        self.run("wake()")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile: Path = tmp_path_factory.mktemp("chromium")
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    # With a path it does not download a driver.
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.pieces.append(None)
    if script.thread.is_alive():
        script.stop()


@pytest.fixture
def page_url(script: Script) -> str:
    return f"http://127.0.0.1:{script.port}/"


@pytest.fixture
def page(driver: webdriver.Chrome, page_url: str) -> Page:
    page = Page(driver, page_url)
    page.wait(lambda: page.text("model") not in ("", "…"), "the first answer is shown")
    return page


BARS = """return [...document.querySelectorAll(".rank .bar")].map(bar =>
    bar.firstChild.getBoundingClientRect().width / bar.getBoundingClientRect().width)"""
GROUPS = """return [...document.querySelectorAll(".group")].map(group =>
    group.innerText.match(/rank \\d+/g))"""


@pytest.mark.parametrize(("tp", "dcp", "groups"), [(8, 8, 1), (6, 2, 3), (4, 1, 1), (1, 1, 1)])
def test_each_rank_has_a_bar_as_full_as_its_shard(
    page: Page, script: Script, tp: int, dcp: int, groups: int
) -> None:
    used = [100 + 7 * rank for rank in range(tp)]
    script.load["kv_tokens"] = {"capacity": [640] * tp, "used": used}
    script.load["config"] |= {"tp_size": tp, "dcp_size": dcp}
    page.poll()
    page.wait(lambda: len(page.run(BARS)) == tp, f"{tp} bars")
    assert page.run(BARS) == pytest.approx([u / 640 for u in used], abs=0.005)
    names = [f"rank {rank}" for rank in range(tp)]
    size = tp // groups
    assert page.run(GROUPS) == [names[i : i + size] for i in range(0, tp, size)]
    assert f"{used[-1]} / 640" in page.text("groups")
    assert (f"rank p mod {dcp}" in page.text("story")) == (dcp > 1)


def test_numbers_are_those_of_the_server(page: Page, script: Script) -> None:
    script.load |= {"running": 1200, "waiting": 7, "model": "a/<i>b</i>", "uptime_seconds": 7384.0}
    script.load["generated_tokens"] += 737400
    page.poll()
    page.wait(lambda: page.text("running") == "1,200", "running requests")
    assert page.text("waiting") == "7"
    assert page.text("model") == "a/<i>b</i>"
    assert page.text("state") == "up for 2 h 3 min"
    assert page.text("speed") == "100"  # 737,400 tokens in 7,374 seconds
    assert page.run("return speeds.length") == 120  # one for each second of the last two minutes
    assert [page.text(kind) for kind in ("live", "cached", "free", "total")] == [
        "10",
        "6",
        "24",
        "40",
    ]
    assert "128 consecutive tokens" in page.text("block-story")
    assert "exchange policy\nby_batch\nasked: auto" in page.text("config")
    assert "num blocks\n40\nasked: default" in page.text("config")
    assert "tp size\n8\nexchange policy" in page.text("config")
    assert "1,234 prompt tokens, 100 of them" in page.text("totals")
    assert "guessed" not in page.text("totals")


def test_drafts_are_shown_with_the_share_that_was_accepted(page: Page, script: Script) -> None:
    script.load["drafts"] = {"proposed": 4800, "accepted": 3120}
    script.load["config"]["num_speculative_tokens"] = 3
    script.load["setup"]["graph_sizes"] = [1, 2, 4, 8]
    page.poll()
    page.wait(
        lambda: "4,800 tokens were guessed, 3,120 of them rightly (65 %)." in page.text("totals"),
        "the drafts",
    )
    assert "CUDA graphs\n4, for up to 8 tokens" in page.text("setup")


def test_what_runs(page: Page, script: Script) -> None:
    lines = page.text("setup").splitlines()
    assert dict(zip(lines[::2], lines[1::2], strict=True)) == {
        "Attention": "fa3",
        "Groups": "TorchGroup (nccl), tp 8, dcp 8: 1 copy of the cache",
        "Exchange": "a2a, narrow from 16 rows on",
        "CUDA graphs": "3, for up to 4 requests",
        "Sampling defaults": "none: temperature 1, all tokens",
    }
    script.load["sampling_defaults"] = {"temperature": 0.3, "top_p": 0.95}
    script.load["setup"] = script.load["setup"] | {"graph_sizes": []}
    page.poll()
    page.wait(lambda: "temperature 0.3, top_p 0.95" in page.text("setup"), "the defaults")
    assert "CUDA graphs\nnone: not captured" in page.text("setup")


def test_percentiles(page: Page, script: Script) -> None:
    assert page.text("time_to_first_token-p50") == "–"
    assert page.text("span") == "In the server, over the last 10 s: no tokens."
    script.load["latency"] = {
        "span_seconds": 287.4,
        "time_to_first_token": {"count": 1200, "p50": 0.04321, "p99": 12.3456},
        "inter_token": {"count": 65000, "p50": 0.0004321, "p99": 0.4321},
    }
    page.poll()
    page.wait(lambda: page.text("time_to_first_token-p50") == "43 ms", "the first percentile")
    assert page.text("time_to_first_token-p99") == "12.3 s"
    assert page.text("inter_token-p50") == "0.43 ms"
    assert page.text("inter_token-p99") == "432 ms"
    assert "over the last 4 min: 1,200 first tokens and 65,000 later ones" in page.text("span")


def test_a_hidden_page_does_not_poll(page: Page, script: Script) -> None:
    hide = "Object.defineProperty(document, 'hidden', { value: %s, configurable: true });"
    changed = "document.dispatchEvent(new Event('visibilitychange'))"
    page.run(hide % "true" + changed)
    time.sleep(0.2)  # a poll that had begun
    num_polls = script.num_polls
    time.sleep(1.5)
    assert script.num_polls == num_polls
    page.run(hide % "false" + changed)
    page.wait(lambda: script.num_polls > num_polls, "that it asks again")


def test_first_prompt_and_temperature_are_the_servers(page: Page, script: Script) -> None:
    def read(element: str) -> str:
        return page.run(f"return document.getElementById('{element}').value")

    assert read("prompt") == EXAMPLE
    assert read("temperature") == "0"
    script.load |= {"example_prompt": "<b>Hello", "sampling_defaults": {"temperature": 0.6}}
    page.poll()
    page.wait(lambda: read("prompt") == "<b>Hello", "the new prompt")
    page.fill("prompt", "Mine")
    script.load["example_prompt"] = "Hello again"
    page.poll()
    page.wait(lambda: script.load["example_prompt"] in page.run("return shown.prompt"), "a poll")
    assert read("prompt") == "Mine"  # what somebody has typed stays
    page.fill("temperature", "")
    page.click("send")
    page.wait(lambda: script.bodies, "the request")
    assert script.bodies == [{"prompt": "Mine", "stream": True, "max_tokens": 64}]


def test_chat_switch(page: Page, script: Script) -> None:
    page.fill("prompt", "Hello")
    page.driver.find_element("id", "chat").send_keys(Keys.SPACE)
    page.click("send")
    page.wait(lambda: script.bodies, "the request")
    messages = [{"role": "user", "content": "Hello"}]
    body = {"messages": messages, "stream": True, "max_tokens": 64, "temperature": 0}
    assert script.bodies == [body]
    script.pieces.extend([chat_token(" <i>Hi"), chat_token(" there", "stop"), DONE, None])
    page.wait(lambda: "ended by stop" in page.text("timing"), "the end")
    assert page.text("output") == "Hello\n\n <i>Hi there"
    assert page.text("timing").startswith("2 tokens in ")
    page.driver.find_element("id", "chat").send_keys(Keys.SPACE)
    page.click("send")
    script.pieces.extend([token(" one", "stop"), DONE, None])
    page.wait(lambda: page.text("output") == "Hello one", "a completion after a chat")
    assert script.paths == ["/v1/chat/completions", "/v1/completions"]


def test_copying(page: Page, script: Script) -> None:
    for element in ("base", "snippet"):
        page.driver.find_element("css selector", f"[data-copies={element}]").click()
        copied = page.text(element)
        page.wait(lambda: "Copied" in page.body(), "that it is copied")
        page.fill("prompt", "")
        page.driver.find_element("id", "prompt").send_keys(Keys.CONTROL, "v")
        prompt = page.run("return document.getElementById('prompt').value")
        assert prompt == copied
        page.wait(lambda: "Copied" not in page.body(), "that the button is as before")


def test_no_chat_without_a_template(page: Page, script: Script) -> None:
    script.load |= {"has_chat_template": False, "example_prompt": "Once"}
    page.poll()
    page.wait(lambda: "has no template" in page.text("chat-label"), "the reason")
    assert not page.driver.find_element("id", "chat").is_enabled()


def test_speed_follows_by_itself_and_survives_a_restart(page: Page, script: Script) -> None:
    script.load |= {"uptime_seconds": 12.0, "generated_tokens": 4577}
    page.wait(
        lambda: page.text("speed") == "5.0", "ten tokens in two seconds, without being told to ask"
    )
    assert page.run("return document.getElementById('line').getAttribute('d')").count("L") == 1
    script.load |= {"uptime_seconds": 0.5, "generated_tokens": 0}
    page.poll()
    page.wait(lambda: page.text("speed") == "–", "no speed from counters that began anew")


def test_prompt_streams_in_piece_by_piece(page: Page, script: Script) -> None:
    page.fill("prompt", "Ein <b>Anfang</b>")
    page.fill("max-tokens", "4")
    page.fill("temperature", "0.25")
    page.driver.find_element("id", "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: script.bodies, "the request")
    assert script.bodies == [
        {"prompt": "Ein <b>Anfang</b>", "stream": True, "max_tokens": 4, "temperature": 0.25}
    ]
    script.pieces.append(token(" one"))
    page.wait(lambda: page.text("output") == "Ein <b>Anfang</b> one", "the first token")
    assert page.text("stop") == "Stop"
    second = token(" zwölf").replace(b"\n\n", b"\r\n\r\n")
    cut = second.index("ö".encode()) + 1  # in the middle of the character
    script.pieces.append(b": a comment\n\n" + second[:cut])
    time.sleep(0.2)  # so that the halves arrive separately
    script.pieces.append(second[cut:])
    page.wait(lambda: page.text("output").endswith("one zwölf"), "the second token")
    script.pieces.extend([token("") + token("\n<i>"), token("", "length"), DONE, None])
    page.wait(lambda: "ended by its length" in page.text("timing"), "the end")
    assert page.text("output") == "Ein <b>Anfang</b> one zwölf\n<i>"
    assert page.text("timing").startswith("5 tokens in ")
    assert page.text("stop") == page.text("problem") == ""


def test_stop_aborts_the_request(page: Page, script: Script) -> None:
    page.click("send")
    script.pieces.append(token(" one"))
    page.wait(lambda: page.text("output").endswith(" one"), "the first token")
    page.click("stop")
    assert script.client_left.wait(5)
    page.wait(lambda: page.text("timing").endswith("stopped."), "that it has stopped")
    assert page.text("output").endswith(" one")
    assert page.text("stop") == page.text("problem") == ""
    page.click("send")
    script.pieces.extend([token(" two", "stop"), DONE, None])
    page.wait(lambda: page.text("output").endswith("Answer: two"), "a second prompt")


def test_errors_are_shown(page: Page, script: Script) -> None:
    script.error = 400, "This model's maximum context length is 1024 tokens."
    page.click("send")
    page.wait(
        lambda: page.text("problem") == "This model's maximum context length is 1024 tokens.",
        "the 400",
    )
    script.error = None
    page.click("send")
    script.pieces.extend(
        [token(" one"), b'data: {"error": {"message": "rank 3 ended"}}\n\n', DONE, None]
    )
    page.wait(lambda: page.text("problem") == "rank 3 ended", "the error in mid-stream")
    assert page.text("output").endswith(" one")
    script.pieces.clear()
    page.click("send")
    script.pieces.extend([token(" one"), None])
    page.wait(lambda: "broke off" in page.text("problem"), "a stream without an end")
    page.click("send")
    script.pieces.extend([token(" one", "stop"), DONE, None])
    page.wait(lambda: "ended by stop" in page.text("timing"), "a prompt after all that")
    assert page.text("problem") == ""


def test_key_is_asked_for_where_the_server_wants_one(page: Page, script: Script) -> None:
    assert page.text("unlock") == ""
    script.key = "secret"
    page.click("send")
    page.wait(lambda: "asks for an API key" in page.text("unlock"), "the field")
    assert "missing or wrong" in page.text("problem")
    page.poll()
    page.wait(lambda: page.text("state") == "locked", "/load is locked as well")
    page.fill("key", f"wrong{Keys.ENTER}")
    page.wait(lambda: "refused this API key" in page.text("unlock"), "that it is wrong")
    assert page.text("state") == "wrong key"
    page.fill("key", "secret")
    page.driver.find_element("css selector", "#unlock button").click()
    page.wait(lambda: page.text("state").startswith("up"), "/load with the key")
    page.click("send")
    script.pieces.extend([token(" one", "stop"), DONE, None])
    page.wait(lambda: page.text("output").endswith(" one"), "the answer to a prompt with the key")
    assert page.text("unlock") == ""
    page.driver.refresh()
    page.wait(lambda: page.text("state").startswith("up"), "the key, after a reload")
    page.click("forget")
    page.wait(lambda: page.text("unlock").startswith("This server asks"), "the field once more")
    page.driver.refresh()
    page.wait(lambda: page.text("state") == "locked", "that it is forgotten")
    assert page.run("return sessionStorage.length") == 0


def test_engine_gone_and_back(page: Page, script: Script) -> None:
    assert page.text("banner") == ""
    script.load_error = 503, "the engine has stopped: rank 3 ended"
    page.poll()
    page.wait(lambda: "the engine has stopped: rank 3 ended." in page.text("banner"), "the reason")
    assert page.text("state") == "not available"
    script.stop()
    page.wait(lambda: "the server does not answer" in page.text("banner"), "that nobody answers")
    page.click("send")
    page.wait(
        lambda: "connection to the server failed" in page.text("problem"), "an error for the prompt"
    )
    script.load_error = None
    script.start()
    page.wait(lambda: page.text("state").startswith("up"), "recovery without a reload")
    assert page.text("banner") == ""
    assert page.text("running") == "3"


def test_nothing_comes_from_outside_and_a_phone_scrolls_one_way(page: Page, script: Script) -> None:
    script.load |= {
        "model": "an-organisation/with-a-very-long-model-name-of-many-parts-v2.5-instruct"
    }
    script.load["kv_tokens"] = {"capacity": [1_204_224] * 8, "used": [1_104_224] * 8}
    page.poll()
    page.wait(lambda: "1,104,224" in page.text("groups"), "large numbers")
    size = dict(width=360, height=740, deviceScaleFactor=2, mobile=True)
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        widths = page.run("return [document.documentElement.scrollWidth, window.innerWidth]")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert widths == [360, 360]
    loaded = page.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert set(loaded) == {f"{page.url}load"}
    refused = [
        line
        for line in page.driver.get_log("browser")
        if "Content Security Policy" in line["message"]
    ]
    assert refused == []


PREFIX = "/llm"


@pytest.fixture(scope="module")
def real(demo: Path) -> Iterator[Local]:
    options = ServeConfig(root_path=PREFIX, api_key="secret")
    with run_local(demo, options) as local:
        yield local


def test_real_server_behind_a_prefix_with_a_key(driver: webdriver.Chrome, real: Local) -> None:
    page = Page(driver, f"{real.api.url}{PREFIX}")  # the prefix alone leads to the page
    page.wait(lambda: page.text("state") == "locked", "that a key is needed")
    page.fill("key", f"sécret ✗{Keys.ENTER}")
    page.wait(lambda: page.text("state") == "wrong key", "that it is wrong")
    page.fill("key", f"secret{Keys.ENTER}")
    page.wait(lambda: page.text("state").startswith("up"), "/load with the key")
    assert "Attention\nreference\nGroups\nnone: one rank\nExchange\nnone" in page.text("setup")
    assert "CUDA graphs\nnone on a CPU" in page.text("setup")

    page.fill("prompt", 'It\'s "Tom" & $HOME')
    page.fill("max-tokens", "5")
    for path in ("completions", "chat/completions"):
        page.click("send")
        page.wait(lambda: "tokens in" in page.text("timing"), "an answer", 30)
        page.wait(lambda: page.text("timing").endswith("."), "its end", 30)
        assert page.text("problem") == ""
        assert f"{PREFIX}/v1/{path}" in page.text("snippet")
        page.click("chat")
    page.poll()
    for name in ("time_to_first_token-p50", "inter_token-p99"):
        page.wait(lambda name=name: page.text(name).endswith("s"), "a percentile")

    assert page.text("base") == f"{real.api.url}{PREFIX}/v1"
    for name, words in (("docs", "<title>minidcp: the API"), ("metrics", "vllm:num_requests")):
        link = page.driver.find_element("id", name).get_attribute("href")
        assert link == f"{real.api.url}{PREFIX}/{name}"
        assert words in real.api.http.get(link).text


@pytest.mark.parametrize("is_chat", [False, True])
def test_snippets_run(driver: webdriver.Chrome, real: Local, is_chat: bool) -> None:
    page = Page(driver, f"{real.api.url}{PREFIX}/")
    page.wait(lambda: page.text("state") != "connecting", "the first answer")
    if page.text("state") == "locked":
        page.fill("key", f"secret{Keys.ENTER}")
    page.wait(lambda: page.text("state").startswith("up"), "/load with the key")
    page.fill("prompt", 'It\'s "Tom" & $HOME')
    page.fill("max-tokens", "5")
    if is_chat:
        page.click("chat")

    environment = os.environ | {"MINIDCP_API_KEY": "secret"}
    run = dict(env=environment, capture_output=True, check=True, timeout=60)
    curl = subprocess.run(["sh", "-c", page.text("snippet")], **run).stdout
    choice = json.loads(curl)["choices"][0]
    text = choice["message"]["content"] if is_chat else choice["text"]
    page.driver.find_element("css selector", "input[value=python]").click()
    output = subprocess.run([sys.executable, "-c", page.text("snippet")], **run).stdout
    assert output.decode() == f"{text}\n"
