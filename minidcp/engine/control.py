"""How torchrun's processes find each other: rank 0, the driver, listens, and leaves its port and a
key in torchrun's store. Whoever reaches that store can read the key and send pickles, so the
network must be a closed one (`docs/operations.md`). Next: `engine.py`."""

import contextlib
import logging
import os
import queue
import socket
import struct
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import torch.distributed as dist

logger = logging.getLogger("minidcp")

CONTROL_KEY = "control"  # in the store

# torchrun starts all processes at the same time. Imports from a slow disk may delay some of them.
CONNECT_SECONDS = 300.0
# A rank waits for the driver, which may be downloading the model before it listens. If the driver
# ends, torchrun's store ends, and so does the wait.
DRIVER_TIMEOUT = timedelta(hours=2)
HANDSHAKE_SECONDS = 10  # how long a new connection may take to prove that it has the key
LOST_SECONDS = 60  # without a sign of life from the other machine; then the connection ends

Arrivals = queue.SimpleQueue[tuple[int, Connection]]


def open_store() -> dist.Store:
    """torchrun's store. The agent on the node of rank 0 hosts it."""
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"minidcp/{attempt}", dist.TCPStore(host, port, is_master=False))


def find_host() -> str:
    """Where the driver listens: on loopback, unless there are ranks on other nodes."""
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        return "127.0.0.1"
    return os.environ["MASTER_ADDR"]


def accept_ranks(
    store: dist.Store, host: str, size: int, seconds: float = CONNECT_SECONDS
) -> dict[int, Connection]:
    """Wait until ranks 1 to `size` - 1 have connected to this process.

    Raises TimeoutError, with the ranks that are missing, if that takes longer than so many seconds,
    and ValueError if this process cannot listen on `host`.
    """
    key = os.urandom(32)
    arrivals: Arrivals = queue.SimpleQueue()
    connections: dict[int, Connection] = {}
    deadline = time.monotonic() + seconds

    listener = listen(host, size)
    port = listener.getsockname()[1]
    accepting = threading.Thread(
        target=accept_all, args=(listener, key, arrivals), name="control", daemon=True
    )
    accepting.start()
    try:
        store.set(CONTROL_KEY, f"{port} {key.hex()}")
        while len(connections) < size - 1:
            rank, connection = arrivals.get(timeout=max(0.0, deadline - time.monotonic()))
            if 0 < rank < size and rank not in connections:
                connections[rank] = connection
            else:
                logger.warning("refused a control connection: it says it is rank %d", rank)
                connection.close()
        return connections
    except queue.Empty:
        for connection in connections.values():
            connection.close()
        missing = [str(rank) for rank in range(1, size) if rank not in connections]
        raise TimeoutError(
            f"rank {', '.join(missing)}: did not connect to {host}:{port} within {seconds:.0f} s. "
            "See what torchrun logged for its process. If it is on another node, that node must "
            "reach this address"
        ) from None
    finally:
        with contextlib.suppress(RuntimeError, OSError):
            store.delete_key(CONTROL_KEY)  # it is of no use any more, except to strangers
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        listener.close()


def listen(host: str, backlog: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=backlog)
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR {host!r}: rank 0 cannot listen there ({error}). "
            "It must be an address of the node of rank 0, see torchrun's --local-addr"
        ) from None


def accept_all(listener: socket.socket, key: bytes, arrivals: Arrivals) -> None:
    """Greet everyone who connects, each in a thread: a silent stranger holds up nobody."""
    while True:
        try:
            line, address = listener.accept()
        except OSError:  # the listener is closed
            return
        arguments = (line, str(address[0]), key, arrivals)
        threading.Thread(target=greet, args=arguments, name="greeting", daemon=True).start()


def greet(line: socket.socket, address: str, key: bytes, arrivals: Arrivals) -> None:
    """Queue a connection whose other end has proved that it has the key. Prove the same to it."""
    connection = open_connection(line)
    try:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        rank = int.from_bytes(connection.recv_bytes(4))
        set_timeout(line, 0)
    except Exception as error:  # whatever a stranger may send
        logger.warning("refused a control connection from %s: %r", address, error)
        connection.close()
    else:
        arrivals.put((rank, connection))
    finally:
        line.close()  # the connection has a duplicate


def connect_to_driver(store: dist.Store, host: str, rank: int) -> Connection:
    """Connect this process to the driver, as a rank.

    Raises ConnectionError if there is no driver, or none that has the key.
    """
    address = f"the driver's address, which is in torchrun's store at {os.environ['MASTER_ADDR']}"
    try:
        store.wait([CONTROL_KEY], DRIVER_TIMEOUT)
        port, key = store.get(CONTROL_KEY).decode().split()
        address = f"{host}:{port}"
        line = socket.create_connection((host, int(port)), HANDSHAKE_SECONDS)
        with line:
            connection = open_connection(line)
            answer_challenge(connection, bytes.fromhex(key))
            deliver_challenge(connection, bytes.fromhex(key))
            connection.send_bytes(rank.to_bytes(4))
            set_timeout(line, 0)
        return connection
    except Exception as error:  # torch's errors for stores are RuntimeErrors
        raise ConnectionError(f"rank {rank}: cannot connect to {address} ({error})") from None


def open_connection(line: socket.socket) -> Connection:
    """A connection over a duplicate of a TCP socket. What is read from it must come soon."""
    line.settimeout(None)
    set_timeout(line, HANDSHAKE_SECONDS)
    # A step's plan is small, and is not to wait until the one before it is acknowledged.
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A machine that loses its power does not close its connections.
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", LOST_SECONDS // 2),
        ("TCP_KEEPINTVL", LOST_SECONDS // 6),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", LOST_SECONDS * 1000),  # for data that is not acknowledged
    ):
        if hasattr(socket, name):  # Linux has them all
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(os.dup(line.fileno()))


def set_timeout(line: socket.socket, seconds: int) -> None:
    """Bound how long a read from the socket, or from a duplicate, may take; 0: no bound."""
    timeval = struct.pack("ll", seconds, 0)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
