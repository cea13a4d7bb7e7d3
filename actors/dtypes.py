"""Types of numbers: of weights as they are stored, and of the activations that go with them."""

from __future__ import annotations

from typing import Literal

ComputeDType = Literal["float32", "bfloat16"]
WeightDType = Literal["float32", "bfloat16", "int8", "int4"]


def compute_dtype(weights: WeightDType) -> ComputeDType:
    """The type of activations, and of norms and biases, beside weights of a type."""
    return "float32" if weights == "float32" else "bfloat16"
