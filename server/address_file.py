"""The file in which a health check finds the server. The image sets MINIDCP_ADDRESS_FILE to its
path; without that variable nothing is written. Next: `serve.py`."""

import os
import socket
from pathlib import Path

VARIABLE = "MINIDCP_ADDRESS_FILE"
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def write_address_file(listening: socket.socket) -> None:
    """Write the URL of the socket that listens, as this machine can use it. Raises ValueError if
    the file cannot be written."""
    path = os.environ.get(VARIABLE)
    if not path:
        return

    host, port = listening.getsockname()[:2]
    host = LOOPBACK.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    try:
        Path(path).write_text(url)
    except OSError as error:
        raise ValueError(
            f"{VARIABLE}={path}: the server's address cannot be written there ({error.strerror}); "
            "name a file in a folder that is writable, or mount one (docker run --tmpfs /tmp)"
        ) from None
