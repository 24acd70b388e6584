"""Does each planned launch run the kernel that Triton would choose for the same arguments?

Run by tests/test_launch.py with the compiling Triton. No GPU is used: the driver is a stub, and
each of Triton's cache keys "compiles" into an object of its own. Prints how many launches were
compared, and how many different kernels they ran.
"""

import itertools

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rcmlib.ops import attention, attention_backward, gate, projection, quantize, skip
from rcmlib.ops.plan import Plan
from rcmlib.ops.sage_attention import sage_attention_forward

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Driver:
    """An H100, as far as Triton asks before it launches."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """What Triton caches and runs."""

    function = packed_metadata = None

    def launch_metadata(self, *args):
        return None

    def run(self, *args):
        pass


def compile_nothing(self, key, signature, device, *rest):
    return self.device_caches[device][0].setdefault(key, Compiled())


COMPARED = []


def launch_and_compare(self, *tensors):
    chosen = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
    assert self.compiled in (None, chosen), (self.kernel, self.numbers, self.constants)
    self.compiled = chosen
    assert len(self.rest) + len(tensors) == len(self.kernel.arg_names)
    COMPARED.append(chosen)


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
    yield torch.tensor(0.5).double(), torch.tensor(1.0).double()
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
        attention_backward.attention_backward(
            a, q, k, v, lse, lse.clone(), c_out, scale, flag
        )
        skip.skip_forward(x, a, c_skip, c_out)
        for b, save in ((bias, flag), (None, not flag)):
            projection.projection_forward(a, weight, b, y, c_skip, c_out, save)
        gates = [new(batch, 48), new(batch, q_len, 48, dtype=x_dtype)]
        for c in gates:
            projection.projection_forward(
                a, weight, bias, y, torch.tensor(1.0), c, flag
            )
            for product in (torch.empty_like(y, dtype=dtype), None):
                gate.gate_backward(y, product, c, dtype if flag else None)
    quantize.quantize_int8(q, 32, factor=0.5)


driver.set_active(Driver())
JITFunction._do_compile = compile_nothing
Plan.launch = launch_and_compare
for values in layouts():
    launch_all(*values)
print(len(COMPARED), len(set(COMPARED)))
