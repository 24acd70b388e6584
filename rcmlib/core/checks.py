"""The checks of the operations' arguments, their coefficients, and autocast."""

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)  # the last two: while exporting
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def tensor(name: str, t: Tensor, rank: int | None) -> None:
    """TypeError or ValueError unless t is a non-empty tensor that the kernels can read."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name} must be one of {allowed}, got {t.dtype}")
    if rank is not None and t.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got {t.ndim}: {dims(t)}")
    if t.ndim == 0 or t.numel() == 0:
        raise ValueError(f"{name} must not be empty, got {dims(t)}")


def like(name: str, t: Tensor, first_name: str, first: Tensor) -> None:
    """t must share first's dtype and device."""
    if t.dtype != first.dtype:
        raise TypeError(f"{name} must have {first_name}'s dtype {first.dtype}, got {t.dtype}")
    _same_device(name, t, first_name, first)


def residual(name: str, t: Tensor, first_name: str, first: Tensor) -> None:
    """What the skip carries may also stay in float32 beside 16-bit operands."""
    if t.dtype not in (first.dtype, torch.float32):
        also = "" if first.dtype == torch.float32 else " or torch.float32"
        raise TypeError(
            f"{name} must have {first_name}'s dtype {first.dtype}{also}, got {t.dtype}"
        )
    _same_device(name, t, first_name, first)


def _same_device(name: str, t: Tensor, first_name: str, first: Tensor) -> None:
    if t.device != first.device:
        raise ValueError(
            f"{name} must be on {first_name}'s device {first.device}, got {t.device}"
        )


def shape(name: str, t: Tensor, *allowed: tuple[str, tuple]) -> None:
    """ValueError unless t has one of these shapes, each behind the words that t must …"""
    if t.shape not in [a for _, a in allowed]:
        must = " or ".join(f"{what} {list(a)}" for what, a in allowed)
        raise ValueError(f"{name} must {must}, got {dims(t)}")


def contiguous_rows(name: str, t: Tensor) -> None:
    """The last dimension has to be contiguous; the others may have any strides."""
    if t.stride()[-1] != 1 and t.shape[-1] > 1:
        raise ValueError(
            f"{name} must have a contiguous last dimension, got strides {t.stride()}; "
            f"call {name}.contiguous()"
        )


def coefficients(c_skip, c_out, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape: [B] on x's device, or 0-dimensional on the CPU, where a launch
    reads constants without waiting for the GPU; but not inside torch.compile, whose CUDA
    graphs would keep the first call's."""
    c_skip = _coefficient("c_skip", c_skip, x)
    c_out = _coefficient("c_out", c_out, x)
    both = (c_skip, c_out)
    constant = all(c.ndim == 0 and c.device.type == "cpu" and not c.requires_grad for c in both)
    if constant and not torch.compiler.is_compiling():
        return both
    # In float64: a gradient is summed over the samples before it is rounded.
    wide = (c if c.ndim else c.to(x.device, torch.float64).expand(x.shape[0]) for c in both)
    return tuple(c.contiguous() for c in wide)


def _coefficient(name: str, c, x: Tensor) -> Tensor:
    if not isinstance(c, Tensor):
        if isinstance(c, bool) or not isinstance(c, (int, float)):
            raise TypeError(
                f"{name} must be a number or a torch.Tensor, got {type(c).__name__}"
            )
        if torch.compiler.is_compiling():  # by a product, as in `coefficients.edm`
            return x.new_ones(x.shape[:1], dtype=torch.float64) * c
        return torch.scalar_tensor(c, dtype=torch.float64, device="cpu")
    if not c.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {c.dtype}")
    if c.ndim != 0 and (c.ndim != 1 or c.shape[0] != x.shape[0]):
        raise ValueError(f"{name} must be a number or of shape [{x.shape[0]}], got {dims(c)}")
    if c.ndim == 1 and c.device != x.device:
        raise ValueError(f"{name} must be on the inputs' device {x.device}, got {c.device}")
    return c


def as_launched(*coefficients: Tensor | None, default: float | None = None) -> tuple:
    """As a launcher takes them: [B] tensors and gates as they are, constants as floats."""
    return tuple(default if c is None else c if c.ndim else c.item() for c in coefficients)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Inside torch.autocast: the operands of a matrix product in its dtype, as PyTorch's."""
    first = tensors[0]
    if not isinstance(first, Tensor):
        return tensors
    device = first.device.type
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in DTYPES else t for t in tensors
    )


def why_called(part: nn.Module | None, expected: type[nn.Module], name: str = "it") -> str:
    """Why a part of a module has to be called for what it computes; empty if the kernels may
    read its weights instead. Adapters, quantisers, pruning and hooks each leave a trace."""
    if type(part) is not expected:
        came = "missing" if part is None else f"a {type(part).__name__}"
        return f"{name} is {came}, not a plain {expected.__name__}"
    if any(getattr(part, hooks) for hooks in HOOKS) or _has_any_global_hook():
        return f"a hook on {name} would no longer run"
    # torch.compile guards the second, but not the first.
    if "forward" in part.__dict__ or part.forward.__func__ is not expected.forward:
        return f"{name}.forward was replaced on the instance"
    for which in ("weight", "bias") if expected is nn.Linear else ():
        t = getattr(part, which)
        if t is not None and type(t) not in PLAIN:
            return f"{name}.{which} is a {type(t).__name__}, not a plain tensor"
        if t is not None and (t.layout != torch.strided or t.stride(-1) != 1):
            return f"{name}.{which} has rows that are not contiguous"
    return ""


def dims(t: Tensor) -> str:
    return str(list(t.shape))
