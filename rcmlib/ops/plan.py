"""A launch is planned once for each layout of its tensors, and then repeated.

Grid, tile, strides and the compiled kernel follow from the tensors' layouts alone. Working
them out, and having Triton bind some 30 arguments and look up what it compiled for them, takes
longer than everything else in a call together. So launchers cache their plans by layout.
"""

import math
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

PLANS = 1024  # that each launcher keeps; the oldest go first


class Layout(NamedTuple):
    """What a launch depends on in a tensor: all but its numbers, and where they are."""

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    aligned: bool  # to 16 bytes: Triton compiles for that, and the copy engine needs it


def layout(t) -> Layout | None:
    """None for None, and for a number: a launch does not depend on its value."""
    if not isinstance(t, torch.Tensor):
        return None
    return Layout(t.dtype, t.shape, t.stride(), t.data_ptr() % 16 == 0)


def is_contiguous(t: Layout) -> bool:
    stride = 1
    for size, actual in zip(reversed(t.shape), reversed(t.strides), strict=True):
        if size > 1 and actual != stride:
            return False
        stride *= size
    return True


class Plan:
    """kernel[grid](*tensors, *numbers, **constants), for any tensors of the same layouts.

    The first launch is Triton's own, which compiles the kernel or finds it. It returns what
    ran, and later launches run that: launch hooks work as ever, pre-run hooks and changes of
    `triton.knobs` come too late. Interpreted kernels are launched by Triton every time.
    """

    def __init__(self, kernel, programs: int, *numbers, **constants):
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.numbers = numbers
        self.constants = constants
        self.compiled = None
        # As the compiled kernel takes them, by position.
        names = getattr(kernel, "arg_names", ())
        self.rest = (*numbers, *(constants[n] for n in names if n in constants))

    def launch(self, *tensors) -> None:
        """tensors: the kernel's first arguments; tensors, descriptors, None, and floats, on
        whose values Triton never specialises."""
        if self.compiled is None:
            launch = self.kernel[self.grid]
            self.compiled = launch(*tensors, *self.numbers, **self.constants)
        else:
            self.compiled[self.grid](*tensors, *self.rest)


class Box(NamedTuple):
    """How the copy engine reads a tensor of a known layout: box by box."""

    shape: list[int]
    strides: list[int]
    block: list[int]

    def of(self, t: torch.Tensor) -> TensorDescriptor:
        return _Checked(t, *self)


class _Checked(TensorDescriptor):
    """Without the checks at every call. Planning makes sure of what they ask."""

    def __post_init__(self):
        pass


def descriptors_allowed(*layouts: Layout) -> bool:
    """Can the copy engine address these? Base and strides in multiples of 16 bytes."""
    return all(
        t.aligned
        and all(
            stride > 0 and stride * t.dtype.itemsize % 16 == 0
            for stride, size in zip(t.strides[:-1], t.shape[:-1], strict=True)
            if size > 1
        )
        for t in layouts
    )


def box_of_rows(t: Layout, rows: int, block_d: int) -> Box:
    """A tensor [B, H, N, D] as boxes of `rows` tokens of one head."""
    # The stride of a dimension of size 1 is never used, but has to look aligned.
    strides = [
        s if n > 1 else 16 for s, n in zip(t.strides[:-1], t.shape[:-1], strict=True)
    ]
    return Box(list(t.shape), [*strides, 1], [1, 1, rows, block_d])


def box_of_matrix(t: Layout, block: list[int]) -> Box:
    """A contiguous tensor as a matrix: all its rows below one another."""
    cols = t.shape[-1]
    return Box([math.prod(t.shape[:-1]), cols], [cols, 1], block)
