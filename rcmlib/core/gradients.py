"""What autograd and `torch.library` want: who needs a gradient, how often, and operators."""

import functools
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula


def wants_grad(*tensors: Tensor | None) -> bool:
    """Will a backward pass need what this call could save? Autograd has to see forward mode,
    too: an operator would drop the tangents in silence, a Function without a jvp says so."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def wanted(values: Sequence, needs_input_grad: Sequence[bool]) -> tuple:
    """The values whose input wants a gradient, None for the others."""
    return tuple(
        v if needed else None for v, needed in zip(values, needs_input_grad, strict=False)
    )


def signed(forward: Callable) -> Callable:
    """forward with its signature, which Function.apply would else work out at every call."""
    forward.__signature__ = inspect.signature(forward)
    return forward


def once_differentiable(backward: Callable) -> Callable:
    """A backward pass whose results, differentiated once more, raise instead of being zero.

    PyTorch's decorator of this name looks at the incoming gradients alone, and so lets a
    second derivative by the saved tensors vanish: after out.sum(), and in nested torch.func.
    """

    @functools.wraps(backward)
    def guarded(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        sources = [t for t in (*grads, *ctx.saved_tensors) if t is not None]
        some = [t for t in results if t is not None]
        if not some or not any(t.requires_grad for t in sources):
            return results
        tied = iter(_OnceOnly.apply(len(some), *some, *sources))
        return tuple(None if t is None else next(tied) for t in results)

    return guarded


class _OnceOnly(torch.autograd.Function):
    """The first `count` tensors, as functions of all of them that nobody can differentiate."""

    @staticmethod
    def forward(count, *tensors):
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "trying to differentiate twice: rcmlib's kernels have first derivatives only"
        )


def dense_rows(grad: Tensor) -> Tensor:
    """A gradient as the kernels read it; autograd may hand over any strides."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def per_sample(c: Tensor, like: Tensor) -> Tensor:
    """A coefficient as [B], on like's device in float64."""
    if c.ndim == 0 and like.is_cuda:  # a CUDA graph could not hold its copy
        return like.new_full(like.shape[:1], c.item(), dtype=torch.float64)
    return c.to(like.device, torch.float64).expand(like.shape[:1]).contiguous()


def power_of_two(grad: Tensor, c_out: Tensor) -> Tensor:
    """Near |c_out| [B], but such that the largest |power·g| of a sample is 32 to 4096."""
    top = grad.abs().amax((1, 2)).double().clamp_min(2.0**-100)
    return torch.exp2(torch.floor(torch.log2(c_out.abs().clamp(64 / top, 4096 / top))))


def coefficient_grad(dots: Tensor, c: Tensor) -> Tensor:
    """The kernels' partial sums [B, …] added up in float64, as the gradient of c [B]."""
    return dots.sum(tuple(range(1, dots.ndim)), dtype=torch.float64).to(c.dtype)


# ---- the registered operators: torch.compile and the dispatcher know them ----

LIBRARY = torch.library.Library("rcmlib", "DEF")


def count_flops(*names: str) -> Callable:
    """Decorates what `torch.utils.flop_counter` adds for these operators, from the shapes of
    their arguments: the products' multiplications and additions, as for PyTorch's own."""
    return register_flop_formula([getattr(torch.ops.rcmlib, name) for name in names])


def operator(function: Callable) -> Callable:
    """Registers `_name` as the operator torch.ops.rcmlib.name, on every device.

    The schema comes from the annotations; nothing is written to and no result is an argument.
    (`torch.library.custom_op` would take longer than all checks of the input.) Gradients are
    the business of the functions that call it: a backward pass through it raises an error.
    """
    name = function.__name__.removeprefix("_")
    schema = torch.library.infer_schema(function, mutates_args=())
    LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")

    def backward(_context, *_gradients):
        raise RuntimeError(
            f"torch.ops.rcmlib.{name} has no autograd formula; call the function of rcmlib "
            "that uses it"
        )

    torch.library.register_autograd(f"rcmlib::{name}", backward, lib=LIBRARY)
    return function
