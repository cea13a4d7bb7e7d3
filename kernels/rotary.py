"""Tables of rotary position embeddings, as Hugging Face transformers computes them (`modeling_rope_utils`)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rotary_table(
    head_dim: int,
    max_positions: int,
    theta: float,
    scaling: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, float32 [max_positions, head_dim / 2], for the half-split convention.

    head_dim: dimensions of a head that are rotated (fewer than the head has, for partial rotary embeddings);
    scaling: the `rope_scaling` / `rope_parameters` entry of a model's config.json, its kind under "rope_type" or
    "type": default, linear, dynamic (whose base only changes beyond the original length: taken as default), llama3
    or yarn. Raises ValueError for another kind or a missing entry.
    """
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"rotary dimensions must be even and positive, not {head_dim}")
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    magnitude = 1.0
    if kind == "linear":
        frequencies = frequencies / _entry(scaling, kind, "factor")
    elif kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif kind == "yarn":
        frequencies, magnitude = _yarn(head_dim, theta, scaling)
    elif kind not in ("default", "dynamic"):
        raise ValueError(f"rope scaling {kind!r} is not supported: use default, linear, dynamic, llama3 or yarn")
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies).to(device)
    return angles.cos() * magnitude, angles.sin() * magnitude


def _entry(scaling: Mapping[str, Any], kind: str, name: str) -> float:
    value = scaling.get(name)
    if not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"rope scaling {kind!r} needs a positive number {name!r}, not {value!r}")
    return value


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor = _entry(scaling, "llama3", "factor")
    low = _entry(scaling, "llama3", "low_freq_factor")
    high = _entry(scaling, "llama3", "high_freq_factor")
    original = _entry(scaling, "llama3", "original_max_position_embeddings")
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled)


def _yarn(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN (https://arxiv.org/abs/2309.00071): frequencies, and the factor on cos and sin."""
    factor = _entry(scaling, "yarn", "factor")
    original = _entry(scaling, "yarn", "original_max_position_embeddings")

    def stretch(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    def dimension_of(rotations: float) -> float:
        return (head_dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        magnitude = stretch(factor, mscale) / stretch(factor, mscale_all) if mscale and mscale_all else stretch(factor)
    low = dimension_of(scaling.get("beta_fast") or 32)
    high = dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (1.0 / (factor * powers)) * ramp + (1.0 / powers) * (1 - ramp), float(magnitude)
