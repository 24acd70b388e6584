"""Does each planned launch run the kernel that Triton would choose for the same arguments?

Run by tests/test_launch.py with the compiling Triton. No GPU is used: the driver is a stub, and
each of Triton's cache keys "compiles" into an object of its own, which only notes that it ran.
Prints how many launches were compared, and how many different kernels they ran.
"""

import itertools
from dataclasses import fields, is_dataclass

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.experimental.gluon.nvidia import hopper as gluon
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from rcmlib.attention import backward as attention_backward
from rcmlib.attention import forward as attention
from rcmlib.core.launch import Plan
from rcmlib.projection import gate
from rcmlib.projection import kernel as projection
from rcmlib.sage import quantize
from rcmlib.sage.kernel import sage_attention_forward
from rcmlib.skip import kernel as skip

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Driver:
    """An H100, as far as Triton asks before it launches. Each time the stream is another."""

    def __init__(self):
        self.stream = 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        self.stream += 1
        return self.stream


class Compiled(CompiledKernel):
    """What Triton caches and runs."""

    function = packed_metadata = None

    def __init__(self):
        pass

    def _init_handles(self):
        pass

    def launch_metadata(self, *args):
        return None

    def run(self, *launch):
        grid, stream, arguments = launch[:3], launch[3], launch[9:]
        RAN.append((self, grid, stream, arguments))


def compile_nothing(self, key, signature, device, *rest):
    return self.device_caches[device][0].setdefault(key, Compiled())


RAN, COMPARED = [], []
DRIVER = Driver()
planned_launch = Plan.launch


def launch_and_compare(self, *tensors):
    """Then Triton's own launch: by name as the plan has it, checked descriptors included."""
    planned_launch(self, *tensors)
    assert RAN[-1][2] == DRIVER.stream
    boxed = [
        checked_descriptor(t, *b) for t, b in zip(tensors, self.boxes, strict=False)
    ]
    tensors = (*boxed, *tensors[len(boxed) :])
    self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
    (compiled, grid, _, arguments), (chosen, its_grid, _, expected) = RAN
    assert compiled is chosen, (self.kernel, self.numbers, self.constants)
    assert grid == its_grid
    assert len(arguments) == len(self.kernel.arg_names)
    for a, b in zip(arguments, expected, strict=True):
        assert same(a, b), (self.kernel, a, b)
    RAN.clear()
    COMPARED.append(chosen)


def checked_descriptor(tensor, *box):
    """Triton's, or Gluon's, which has a layout, too."""
    return (TensorDescriptor if len(box) == 3 else gluon.TensorDescriptor)(tensor, *box)


def same(a, b):
    if is_dataclass(b):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(b))
    return (
        a is b if isinstance(b, torch.Tensor) else a == b
    )  # numbers, and tuples of them


def tensor(*shape, dtype=BF16, offset=0, pad=0):
    """A view into a larger storage: `offset` elements from its start, `pad` between rows."""
    *outer, last = shape
    rows = torch.empty(offset + 2 * last * (1 + sum(outer) + torch.Size(outer).numel()))
    rows = rows.to(dtype)[offset:]
    strides, stride = [1], last + pad
    for size in reversed(outer):
        strides.insert(0, stride)
        stride *= size
    return rows.as_strided(shape, strides)


def coefficients(batch):
    wide = torch.rand(batch + 1)
    yield 0.5, 1.0
    yield torch.rand(batch), torch.rand(batch)
    yield torch.rand(batch), wide[1:]  # not aligned
    yield wide[1:], torch.rand(batch, dtype=torch.float64)


def layouts():
    """(batch, q_len, kv_len, head_dim, dtype, x's dtype, offset, pad)"""
    sizes = [(1, 1, 1, 16), (2, 128, 64, 64), (2, 128, 128, 64), (3, 37, 100, 96)]
    dtypes = [(BF16, BF16), (FP16, FP16), (FP16, FP32), (FP32, FP32)]
    for size, dtype in itertools.product(sizes, dtypes):
        for offset, pad in ((0, 0), (1, 0), (0, 16), (0, 1)):
            yield *size, *dtype, offset, pad


def launch_all(batch, q_len, kv_len, dim, dtype, x_dtype, offset, pad):
    def new(*shape, dtype=dtype):
        return tensor(*shape, dtype=dtype, offset=offset, pad=pad)

    q, k, v = (new(batch, 2, n, dim) for n in (q_len, kv_len, kv_len))
    x = new(batch, q_len, 2 * dim, dtype=x_dtype)
    a = new(batch, q_len, 2 * dim)
    weight, bias = new(48, 2 * dim), new(48)
    y = new(batch, q_len, 48, dtype=x_dtype)
    for (c_skip, c_out), flag in zip(
        coefficients(batch), (False, True, False, True), strict=True
    ):
        scale = 1.0 if flag else 0.25
        for residual in (x, None):
            for save in (False, True):
                attention.attention_forward(
                    q, k, v, residual, c_skip, c_out, scale, flag, save
                )
            smooth = (flag, not flag, flag)
            for pv in ("fp8", "fp16"):
                sage_attention_forward(
                    q, k, v, residual, c_skip, c_out, scale, flag, *smooth, pv
                )
        _, f, lse = attention.attention_forward(
            q, k, v, x, c_skip, c_out, scale, flag, True
        )
        for wanted, width in ((None, dim), (dtype, None), (FP32, dim)):
            skip.skip_backward(
                x, x if flag else None, f, c_skip, c_out, width, wanted, x_dtype
            )
        saved = (a, q, k, v, lse, lse.clone(), c_out, scale, flag)
        attention_backward.attention_backward(*saved)
        attention_backward.plain_backward(*saved)
        skip.skip_forward(x, a, c_skip, c_out)
        for b, save in ((bias, flag), (None, not flag)):
            projection.projection_forward(a, weight, b, y, c_skip, c_out, save)
        gates = [new(batch, 48), new(batch, q_len, 48, dtype=x_dtype)]
        for c in gates:
            projection.projection_forward(a, weight, bias, y, 1.0, c, flag)
            for product in (torch.empty_like(y, dtype=dtype), None):
                gate.gate_backward(y, product, c, dtype if flag else None)
    quantize.quantize_int8(q, 32, factor=0.5)


driver.set_active(DRIVER)
JITFunction._do_compile = compile_nothing
Plan.launch = launch_and_compare
for values in layouts():
    launch_all(*values)
print(len(COMPARED), len(set(COMPARED)))
