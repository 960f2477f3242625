"""minidcp through openai-python: a completion, a chat, and a streaming chat.

    pip install openai
    python examples/openai_client.py [--base-url http://127.0.0.1:8000/v1]

If MINIDCP_API_KEY is set, it is sent as the key. Chat needs a model with a chat template.
"""

from __future__ import annotations

import argparse
import os

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="the server's API")
    args = parser.parse_args()
    api_key = os.environ.get("MINIDCP_API_KEY", "none")
    client = OpenAI(base_url=args.base_url, api_key=api_key)
    model = client.models.list().data[0].id

    completion = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=32, temperature=0
    )
    print(f"completion: {completion.choices[0].text!r}")

    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "What does decode context parallelism share out?"}
    ]
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=64)
    print(f"chat: {chat.choices[0].message.content!r}")

    print("streaming: ", end="")
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 40},  # parameters that OpenAI's API does not have go here
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            print(f"\n{chunk.usage.completion_tokens} tokens")


if __name__ == "__main__":
    main()
