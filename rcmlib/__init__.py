"""rcmlib: the rCM skip connection, fused into attention kernels, and measured.

    f(x, t) = c_skip(t)·x + c_out(t)·Attention(x)

The package behind the book *Fusing rCM skip connections into SageAttention 2++ kernels*.
"""

from rcmlib.core import set_interpreter_default

set_interpreter_default()  # before anything imports Triton

from rcmlib import integrate, reference  # noqa: E402
from rcmlib.attention import rcm_attention  # noqa: E402
from rcmlib.coefficients import Coefficients, edm, rectified_flow, trigflow  # noqa: E402
from rcmlib.modules import (  # noqa: E402
    BaselineRCMAttention,
    FusedRCMAttention,
    TransformerBlock,
    TritonFusedRCMAttention,
)
from rcmlib.projection import gated_projection, rcm_projection  # noqa: E402
from rcmlib.sage import rcm_sage_attention  # noqa: E402
from rcmlib.skip import rcm_skip  # noqa: E402

__all__ = [
    "BaselineRCMAttention", "Coefficients", "FusedRCMAttention", "TransformerBlock",
    "TritonFusedRCMAttention", "benchmark_all_implementations", "edm", "gated_projection",
    "integrate", "rcm_attention", "rcm_projection", "rcm_sage_attention", "rcm_skip",
    "rectified_flow", "reference", "trigflow",
]  # fmt: skip


def __getattr__(name: str):
    """The benchmark, when it is asked for: it brings torch.compile and a progress bar."""
    if name == "benchmark_all_implementations":
        from rcmlib.measure.benchmark import benchmark_all_implementations

        return benchmark_all_implementations
    raise AttributeError(f"module 'rcmlib' has no attribute {name!r}")
