"""A chat in the terminal, streamed, on Python's own library alone.

    python examples/chat.py [--url http://127.0.0.1:8000] [--system "Answer briefly."]

Ctrl+C stops an answer, an empty line begins a new chat, Ctrl+D leaves. MINIDCP_API_KEY is sent if it is
set. The model must have a chat template.
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
    """The pieces of text of an answer, as they come.

    Raises:
        RuntimeError: the server refused, failed, or cannot be reached; the message is the server's.
    """
    key = os.environ.get("MINIDCP_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urlopen(request) as response:  # leaving this block early closes the connection: an abort
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


def answer(url: str, body: dict[str, Any]) -> str:
    """Print an answer while it comes; what there is of it, if it is stopped or fails."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--system", help="what the model is told before the chat")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=0.7)
    args = parser.parse_args()
    beginning: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(beginning)
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if not said:
            messages = list(beginning)
            print("(a new chat)\n")
            continue
        messages.append({"role": "user", "content": said})
        sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature}
        text = answer(args.url.rstrip("/"), {"messages": messages, "stream": True, **sampling})
        if text:
            messages.append({"role": "assistant", "content": text})
        else:
            messages.pop()  # a question without an answer would stand before the next one


if __name__ == "__main__":
    main()
