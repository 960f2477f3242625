"""The sampling defaults in a checkpoint's generation_config.json, as vLLM and SGLang take them.
Its end-of-sequence tokens are read in `model_config.py`. Next: `request.py`."""

import logging
from pathlib import Path
from typing import Any

from minidcp.config import require
from minidcp.model_config import GENERATION_FILE, read_object
from minidcp.request import SamplingParams

logger = logging.getLogger("minidcp")

# What is taken from the file. max_new_tokens is not: it would cut answers without a word.
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

SamplingDefaults = dict[str, Any]  # fields of SamplingParams


def read_sampling_defaults(choice: str, model: Path) -> SamplingDefaults:
    """What requests get that do not say otherwise. `choice` is --generation-config.

    Raises ValueError if the file cannot be read or a value in it is out of range.
    """
    if choice in ("vllm", "none"):
        return {}
    file = model / GENERATION_FILE
    if choice == "auto":
        if not file.exists():
            return {}
    else:
        file = Path(choice).expanduser()
        if file.is_dir():
            file = file / GENERATION_FILE
        require(
            file.exists(),
            f"--generation-config {choice!r}: must be auto, vllm or none, or a directory with a "
            f"{GENERATION_FILE}",
        )

    given = read_object(file)
    defaults = {name: given[name] for name in NAMES if given.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ValueError(
            f"{file}: {error}; correct it, or start with --generation-config none"
        ) from None
    if defaults:
        listed = ", ".join(f"{name} {value}" for name, value in defaults.items())
        logger.info("sampling defaults: %s (%s)", listed, file)
    return defaults
