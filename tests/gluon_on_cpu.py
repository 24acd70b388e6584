"""Hopper's attention kernels on a CPU: their own Python source, with NumPy in Gluon's place.

    out, saved_f, lse = run(team, q, k, v, x, c_skip, c_out, scale, is_causal, programs, seed)
    dq, dk, dv = run_backward(g, q, k, v, lse, delta, c_out, scale, is_causal, seed)

Each partition of `warp_specialize` is a thread, and one of them runs at a time. Who goes on at
a barrier, and when a copy or a product is done, is drawn at random. So what a kernel may assume
only of mbarriers and waits is put to the test: a buffer that is overwritten while it is read, a
result that is read before it is there, and a wait that nobody ends are errors.
"""

import random
import threading
import types
from types import SimpleNamespace

import numpy as np
import torch

from rcmlib.attention import (
    backward_ring,
    dq_sum,
    hopper,
    hopper_backward,
    registers,
    ring,
)
from rcmlib.attention.forward import sources
from rcmlib.attention.tiles import LOG2_E
from rcmlib.core import epilogue

# A name that two of them have is the later one's.
FORWARD = (epilogue, ring, registers, hopper)
BACKWARD = (*FORWARD, backward_ring, dq_sum, hopper_backward)
BF16, FLOAT32, INT32, INT64 = "bf16", np.float32, np.int32, np.int64


class Stuck(AssertionError):
    pass


class Turns:
    """Threads of which one runs at a time, and operations that are done some time later."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.waiting = {}  # thread: (its event, the condition it waits for)
        # How soon copies and products are done: in some runs very late.
        self.soon = self.random.choice([0.05, 0.5])
        self.later = []
        self.error = None

    def run(self, functions):
        threads = []
        for function in functions:
            event = threading.Event()
            thread = threading.Thread(target=self._body, args=(function, event))
            self.waiting[thread] = (event, lambda: True)
            threads.append(thread)
        for thread in threads:
            thread.start()
        self._next()
        for thread in threads:
            thread.join()
        while self.later and not self.error:
            self._do(self.later.pop(0))
        if self.error:
            raise self.error

    def _body(self, function, event):
        event.wait()
        try:
            if not self.error:
                function()
        except BaseException as error:
            self.error = self.error or error
        self._next()

    def _do(self, operation):
        try:
            operation()
        except BaseException as error:
            self.error = self.error or error

    def _next(self):
        """Hands on to a thread that can run, after some of the operations under way."""
        while True:
            ready = [
                t
                for t, (_, condition) in self.waiting.items()
                if self.error or condition()
            ]
            if self.later and (not ready or self.random.random() < self.soon):
                self._do(self.later.pop(self.random.randrange(len(self.later))))
                continue
            if ready:
                event, _ = self.waiting.pop(self.random.choice(ready))
                event.set()
            elif self.waiting:
                self.error = Stuck(f"{len(self.waiting)} partitions wait for ever")
                continue
            return

    def wait(self, condition):
        event = threading.Event()
        self.waiting[threading.current_thread()] = (event, condition)
        self._next()
        event.wait()
        if self.error:
            raise SystemExit


class Tensor:
    """A NumPy array with what the kernel asks of a tensor. Integers, too."""

    def __init__(self, data, dtype=None, done=True):
        self.data = np.asarray(data)
        self.dtype = dtype or self.data.dtype.type
        self.done = done  # False: a product that is under way
        self.type = SimpleNamespace(layout=None)

    @property
    def value(self):
        assert self.done, "a product was read before the wait for it"
        return self.data

    shape = property(lambda self: self.data.shape)

    def to(self, dtype, bitcast=False):
        if (
            bitcast
        ):  # where `inline_asm_elementwise` takes them, it takes them as they are
            return self
        if dtype == BF16:
            rounded = (
                torch.from_numpy(np.array(self.value, np.float32)).bfloat16().float()
            )
            return Tensor(rounded.numpy(), BF16)
        return Tensor(self.value.astype(dtype))

    def reshape(self, shape):
        return Tensor(self.value.reshape(shape), self.dtype)

    def __getitem__(self, index):
        return Tensor(self.value[index], self.dtype)

    def __index__(self):
        return int(self.value)

    def __bool__(self):
        return bool(self.value)

    def __neg__(self):
        return Tensor(-self.value)


def _operators():
    names = (
        "add sub mul truediv floordiv mod and or xor lshift rshift lt le gt ge eq ne"
    )
    for name in names.split():

        def forward(a, b, name=name):
            with np.errstate(all="ignore"):
                return Tensor(getattr(np.asarray(a.value), f"__{name}__")(raw(b)))

        def backward(a, b, name=name):
            with np.errstate(all="ignore"):
                return Tensor(getattr(np.asarray(raw(b)), f"__{name}__")(a.value))

        setattr(Tensor, f"__{name}__", forward)
        setattr(Tensor, f"__r{name}__", backward)


def raw(a):
    """A number in the precision that Triton gives it beside a tensor."""
    if isinstance(a, Tensor):
        return a.value
    return np.float32(a) if isinstance(a, float) else np.int64(a)


_operators()


class Pointer:
    """Into a flat array."""

    def __init__(self, array, offset=0):
        self.array, self.offset = array, offset
        element_ty = BF16 if array.dtype == np.uint16 else np.float32
        self.dtype = SimpleNamespace(element_ty=element_ty)

    def __add__(self, offset):
        return Pointer(self.array, self.offset + raw(offset))

    def to(self, dtype):  # an address
        return self


class Shared:
    """A buffer in shared memory. use: products and loads that are reading this part, and is
    what was stored there yet to be handed over by a fence?"""

    def __init__(self, data, dtype, parts=None, use=None):
        self.data, self.dtype, self.shape = data, dtype, data.shape
        self.parts = parts
        self.use = use or SimpleNamespace(products=0, loads=0, unfenced=False)

    def index(self, i):
        if self.parts is None:
            self.parts = [Shared(d, self.dtype) for d in self.data]
        return self.parts[int(raw(i))]

    def reshape(self, shape):
        return Shared(self.data.reshape(shape), self.dtype, use=self.use)

    def permute(self, order):
        return Shared(self.data.transpose(order), self.dtype, use=self.use)

    def slice(self, start, length, dim):
        at = [slice(None)] * len(self.shape)
        at[dim] = slice(start, start + length)
        return Shared(self.data[tuple(at)], self.dtype, use=self.use)

    def store(self, tensor):
        """Products may read it after a fence."""
        assert not self.use.products, "a buffer is overwritten while a product reads it"
        self.data[...] = tensor.value
        self.use.unfenced = True
        stores_under_way().append(self)

    def load(self, layout):
        """Under way until a fence: the copy engine does not wait for it."""
        self.use.loads += 1
        loads_under_way().append(self)
        return Tensor(self.data.copy(), self.dtype)


own = threading.local()


def loads_under_way() -> list[Shared]:
    """Of this partition."""
    own.loads = getattr(own, "loads", [])
    return own.loads


def stores_under_way() -> list[Shared]:
    own.stores = getattr(own, "stores", [])
    return own.stores


def fence():
    while loads_under_way():
        own.loads.pop().use.loads -= 1
    while stores_under_way():
        own.stores.pop().use.unfenced = False


class Barrier:
    def __init__(self, count=1):
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0

    def arrive(self, count=1):
        self.pending -= count
        assert self.pending >= 0, "more arrivals than an mbarrier counts"
        self.turn()

    def turn(self):
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1


class Machine:
    """The modules that the kernel's source names, for one program."""

    def __init__(self, modules, program, programs, seed):
        turns = self.turns = Turns(seed)
        groups = {}  # thread: the products that it has under way, oldest first
        leaving = {}  # thread: so its copies to global memory

        def array(function, dtype=None):
            def call(*arguments):
                with np.errstate(all="ignore"):
                    return Tensor(function(*map(raw_or_same, arguments)), dtype)

            return call

        def reduced(function):
            return lambda t, axis: Tensor(function(t.value, axis=axis))

        def store(pointer, value, mask=None):
            at, inside = pointer.offset, raw(mask)
            value = value.to(pointer.dtype.element_ty).value
            at, value, inside = np.broadcast_arrays(at, value, inside)
            pointer.array[at[inside]] = value[inside]

        def allocate(dtype, shape, layout):
            if dtype is INT64:
                return Shared(
                    np.zeros(shape), dtype, [Barrier() for _ in range(shape[0])]
                )
            return Shared(np.full(shape, np.nan, np.float32), dtype)

        def init(bar, count):
            bar.count = bar.pending = count

        def expect(bar, count):
            bar.bytes += count
            bar.arrive()

        def copy(source, at, bar, to):
            def land():
                assert not (to.use.products or to.use.loads), (
                    "a buffer is overwritten while somebody reads it"
                )
                to.data[...] = source.box(list(map(int, at)))
                bar.bytes -= source.block_type.nbytes
                bar.turn()

            turns.later.append(land)

        def copy_back(target, at, source):
            assert not source.use.unfenced, (
                "the copy engine reads what no fence has handed over"
            )
            done = []

            def leave():
                if not done:
                    done.append(True)
                    target.put(source.data, list(map(int, at)))
                    source.use.products -= 1

            source.use.products += 1
            leaving.setdefault(threading.current_thread(), []).append(leave)
            turns.later.append(leave)

        def copied_back(left):
            own = leaving.get(threading.current_thread(), [])
            while len(own) > left:
                own.pop(0)()

        def product(a, b, acc, use_acc=True, is_async=False):
            own = groups.setdefault(threading.current_thread(), [])
            shared = [t for t in (a, b) if isinstance(t, Shared)]
            left = None if isinstance(a, Shared) else a.value
            start = (
                acc.data if use_acc else 0
            )  # sums into one tensor follow one another
            out = Tensor(np.zeros(acc.shape, np.float32), done=False)
            for t in shared:
                assert not t.use.unfenced, (
                    "a product reads what no fence has handed over"
                )
                t.use.products += 1

            def finish():
                if out.finish is None:
                    return
                out.finish = None
                for earlier in list(own):
                    if earlier is out:
                        break
                    earlier.finish and earlier.finish()
                with np.errstate(all="ignore"):
                    one = a.data if left is None else left
                    out.data[...] = start + one.astype(np.float32) @ b.data
                for t in shared:
                    t.use.products -= 1

            out.finish = finish
            own.append(out)
            turns.later.append(finish)
            return out

        def product_wait(left, tensors):
            own = groups.setdefault(threading.current_thread(), [])
            turns.wait(lambda: True)
            while len(own) > left:
                if own[0].finish:
                    own[0].finish()
                own.pop(0).done = True
            return tensors[0] if len(tensors) == 1 else tuple(tensors)

        def specialize(functions, warps, registers):
            turns.run([lambda f=f, a=a: f(*a) for f, a in functions])

        def load(pointer, mask=None, other=None):
            if mask is None:
                return Tensor(pointer.array[pointer.offset])
            at = np.where(raw(mask), pointer.offset, 0)
            return Tensor(np.where(raw(mask), pointer.array[at], np.float32(other)))

        def add_to_memory(text, constraints, arguments, *_, **__):
            assert text.startswith("red.") and ".add." in text
            pointer, values = arguments
            np.add.at(pointer.array, pointer.offset, values.value)

        gl = self.gl = SimpleNamespace(
            float32=FLOAT32, int32=INT32, int64=INT64, bfloat16=BF16, float16=BF16,
            program_id=lambda axis: Tensor(np.int64(program)),
            num_programs=lambda axis: Tensor(np.int64(programs)),
            arange=lambda start, stop, layout=None: Tensor(np.arange(start, stop)),
            zeros=lambda shape, dtype, layout: Tensor(np.zeros(shape, dtype)),
            full=lambda shape, value, dtype, layout: Tensor(np.full(shape, value, dtype)),
            cdiv=lambda a, b: -(-a // b), static_range=range, store=store, load=load,
            where=array(np.where), maximum=array(np.maximum), minimum=array(np.minimum),
            exp2=array(np.exp2), log2=array(np.log2), abs=array(np.abs),
            max=reduced(np.max), min=reduced(np.min), sum=reduced(np.sum),
            reduce_or=reduced(np.bitwise_or.reduce),
            convert_layout=lambda t, layout: t, allocate_shared_memory=allocate,
            SliceLayout=nothing, DotOperandLayout=nothing, warp_specialize=specialize,
            inline_asm_elementwise=add_to_memory, SwizzledSharedLayout=nothing,
            BlockedLayout=nothing,
            NVMMASharedLayout=SimpleNamespace(get_default_for=nothing),
        )  # fmt: skip
        gl.NVMMADistributedLayout = nothing
        barriers = SimpleNamespace(
            MBarrierLayout=nothing, init=init, expect=expect,
            arrive=lambda bar: (turns.wait(lambda: True), bar.arrive()),
            wait=lambda bar, phase: turns.wait(lambda: bar.phase & 1 != int(raw(phase))),
        )  # fmt: skip
        hw = SimpleNamespace(
            warpgroup_mma=product,
            warpgroup_mma_wait=product_wait,
            fence_async_shared=lambda: (turns.wait(lambda: True), fence()),
        )
        tma = SimpleNamespace(
            async_copy_global_to_shared=copy,
            async_copy_shared_to_global=copy_back,
            store_wait=copied_back,
        )
        fakes = {"gl": gl, "hw": hw, "mbarrier": barriers, "tma": tma, "tl": gl}
        self.functions = rebuilt(modules, fakes)


def raw_or_same(a):
    return a if isinstance(a, (str, tuple)) else raw(a)


def nothing(*_, **__):
    return None


def rebuilt(modules, fakes):
    """The functions of the kernel's modules, by name, in a world where Gluon is NumPy."""
    world = {}
    for module in modules:
        for name, value in vars(module).items():
            inner = getattr(value, "fn", None)
            if isinstance(inner, types.FunctionType):
                world[name] = inner
            elif hasattr(value, "value") and type(value).__name__ == "constexpr":
                world[name] = value.value
            else:
                world[name] = value

    def counted(*bounds):
        return (Tensor(np.int64(i)) for i in range(*map(int, bounds)))

    world |= fakes | {"in_registers": nothing, "range": counted}
    for name, value in list(world.items()):
        if isinstance(value, types.FunctionType) and "rcmlib" in value.__module__:
            copy = types.FunctionType(value.__code__, world, name, value.__defaults__)
            world[name] = copy
    return world


class Descriptor:
    """A tensor [B, H, N, D], copied in boxes; zeros beyond its end."""

    def __init__(self, t, rows, cols):
        self.array = t.float().numpy()
        self.dtype = FLOAT32 if t.dtype == torch.float32 else BF16
        self.rows, self.cols, self.layout = rows, cols, None
        self.block_type = SimpleNamespace(nbytes=rows * cols * t.element_size())

    def put(self, tile, at):
        sample, head, row, _ = at
        found = self.array[sample, head, row : row + self.rows]
        found[...] = tile[0, 0, : found.shape[0], : found.shape[1]]

    def box(self, at):
        sample, head, row, _ = at
        found = self.array[sample, head, row : row + self.rows]
        out = np.zeros((1, 1, self.rows, self.cols), np.float32)
        out[0, 0, : found.shape[0], : found.shape[1]] = found
        return out


def run(team, q, k, v, x, c_skip, c_out, scale, is_causal, programs=None, seed=0):
    """(out, saved_f [B, Nq, H·D], lse [B, H, Nq]) of tensors on the CPU. programs: so many, or
    one a task."""
    batch, heads, q_len, dim = q.shape
    kv_len, block_d = k.shape[2], max(64, 1 << (dim - 1).bit_length())
    m, n = ring.ROWS.value, team.block_n
    how = hopper.launch.TeamVariant(
        **vars(team), head_dim=dim, block_d=block_d, causal=is_causal,
        ragged=kv_len % n != 0, per_sample=isinstance(c_out, torch.Tensor),
    )  # fmt: skip
    read = sources(q, k, v, x)
    described = [
        Descriptor(t, rows, block_d)
        for t, rows in zip(read, (m, n, n, m), strict=False)
    ]
    described += [None] * (4 - len(described))
    tasks = batch * heads * -(-q_len // (m * team.groups))
    rounds = -(-tasks // (2 if is_causal else 1))
    programs = min(rounds, programs or rounds)
    out, f = (
        np.full(batch * q_len * heads * dim, np.nan, np.float32) for _ in range(2)
    )
    lse = np.full(batch * heads * q_len, np.nan, np.float32)
    if how.per_sample:
        c_skip, c_out = (Pointer(c.float().numpy()) for c in (c_skip, c_out))
    else:
        c_skip, c_out = map(np.float32, (c_skip, c_out))
    numbers = (Tensor(np.int64(i)) for i in (tasks, heads, q_len, kv_len))
    numbers = list(numbers)
    for program in range(programs):
        machine = Machine(FORWARD, program, programs, seed + program)
        machine.functions["hopper_attention_kernel"](
            *described, Pointer(out), Pointer(f), Pointer(lse), c_skip, c_out,
            float(scale * LOG2_E), *numbers, None, how,
        )  # fmt: skip
    tokens = (batch, q_len, heads * dim)
    found = (out.reshape(tokens), f.reshape(tokens), lse.reshape(batch, heads, q_len))
    return tuple(map(torch.from_numpy, found))


def run_backward(g, q, k, v, lse, delta, c_out, scale, is_causal, seed=0):
    """dq, dk, dv [B, H, N, D] of tensors on the CPU; `scale_kernel`'s part is done here.
    g [B, H, Nq, D]; lse, delta [B, H, Nq] float32; c_out [B]."""
    batch, heads, q_len, dim = q.shape
    kv_len = k.shape[2]
    how, tiles = hopper_backward.variant(q, kv_len, is_causal, True)
    k, v = hopper_backward.seen(k, v, q_len, is_causal)
    rows = (how.block_n, 64, 64, how.block_n)
    described = [
        Descriptor(t, n, how.block_d) for t, n in zip((q, k, v, g), rows, strict=True)
    ]
    sums = np.zeros(batch * heads * tiles * dq_sum.SCRATCH.value, np.float32)
    dk, dv = (torch.full((batch, heads, kv_len, dim), torch.nan) for _ in range(2))
    described += [Descriptor(t, 64, how.block_d) for t in (dk, dv)]
    numbers = [Tensor(np.int64(i)) for i in (heads, q_len, kv_len)]
    for program in range(batch * heads * -(-kv_len // 128)):
        machine = Machine(BACKWARD, program, None, seed + program)
        machine.functions["hopper_backward_kernel"](
            *described, Pointer(sums),
            *(Pointer(t.numpy().reshape(-1)) for t in (lse, delta)),
            Pointer(c_out.float().numpy()), float(scale), float(scale * LOG2_E), *numbers, how,
        )  # fmt: skip
    row, col = np.indices((how.block_n, how.block_d))
    place = dq_sum.in_order_of_registers.fn(row % 64, col % 64)
    place += (row // 64 + col // 64) * dq_sum.SCRATCH.value // 2
    dq = torch.from_numpy(sums.reshape(batch, heads, tiles, -1)[..., place])
    dq = dq.flatten(2, 3)[:, :, :q_len, :dim] * c_out.view(-1, 1, 1, 1) * scale
    return dq, dk, dv
