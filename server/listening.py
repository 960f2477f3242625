"""Where the server listens: a port or a Unix socket. `serve.py` runs the application there."""

import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from minidcp.config import ServeConfig


@contextmanager
def open_listener(options: ServeConfig) -> Generator[socket.socket]:
    """The socket that the server listens on. Afterwards nothing is left of it."""
    if not options.uds:
        with listen(options.host, options.port) as listening:
            yield listening
        return
    with listen_on_unix_socket(options.uds) as listening:
        try:
            yield listening
        finally:
            Path(options.uds).unlink(missing_ok=True)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Port 0 lets the system choose."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family = addresses[0][0]
        is_ipv6 = family == socket.AF_INET6
        return socket.create_server((host, port), family=family, dualstack_ipv6=is_ipv6)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({error})") from None


def listen_on_unix_socket(path: str) -> socket.socket:
    """A Unix socket that listens. One that is left of a server that has ended is replaced."""
    listening = socket.socket(socket.AF_UNIX)
    try:
        if Path(path).is_socket() and not is_answered(path):
            Path(path).unlink()
        listening.bind(path)
        listening.listen()
    except OSError as error:
        listening.close()
        raise ValueError(f"--uds {path}: cannot listen there ({error})") from None
    return listening


def is_answered(path: str) -> bool:
    """Whether a process listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
    return True


def find_reachable_host(listening: socket.socket, host: str) -> str:
    """A host that clients on other machines can use. It is `host`, unless that means "every
    address": then it is the one that this machine sends from."""
    if listening.getsockname()[0] not in ("0.0.0.0", "::"):
        return host
    # To connect a UDP socket sends nothing. The addresses are those reserved for documentation.
    probes = [(socket.AF_INET, "192.0.2.1")]
    if listening.family == socket.AF_INET6:
        probes.append((socket.AF_INET6, "2001:db8::1"))
    for family, address in probes:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
    return "localhost"  # there is no network


def format_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
