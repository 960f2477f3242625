#!/usr/bin/env bash
# Every endpoint once, with curl:
#
#   examples/curl.sh [http://127.0.0.1:8000]
#
# MINIDCP_API_KEY is sent if it is set. Chat needs a model with a chat template.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}

call() { # call PATH [JSON]: GET, or POST if there is a body
    echo "--- ${2:+POST }$1" >&2
    curl --silent --show-error --no-buffer "$url$1" -H 'Content-Type: application/json' \
        -H "Authorization: Bearer ${MINIDCP_API_KEY:-none}" ${2:+--data "$2"}
    echo
}

call /health
call /version
call /v1/models
call /load

call /v1/completions '{"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}'
call /v1/completions '{"prompt": "Once upon a time", "max_tokens": 8, "stream": true, "seed": 1,
    "stream_options": {"include_usage": true}}'
call /v1/completions '{"prompt": ["One,", "Two,"], "max_tokens": 4, "n": 2, "logprobs": 1}'

call /v1/chat/completions '{"max_tokens": 32, "messages": [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is a KV cache?"}]}'

call /tokenize '{"prompt": "Once upon a time"}'
call /detokenize '{"tokens": [1, 2, 3]}'
call /metrics | grep -E '^(vllm|minidcp):' | grep -v _bucket
