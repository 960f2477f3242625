"""Rates of GPUs and of the links between them, in one place: for `plan.py`, for the choice between
two ways to use cached context in a prefill (`attention/context.py`), and for `benchmarks/`."""

# memory: bytes that CUDA reports. bandwidth: bytes/s of a copy within the GPU's memory.
# flops: bf16 FLOP/s of a large matrix product. link: bytes/s that one GPU receives from its peers.
# capability: CUDA's number of what the GPU can do. From 8.9 on that includes products of FP8.
# H100 and H200 are measured, except for the link. A100 and B200 are scaled down from their data
# sheets (2.0 TB/s, 312 TFLOP/s, 300 GB/s and 8.0 TB/s, 2,250 TFLOP/s, 900 GB/s).
GPUS: dict[str, dict[str, float]] = {
    "h100": {
        "memory": 79.1 * 2**30,
        "bandwidth": 3.0e12,
        "flops": 790e12,
        "link": 350e9,
        "capability": 9.0,
    },
    "h200": {
        "memory": 139.8 * 2**30,
        "bandwidth": 4.3e12,
        "flops": 790e12,
        "link": 350e9,
        "capability": 9.0,
    },
    "a100": {
        "memory": 79.1 * 2**30,
        "bandwidth": 1.7e12,
        "flops": 270e12,
        "link": 240e9,
        "capability": 8.0,
    },
    "b200": {
        "memory": 178.3 * 2**30,
        "bandwidth": 6.8e12,
        "flops": 1.7e15,
        "link": 700e9,
        "capability": 10.0,
    },
}
DEFAULT_CAPABILITY = 9.0  # of a GPU that is given in numbers

# How many products of FP8 values tensor cores do in the time of one of bf16 values.
FP8_SPEEDUP = 2

LINK_BYTES_PER_SECOND = GPUS["h100"]["link"]

# FLOP/s that a prompt's attention and projections reach on an H100: half of `flops`.
PREFILL_FLOPS = 400e12
