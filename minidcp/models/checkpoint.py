"""Checkpoints: safetensors, read slice by slice, so that a rank reads only its share. What the
model asks for is recorded first (`RecordingSource`). A checkpoint that lacks a tensor, or has one
too many, is then refused before it is read. Next: `layers.py`."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minidcp.config import require
from minidcp.console import ProgressBar, UnfailingStream
from minidcp.kernels.fp8 import BLOCK, Fp8Tensor, Weight, find_block, quantize_weight
from minidcp.model_config import read_object
from minidcp.models.weights import Shard

MAX_LISTED = 8  # how many names an error message lists
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names; all others are of quantised weights
FP8_DTYPE = "F8_E4M3"  # safetensors' name
SCALE_DTYPE = "F8_E8M0"  # of scales that are powers of two, besides those of DTYPES
SCALE_SUFFIX = "_scale_inv"  # weight · weight_scale_inv, block by block, is what was quantised
ROWS_COMPARED = 4096  # at a time, to need little memory


class CheckpointSource:
    """A directory of safetensors in the hub's format.

    `fp8_block` are the rows and columns that share a scale where the checkpoint is in FP8. With
    `fp8` matrices are read in FP8, whatever they are in. Without, they are dequantised.

    Raises ValueError if a file is missing or damaged.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        device: torch.device,
        progress: bool = False,
        fp8_block: tuple[int, int] | None = None,
        fp8: bool = False,
    ) -> None:
        self.path = path
        self.fp8 = fp8
        self.quantized: set[str] = set()  # matrices that are not in FP8 in the checkpoint
        self.fp8_block = fp8_block
        self.dtype = dtype
        self.device = device
        self.bytes_read = 0
        self.names_read: set[str] = set()
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

    def share_tensors(self, layer: int) -> list[str]:
        """Leave out embeddings and head of a layer that predicts further tokens.

        They are copies of the model's own, which the layer shares. Returns the names of those that
        are not. Only some rows are compared, because they are large.

        Raises ValueError if the checkpoint has no such layer.
        """
        prefix = f"model.layers.{layer}."
        require(
            any(name.startswith(prefix) for name in self.file_of),
            f"--speculative-method mtp: {self.path} has no {prefix}*, though its config.json has "
            "num_nextn_predict_layers; use ngram",
        )
        different = []
        shared = {"embed_tokens.weight": EMBEDDINGS, "shared_head.head.weight": HEAD}
        for name, original in shared.items():
            if prefix + name not in self.file_of:
                continue
            if original not in self.file_of:  # tied to the embeddings
                original = EMBEDDINGS
            if original in self.file_of and not self.are_equal(prefix + name, original, parts=16):
                different.append(name)
            del self.file_of[prefix + name]
        return different

    def are_equal(self, first: str, second: str, parts: int | None = None) -> bool:
        """Compare two tensors in the model's dtype, some rows at a time.

        Of all rows, or of a few in so many parts of them.
        """
        slices = [self.get_slice(first), self.get_slice(second)]
        shape, other_shape = (s.get_shape() for s in slices)
        if shape != other_shape:
            return False
        rows_compared, step = ROWS_COMPARED, ROWS_COMPARED
        if parts is not None:
            rows_compared, step = 16, max(16, shape[0] // parts)
        for begin in range(0, shape[0], step):
            rows, other_rows = (s[begin : begin + rows_compared].to(self.dtype) for s in slices)
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
            is_scale = name.endswith(SCALE_SUFFIX) and tensor.get_dtype() == SCALE_DTYPE
            if tensor.get_dtype() not in DTYPES and not is_fp8 and not is_scale:
                quantised.append(f"{name} ({tensor.get_dtype()})")
            if shape != expected[name]:
                wanted = f"config.json says {list(expected[name])}"
                if name.endswith(SCALE_SUFFIX):
                    wanted += f" with weight_block_size {list(self.fp8_block or ())}"
                misshapen.append(f"{name} {list(shape)}, {wanted}")

        problems = [
            describe_problem("missing", missing),
            describe_problem("not part of this model", left_over),
            describe_problem("of another shape", misshapen),
            describe_problem(f"of a dtype other than {', '.join(DTYPES)}", quantised),
        ]
        if self.fp8_block is None and any(FP8_DTYPE in entry for entry in quantised):
            problems.append(
                "FP8 needs a quantization_config with quant_method and "
                "weight_block_size in config.json"
            )
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

    def read(
        self, name: str, shape: tuple[int, ...], shard: Shard, dtype: torch.dtype | None = None
    ) -> Tensor:
        part = self.read_part(name, shape, shard)
        if part.dtype == torch.float8_e4m3fn:
            scales = self.read_scales(name, shape, shard, block=1)
            part = part.float() * scales
        part = part.to(dtype or self.dtype)
        return shard.pad(part, shape)

    def read_matrix(self, name: str, shape: tuple[int, ...], shard: Shard) -> Weight:
        if not self.fp8:
            return self.read(name, shape, shard)
        part = self.read_part(name, shape, shard)
        # All matrices have the checkpoint's blocks, because some are stacked or joined.
        _, block = self.fp8_block or (BLOCK, BLOCK)
        if part.dtype != torch.float8_e4m3fn:
            self.quantized.add(name)
            return quantize_weight(shard.pad(part.to(self.dtype), shape), block)

        rows, columns = shard.shape(shape)
        block = find_block(columns, block)  # another part may begin within a block
        values = shard.pad(part.view(torch.uint8), shape).view(torch.float8_e4m3fn)
        scales = self.read_scales(name, shape, shard, block)
        padded_scales = scales.new_zeros(rows, columns // block)
        padded_scales[: scales.shape[0], : scales.shape[1]] = scales
        return Fp8Tensor(values, padded_scales.T.contiguous(), block)

    def read_part(self, name: str, shape: tuple[int, ...], shard: Shard) -> Tensor:
        """This rank's part as it is stored, not padded."""
        part = shard.cut(self.get_slice(name), shape)
        self.bytes_read += part.nbytes
        if name not in self.names_read:
            self.names_read.add(name)
            self.bar.update()
        return part.to(self.device)

    def read_scales(self, name: str, shape: tuple[int, ...], shard: Shard, block: int) -> Tensor:
        """The scales of a part: for each row, and for each `block` columns."""
        assert self.fp8_block is not None
        scales: Tensor = self.get_slice(f"{name}{SCALE_SUFFIX}")[:]
        self.bytes_read += scales.nbytes
        scales = scales.to(device=self.device, dtype=torch.float32)
        for dim, step in enumerate((1, block)):
            begin, end = shard.bounds(shape[dim]) if dim == shard.dim else (0, shape[dim])
            index = torch.arange(begin, end, step, device=self.device)
            scales = scales.index_select(dim, index // self.fp8_block[dim])
        return scales

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
