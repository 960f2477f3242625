"""Where weights come from: safetensors read slice by slice, so that a rank reads only its share. What the model
asks for, by Hugging Face's names, is recorded first: a checkpoint that lacks or adds any is refused unread."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from minidcp.config import require


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts along `dim`. Parts are rounded up to a multiple of `align` and padded with
    zeros: zero rows of an up projection meet zero columns of the down projection, and change nothing."""

    dim: int = 0
    index: int = 0
    count: int = 1
    align: int = 1

    def bounds(self, length: int) -> tuple[int, int, int]:
        """(start, stop, size): the rows [start, stop) that exist, of a part of `size` rows."""
        size = -(-length // (self.count * self.align)) * self.align
        start = min(self.index * size, length)
        return start, min(start + size, length), size

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        return *whole[: self.dim], self.bounds(whole[self.dim])[2], *whole[self.dim + 1 :]


WHOLE = Shard()


@dataclass(frozen=True)
class Weights:
    """A source seen from one module: names are relative to `prefix`, shapes those of whole tensors."""

    source: "WeightSource"
    prefix: str = ""

    def scope(self, name: str) -> "Weights":
        return Weights(self.source, f"{self.prefix}{name}.")

    def read(self, name: str, *shape: int, shard: Shard = WHOLE) -> Tensor:
        return self.source.read(self.prefix + name, shape, shard)


class RecordingSource:
    """Hands out tensors without storage and records what was asked for: a model's list of weights."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sizes: dict[str, int] = {}  # values that this rank holds

    def read(self, name: str, shape: tuple[int, ...], shard: Shard) -> Tensor:
        part = torch.empty(shard.shape(shape), device="meta")
        self.shapes[name], self.sizes[name] = shape, part.numel()
        return part


class CheckpointSource:
    """A directory of safetensors in the hub's format. Raises ValueError if a file is missing or damaged."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device, progress: bool = False) -> None:
        self.path, self.dtype, self.device, self.bytes_read = path, dtype, device, 0
        self.files: dict[str, Any] = {}
        self.file_of = self.find_tensors()
        self.bar = tqdm(desc="Loading weights", total=len(self.file_of), unit=" tensors", disable=not progress)

    def find_tensors(self) -> dict[str, str]:
        """The file of every tensor: from the index where there is one, else of the single file."""
        index, single = self.path / "model.safetensors.index.json", "model.safetensors"
        if index.exists():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{index}: not a safetensors index") from None
        require((self.path / single).exists(), f"{self.path}: neither {index.name} nor {single} is there")
        return dict.fromkeys(self.open(single).keys(), single)

    def open(self, file: str) -> Any:
        if file not in self.files:
            try:
                self.files[file] = safe_open(self.path / file, framework="pt", device="cpu")
            except FileNotFoundError:
                raise ValueError(f"{self.path / file}: no such file, but the checkpoint's index names it") from None
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.path / file}: truncated or not safetensors ({error})") from None
        return self.files[file]

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises ValueError with a list of what is missing, left over or of another shape than the model asks for."""
        held = {name for name in self.file_of if not name.endswith("rotary_emb.inv_freq")}
        problems = {"missing": sorted(expected.keys() - held), "not part of this model": sorted(held - expected.keys())}
        wrong = []
        for name in sorted(expected.keys() & held):
            try:
                shape = tuple(self.open(self.file_of[name]).get_slice(name).get_shape())
            except SafetensorError:
                problems["missing"].append(f"{name} (in the index, not in {self.file_of[name]})")
                continue
            if shape != expected[name]:
                wrong.append(f"{name} {list(shape)}, config.json says {list(expected[name])}")
        problems["of another shape"] = wrong
        some = {what: names[:8] + [f"and {len(names) - 8} more"] * (len(names) > 8) for what, names in problems.items()}
        found = "; ".join(f"{len(problems[what])} {what}: {', '.join(names)}" for what, names in some.items() if names)
        require(not found, f"{self.path}: the weights do not fit config.json: {found}")

    def read(self, name: str, shape: tuple[int, ...], shard: Shard) -> Tensor:
        start, stop, size = shard.bounds(shape[shard.dim])
        part: Tensor = self.open(self.file_of[name]).get_slice(name)[(slice(None),) * shard.dim + (slice(start, stop),)]
        self.bytes_read += part.nbytes
        self.bar.update()
        part = part.to(device=self.device, dtype=self.dtype)
        missing = size - (stop - start)
        behind = [0, 0] * (len(shape) - shard.dim - 1)  # F.pad counts dims from the last
        return F.pad(part, [*behind, 0, missing]) if missing else part

    def close(self) -> None:
        self.bar.close()
        self.files.clear()


class RandomSource:
    """Random weights of the right shapes, for measuring without a checkpoint: std 0.02, norms 1. With all but equal
    weights the router would send every token to the same experts, and steps would look faster than they are."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device, self.bytes_read = dtype, device, 0

    def read(self, name: str, shape: tuple[int, ...], shard: Shard) -> Tensor:
        out = torch.ones(shard.shape(shape), dtype=self.dtype, device=self.device)
        if out.dim() > 1:
            # Seeded by name and part, so that what is replicated is equal on all ranks.
            generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{name} {shard.index}".encode()))
            out.normal_(0, 0.02, generator=generator)
            self.bytes_read += out.nbytes
        return out


WeightSource = RecordingSource | CheckpointSource | RandomSource


def find_model(model: str, files: tuple[str, ...] = ("*.json", "*.safetensors", "tokenizer*")) -> Path:
    """The local directory of `model`: a path, or a name on the Hugging Face hub (downloaded with progress). Raises
    ValueError if it is neither a directory nor a hub name that can be downloaded."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1 or path.exists()
    require(not looks_like_path, f"--model-path {model!r}: no such directory")
    from huggingface_hub import snapshot_download  # imports slowly, and a local model never needs it

    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        message = "no such directory, and it could not be downloaded from the Hugging Face hub"
        raise ValueError(f"--model-path {model!r}: {message} ({why})") from None
