"""What config.json says about weights in FP8, checked. They are read in `models/checkpoint.py`."""

from typing import Any

from minidcp.config import require, shorten
from minidcp.rope_config import is_int

# What quantization_config may say: FP8 weights with a scale for each block of a matrix, as DeepSeek
# publishes them. Activations are quantised by their own largest values, whatever else is said.
FP8_OPTIONS: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("float", "ue8m0", None),
    "expert_dtype": ("fp8", None),
}
FP8_OTHER_KEYS = (
    "weight_block_size",
    # Which weights are quantised is seen from their dtype. Where products are in FP8, the other
    # matrices are quantised too, with a warning.
    "modules_to_not_convert",
    "modules_to_convert",
    "dequantize",
)


def read_fp8_block(hf: dict[str, Any], source: str) -> tuple[int, int] | None:
    """weight_block_size of a quantization_config. None if weights are not quantised.

    Raises ValueError for any other quantisation.
    """
    config = hf.get("quantization_config")
    if config is None:
        return None
    where = f"{source}: quantization_config"
    require(isinstance(config, dict), f"{where} is {shorten(config)}; expected an object")
    for name, supported in FP8_OPTIONS.items():
        listed = ", ".join(repr(v) for v in supported if v is not None)
        require(
            config.get(name) in supported,
            f"{where}: {name} {shorten(config.get(name))} is not supported; supported: {listed}",
        )
    for name, value in config.items():
        require(
            name in FP8_OPTIONS or name in FP8_OTHER_KEYS or value is None,
            f"{where} has {shorten(name)}, which is not supported; "
            f"supported: {', '.join((*FP8_OPTIONS, *FP8_OTHER_KEYS))}",
        )

    block = config.get("weight_block_size")
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    require(
        is_pair and all(is_int(size) and size > 0 for size in block),
        f"{where}: weight_block_size {shorten(block)} is not supported; supported: the rows and "
        "columns of a block, such as [128, 128]",
    )
    return (block[0], block[1])
