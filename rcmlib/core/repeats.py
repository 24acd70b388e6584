"""Calls like an earlier one go straight to their launch, past the checks and the dispatcher.

Both look at types, dtypes, devices, shapes and strides, and plans at alignment too; none of
them at the numbers in a tensor. A call that agrees in all of these with one that went through
would pass again, and end in the same launch; unless somebody else wants to see it. Then it
takes the long way.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

from rcmlib.core.layout import layout_key

# The dispatch keys that this thread adds to a tensor's own: torch.func's transforms, tracers
# and dispatch modes each add one. These are the sets without any.
_added_keys = torch._C._dispatch_tls_local_include_set
UNWATCHED = {_added_keys().raw_repr()}
with torch.inference_mode():
    UNWATCHED.add(_added_keys().raw_repr())
KEPT = 4096  # keys of each operation
OPTIONS = {bool, float, str, type(None)}
CPU, META = torch.device("cpu"), torch.device("meta")


class Repeats:
    """The calls that went through, each with what its launcher wants to know: its plan."""

    def __init__(self):
        self.known = {}

    def find(self, key):
        # Inside torch.compile the key is None: a graph must not depend on what is known.
        return None if key is None else self.known.get(key)

    def add(self, key, value: Callable[[], object]) -> None:
        """value is called if the call may be repeated."""
        if key is None or META in key:  # nothing is launched on that device
            return
        if CPU in key and torch.bfloat16 in key:  # launched on copies (`checks.launch`)
            return
        if len(self.known) >= KEPT:
            self.known.clear()
        self.known[key] = value()


def call_key(arguments: tuple, *options) -> tuple | None:
    """What repetitions of a call have in common. None: it has to take the long way.

    arguments: tensors, floats, whose values do not matter, and None. options: by value.
    All that a plan depends on is in it.
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
        kind = type(a)
        if kind is Tensor or kind is Parameter:
            # A lazily negated tensor is negated by the dispatcher.
            if a.is_neg() or (training and a.requires_grad):
                return None
        elif kind is not float and a is not None:
            return None
    kinds = tuple(map(type, options))  # True equals 1.0, and is refused elsewhere
    if not OPTIONS.issuperset(kinds):
        return None
    try:
        return layout_key(arguments) + kinds + options
    except RuntimeError:  # a tensor without strides, or without memory of its own
        return None


def same(c_skip, c_out, checked: tuple[Tensor, Tensor]) -> bool:
    """Does the launcher get a caller's coefficients as they are, or two numbers?"""
    if type(c_skip) is float and type(c_out) is float:
        return True
    return c_skip is checked[0] and c_out is checked[1] and c_skip.ndim == 1
