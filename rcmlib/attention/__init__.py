"""`rcm_attention` and plain `attention`: one kernel forward, three or four backward."""

import math

import torch
from torch import Tensor

from rcmlib.core import check_device, checks, gradients, load
from rcmlib.core.launch import known, run_on_device

HEAD_DIMS = range(16, 257)
FLOAT32 = torch.finfo(torch.float32)


def rcm_attention(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, c_skip: float | Tensor, c_out: float | Tensor,
    *, scale: float | None = None, is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """c_skip·x + c_out·merge_heads(softmax(q kᵀ·scale) v), in one kernel.

    q: [B, H, Nq, D]; k, v: [B, H, Nkv, D], D from 16 to 256, every length ≥ 1, any strides
    with a contiguous last dimension (so the views of a packed QKV need no copy). One dtype:
    float32 (IEEE products), float16 or bfloat16 (float32 accumulation, softmax and skip; one
    rounding at the end). Inside torch.autocast they are cast to its dtype.
    x and the result: [B, Nq, H·D], token layout, in q's dtype or float32.
    c_skip, c_out: a number, or a floating tensor [B], one a sample.
    scale: 1/√D unless given; positive. Scores (q·k times scale) up to about 1e8: beyond that
    float32 cannot tell neighbours apart, and in float16 the weights may overflow.
    is_causal: query i sees keys 0 … i, as in SDPA.

    Where c_skip = 1 and c_out = 0 the result is x, bit for bit.
    Differentiable in q, k, v, x, c_skip and c_out, with O(N) memory: a call that wants
    gradients also saves F = attention(q, k, v) in q's dtype, and one float32 a query. So
    gradients are exact to rounding at any noise level, t = 0 included. The weights are
    recomputed from that float32: with scores s they gain a relative error of 6e-8·|s|. Two runs
    give the same bits; but for dq on Hopper (16 bits, D ≤ 128, 1024 queries and keys or more),
    which is summed in a float32 buffer in no fixed order, unless
    torch.use_deterministic_algorithms asks for one.
    Time, bfloat16 on Hopper with D ≤ 128 and more than 512 keys: weights are relative to the
    largest score among the last 32 to 191 keys (causal: along the diagonal). Where others are
    80 or more above it, or one is NaN or +inf, that block of queries is computed twice. So
    leave padding keys out, or in front, rather than push their scores down.
    Second derivatives and forward mode (torch.func.jvp) raise an error.
    Raises TypeError or ValueError for anything else, RuntimeError where Triton is missing.
    Specification: `rcmlib.reference.rcm_attention`. Equation: rCM, arXiv 2510.08431.
    """
    return _call("rcm_attention", (q, k, v, x, c_skip, c_out), scale, is_causal)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """merge_heads(softmax(q kᵀ·scale) v), [B, Nq, H·D]: `rcm_attention`'s kernel without x.

    Arguments, gradients and errors as there; the result has q's dtype. It is for layers in
    which a projection stands between attention and skip (`rcm_projection`).
    """
    return _call("attention", (q, k, v, None, None, None), scale, is_causal)


def _call(kind: str, arguments: tuple, scale: float | None, is_causal: bool) -> Tensor:
    plan = known(kind, arguments, is_causal, False)
    if plan is not None:
        scale = check_scale(scale, arguments[0])
        return _launch(*arguments, scale, is_causal, False, plan)[0]
    q, k, v, x, *c = arguments
    q, k, v = checks.autocast(q, k, v)
    check_attention(q, k, v, is_causal)
    scale = check_scale(scale, q)
    if kind == "rcm_attention":
        check_attention_residual(x, q)
        c = checks.coefficients(*c, x)
    if gradients.wants_grad(q, k, v, x, *c):
        return _Attention.apply(q, k, v, x, *c, scale, is_causal)[0]
    return torch.ops.rcmlib.attention(q, k, v, x, *c, scale, is_causal)


def check_attention(q, k, v, is_causal) -> None:
    """Checks all but scale, x and the coefficients."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, t, rank=4)
        checks.like(name, t, "q", q)
    batch, heads, _, head_dim = q.shape
    kv_shape = (batch, heads, k.shape[2], head_dim)
    checks.shape("k", k, ("be [B, H, Nkv, D] with q's B, H, D =", kv_shape))
    checks.shape("v", v, ("have k's shape", kv_shape))
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[-1]:  # `in` breaks on a SymInt
        raise ValueError(
            f"q must have a head dimension of {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}, got {head_dim}"
        )
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.contiguous_rows(name, t)
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, got {type(is_causal).__name__}")


def check_scale(scale: float | None, q: Tensor) -> float:
    """The scale of the scores: 1/√D unless given."""
    if scale is None:
        return 1 / math.sqrt(q.shape[-1])
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not (FLOAT32.tiny < scale < FLOAT32.max / 2):
        raise ValueError(f"scale must be positive and finite in float32, got {scale}")
    return float(scale)


def check_attention_residual(x, q) -> None:
    """x must fit the result of attention on a checked q."""
    checks.tensor("x", x, rank=3)
    checks.residual("x", x, "q", q)
    batch, heads, q_len, head_dim = q.shape
    checks.shape("x", x, ("be [B, Nq, H*D] =", (batch, q_len, heads * head_dim)))
    checks.contiguous_rows("x", x)


# ---- the registered operators: torch.compile and opcheck see these ----


@gradients.operator
def _attention(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor | None,
    c_skip: Tensor | None, c_out: Tensor | None, scale: float, is_causal: bool,
) -> Tensor:  # fmt: skip
    check_device("q", q.device)
    c = checks.as_launched(c_skip, c_out)
    return _launch(q, k, v, x, *c, scale, is_causal)[0]


def _launch(q, k, v, x, *arguments) -> tuple:
    attention_forward = load("rcmlib.attention.forward").attention_forward
    dtypes = (q.dtype if x is None else x.dtype, q.dtype, torch.float32)
    return run_on_device(attention_forward, dtypes, q, k, v, x, *arguments)


@torch.library.register_fake("rcmlib::attention")
def empty_result(q, k, v, x, *_):
    batch, heads, q_len, head_dim = q.shape
    like = q if x is None else x
    return like.new_empty(batch, q_len, heads * head_dim)


@gradients.operator
def _attention_saving(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor | None,
    c_skip: Tensor | None, c_out: Tensor | None, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, f, lse). Without x, out is f, and the second result is empty."""
    check_device("q", q.device)
    c = checks.as_launched(c_skip, c_out)
    return _launch(q, k, v, x, *c, scale, is_causal, True)


@torch.library.register_fake("rcmlib::attention_saving")
def _(q, k, v, x, c_skip, c_out, scale, is_causal):
    out = empty_result(q, k, v, x)
    f = q.new_empty(0 if x is None else out.shape)
    return out, f, q.new_empty(q.shape[:3], dtype=torch.float32)


@gradients.operator
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
    c_out: Tensor | None, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    attention_backward = load("rcmlib.attention.backward").attention_backward
    (c,) = checks.as_launched(c_out, default=1.0)
    arguments = (grad, q, k, v, lse, delta, c, scale, is_causal)
    return run_on_device(attention_backward, [q.dtype] * 3, *arguments)


@torch.library.register_fake("rcmlib::attention_backward")
def _(grad, q, k, v, lse, delta, c_out, scale, is_causal):
    def result(t):
        batch, heads, n, head_dim = t.shape
        return t.new_empty(batch, n, heads, head_dim).transpose(1, 2)

    return result(q), result(k), result(v)


def two_products(q, k, *_, **__):
    return 4 * math.prod(q) * k[2]


gradients.count_flops("attention", "attention_saving")(two_products)


@gradients.count_flops("attention_backward")
def _(grad, q, k, *_, **__):
    return 10 * math.prod(q) * k[2]


class _Attention(torch.autograd.Function):
    """What torch.func asks for and `register_autograd` (torch 2.11) cannot give."""

    @staticmethod
    @gradients.signed
    def forward(q, k, v, x, c_skip, c_out, scale, is_causal):
        return torch.ops.rcmlib.attention_saving(q, k, v, x, c_skip, c_out, scale, is_causal)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, x, c_skip, c_out, ctx.scale, ctx.is_causal = inputs
        out, f, lse = output
        ctx.mark_non_differentiable(f, lse)
        ctx.set_materialize_grads(False)  # f and lse get none: no zeros for them
        ctx.residual = None if x is None else x.dtype
        f = out if x is None else f
        x = x if ctx.needs_input_grad[4] else None  # for the gradient of its coefficient
        ctx.save_for_backward(q, k, v, x, c_skip, c_out, f, lse)

    @staticmethod
    @gradients.once_differentiable
    def backward(ctx, grad, _f, _lse):
        if grad is None:  # what came after passed none on
            return (None,) * 8
        q, k, v, x, c_skip, c_out, f, lse = ctx.saved_tensors
        dx_wanted, *c_wanted = ctx.needs_input_grad[3:6]
        grad = gradients.dense_rows(grad)
        heads_wanted = any(ctx.needs_input_grad[:3])
        skip, out, unit = c_skip, c_out, None
        if heads_wanted and c_out is not None and q.dtype == torch.float16:
            # g, or a product with it, may overflow where c_out·g does not. So a power of two
            # a sample, which rounds nothing, goes first, and c_out's remainder at the end.
            skip, out = (gradients.per_sample(c, grad) for c in (c_skip, c_out))
            unit = gradients.power_of_two(grad, out)
        # One pass over g: dx, unit·g, the sums g·x, and δ, one number a row and head.
        dx, scaled, x_dots, delta = torch.ops.rcmlib.skip_backward(
            grad, x, f, skip, out if unit is None else unit, q.shape[-1],
            ctx.residual if dx_wanted else None, None if unit is None else q.dtype,
        )  # fmt: skip
        dq = dk = dv = None
        if heads_wanted:
            g = (grad.to(q.dtype), delta, out)
            if unit is not None:
                g = (scaled, (unit.view(-1, 1, 1) * delta).float(), out / unit)
            dq, dk, dv = torch.ops.rcmlib.attention_backward(
                g[0], q, k, v, lse, *g[1:], ctx.scale, ctx.is_causal
            )
        return (
            *gradients.wanted((dq, dk, dv, dx), ctx.needs_input_grad),
            gradients.coefficient_grad(x_dots, c_skip) if c_wanted[0] else None,
            gradients.coefficient_grad(delta, c_out) if c_wanted[1] else None,
            *(None, None),
        )
