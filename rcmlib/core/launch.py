"""A launch is planned once for each layout of its tensors, and then repeated.

Grid, tile, strides and the compiled kernel follow from the tensors' layouts alone. Working
them out, and having Triton bind some 30 arguments and look up what it compiled for them, takes
longer than everything else in a call together. So plans are kept by layout (`by_layout`).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rcmlib.core.layout import Layout, layout, layout_key

PLANS = 1024  # kept of each kind


def by_layout(make: Callable) -> Callable:
    """Calls `make` with layouts in place of tensors, once for each set of them.

    A number becomes None: a launch does not depend on its value. The other arguments, to be
    told apart by their values, are passed on.
    """
    plans = {}

    @functools.wraps(make)
    def find(*arguments):
        key = layout_key(arguments)
        plan = plans.get(key)
        if plan is None:
            plan = make(*map(_planned_for, arguments))
            if len(plans) >= PLANS:
                plans.clear()
            plans[key] = plan
        return plan

    find.cache_clear = plans.clear
    return find


def _planned_for(a):
    if isinstance(a, Tensor):
        return layout(a)
    return None if isinstance(a, float) else a


class Box(NamedTuple):
    """How the copy engine reads a tensor of a known layout: box by box."""

    shape: list[int]
    strides: list[int]
    block: list[int]


class Plan:
    """kernel[grid](*tensors, *numbers, **constants), for any tensors of the same layouts.

    boxes: of the first tensors, which go in as descriptors for the copy engine.

    The first launch is Triton's own, which compiles the kernel or finds it. It returns what
    ran, and later launches run that: launch hooks work as ever, pre-run hooks and changes of
    `triton.knobs` come too late. Interpreted kernels are launched by Triton every time.
    """

    def __init__(
        self,
        kernel,
        programs: int,
        *numbers,
        boxes: tuple[Box, ...] = (),
        **constants,
    ):
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.numbers = numbers
        self.boxes = boxes
        self.constants = constants
        self.run = None
        # As the compiled kernel takes them, by position.
        names = getattr(kernel, "arg_names", ())
        self.rest = (*numbers, *(constants[n] for n in names if n in constants))

    def launch(self, *tensors) -> None:
        """tensors: the kernel's first arguments; tensors, None, and floats, on whose values
        Triton never specialises. On the current stream of the current device."""
        if self.boxes:
            boxed = map(_Descriptor, tensors, self.boxes)
            tensors = (*boxed, *tensors[len(self.boxes) :])
        if self.run is None:
            launch = self.kernel[self.grid]
            compiled = launch(*tensors, *self.numbers, **self.constants)
            if compiled is not None:
                self.run = compiled[self.grid]
        else:
            self.run(*tensors, *self.rest)


class _Descriptor(TensorDescriptor):
    """Without the checks at every call. Planning makes sure of what they ask."""

    def __init__(self, base: Tensor, box: Box):
        self.base = base
        self.shape, self.strides, self.block_shape = box


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
