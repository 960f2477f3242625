"""How the model asks for its weights, by Hugging Face's names: a rank asks for its share of a
tensor. Checkpoints are in `checkpoint.py`. Next: that file, or `deepseek.py`."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minidcp.config import require
from minidcp.kernels.fp8 import BLOCK, E4M3, Fp8Tensor, Weight, find_block, quantize_weight

# What a part of a sharded dim is rounded up to. Rows of 16 bytes are what grouped_mm wants and what
# the tensor memory accelerator can copy; tensor cores take 32 FP8 values at a time.
ALIGN = 8
FP8_ALIGN = 32

# What is downloaded of a model on the hub: configurations, weights, and everything that
# transformers reads for a tokenizer, chat templates included. A README may have example prompts.
HUB_FILES = (
    "README.md",
    "*.json",
    "*.safetensors",
    "tokenizer*",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts along `dim`.

    The size of a part is rounded up to a multiple of `align`, and what is missing at the end is
    zeros. That changes nothing: zero rows of an up projection meet zero columns of the down
    projection.
    """

    dim: int = 0
    index: int = 0
    count: int = 1
    align: int = 1

    def part_size(self, length: int) -> int:
        """Rows of a part, zeros included, where the whole tensor has `length` rows."""
        return -(-length // (self.count * self.align)) * self.align

    def bounds(self, length: int) -> tuple[int, int]:
        """The rows [start, stop) of the whole tensor that are in this part."""
        size = self.part_size(length)
        start = min(self.index * size, length)
        return start, min(start + size, length)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a part of a tensor with shape `whole`."""
        return *whole[: self.dim], self.part_size(whole[self.dim]), *whole[self.dim + 1 :]

    def cut(self, whole: Any, shape: tuple[int, ...]) -> Tensor:
        """This part of a tensor with that shape, or of safetensors' slice of one, unpadded."""
        start, stop = self.bounds(shape[self.dim])
        index = (slice(None),) * self.dim + (slice(start, stop),)
        part: Tensor = whole[index]
        return part

    def pad(self, part: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Append the zeros that a part of a tensor with shape `shape` ends with."""
        missing = self.part_size(shape[self.dim]) - part.shape[self.dim]
        if missing == 0:
            return part
        # F.pad takes pairs (before, after) from the last dim on.
        dims_behind = len(shape) - self.dim - 1
        return F.pad(part, [0, 0] * dims_behind + [0, missing])


WHOLE = Shard()


class WeightSource(Protocol):
    """Where weights come from.

    Attributes:
        fp8: whether matrices are read in FP8, where the model asks for it.
    """

    fp8: bool

    def read(
        self, name: str, shape: tuple[int, ...], shard: Shard, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A rank's part of a tensor whose whole has this shape."""

    def read_matrix(self, name: str, shape: tuple[int, ...], shard: Shard) -> Weight:
        """The same in FP8, if the source is."""


@dataclass(frozen=True)
class Weights:
    """A source as one module sees it: names are relative to `prefix`."""

    source: WeightSource
    prefix: str = ""

    @property
    def align(self) -> int:
        """What the parts of a sharded dim are rounded up to."""
        return FP8_ALIGN if self.source.fp8 else ALIGN

    def scope(self, name: str) -> "Weights":
        return Weights(self.source, f"{self.prefix}{name}.")

    def read(
        self, name: str, *shape: int, shard: Shard = WHOLE, dtype: torch.dtype | None = None
    ) -> Tensor:
        """This rank's part of a tensor, in the model's dtype unless another is given.

        `shape` is that of the whole tensor.
        """
        return self.source.read(self.prefix + name, shape, shard, dtype)

    def read_matrix(self, name: str, *shape: int, shard: Shard = WHOLE) -> Weight:
        """This rank's part of a matrix that may be in FP8."""
        return self.source.read_matrix(self.prefix + name, shape, shard)


class RecordingSource:
    """Hands out tensors without storage, and records what was asked for."""

    def __init__(self, fp8: bool = False) -> None:
        self.fp8 = fp8
        self.shapes: dict[str, tuple[int, ...]] = {}  # of whole tensors

    def read(
        self, name: str, shape: tuple[int, ...], shard: Shard, dtype: torch.dtype | None = None
    ) -> Tensor:
        part = torch.empty(shard.shape(shape), device="meta")
        self.shapes[name] = shape
        return part

    def read_matrix(self, name: str, shape: tuple[int, ...], shard: Shard) -> Weight:
        part = self.read(name, shape, shard)
        return make_empty_fp8(part.shape) if self.fp8 else part


def make_empty_fp8(shape: tuple[int, ...], block: int = BLOCK) -> Fp8Tensor:
    """A matrix in FP8 without storage, whose scales are for `block` columns at most."""
    rows, columns = shape
    block = find_block(columns, block)
    values = torch.empty(rows, columns, dtype=E4M3, device="meta")
    return Fp8Tensor(values, torch.empty(columns // block, rows, device="meta"), block)


class RandomSource:
    """Random weights of the right shapes, to measure without a checkpoint.

    Matrices have std 0.02; vectors, which are norms and biases, are 1.

    Weights that are almost equal would be wrong: the router would send every token to the same
    experts, and steps would look faster than they are. Every rank makes the whole tensor, seeded
    by its name, and keeps its part. So all layouts of ranks have the same random model.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, fp8: bool = False) -> None:
        self.fp8 = fp8
        self.dtype = dtype
        self.device = device
        self.bytes_read = 0

    def read(
        self, name: str, shape: tuple[int, ...], shard: Shard, dtype: torch.dtype | None = None
    ) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shard.shape(shape), dtype=dtype or self.dtype, device=self.device)

        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        whole = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        whole.normal_(0, 0.02, generator=generator)
        part = shard.pad(shard.cut(whole, shape), shape)
        self.bytes_read += part.nbytes
        return part if part.shape == whole.shape else part.clone()  # do not keep the whole alive

    def read_matrix(self, name: str, shape: tuple[int, ...], shard: Shard) -> Weight:
        part = self.read(name, shape, shard)
        if not self.fp8:
            return part
        quantized = quantize_weight(part)
        self.bytes_read += quantized.nbytes - part.nbytes
        return quantized


def find_model(model: str, files: tuple[str, ...] = HUB_FILES) -> Path:
    """The local directory of `model`: a path, or a name on the Hugging Face hub.

    A hub model is downloaded, with progress. Raises ValueError if it is neither a directory nor a
    name that can be downloaded.
    """
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
    except (OSError, RuntimeError) as error:  # RuntimeError: of ~user, if there is no such user
        raise ValueError(f"--model-path {model!r}: cannot be read ({error})") from None
    is_hub_name = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    require(is_hub_name and not path.exists(), f"--model-path {model!r}: no such directory")

    # It is slow to import, and a local model never needs it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        message = "no such directory, and it could not be downloaded from the Hugging Face hub"
        raise ValueError(
            f"--model-path {model!r}: {message} ({type(error).__name__}: {first_line})"
        ) from None
