"""Layouts of tensors: what a launch depends on in them, and the key to find it again by."""

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """All of a tensor but its numbers, and where they are."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    strides: tuple[int, ...]
    aligned: bool  # to 16 bytes: Triton compiles for that, and the copy engine needs it


def layout(t: Tensor) -> Layout:
    return Layout._make(fields(t))


def fields(t: Tensor) -> tuple:
    """`Layout`'s, without the time that it takes to make one. RuntimeError for a tensor that
    has no strides, or no memory of its own."""
    return (t.dtype, t.device, t.shape, t.stride(), t.data_ptr() % 16 == 0)


def layout_key(arguments) -> tuple:
    """Equal for arguments of the same layouts: the fields of a tensor, the type of a float or
    None, and type and value (True equals 1) of all else.

    It is flat, which is built and hashed fastest. Still no two lists of arguments share one:
    the first entry of each argument tells how many follow.
    """
    key = []
    for a in arguments:
        if isinstance(a, Tensor):
            key += fields(a)
        elif a is None or isinstance(a, float):
            key.append(type(a))
        else:
            key += (type(a), a)
    return tuple(key)


def is_contiguous(t: Layout) -> bool:
    stride = 1
    for size, actual in zip(reversed(t.shape), reversed(t.strides), strict=True):
        if size > 1 and actual != stride:
            return False
        stride *= size
    return True
