"""The Triton kernels, one idea a file. This page knows whether they can run, and where.

It imports no Triton: coefficients, references and the PyTorch modules work on platforms that
have none, and the kernel files are imported by the first call that launches one.
"""

import functools
import importlib
import importlib.util
import os
import sys

import torch

LAUNCHERS = {
    "attention": "attention.forward",
    "attention_backward": "attention.backward",
    "gate": "projection.gate",
    "projection": "projection.kernel",
    "quantize": "sage.quantize",
    "sage_attention": "sage.kernel",
    "skip": "skip.kernel",
}


def __getattr__(name: str):
    """Imports a launcher's file at its first use as ops.NAME; later uses do not come here."""
    if name in LAUNCHERS:
        return importlib.import_module(f"rcmlib.{LAUNCHERS[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def set_interpreter_default() -> None:
    """Without a CUDA device, let Triton's interpreter run the kernels on the CPU.

    Triton decides when it is imported, so `import rcmlib` calls this first. A
    TRITON_INTERPRET that is already set is left alone.
    """
    if not torch.cuda.is_available() and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")


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

    return not isinstance(skip_epilogue, triton.JITFunction)


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
