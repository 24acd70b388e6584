"""The public operations: check the input, pick the kernel, register with `torch.library`.

Every bad input ends here, in a TypeError or ValueError that names the argument, says what
came and what is allowed. Nothing has been written by then.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rcmlib import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = range(16, 257)
FLOAT32 = torch.finfo(torch.float32)


def rcm_skip(
    x: Tensor, f: Tensor, c_skip: float | Tensor, c_out: float | Tensor
) -> Tensor:
    """c_skip·x + c_out·f in one Triton launch, per sample.

    x, f: [B, …] of one shape, dtype (float32, float16 or bfloat16) and device. Contiguous, or
    viewable as [B, R, C] with a contiguous last dimension (such as a slice of the channels).
    c_skip, c_out: a number, or a floating tensor [B]. Arithmetic is float32, rounded once.
    Returns a new contiguous tensor like x. Where c_out is 0 that is c_skip·x exactly.

    Raises TypeError or ValueError for anything else, RuntimeError where Triton is missing.
    """
    for name, t in (("x", x), ("f", f)):
        _check_tensor(name, t, rank=None)
    _check_like("f", f, "x", x)
    if f.shape != x.shape:
        raise ValueError(f"f must have x's shape {_dims(x)}, got {_dims(f)}")
    c_skip, c_out = _coefficients(c_skip, c_out, x)
    tiles = [_rows_of_samples(name, t) for name, t in (("x", x), ("f", f))]
    if tiles[0].shape != tiles[1].shape:  # one is contiguous, the other has gaps
        tiles = [t.view(tiles[0].shape[0], -1, x.shape[-1]) for t in tiles]
    return torch.ops.rcmlib.skip(*tiles, c_skip, c_out).view(x.shape)


def rcm_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    c_skip: float | Tensor,
    c_out: float | Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """c_skip·x + c_out·merge_heads(softmax(q kᵀ·scale) v), in one kernel.

    q: [B, H, Nq, D]; k, v: [B, H, Nkv, D], D from 16 to 256, every length ≥ 1, any strides
    with a contiguous last dimension (so the views of a packed QKV need no copy).
    x and the result: [B, Nq, H·D], token layout. All of one dtype: float32 (IEEE products),
    float16 or bfloat16 (float32 accumulation, softmax and skip; one rounding at the end).
    c_skip, c_out: a number, or a floating tensor [B], one a sample.
    scale: 1/√D unless given; positive. Scores (q·k times scale) up to about 1e8: beyond that
    float32 cannot tell neighbours apart, and in float16 the weights may overflow.
    is_causal: query i sees keys 0 … i, as in SDPA.

    Where c_skip = 1 and c_out = 0 the result is x, bit for bit.
    There is no gradient yet: a backward pass through it raises a RuntimeError.
    Raises TypeError or ValueError for anything else, RuntimeError where Triton is missing.
    Specification: `rcmlib.reference.rcm_attention`. Equation: rCM, arXiv 2510.08431.
    """
    for name, t, rank in (("q", q, 4), ("k", k, 4), ("v", v, 4), ("x", x, 3)):
        _check_tensor(name, t, rank)
        _check_like(name, t, "q", q)
    batch, heads, q_len, head_dim = q.shape
    kv_shape = (batch, heads, k.shape[2], head_dim)
    if k.shape != kv_shape:
        raise ValueError(
            f"k must be [B, H, Nkv, D] with q's B, H, D {_dims(q)}, got {_dims(k)}"
        )
    if v.shape != kv_shape:
        raise ValueError(f"v must have k's shape {_dims(k)}, got {_dims(v)}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"q must have a head dimension of {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}, got {head_dim}"
        )
    if x.shape != (batch, q_len, heads * head_dim):
        raise ValueError(
            f"x must be [B, Nq, H*D] = [{batch}, {q_len}, {heads * head_dim}], got {_dims(x)}"
        )
    for name, t in (("q", q), ("k", k), ("v", v), ("x", x)):
        if t.stride(-1) != 1:
            raise ValueError(
                f"{name} must have a contiguous last dimension, got strides {t.stride()}; "
                f"call {name}.contiguous()"
            )
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    elif not (FLOAT32.tiny < scale < FLOAT32.max / 2):
        raise ValueError(f"scale must be positive and finite in float32, got {scale}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, got {type(is_causal).__name__}")
    c_skip, c_out = _coefficients(c_skip, c_out, x)
    return torch.ops.rcmlib.attention(
        q, k, v, x, c_skip, c_out, float(scale), is_causal
    )


# ---- the registered operators: torch.compile and opcheck see these ----


@torch.library.custom_op("rcmlib::skip", mutates_args=())
def _skip_op(x: Tensor, f: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    ops.check_device("x", x.device)
    from rcmlib.ops.skip import skip_forward

    return _launch(skip_forward, (x, f), c_skip, c_out)


@_skip_op.register_fake
def _(x, f, c_skip, c_out):
    return x.new_empty(x.shape)


@torch.library.custom_op("rcmlib::attention", mutates_args=())
def _attention_op(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor,
    c_skip: Tensor, c_out: Tensor, scale: float, is_causal: bool,
) -> Tensor:  # fmt: skip
    ops.check_device("q", q.device)
    from rcmlib.ops.attention import attention_forward

    return _launch(attention_forward, (q, k, v, x), c_skip, c_out, scale, is_causal)


@_attention_op.register_fake
def _(q, k, v, x, c_skip, c_out, scale, is_causal):
    return x.new_empty(x.shape)


def _launch(
    forward: Callable[..., Tensor], tensors: tuple[Tensor, ...], *args
) -> Tensor:
    """Run a launcher on the tensors' own device.

    Triton's interpreter gets bfloat16 arithmetic wrong, silently (NumPy has no such type), so
    on a CPU bfloat16 inputs are computed in float32 and the result is rounded.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    if device.type == "cuda":
        with torch.cuda.device(device):  # Triton launches on the current device
            return forward(*tensors, *args)
    if dtype == torch.bfloat16:
        # Contiguous: strides of a view that overlaps itself are not kept by a conversion.
        layout = {"memory_format": torch.contiguous_format}
        tensors = tuple(t.to(torch.float32, **layout) for t in tensors)
    with np.errstate(all="ignore"):  # NaN and infinity are values here, not accidents
        return forward(*tensors, *args).to(dtype)


# ---- checks ----


def _check_tensor(name: str, t: Tensor, rank: int | None) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name} must be one of {allowed}, got {t.dtype}")
    if rank is not None and t.ndim != rank:
        raise ValueError(
            f"{name} must have {rank} dimensions, got {t.ndim}: {_dims(t)}"
        )
    if t.ndim == 0 or t.numel() == 0:
        raise ValueError(f"{name} must not be empty, got {_dims(t)}")


def _check_like(name: str, t: Tensor, first_name: str, first: Tensor) -> None:
    if t.dtype != first.dtype:
        raise TypeError(
            f"{name} must have {first_name}'s dtype {first.dtype}, got {t.dtype}"
        )
    if t.device != first.device:
        raise ValueError(
            f"{name} must be on {first_name}'s device {first.device}, got {t.device}"
        )


def _coefficients(c_skip, c_out, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape: [B] on x's device, or 0-dimensional on the CPU."""
    pair = [
        _coefficient(name, c, x) for name, c in (("c_skip", c_skip), ("c_out", c_out))
    ]
    if all(c.ndim == 0 and c.device.type == "cpu" for c in pair):
        return pair[0], pair[1]
    batch = x.shape[0]
    a, b = (c.to(x.device).expand(batch).contiguous() for c in pair)
    return a, b


def _coefficient(name: str, c, x: Tensor) -> Tensor:
    if not isinstance(c, Tensor):
        if isinstance(c, bool) or not isinstance(c, (int, float)):
            raise TypeError(
                f"{name} must be a number or a torch.Tensor, got {type(c).__name__}"
            )
        return torch.tensor(c, dtype=torch.float64)
    if not c.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {c.dtype}")
    if c.ndim != 0 and c.shape != x.shape[:1]:
        raise ValueError(
            f"{name} must be a number or of shape [{x.shape[0]}], got {_dims(c)}"
        )
    if c.ndim == 1 and c.device != x.device:
        raise ValueError(
            f"{name} must be on the inputs' device {x.device}, got {c.device}"
        )
    return c


def _rows_of_samples(name: str, t: Tensor) -> Tensor:
    """t [B, …] as a view [B, 1, M] if its samples are dense, else [B, R, C]."""
    batch = t.shape[0]
    if t[0].is_contiguous():
        return t.view(batch, 1, -1)
    try:
        rows = t.view(batch, -1, t.shape[-1])
    except RuntimeError:
        rows = None
    if rows is None or rows.stride(-1) != 1:
        raise ValueError(
            f"{name} must be viewable as [B, R, C] with a contiguous last dimension, got shape "
            f"{_dims(t)} with strides {t.stride()}; call {name}.contiguous()"
        )
    return rows


def _dims(t: Tensor) -> str:
    return str(list(t.shape))
