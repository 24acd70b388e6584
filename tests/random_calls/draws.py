"""Random tensors, strides, lengths and coefficients, each decided by (seed, index) alone.

A call has two sources. `kind` decides what a kernel is compiled for (dtypes, head dimension,
layouts, options, which class a length is of, which gradients are wanted) and is one of KINDS
for each function: so ten thousand calls compile not ten thousand kernels, but some 1500, most
of them small. `call` decides the rest. Another seed has other kinds.
"""

import random

import torch

from tests.inputs import DTYPES

KINDS = 32
HEAD_DIMS = 16, 17, 24, 40, 64, 72, 96, 128, 160, 256
LENGTHS = {  # Triton compiles anew for 1, for multiples of 16, for the others
    "one": lambda draw, most: 1,
    "whole": lambda draw, most: 64 * draw.randint(1, most // 64),
    "sixteens": lambda draw, most: 16 + 32 * draw.randint(0, most // 32 - 1),
    "ragged": lambda draw, most: draw.randint(2, most) | 1,
}


def transposed(new, *shape):
    """The third dimension from the end lies inside the second: heads of a token, say."""
    if len(shape) < 3:
        return new(*shape)
    *outer, a, b, c = shape
    return new(*outer, b, a, c).transpose(-3, -2)


def packed(new, *shape):
    """One of three that lie side by side in each token, as q, k and v do."""
    *outer, a, c = shape
    if not outer:
        return new(a, 3, c)[:, 1]
    *outer, heads = outer
    return new(*outer, a, 3, heads, c).select(-3, 1).transpose(-3, -2)


def misaligned(new, *shape):
    """The first address is no multiple of 16 bytes."""
    return new(torch.Size(shape).numel() + 1)[1:].view(shape)


LAYOUTS = {
    "contiguous": lambda new, *shape: new(*shape),
    "transposed": transposed,
    "packed": packed,
    "some channels": lambda new, *shape: new(*shape[:-1], shape[-1] + 16)[..., 8:-8],
    "some rows": lambda new, *shape: new(*shape[:-2], shape[-2] + 3, shape[-1])[
        ..., 2:-1, :
    ],
    "misaligned": misaligned,
    "one for all samples": lambda new, *shape: new(1, *shape[1:]).expand(shape),
    "one for all heads": lambda new, first, *shape: new(first, 1, *shape[1:]).expand(
        first, *shape
    ),
}
STRIDED = tuple(LAYOUTS)[:-1]  # with two dimensions or more
COEFFICIENTS = "float", "int", "on the CPU", "on the device", "a sample", "a sample"


class Draw:
    """The random choices of one call: `name` of the function, `dtype`, and what is asked.

    `large` where the device is a GPU: lengths up to 1500, else 70.
    """

    def __init__(self, seed: int, index: int, device: torch.device, weights: dict):
        self.call = random.Random(f"{seed} {index}")
        (self.name,) = self.call.choices(list(weights), list(weights.values()))
        self.number = self.call.randrange(KINDS)
        self.kind = random.Random(f"{seed} {self.name} {self.number}")
        self.device = device
        self.large = device.type == "cuda"
        self.most = 1500 if self.large else 70
        self.values = torch.Generator(device)
        self.values.manual_seed(self.call.getrandbits(40))
        self.dtype = self.kind.choice(DTYPES)
        self.at_zero = False
        self.autocast = None
        if self.dtype == torch.float32 and self.kind.random() < 0.4:
            self.autocast = self.kind.choice(DTYPES[1:])
        self.residual = torch.float32 if self.kind.random() < 0.25 else self.dtype

    def tensor(self, *shape, dtype=None, layout="contiguous", size=1.0, shifts=True):
        """Normal numbers, some larger, some around an offset of each channel."""
        shift = self.call.random() if shifts else 1.0

        def new(*shape):
            t = torch.randn(shape, generator=self.values, device=self.device)
            if shift < 0.15:
                offset = torch.randn(
                    shape[-1], generator=self.values, device=self.device
                )
                t = t + 4 * offset
            elif shift < 0.25:
                t = 4 * t
            return (size * t).to(dtype or self.dtype)

        return LAYOUTS[layout](new, *shape)

    def layout(self, names=STRIDED) -> str:
        return self.kind.choice(("contiguous", *names))

    def length_kind(self) -> str:
        return self.kind.choices(list(LENGTHS), (1, 4, 2, 5))[0]

    def length(self, kind: str, most: int | None = None) -> int:
        return LENGTHS[kind](self.call, most or self.most)

    def batch(self) -> int:
        return self.call.randint(1, 5 if self.large else 2)

    def coefficients(self, batch: int) -> tuple:
        """c_skip and c_out; in one call of ten 1 and 0, as at t = 0."""
        self.at_zero = self.call.random() < 0.1
        values = (1, 0) if self.at_zero else (None, None)
        return tuple(self.coefficient(batch, value) for value in values)

    def coefficient(self, batch: int, value: int | None):
        """A number or a tensor: 0-dimensional, on either device, or [B] with any start."""
        form = self.kind.choice(COEFFICIENTS)
        dtype = self.kind.choice((torch.float64, *DTYPES))
        start = self.kind.randint(0, 1)
        if form == "int":
            return self.call.randint(-1, 2) if value is None else value
        if form == "a sample":
            c = torch.rand(batch + 1, generator=self.values, device=self.device)
            c = 4 * c - 2 if value is None else torch.full_like(c, value)
            return c.to(dtype)[start : start + batch]
        number = self.call.uniform(-2, 2) if value is None else float(value)
        if form == "float":
            return number
        device = "cpu" if form == "on the CPU" else self.device
        return torch.tensor(number, dtype=dtype, device=device)
