"""What a random call is, and how it is shown."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tests.random_calls.rounding import no_terms


@dataclass
class Call:
    """ours, spec and peer take the inputs, by name, and the options."""

    ours: Callable
    spec: Callable  # in float64
    peer: Callable  # PyTorch, in the same precision
    inputs: dict
    options: dict = field(default_factory=dict)
    constant: tuple = ()  # the inputs whose gradient nobody asks for
    casts: tuple = ()  # the inputs that ours casts inside autocast
    terms: Callable = no_terms  # how large what is rounded was (rounding.py)
    together: bool = False  # all gradients or none, measured by the whole gradient
    wide: tuple = ()  # results that are rounded once, to their own dtype
    precision: torch.dtype | None = None  # of the products
    at_zero: bool = False  # c_skip = 1, c_out = 0: the result is x
    # How it is called:
    name: str = ""
    mode: str = "grad"
    wanted: tuple = ()  # the inputs that require a gradient
    autocast: torch.dtype | None = None
    again: bool = False  # more than once: its plan is known
    g: str = "contiguous"  # strides of the incoming gradient

    def __str__(self):
        parts = [f"{n}={shown(v)}" for n, v in (self.inputs | self.options).items()]
        how = [self.mode]
        if self.wanted:
            how.append(f"{', '.join(self.wanted)} require it, g {self.g}")
        if self.autocast:
            how.append(f"autocast {short(self.autocast)}")
        if self.again:
            how.append("again")
        return f"{self.name}({', '.join(parts)}) {'; '.join(how)}"


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shown(value) -> str:
    if not isinstance(value, torch.Tensor):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    text = f"{list(value.shape)} {short(value.dtype)}"
    if not value.is_contiguous():
        text += f" strides {value.stride()}"
    if value.data_ptr() % 16:
        text += " misaligned"
    return text if value.ndim else f"{text} on {value.device.type}"
