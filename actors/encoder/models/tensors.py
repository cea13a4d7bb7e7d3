"""Tensors of a checkpoint by name, mapped from its safetensors files and not copied."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_runtime.actors.checkpoint import CheckpointError
from llm_runtime.actors.checkpoint.files import weight_files


class Tensors:
    """The tensors of a directory, as float32. Use it in a `with` block; the tensors live on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._stack = ExitStack()
        self._files = {}
        for file in weight_files(path):
            try:
                opened = self._stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cannot be read ({error})") from None
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor of this shape. Raises CheckpointError if there is none."""
        if name not in self._files:
            raise CheckpointError(f"{self.path}: the tensor {name} is missing")
        tensor: Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != tuple(shape) or not tensor.is_floating_point():
            raise CheckpointError(
                f"{self.path}: the tensor {name} is {tensor.dtype} {list(tensor.shape)}, not numbers {list(shape)}"
            )
        tensor = tensor.to(torch.float32)
        self.nbytes += tensor.nbytes
        return tensor
