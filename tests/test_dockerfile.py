"""What can be checked without a container engine: the Dockerfile's commands fit the command line
and the package, the health check tells healthy servers from others, and the examples for monitoring
agree with the server. Compose and Kubernetes are in `test_manifests.py`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from minidcp.cli import build_parser
from minidcp_server.address_file import write_address_file
from minidcp_server.listening import listen

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
GAUGES = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} | {
    "minidcp:kv_tokens_capacity",
    "minidcp:kv_blocks_free",
}
COUNTERS = {
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "minidcp:exchange_bytes_total",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "minidcp:step_seconds",
}


def read_dockerfile() -> list[tuple[str, str]]:
    """Instructions and their arguments, with continued lines joined."""
    text = "\n".join(
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] != "#"
    )
    lines = [line for line in text.replace("\\\n", "").splitlines() if line.strip()]
    return [(name, rest) for name, rest in (line.split(maxsplit=1) for line in lines)]


DOCKERFILE = read_dockerfile()


def arguments(instruction: str) -> list[str]:
    """The arguments of every use of an instruction, in order."""
    return [rest for name, rest in DOCKERFILE if name == instruction]


def default_of(name: str) -> str:
    """The default of a build argument."""
    return next(rest.split("=")[1] for rest in arguments("ARG") if rest.startswith(f"{name}="))


def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return loaded


def entrypoint() -> list[str]:
    """The part of the entry point that is minidcp's own."""
    command: list[str] = json.loads(arguments("ENTRYPOINT")[-1])  # fails if it is not the exec form
    return command[command.index("minidcp") + 1 :]


def test_flags_follow_the_image_name() -> None:
    flags = ["deepseek-ai/DeepSeek-V2", "--tp-size", "8", "--dcp-size", "8"]
    args = build_parser().parse_args([*entrypoint(), *flags])
    assert (args.command, args.model, args.tp_size, args.dcp_size) == ("serve", flags[0], 8, 8)
    assert (args.host, args.port) == ("0.0.0.0", int(arguments("EXPOSE")[-1]))


def test_no_flags_print_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([*entrypoint(), *json.loads(arguments("CMD")[-1])])
    assert ended.value.code == 0
    assert "--dcp-size" in capsys.readouterr().out


def test_runs_as_a_user_without_rights_who_has_a_home() -> None:
    user = arguments("USER")[-1]
    # A number, because Kubernetes' runAsNonRoot knows no names.
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"useradd --uid {user.split(':')[0]}" in " ".join(arguments("RUN"))
    assert "HOME=/home/minidcp" in " ".join(arguments("ENV"))


@contextmanager
def answering(status: int) -> Iterator[int]:
    """Run a server that answers /health with this status. Yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (404, 1), (None, 1)])
def test_health_check(status: int | None, code: int, tmp_path: Path) -> None:
    """The command asks the server where it says that it listens, whatever proxies there are."""
    options, command = arguments("HEALTHCHECK")[-1].split("CMD", 1)
    assert "--start-period=60m" in options
    python, *rest = json.loads(command)
    assert python == "python"
    assert "MINIDCP_ADDRESS_FILE=/tmp/minidcp-address" in arguments("ENV")
    file = tmp_path / "address"
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:1")
    environment = os.environ | proxies | {"MINIDCP_ADDRESS_FILE": str(file)}

    def check() -> int:
        command = [sys.executable, *rest]
        return subprocess.run(command, capture_output=True, env=environment).returncode

    if status is None:
        assert check() == code  # no server has written its address
        file.write_text("http://127.0.0.1:1")
        assert check() == code  # no server listens there
    else:
        with answering(status) as port:
            file.write_text(f"http://127.0.0.1:{port}")
            assert check() == code


@pytest.mark.parametrize(
    ("host", "reachable"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]")],
)
def test_the_server_writes_where_it_listens(
    host: str, reachable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "address"
    monkeypatch.setenv("MINIDCP_ADDRESS_FILE", str(file))
    try:
        listening = listen(host, 0)
    except ValueError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with listening:
        write_address_file(listening)
        port = listening.getsockname()[1]
        assert file.read_text() == f"http://{reachable}:{port}"
        with socket.create_connection((reachable.strip("[]"), port)):
            pass
        monkeypatch.setenv("MINIDCP_ADDRESS_FILE", str(tmp_path / "not" / "there"))
        with pytest.raises(ValueError, match=r"MINIDCP_ADDRESS_FILE=.*/there: .* --tmpfs /tmp"):
            write_address_file(listening)
        monkeypatch.setenv("MINIDCP_ADDRESS_FILE", "")
        write_address_file(listening)


# What importing the official package does, and whether the image may be built then.
FA3_PACKAGES = {
    "both operators": (
        "import torch\n"
        "library = torch.library.Library('flash_attn_3', 'DEF')\n"
        "library.define('fwd(Tensor q) -> Tensor')\n"
        "library.define('get_scheduler_metadata(Tensor q) -> Tensor')\n",
        True,
    ),
    "none that torch knows": ("", False),
}


@pytest.mark.parametrize("case", FA3_PACKAGES)
def test_the_build_fails_without_fa3(case: str, tmp_path: Path) -> None:
    code, loads = FA3_PACKAGES[case]
    (tmp_path / "flash_attn_interface.py").write_text(code)
    (step,) = (rest for rest in arguments("RUN") if "load_operators" in rest)
    script = re.search(r'python -c "([^"]*)"', step)
    assert script is not None
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", script[1]]
    built = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (built.returncode == 0) == loads, built.stderr


def test_the_build_needs_no_front_end_from_the_net() -> None:
    assert "syntax=" not in (ROOT / "Dockerfile").read_text()


def test_any_user_id_may_write() -> None:
    """Group 0 has what a user without an entry in /etc/passwd writes to."""
    (step,) = (rest for rest in arguments("RUN") if "useradd" in rest)
    install = step[step.index("install ") :].split()
    assert install[install.index("-g") : install.index("2775") + 1] == ["-g", "0", "-m", "2775"]
    home = "/home/minidcp"
    hub = f"{home}/.cache/huggingface"
    assert {home, f"{home}/.cache", hub, f"{home}/.triton"} <= set(install)
    assert f"HOME={home}" in arguments("ENV")[-2] and "LOGNAME=" in arguments("ENV")[-2]


def test_documented_stops_wait_for_running_requests() -> None:
    """Docker kills after 10 s, which is less than the default of --shutdown-timeout."""
    default = build_parser().parse_args([*entrypoint(), "MODEL"]).shutdown_timeout
    for name in ("README.md", "Dockerfile", "examples/README.md", "docs/operations.md"):
        text = (ROOT / name).read_text().replace("\\\n", " ")
        commands = re.findall(r"docker run .*(?:MODEL|deepseek-ai).*", text)
        assert commands, name
        for command in commands:
            given = re.search(r"--shutdown-timeout (\d+)", command)
            drained = float(given[1]) if given else default
            stop = re.search(r"--stop-timeout (\d+)", command)
            assert stop is not None and float(stop[1]) > drained, command


def test_copies_what_is_there_and_not_ignored() -> None:
    patterns = [
        p for p in (ROOT / ".dockerignore").read_text().split("\n") if p and not p.startswith("#")
    ]
    sources = [s for rest in arguments("COPY") if "--from" not in rest for s in rest.split()[:-1]]
    assert {"pyproject.toml", "minidcp", "server"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        last = [p for p in patterns if fnmatch(source, p.removeprefix("!"))][-1]
        assert last == f"!{source}"


def test_requirements_are_the_projects(tmp_path: Path) -> None:
    line = next(rest for rest in arguments("RUN") if "requirements.txt" in rest).split("&&")[0]
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    command = line.replace("python", f"'{sys.executable}'", 1)
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    wanted = [*project()["dependencies"], *project()["optional-dependencies"]["server"]]
    assert (tmp_path / "requirements.txt").read_text().splitlines() == wanted


def test_versions_fit() -> None:
    requirements = {r.name: r for r in map(Requirement, project()["dependencies"])}
    assert default_of("TORCH_VERSION") in requirements["torch"].specifier
    python = Requirement(f"python{project()['requires-python']}")
    assert default_of("PYTHON_VERSION") in python.specifier
    assert f'image.version="{project()["version"]}"' in " ".join(arguments("LABEL"))


def load_yaml(name: str) -> list[Any]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def test_commands_in_the_examples_have_flags_that_exist() -> None:
    text = (EXAMPLES / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r" minidcp ((?:deepseek-ai/|/model )[^`\n]*)", text)
    assert len(commands) == 2
    for command in commands:
        assert build_parser().parse_args([*entrypoint(), *command.split()]).dcp_size == 8
    serve = build_parser().parse_args([*entrypoint(), "MODEL"])
    for name in re.findall(r"`--((?:max|request|sse|api|shutdown)[a-z-]*)", text):
        assert hasattr(serve, name.replace("-", "_")), name


def test_prometheus_example_scrapes_the_server() -> None:
    ((job,),) = (config["scrape_configs"] for config in load_yaml("prometheus.yml"))
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"][0]["targets"] == ["127.0.0.1:8000"]


def test_dashboard_draws_metrics_that_exist_side_by_side() -> None:
    dashboard = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    known = (
        GAUGES | COUNTERS | {f"{h}_{end}" for h in HISTOGRAMS for end in ("bucket", "sum", "count")}
    )
    drawn: set[str] = set()
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            metrics = set(re.findall(r"(?:vllm|minidcp):\w+", target["expr"]))
            assert metrics and metrics <= known, (panel["title"], metrics - known)
            drawn |= metrics
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    assert drawn >= GAUGES | COUNTERS
    assert {h for h in HISTOGRAMS if any(d.startswith(h) for d in drawn)} == HISTOGRAMS
