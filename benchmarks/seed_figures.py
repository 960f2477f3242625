"""What SGLang's pull requests 14194 and 21637 report: DeepSeek-V2 on eight H100s.

Random prompts of about 4,000 tokens and answers of about 1,500. Other benchmarks show these figures
beside their own.
"""

from __future__ import annotations

SOURCE = "SGLang's pull requests 14194 and 21637, DeepSeek-V2 on 8 × H100"
LEVELS = (1, 8, 32, 64, 128, 256, 512)  # concurrent requests

# Output tokens/s by set-up and attention back-end, at each of LEVELS.
TOKENS_PER_S = {
    ("TP8", "flashinfer"): (103, 498, 1060, 1385, 1374, 1403, 1400),
    ("TP8", "fa3"): (103, 492, 1058, 1370, 1358, 1384, 1382),
    ("TP8 DCP8 ag_rs", "flashinfer"): (89, 425, 947, 1336, 1945, 2568, 3107),
    ("TP8 DCP8 ag_rs", "fa3"): (90, 425, 953, 1358, 1961, 2572, 2930),
    ("TP8 DCP8 a2a", "flashinfer"): (86, 413, 929, 1320, 1919, 2559, 3126),
    ("TP8 DCP8 a2a", "fa3"): (87, 413, 936, 1341, 1933, 2570, 2951),
}

# Mean time to first token in ms. They report it with FlashInfer only, from 32 requests on.
TTFT_MS = {
    ("TP8", "flashinfer"): (413, 5744, 39672, 106844, 239577),
    ("TP8 DCP8 ag_rs", "flashinfer"): (420, 655, 1095, 1970, 28734),
}
TTFT_LEVELS = LEVELS[2:]

# µs of a collective by bytes: NCCL eager, and symmetric memory in a CUDA graph.
COLLECTIVES_US = {
    2048: {
        "all_gather": (14.57, 2.68),
        "reduce_scatter": (16.06, 2.82),
        "all_to_all": (18.34, 5.45),
    },
    8192: {
        "all_gather": (14.42, 3.11),
        "reduce_scatter": (15.82, 3.00),
        "all_to_all": (17.84, 5.57),
    },
    32768: {
        "all_gather": (14.37, 5.07),
        "reduce_scatter": (18.74, 3.25),
        "all_to_all": (17.90, 6.25),
    },
    131072: {
        "all_gather": (18.14, 6.90),
        "reduce_scatter": (17.12, 4.24),
        "all_to_all": (21.18, 7.00),
    },
}


def find_tokens_per_s(setup: str, backend: str) -> dict[int, float]:
    """By concurrency; empty for a set-up that they do not have."""
    return dict(zip(LEVELS, TOKENS_PER_S.get((setup, backend), ()), strict=False))


def find_ttft_ms(setup: str, backend: str) -> dict[int, float]:
    """By concurrency; empty for a set-up that they do not have."""
    return dict(zip(TTFT_LEVELS, TTFT_MS.get((setup, backend), ()), strict=False))
