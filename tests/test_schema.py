"""schemathesis makes bodies from the OpenAPI schema: answers fit it, and never are a 500."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

from servers import Server

pytest_plugins = ["servers"]
CHECKS = (
    "not_a_server_error,status_code_conformance,"
    "content_type_conformance,response_schema_conformance"
)


def test_schema(demo: Path, tmp_path: Path) -> None:
    flags = ["--ranks", "threads", "--max-model-len", "64"]
    server = Server(demo, tmp_path, *flags, "--served-model-name", "demo")
    try:
        server.wait_until_healthy()
        command = [
            Path(sysconfig.get_path("scripts"), "st"),
            "run",
            f"{server.url}/openapi.json",
            "--checks",
            CHECKS,
        ]
        # A chat may fill the whole context, and how long that takes is not tested here.
        command += ["--max-examples", "10", "--generation-deterministic", "--request-timeout", "60"]
        run = subprocess.run(
            [*command, "--no-color"], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert run.returncode == 0, run.stdout
        found = re.search(r"(\d+) generated", run.stdout)
        assert found is not None and int(found[1]) >= 500, run.stdout
        assert "Traceback" not in server.stderr.read_text()
    finally:
        server.kill()
