"""`--speculative-config`, vLLM's flag for speculative decoding: a JSON object. Its keys set flags
of ours; what these mean is in `config.py`."""

import json
from collections.abc import Mapping
from typing import Any

from minidcp.config import EngineConfig, flag, require, shorten

EXAMPLE = '{"method": "ngram", "num_speculative_tokens": 4}'
# The methods, as vLLM spells them and as --speculative-method does.
METHODS = {"ngram": "ngram", "mtp": "mtp", "deepseek_mtp": "mtp"}
# The keys, and the options that they set.
OPTIONS = {
    "method": "speculative_method",
    "num_speculative_tokens": "num_speculative_tokens",
    "prompt_lookup_max": "prompt_lookup_max",
    "prompt_lookup_min": "prompt_lookup_min",
}
LEAST = {field.name: field.metadata["least"] for field, _ in EngineConfig.options()}


def read_speculative_config(text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the JSON object sets, by name.

    given: the options that have flags of their own on the command line. Raises ValueError if an
    option is given both ways, or if the object is wrong.
    """
    where = f"--speculative-config {shorten(text)}"
    keys = parse_object(text, where)
    options = {}
    for key, value in keys.items():
        check_value(key, value, where)
        option = OPTIONS[key]
        require(
            option not in given,
            f"{where}: {key!r} is given twice, also as {flag(option)} {given.get(option)}; "
            "leave one of them out",
        )
        options[option] = METHODS[value] if key == "method" else value

    has_method = "method" in keys or given.get("speculative_method") in METHODS
    require(has_method, f'{where}: \'method\' is missing; add "method": "ngram" or "mtp"')
    return options


def parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON ({error}); give {EXAMPLE}") from None
    require(isinstance(content, dict), f"{where}: must be a JSON object, such as {EXAMPLE}")
    return dict(content)


def check_value(key: str, value: Any, where: str) -> None:
    """Raise a ValueError unless the key is known and the value is one that it takes."""
    require(
        key in OPTIONS,
        f"{where}: unknown key {shorten(key)}; possible are {', '.join(OPTIONS)}. "
        "Guesses come from prompt lookup or the model's MTP layer, not from another model",
    )
    given = f"{where}: {key!r} is {shorten(value)}"
    if key == "method":
        is_possible = isinstance(value, str) and value in METHODS
        require(is_possible, f"{given}; must be one of {', '.join(METHODS)}")
    else:
        least = LEAST[OPTIONS[key]]
        is_possible = type(value) is int and value >= least
        require(is_possible, f"{given}; must be an integer, at least {least}")
