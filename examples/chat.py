"""A streaming chat in the terminal that needs only Python's standard library.

    python examples/chat.py [--url http://127.0.0.1:8000] [--system "Answer briefly."]

Ctrl+C stops an answer, an empty line starts a new chat, Ctrl+D quits. If MINIDCP_API_KEY is set, it
is sent as the key. The model must have a chat template.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

Message = dict[str, str]


def stream_answer(url: str, body: dict[str, Any]) -> Iterator[str]:
    """Yield the text of an answer piece by piece, as it arrives.

    Raises:
        RuntimeError: The server refused the request, failed, or cannot be reached. The message is
        the
            server's own where it sent one.
    """
    key = os.environ.get("MINIDCP_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        # Leaving this block early closes the connection, and the server aborts the request.
        with urlopen(request) as response:
            for line in response:
                data = line.decode().removeprefix("data:").strip()
                if not line.startswith(b"data:") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
    except HTTPError as error:
        text = error.read().decode(errors="replace")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["error"]["message"]
        raise RuntimeError(f"{error.code}: {text}") from None
    except (URLError, ConnectionError) as error:
        raise RuntimeError(f"{url} does not answer: {error}") from None


def print_answer(url: str, body: dict[str, Any]) -> str:
    """Print an answer as it arrives and return it.

    If the answer is stopped or fails, the text up to that point is returned.
    """
    text = ""
    try:
        for piece in stream_answer(url, body):
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except RuntimeError as error:
        print(f"[{error}]", end="", file=sys.stderr)
    print("\n")
    return text


def chat(url: str, system: list[Message], sampling: dict[str, Any]) -> None:
    """Read questions from the terminal and print answers until Ctrl+D.

    Every new chat starts with the messages in `system`.
    """
    messages = list(system)
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return

        if not question:
            messages = list(system)
            print("(a new chat)\n")
            continue

        messages.append({"role": "user", "content": question})
        text = print_answer(url, {"messages": messages, "stream": True, **sampling})
        if text:
            messages.append({"role": "assistant", "content": text})
        else:
            messages.pop()  # otherwise the next request would have two user messages in a row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--system", help="a system message at the start of each chat")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=0.7)
    args = parser.parse_args()

    system: list[Message] = []
    if args.system:
        system.append({"role": "system", "content": args.system})
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    chat(args.url.rstrip("/"), system, sampling)


if __name__ == "__main__":
    main()
