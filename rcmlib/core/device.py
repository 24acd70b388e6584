"""What a GPU offers the kernels, by its compute capability."""

import torch


def device_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability. The interpreter has none: it follows the H100's paths."""
    if device.type != "cuda":
        return (9, 0)
    return torch.cuda.get_device_capability(device)


def copy_engine(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Do tensor descriptors pay here? Where they feed wgmma (sm_90) or tcgen05 (sm_100)."""
    return dtype != torch.float32 and capability[0] in (9, 10)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are IEEE products; 16-bit operands have only one way."""
    return "ieee" if dtype == torch.float32 else "tf32"
