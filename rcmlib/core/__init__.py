"""What the operations share. This page knows where the kernels can run. It needs no Triton:
what is plain PyTorch works without, and the first launch imports the kernels' files."""

import functools
import importlib.util
import os
import sys

import numpy as np
import torch
from numpy.lib import NumpyVersion


def set_interpreter_default() -> None:
    """Without a GPU, let Triton's interpreter run the kernels on the CPU.

    Triton decides when it is imported, so `import rcmlib` calls this first. No child process
    inherits the choice, and counting GPUs leaves CUDA alone: a forked child may still use it.
    Where Triton is imported already, or TRITON_INTERPRET is set, nothing changes.
    """
    named = "triton" in sys.modules or "TRITON_INTERPRET" in os.environ
    if named or importlib.util.find_spec("triton") is None or torch.cuda.device_count():
        return
    os.environ["TRITON_INTERPRET"] = "1"  # asked while Triton's own functions are decorated
    try:
        importlib.import_module("triton").knobs.runtime.interpret = True
    finally:
        del os.environ["TRITON_INTERPRET"]


load = functools.cache(importlib.import_module)  # the file of a kernel, when it is launched


@functools.cache  # fixed when Triton is imported, and asked at every launch
def interpreting() -> bool:
    """Does Triton's interpreter run the kernels of this process? Imports Triton."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "this operation is a Triton kernel, and Triton is not installed; it exists for "
            "Linux (pip install triton). What is plain PyTorch in rcmlib works without it: "
            "coefficients, rcmlib.reference, BaselineRCMAttention and FusedRCMAttention"
        )
    import triton

    from rcmlib.core.epilogue import skip_epilogue

    interpreted = not isinstance(skip_epilogue, triton.JITFunction)
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if interpreted and version < (3, 7) and NumpyVersion(np.__version__) >= "2.4.0":
        raise RuntimeError(
            f"Triton {triton.__version__}'s interpreter needs NumPy below 2.4, here is "
            f"{np.__version__}; pip install 'numpy<2.4', or Triton 3.7 or newer"
        )
    return interpreted


@functools.cache  # of what passes: an error is raised anew at every call
def check_device(name: str, device: torch.device) -> None:
    """ValueError unless Triton can launch a kernel on tensors of this device.

    Compute capability 8.0 is the first with bfloat16 and the first tested here.
    """
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"{name} must be on a CUDA device or the CPU, got {device}")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise ValueError(
                f"{name} must be on a GPU of compute capability 8.0 (A100) or newer, "
                f"got {'.'.join(map(str, capability))}"
            )
    if not interpreting() and device.type == "cpu":
        raise ValueError(
            f"{name} is on the CPU, but Triton was loaded to compile for a GPU; move the "
            "inputs to a CUDA device, or set TRITON_INTERPRET=1 before Python starts to "
            "interpret the kernels on the CPU (slow: small inputs only)"
        )


# ---- what a GPU offers the kernels, by its compute capability ----

assumed_capability = (9, 0)  # of what is no GPU: the interpreter follows an H100's paths


def device_capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return assumed_capability
    return torch.cuda.get_device_capability(device)


def multiprocessors(device: torch.device) -> int | None:
    """How many SMs a GPU has; None for what is no GPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).multi_processor_count


def copy_engine(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Do tensor descriptors pay here? Where they feed wgmma (sm_90) or tcgen05 (sm_100)."""
    return dtype != torch.float32 and capability[0] in (9, 10)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are IEEE products; 16-bit operands have only one way."""
    return "ieee" if dtype == torch.float32 else "tf32"
