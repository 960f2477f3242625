"""A server behind proxies and in front of browsers: a prefix, other origins, several names, another
chat template, a Unix socket."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from servers import PROMPT, Server, check_error, serve, wait_until

from minidcp.config import ServeConfig
from minidcp_server.chat_template import read_template_file
from minidcp_server.example_prompt import NEUTRAL_PROMPT, read_example_prompt
from minidcp_server.listening import is_answered, listen_on_unix_socket

pytest_plugins = ["servers"]
PREFIX = "/llm"
KEY = {"Authorization": "Bearer secret"}
ORIGIN = "https://chat.example.com"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
README = f"""---
license: mit
widget:
- messages: []
- text: "It's {PROMPT}\\n"
---
A model.
"""


@pytest.fixture(scope="module")
def server(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    logs = tmp_path_factory.mktemp("options")
    (logs / "template.jinja").write_text(TEMPLATE)
    (logs / "generation_config.json").write_text('{"temperature": 0.0, "eos_token_id": 7}')
    flags = ["--root-path", PREFIX, "--cors-allow-origins", f"http://localhost:3000, {ORIGIN}"]
    flags += ["--served-model-name", "demo", "other", "--api-key", "secret"]
    flags += ["--chat-template", f"{logs}/template.jinja", "--generation-config", str(logs)]
    with serve(demo, logs, *flags) as server:
        yield server


@pytest.fixture(scope="module", params=["", PREFIX], ids=["stripping", "not stripping"])
def proxied(server: Server, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """What reaches the server from a proxy that takes the prefix away, or does not."""
    with httpx.Client(base_url=server.url + request.param, headers=KEY, timeout=60) as client:
        yield client


def test_paths_behind_a_proxy(proxied: httpx.Client) -> None:
    for path in ("/health", "/v1/models", "/v1/models/", "/load", "/docs", "/docs/", "/"):
        assert proxied.get(path).status_code == 200, path
    assert proxied.get("/v1/models").json()["data"][1]["id"] == "other"
    schema = proxied.get("/openapi.json").json()
    assert schema["servers"] == [{"url": PREFIX}]
    assert "/v1/chat/completions" in schema["paths"]
    check_error(proxied.get("/v1/nothing"), 404, f"no GET '{PREFIX}/v1/nothing' here")


def test_the_prefix_alone_leads_to_the_page(server: Server) -> None:
    """Its addresses are relative, so there must be a slash at the end of its own."""
    moved = httpx.get(server.url + PREFIX, headers=KEY)
    assert (moved.status_code, moved.headers["location"]) == (307, f"{PREFIX}/")
    assert httpx.get(server.url + f"{PREFIX}x", headers=KEY).status_code == 404


def test_the_key_is_asked_for_behind_a_proxy_too(proxied: httpx.Client) -> None:
    del proxied.headers["Authorization"]
    try:
        for path in ("/health", "/health/", "/metrics", "/", "/docs", "/openapi.json"):
            assert proxied.get(path).status_code == 200, path
        for path in ("/v1/models", "/load", "/version", "/v1/nothing", f"{PREFIX}{PREFIX}/health"):
            assert proxied.get(path).status_code == 401, path
    finally:
        proxied.headers.update(KEY)


def test_documentation_needs_nothing_from_elsewhere(proxied: httpx.Client) -> None:
    page = proxied.get("/docs").text
    assert "connect-src 'self'" in page
    assert not re.findall(r"(?:src|href)=|https?://", page)


def test_preflights_need_no_key(server: Server) -> None:
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    url = f"{server.url}/v1/chat/completions"
    allowed = httpx.options(url, headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert allowed.headers["access-control-allow-headers"] == "authorization,content-type"
    assert httpx.options(url, headers=asked | {"Origin": "https://evil.example"}).status_code == 400


def test_answers_say_which_origin_may_read_them(server: Server) -> None:
    for headers in (KEY, {}):  # also that of a wrong key
        answer = httpx.get(f"{server.url}/v1/models", headers=headers | {"Origin": ORIGIN})
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        answer = httpx.get(f"{server.url}/v1/models", headers=headers | {"Origin": "https://x.y"})
        assert "access-control-allow-origin" not in answer.headers


def test_several_names(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}{PREFIX}/v1", api_key="secret") as client:
        assert [card.id for card in client.models.list()] == ["demo", "other"]
        assert client.models.retrieve("other").id == "other"
        for name in ("demo", "other"):
            answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=2)
            assert answer.model == "demo"
        with pytest.raises(openai.NotFoundError, match="this server has 'demo', 'other'") as error:
            client.completions.create(model="third", prompt=PROMPT)
    assert error.value.param == "model"


def test_the_template_of_the_flag(server: Server) -> None:
    with httpx.Client(base_url=server.url, headers=KEY) as client:
        messages = [{"role": "user", "content": PROMPT}]
        chat = client.post("/tokenize", json={"messages": messages}).json()
        text = client.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": False})
        assert chat["tokens"] == text.json()["tokens"]


def test_sampling_defaults_are_used_and_shown(server: Server) -> None:
    with httpx.Client(base_url=server.url, headers=KEY) as client:
        load = client.get("/load").json()
        assert load["sampling_defaults"] == {"temperature": 0}
        assert load["example_prompt"] == NEUTRAL_PROMPT
        body = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True}
        texts = [
            client.post("/v1/completions", json=body | more).json()["choices"][0]["text"]
            for more in ({}, {}, {"temperature": 0}, {"temperature": 100})
        ]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    assert "sampling defaults: temperature 0.0" in server.stderr.read_text()


def test_example_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_example_prompt(tmp_path) == NEUTRAL_PROMPT
    readme = tmp_path / "README.md"
    for content in ("", "no metadata", "---\nlicense: mit\n---\n", "---\nwidget: 5\n---\n"):
        readme.write_text(content)
        assert read_example_prompt(tmp_path) == NEUTRAL_PROMPT
    assert not caplog.records
    readme.write_text("---\nwidget: [}\n---\n")
    assert read_example_prompt(tmp_path) == NEUTRAL_PROMPT
    assert "its metadata cannot be read" in caplog.text
    readme.write_text(README)
    assert read_example_prompt(tmp_path) == f"It's {PROMPT}\n"
    demo = Path(__file__).parents[1] / "examples" / "demo-model"
    assert read_example_prompt(demo).endswith("\nAnswer:")


def test_a_unix_socket(demo: Path, tmp_path: Path) -> None:
    """The command that is printed works in a shell, and nothing is left of the socket."""
    (model := tmp_path / "model").mkdir()
    for file in demo.iterdir():
        (model / file.name).symlink_to(file)
    (model / "README.md").write_text(README)
    path = tmp_path / "it's here.sock"
    server = Server(model, tmp_path, "--uds", str(path))
    try:
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(base_url="http://localhost", transport=transport) as client:

            def is_healthy() -> bool:
                assert server.process.poll() is None, server.stderr.read_text()
                return path.exists() and client.get("/health").status_code == 200

            wait_until(is_healthy, 120, "the server is not healthy")
            assert client.get("/load").json()["example_prompt"] == f"It's {PROMPT}\n"
        stdout = server.stdout.read_text()
        assert f" on unix:{path} (" in stdout
        command = next(line for line in stdout.splitlines() if line.startswith("curl "))
        answer = subprocess.run(command, shell=True, capture_output=True, check=True).stdout
        assert json.loads(answer)["choices"][0]["text"]
        assert server.stop() == 0
        assert not path.exists()
    finally:
        server.kill()


def test_where_a_unix_socket_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listen_on_unix_socket(str(path)):
        assert is_answered(str(path))
        with pytest.raises(ValueError, match=r"^--uds .*: cannot listen there"):
            listen_on_unix_socket(str(path))
    assert path.is_socket()  # what a server leaves that was killed
    with listen_on_unix_socket(str(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    path.unlink()
    path.write_text("precious")
    for wrong in (path, tmp_path / "nowhere" / "socket", tmp_path / ("a" * 200)):
        with pytest.raises(ValueError, match=r"^--uds .*: cannot listen there"):
            listen_on_unix_socket(str(wrong))
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"root_path": "llm"}, "--root-path 'llm': must begin with a slash"),
        ({"root_path": "/llm/"}, "--root-path '/llm/': must begin with a slash and not end"),
        ({"cors_allow_origins": f"{ORIGIN}/"}, f"--cors-allow-origins '{ORIGIN}/': must be"),
        ({"cors_allow_origins": "*, localhost:3000"}, "--cors-allow-origins 'localhost:3000'"),
        ({"served_model_name": ("a", "")}, "a name is empty"),
        ({"served_model_name": "a"}, "--served-model-name 'a': must be a tuple"),
        ({"keep_alive_timeout": 0.0}, "--keep-alive-timeout 0.0: must be at least 1"),
    ],
)
def test_wrong_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ServeConfig(**options)


def test_wrong_templates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--chat-template .*nowhere': cannot be read"):
        read_template_file(str(tmp_path / "nowhere"))
    file = tmp_path / "template"
    file.write_text("a\n{% for %}")
    with pytest.raises(ValueError, match=r"--chat-template .*template': line 2: "):
        read_template_file(str(file))
    for template in (
        TEMPLATE,
        "{{ raise_exception('no') }}",
        "{% generation %}a{% endgeneration %}",
    ):
        file.write_text(template)
        assert read_template_file(str(file)) == template
