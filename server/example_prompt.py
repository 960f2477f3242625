"""A first prompt for people who try the server. The checkpoint's README may have one that its model
can answer: the hub's model cards have such prompts as `widget` in their metadata."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

logger = logging.getLogger("minidcp")

NEUTRAL_PROMPT = "Once upon a time"
MAX_LENGTH = 2000  # characters


def read_example_prompt(model: Path) -> str:
    """The first text among the examples of the README, or a neutral prompt."""
    readme = model / "README.md"
    if not readme.exists():
        return NEUTRAL_PROMPT
    try:
        metadata: Any = metadata_load(readme)
    except Exception as error:  # YAML raises many kinds, and nothing else here needs the file
        logger.warning("%s: its metadata cannot be read (%s)", readme, error)
        return NEUTRAL_PROMPT

    examples = metadata.get("widget") if isinstance(metadata, dict) else None
    for example in examples if isinstance(examples, list) else []:
        text = example.get("text") if isinstance(example, dict) else None
        if isinstance(text, str) and 0 < len(text) <= MAX_LENGTH:
            return text
    return NEUTRAL_PROMPT
