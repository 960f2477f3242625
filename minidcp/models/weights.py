"""Where weights come from: safetensors, read slice by slice, so that a rank reads only its share.
What the model asks for, by Hugging Face's names, is recorded first. A checkpoint that lacks a
tensor, or has one too many, is then refused before it is read."""

import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minidcp.config import require
from minidcp.console import ProgressBar, UnfailingStream
from minidcp.model_config import read_object

MAX_LISTED = 8  # how many names an error message lists
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names; all others are of quantised weights
FP8_DTYPE = "F8_E4M3"  # safetensors' name
SCALE_SUFFIX = "_scale_inv"  # weight · weight_scale_inv, block by block, is what was quantised
ROWS_COMPARED = 4096  # at a time, to need little memory
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


@dataclass(frozen=True)
class Weights:
    """A source as one module sees it: names are relative to `prefix`."""

    source: "WeightSource"
    prefix: str = ""

    def scope(self, name: str) -> "Weights":
        return Weights(self.source, f"{self.prefix}{name}.")

    def read(
        self, name: str, *shape: int, shard: Shard = WHOLE, dtype: torch.dtype | None = None
    ) -> Tensor:
        """This rank's part of a tensor, in the model's dtype unless another is given.

        `shape` is that of the whole tensor.
        """
        return self.source.read(self.prefix + name, shape, shard, dtype)


class RecordingSource:
    """Hands out tensors without storage, and records what was asked for."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}  # of whole tensors
        self.sizes: dict[str, int] = {}  # how many values this rank holds

    def read(
        self, name: str, shape: tuple[int, ...], shard: Shard, dtype: torch.dtype | None = None
    ) -> Tensor:
        part = torch.empty(shard.shape(shape), device="meta")
        self.shapes[name] = shape
        self.sizes[name] = part.numel()
        return part


class CheckpointSource:
    """A directory of safetensors in the hub's format.

    Matrices in FP8 are dequantised while they are read. `fp8_block` are the rows and columns that
    share a scale. Raises ValueError if a file is missing or damaged.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        device: torch.device,
        progress: bool = False,
        fp8_block: tuple[int, int] | None = None,
    ) -> None:
        self.path = path
        self.fp8_block = fp8_block
        self.dtype = dtype
        self.device = device
        self.bytes_read = 0
        self.files: dict[str, Any] = {}
        self.file_of = self.find_tensors()
        self.stored_names: dict[str, str] = {}  # of tensors that have another name in their file
        self.bar = ProgressBar(
            desc="Loading weights",
            total=len(self.file_of),
            unit=" tensors",
            disable=not progress,
            file=UnfailingStream(sys.stderr),
        )

    def find_tensors(self) -> dict[str, str]:
        """The file of every tensor: from the index if there is one, else of the single file."""
        index = self.path / "model.safetensors.index.json"
        if os.path.lexists(index):
            weight_map = read_object(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(file, str) for file in weight_map.values()
            ):
                raise ValueError(f"{index}: not a safetensors index")
            return weight_map

        single = "model.safetensors"
        is_there = os.path.lexists(self.path / single)
        require(is_there, f"{self.path}: neither {index.name} nor {single} is there")
        return dict.fromkeys(self.open(single).keys(), single)

    def open(self, file: str) -> Any:
        if file not in self.files:
            path = self.path / file
            try:
                # safe_open calls a file that may not be read one that is not there.
                path.open("rb").close()
                self.files[file] = safe_open(path, framework="pt", device="cpu")
            except FileNotFoundError:
                if path.is_symlink():
                    raise ValueError(f"{path}: links to a file that is not there") from None
                raise ValueError(
                    f"{path}: no such file, but the checkpoint's index names it"
                ) from None
            except SafetensorError as error:
                raise ValueError(f"{path}: truncated or not safetensors ({error})") from None
            except OSError as error:
                raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
        return self.files[file]

    def get_slice(self, name: str) -> Any:
        """The tensor, of which nothing is read yet. Raises SafetensorError if its file has none."""
        return self.open(self.file_of[name]).get_slice(self.stored_names.get(name, name))

    def tie_head(self) -> bool:
        """Make lm_head and the embeddings one tensor, as a config.json with tied embeddings says.

        The checkpoint may have both, or lm_head only. Returns False if they differ: transformers
        then uses both.
        """
        if HEAD not in self.file_of:
            return True
        if EMBEDDINGS not in self.file_of:
            self.file_of[EMBEDDINGS] = self.file_of.pop(HEAD)
            self.stored_names[EMBEDDINGS] = HEAD
            return True

        try:
            is_copy = self.are_equal(HEAD, EMBEDDINGS)
        except SafetensorError:
            return False  # only the index has it, which `check` reports
        if is_copy:
            del self.file_of[HEAD]
        return is_copy

    def skip_layers(self, indices: range) -> int:
        """Leave out the tensors of these layers; returns how many there are."""
        prefixes = tuple(f"model.layers.{index}." for index in indices)
        names = [name for name in self.file_of if name.startswith(prefixes)]
        for name in names:
            del self.file_of[name]
        return len(names)

    def are_equal(self, first: str, second: str) -> bool:
        """Compare two tensors in the model's dtype, some rows at a time."""
        slices = [self.get_slice(first), self.get_slice(second)]
        shape, other_shape = (s.get_shape() for s in slices)
        if shape != other_shape:
            return False
        for begin in range(0, shape[0], ROWS_COMPARED):
            rows, other_rows = (s[begin : begin + ROWS_COMPARED].to(self.dtype) for s in slices)
            if not torch.equal(rows, other_rows):
                return False
        return True

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Compare the checkpoint's tensors with the shapes of those that the model asks for.

        Raises ValueError with a list of what is missing, left over, of another shape, or quantised.
        """
        held = {name for name in self.file_of if not name.endswith("rotary_emb.inv_freq")}
        expected = {**expected, **self.list_scales(expected)}
        missing = sorted(expected.keys() - held)
        left_over = sorted(held - expected.keys())
        misshapen = []
        quantised = []
        for name in sorted(expected.keys() & held):
            file = self.file_of[name]
            try:
                tensor = self.get_slice(name)
            except SafetensorError:
                missing.append(f"{name} (in the index, not in {file})")
                continue
            shape = tuple(tensor.get_shape())
            is_fp8 = f"{name}{SCALE_SUFFIX}" in expected
            if tensor.get_dtype() not in DTYPES and not is_fp8:
                quantised.append(f"{name} ({tensor.get_dtype()})")
            if shape != expected[name]:
                wanted = list(expected[name])
                misshapen.append(f"{name} {list(shape)}, config.json says {wanted}")

        problems = [
            describe_problem("missing", missing),
            describe_problem("not part of this model", left_over),
            describe_problem("of another shape", misshapen),
            describe_problem(f"of a dtype other than {', '.join(DTYPES)}", quantised),
        ]
        found = "; ".join(problem for problem in problems if problem)
        require(not found, f"{self.path}: the weights do not fit config.json: {found}")
        self.bar.total = len(expected)

    def list_scales(self, expected: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of the scales of those expected tensors that are in FP8."""
        scales: dict[str, tuple[int, ...]] = {}
        if self.fp8_block is None:
            return scales
        for name, shape in expected.items():
            if name not in self.file_of or len(shape) != len(self.fp8_block):
                continue
            try:
                is_fp8 = self.get_slice(name).get_dtype() == FP8_DTYPE
            except SafetensorError:
                continue  # only the index has it, which `check` reports
            if is_fp8:
                num_blocks = (-(-size // n) for size, n in zip(shape, self.fp8_block, strict=True))
                scales[f"{name}{SCALE_SUFFIX}"] = tuple(num_blocks)
        return scales

    def dequantize(self, part: Tensor, name: str, shape: tuple[int, ...], shard: Shard) -> Tensor:
        """This rank's part of a matrix in FP8, in float32. A block may begin in another part."""
        assert self.fp8_block is not None
        scales: Tensor = self.get_slice(f"{name}{SCALE_SUFFIX}")[:]
        self.bytes_read += scales.nbytes
        scales = scales.to(device=self.device, dtype=torch.float32)
        for dim, (size, block) in enumerate(zip(shape, self.fp8_block, strict=True)):
            begin, end = shard.bounds(size) if dim == shard.dim else (0, size)
            block_of = torch.arange(begin, end, device=self.device) // block
            scales = scales.index_select(dim, block_of)
        return part.float() * scales

    def read(
        self, name: str, shape: tuple[int, ...], shard: Shard, dtype: torch.dtype | None = None
    ) -> Tensor:
        part = shard.cut(self.get_slice(name), shape)
        self.bytes_read += part.nbytes
        self.bar.update()
        if part.dtype == torch.float8_e4m3fn:
            part = self.dequantize(part.to(self.device), name, shape, shard)
        part = part.to(device=self.device, dtype=dtype or self.dtype)
        return shard.pad(part, shape)

    def close(self) -> None:
        self.bar.close()
        self.files.clear()


def describe_problem(problem: str, names: list[str]) -> str:
    """ "3 missing: a, b, c"; empty if there are no names. Only the first few are listed."""
    if not names:
        return ""
    listed = names[:MAX_LISTED]
    if len(names) > MAX_LISTED:
        listed.append(f"and {len(names) - MAX_LISTED} more")
    return f"{len(names)} {problem}: {', '.join(listed)}"


class RandomSource:
    """Random weights of the right shapes, to measure without a checkpoint.

    Matrices have std 0.02; vectors, which are norms and biases, are 1.

    Weights that are almost equal would be wrong: the router would send every token to the same
    experts, and steps would look faster than they are. Every rank makes the whole tensor, seeded
    by its name, and keeps its part. So all layouts of ranks have the same random model.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
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


WeightSource = RecordingSource | CheckpointSource | RandomSource


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
