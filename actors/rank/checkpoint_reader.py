"""Tensors of a checkpoint by their Hugging Face names, read in parts, from GGUF files and safetensors directories."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_runtime.actors.checkpoint import CheckpointError, GGUFFile, ModelConfig, TensorInfo
from llm_runtime.actors.checkpoint.files import stored_tensors
from llm_runtime.actors.checkpoint.names import gguf_name, name_of_gguf
from llm_runtime.actors.rank.dequantize import DEQUANTIZERS, dequantize, four_bits
from llm_runtime.actors.rank.quantization_policy import GROUP


class CheckpointReader(Protocol):
    """A checkpoint's tensors."""

    @property
    def names(self) -> Iterable[str]:
        """Their Hugging Face names, or their own, where there are no others."""
        ...

    def read(self, name: str, shape: tuple[int, ...], rows: range, columns: range) -> Tensor:
        """A part of the tensor `name`, float32, float16 or bfloat16: [rows, columns], or [columns] of a vector.

        `shape` is what the whole must have. Raises CheckpointError if it has not, or is missing.
        """
        ...

    def read_four_bits(
        self, name: str, shape: tuple[int, ...], rows: range, columns: range
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """A part of a matrix that the checkpoint has in groups of 4 bits, as `dequantize.four_bits` gives it; None if
        it has not, or the columns do not begin and end where groups do. Raises CheckpointError as `read` does."""
        ...


def open_checkpoint(path: Path, config: ModelConfig) -> CheckpointReader:
    """The tensors of a GGUF file or a Hugging Face directory. Raises CheckpointError."""
    return SafetensorsSource(path, config) if path.is_dir() else GGUFSource(path, config)


class GGUFSource:
    """Tensors of a GGUF file, dequantized block by block.

    llama.cpp stores the rows of queries and keys of its architecture "llama" in another order: those of a head
    alternate between the two halves that the rotary embedding pairs. Here they have Hugging Face's order again.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._file = GGUFFile(path)
        self._head_dim = config.head_dim
        self._llama = self._file.metadata.get("general.architecture") == "llama"

    @property
    def names(self) -> Iterable[str]:
        return map(name_of_gguf, self._file.tensors)

    def read(self, name: str, shape: tuple[int, ...], rows: range, columns: range) -> Tensor:
        info, blocks = self._blocks(name, shape, rows, columns)
        if info.type not in DEQUANTIZERS:
            raise CheckpointError(
                f"{self._file.path}: tensor {gguf_name(name)!r} is of type {info.type}, which is not supported; "
                "supported are " + ", ".join(DEQUANTIZERS)
            )
        values = dequantize(info.type, blocks)
        values = values[:, columns.start % info.block_values :][:, : len(columns)]
        if len(shape) == 2:
            return values
        return self._in_order(values[0]) if self._is_interleaved(name) else values[0]

    def read_four_bits(
        self, name: str, shape: tuple[int, ...], rows: range, columns: range
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if columns.start % GROUP or columns.stop % GROUP:
            return None
        info, blocks = self._blocks(name, shape, rows, columns)
        groups = four_bits(info.type, blocks)
        if groups is None:
            return None
        quants, scales, minimums = groups
        first = columns.start % info.block_values // GROUP
        inner = slice(first, first + len(columns) // GROUP)
        return quants[:, inner], scales[:, inner], minimums[:, inner]

    def _blocks(self, name: str, shape: tuple[int, ...], rows: range, columns: range) -> tuple[TensorInfo, Tensor]:
        """The blocks that hold a part of a tensor, uint8 [rows, blocks, bytes], in Hugging Face's order of rows."""
        stored = gguf_name(name)
        info = self._file.tensors.get(stored)
        _check_shape(self._file.path, stored, info and info.shape, shape)
        assert info is not None
        blocks = torch.frombuffer(self._file.data(stored), dtype=torch.uint8)
        blocks = blocks.view(-1, info.shape[-1] // info.block_values, info.block_bytes)
        if len(shape) == 2:
            blocks = blocks[rows.start : rows.stop]
        first, last = columns.start // info.block_values, -(-columns.stop // info.block_values)
        blocks = blocks[:, first:last]
        return info, self._in_order(blocks) if len(shape) == 2 and self._is_interleaved(name) else blocks

    def _is_interleaved(self, name: str) -> bool:
        return self._llama and ("self_attn.q_proj." in name or "self_attn.k_proj." in name)

    def _in_order(self, rows: Tensor) -> Tensor:
        """Rows of whole heads [n * head_dim, …] in Hugging Face's order."""
        return rows.reshape(-1, self._head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


class SafetensorsSource:
    """Tensors of a directory with safetensors files.

    Matrices of FP8 numbers are multiplied out: each block of `fp8_block` rows and columns has a factor in the tensor
    NAME_scale_inv.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._path = path
        self._fp8_block = config.fp8_block
        self._files: dict[Path, Any] = {}
        self._tensors = stored_tensors(path)
        # One matrix with two names, of which either may be the one that is stored.
        self._tied = {"model.embed_tokens.weight": "lm_head.weight"} if config.tie_embeddings else {}

    @property
    def names(self) -> Iterable[str]:
        return self._tensors

    def read(self, name: str, shape: tuple[int, ...], rows: range, columns: range) -> Tensor:
        part = self._stored(name, shape, rows, columns)
        if part.dtype == torch.float8_e4m3fn and self._fp8_block is not None and len(shape) == 2:
            high, wide = self._fp8_block
            blocks = (-(-shape[0] // high), -(-shape[1] // wide))
            top, left = rows.start // high, columns.start // wide
            within = range(top, -(-rows.stop // high)), range(left, -(-columns.stop // wide))
            factors = self._stored(f"{name}_scale_inv", blocks, *within).float()
            factors = factors[torch.arange(rows.start, rows.stop) // high - top]
            return part.float().mul_(factors[:, torch.arange(columns.start, columns.stop) // wide - left])
        if part.dtype == torch.float64:
            return part.float()
        if part.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(f"{self._path}: tensor {name!r} is {part.dtype}, which is not supported")
        return part

    def _stored(self, name: str, shape: tuple[int, ...], rows: range, columns: range) -> Tensor:
        """A part of a tensor as it is."""
        # A model that was saved without its head has names without "model.".
        names = (name, self._tied.get(name, name), name.removeprefix("model."))
        name = next((each for each in names if each in self._tensors), name)
        info = self._tensors.get(name)
        _check_shape(self._path if info is None else info.file, name, info and info.shape, shape)
        assert info is not None
        try:
            stored = self._open(info.file).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{info.file}: tensor {name!r} cannot be read ({error})") from None
        if len(shape) == 2:
            part: Tensor = stored[rows.start : rows.stop, columns.start : columns.stop]
        else:
            part = stored[columns.start : columns.stop]
        return part

    def read_four_bits(
        self, name: str, shape: tuple[int, ...], rows: range, columns: range
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        return None

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cannot be read ({error})") from None
        return self._files[file]


def _check_shape(path: Path, name: str, found: tuple[int, ...] | None, wanted: tuple[int, ...]) -> None:
    if found is None:
        raise CheckpointError(f"{path}: has no tensor {name!r}")
    if found != wanted:
        raise CheckpointError(f"{path}: tensor {name!r} has the shape {found}, its configuration says {wanted}")
