"""What has to stand in the environment before the first import of numpy or torch in a process that forks others."""

from __future__ import annotations

import os


def prepare() -> None:
    """Keeps libraries from starting threads and from asking CUDA for devices, unless the user has said otherwise."""
    # numpy's OpenBLAS would start threads when it is imported, and a process with threads must not be forked.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Threads of torch that spin while they wait would take the cores from the other actors.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A process that has asked CUDA cannot fork one that computes with it. xgrammar's foundation would ask when it is
    # imported, for what is not used here; torch, when somebody else asks, asks the driver's management library instead.
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
