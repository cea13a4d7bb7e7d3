"""What the kernels multiply in."""

import torch
import triton
from torch import Tensor


def narrow(*factors: Tensor) -> bool:
    """Whether products are of bfloat16 numbers, with sums in float32, and not float32 throughout.

    They are where all factors are, but in Triton's interpreter, which runs the kernels on the CPU for tests: it would
    multiply the bits of bfloat16 as whole numbers.
    """
    return all(each.dtype == torch.bfloat16 for each in factors) and not triton.knobs.runtime.interpret
