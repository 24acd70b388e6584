"""Launches: planned once for each layout of their tensors, kept in one cache, and repeated.

Grid, tile, strides and the compiled kernel follow from the tensors' layouts and a few options.
Working them out takes longer than all else in a call. So a launcher keeps its plans in `PLANS`,
under a key that holds all a launch depends on (`key_of`). The checks of the input look at no
more. So a call whose key is known would pass them again, and goes straight to its plan, past
checks and dispatcher; unless autograd, a tracer or a profiler wants to see it (`known`).
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from traceback import walk_tb

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

from rcmlib.core import interpreting

# The dispatch keys that this thread adds to a tensor's own: torch.func's transforms, tracers
# and dispatch modes each add one. These are the sets without any.
_added_keys = torch._C._dispatch_tls_local_include_set
UNWATCHED = {_added_keys().raw_repr()}
with torch.inference_mode():
    UNWATCHED.add(_added_keys().raw_repr())
KEPT = 8192  # plans, then the cache starts anew
PLANS: dict[tuple, object] = {}


def key_of(kind: str, arguments: tuple, *options) -> tuple:
    """Equal for calls of one kind with arguments of the same layouts and equal options.

    arguments: tensors, None, and floats, on whose values no launch depends. options: by type
    and value (True equals 1). It is flat, which is built and hashed fastest. Still no two
    lists of arguments share one: an argument's first entry tells how many follow.
    """
    key = [kind]
    for a in arguments:
        if isinstance(a, Tensor):
            # Triton compiles for addresses in multiples of 16 bytes, or for any.
            key += (a.dtype, a.device, a.shape, a.stride(), a.data_ptr() % 16 == 0)
        else:
            key.append(type(a))
    return (*key, *map(type, options), *options)


def known(kind: str, arguments: tuple, *options):
    """What a launcher keeps for the launch that a public call would end in; None if nothing,
    or if the call has to go there. The same kind, arguments and options as the launcher's own
    `key_of`, or it is never found.

    Inside torch.compile it has to: a graph must not depend on what is known.
    """
    if (
        torch.compiler.is_compiling()
        or _added_keys().raw_repr() not in UNWATCHED
        or torch._C._is_torch_function_mode_enabled()
        or profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
    ):
        return None
    training = torch.is_grad_enabled()
    for a in arguments:
        kind_of_a = type(a)
        if kind_of_a is Tensor or kind_of_a is Parameter:
            # A lazily negated tensor is negated by the dispatcher.
            if a.is_neg() or (training and a.requires_grad):
                return None
        elif kind_of_a is not float and a is not None:
            return None
    try:
        return PLANS.get(key_of(kind, arguments, *options))
    except (RuntimeError, TypeError):
        return None  # a tensor without strides, or without memory; an option without a hash


def planned(key: tuple, make: Callable[[], object]):
    """What is kept under this key; `make` is called if nothing is. It must keep no tensor."""
    plan = PLANS.get(key)
    if plan is None:
        if len(PLANS) >= KEPT:
            PLANS.clear()
        plan = PLANS[key] = make()
    return plan


@dataclass(frozen=True)
class Tile:
    """How much of attention one program holds, and with how many warps and buffers."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # the most registers a thread may have (None: no limit)
    two: bool = False  # a program owns two blocks of block_m queries
    fixed: bool = False  # all weights are relative to the last tiles' maximum


@dataclass(frozen=True, kw_only=True)
class Variant(Tile):
    """How an attention kernel (forward, backward, 8-bit) is compiled: its constants."""

    head_dim: int
    block_d: int  # head_dim, or the next power of two
    tma: bool  # the copy engine reads the tensors
    causal: bool
    ragged: bool  # the last tile of keys is not full
    per_sample: bool  # coefficients are [B], not numbers
    precision: str = "tf32"  # "ieee" for float32; 16-bit products have but one


@dataclass(frozen=True)
class Team:
    """Warps with jobs on Hopper, and the tiles that they share (attention/hopper.py)."""

    block_n: int  # keys
    groups: int  # of four warps, each of which owns 64 queries: 2 or 3
    stages: int  # tiles of keys, and of values, on their way or in use
    registers: int  # of a thread in a group; the warp that copies gets by with 24
    turns: bool = False  # the groups take turns on the tensor core
    fixed: bool = False  # as a Tile's


@dataclass(frozen=True, kw_only=True)
class TeamVariant(Team):
    """How the kernel for a Team is compiled."""

    head_dim: int
    block_d: int  # 64 or 128
    causal: bool
    ragged: bool
    per_sample: bool
    num_warps: int = 4  # of the first group; the kernel asks for the others
    num_stages: int = 1  # Triton has nothing to pipeline


# A tensor's shape and strides, the shape of one copy; for Gluon also its layout there.
Box = tuple[list, list, list] | tuple[list, list, list, object]


class Plan:
    """kernel[grid](*tensors, *numbers, **constants), for any tensors of the same layouts.

    numbers: integers and tuples of them. boxes: of the first tensors, which go in as
    descriptors. The constant HOW, where there is one, says how many warps and stages.

    The first launch is Triton's own, which compiles the kernel or finds it. It returns what
    ran, and later launches run that: launch hooks work as ever, pre-run hooks and changes of
    `triton.knobs` come too late. Interpreted kernels are launched by Triton every time.
    """

    def __init__(self, kernel, programs: int, *numbers, boxes: Sequence[Box] = (), **constants):
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.numbers = numbers
        self.boxes = boxes
        if how := constants.get("HOW"):
            constants |= {"num_warps": how.num_warps, "num_stages": how.num_stages}
            constants["maxnreg"] = getattr(how, "maxnreg", None)
        self.constants = constants
        self.run = None
        # As the compiled kernel takes them, by position.
        names = getattr(kernel, "arg_names", ())
        self.rest = (*numbers, *(constants[n] for n in names if n in constants))

    def launch(self, *tensors) -> None:
        """On the current stream and device. tensors: the kernel's first arguments: tensors,
        None, and floats, on whose values Triton never specialises."""
        if self.boxes:
            described = map(_descriptor_class(len(self.boxes[0]) > 3), tensors, self.boxes)
            tensors = (*described, *tensors[len(self.boxes) :])
        if self.run is None:
            try:
                compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
            except Exception as error:  # in `_build` Triton runs a C compiler, and no more
                if all(f.f_code.co_name != "_build" for f, _ in walk_tb(error.__traceback__)):
                    raise
                raise RuntimeError(
                    "Triton needs a C compiler (apt install gcc, or CC=/its/path) and Python's "
                    "headers (apt install python3-dev) to launch kernels"
                ) from error
            if compiled is not None:
                self.run = compiled[self.grid]
        else:
            self.run(*tensors, *self.rest)


@functools.cache
def _descriptor_class(gluon: bool) -> type:
    if gluon:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    else:
        from triton.tools.tensor_descriptor import TensorDescriptor

    class Descriptor(TensorDescriptor):
        """Without the checks at every call. Planning makes sure of what they ask."""

        def __init__(self, base: Tensor, box: Box):
            self.base = base
            self.shape, self.strides, self.block_shape, *rest = box
            if rest:
                (self.layout,) = rest

    return Descriptor


def descriptors_allowed(*tensors: Tensor) -> bool:
    """Can the copy engine address these? Base and strides in multiples of 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0
        and all(
            stride > 0 and stride * t.itemsize % 16 == 0
            for stride, size in zip(t.stride()[:-1], t.shape[:-1], strict=True)
            if size > 1
        )
        for t in tensors
    )


def boxes_of_rows(tensors: Sequence[Tensor], rows: Sequence[int], cols: int) -> tuple[Box, ...]:
    """Tensors [B, H, N, D], or seen as such, each as boxes of so many rows of one head."""
    boxes = []
    for t, count in zip(tensors, rows, strict=True):
        # The stride of a dimension of size 1 is never used, but has to look aligned.
        strides = [s if n > 1 else 16 for s, n in zip(t.stride(), t.shape, strict=True)]
        boxes.append((list(t.shape), [*strides[:-1], 1], [1, 1, count, cols]))
    return tuple(boxes)


def result(like: Tensor, shape, dtype: torch.dtype | None = None, wanted=True) -> Tensor:
    """A tensor to be filled, on like's device, in its dtype unless told. Unwanted: empty."""
    return like.new_empty(shape if wanted else (0,), dtype=dtype)


_INTERPRETER = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child has one thread: nobody would release it
    os.register_at_fork(after_in_child=_INTERPRETER._at_fork_reinit)


def run_on_device(
    launcher: Callable[..., Tensor | tuple[Tensor, ...]], dtypes: Sequence[torch.dtype], *args
) -> Tensor | tuple[Tensor, ...]:
    """Runs a launcher on its first argument's device. dtypes: of the results, if interpreted.

    Triton's interpreter is not for two threads: they take turns. It gets bfloat16 arithmetic
    wrong, silently (NumPy has no such type), so bfloat16 inputs are computed in float32 and the
    results rounded; and tensors of a GPU are computed on the CPU.
    """
    first = args[0]
    if first.is_cuda and not interpreting():
        if first.get_device() == torch.cuda.current_device():
            return launcher(*args)
        with torch.cuda.device(first.device):  # Triton launches on the current device
            return launcher(*args)
    with _INTERPRETER, np.errstate(all="ignore"):  # NaN and infinity are values, no accidents
        results = launcher(*map(_for_interpreter, args))
    if isinstance(results, Tensor):
        return results.to(first.device, dtypes[0])
    return tuple(r.to(first.device, dtype) for r, dtype in zip(results, dtypes, strict=False))


def _for_interpreter(a):
    if a is torch.bfloat16:
        return torch.float32
    if isinstance(a, Tensor) and (a.is_cuda or a.dtype == torch.bfloat16):
        # Contiguous: strides of a view that overlaps itself are not kept by a conversion.
        dtype = torch.float32 if a.dtype == torch.bfloat16 else a.dtype
        return a.to("cpu", dtype, memory_format=torch.contiguous_format)
    return a
