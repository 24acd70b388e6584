"""rcm_projection and gated_projection against float64: shapes, strides, gates, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import rcmlib
from rcmlib import reference
from tests.inputs import (
    DTYPES,
    assert_close,
    assert_sum_close,
    gradients,
    torch_skip,
)

BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"  # a CPU may lack C++
NAMES = ("a", "weight", "bias", "x", "c_skip", "c_out")
GATED = (*NAMES[:4], "gate")
SHAPES = [  # (B, N, K, C)
    (1, 1, 1, 1),
    (2, 37, 53, 29),  # primes: no row begins at a multiple of 16 bytes
    (1, 128, 64, 128),  # whole tiles
    (3, 130, 48, 112),  # two rows over, and samples that end inside a tile
    (2, 20, 1, 40),
    (2, 65, 200, 17),
    (5, 3, 96, 264),  # fewer tokens than a tile holds
]


def inputs(shape, dtype, device, seed=0, x_dtype=None):
    """Random a, weight, bias, x and per-sample coefficients for (B, N, K, C)."""
    batch, tokens, depth, cols = shape
    random = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=random, dtype=torch.float64)

    a, weight = draw(batch, tokens, depth), draw(cols, depth) * depth**-0.5
    tensors = (t.to(device, dtype) for t in (a, weight, draw(cols)))
    x = draw(batch, tokens, cols).to(device, x_dtype or dtype)
    return *tensors, x, *torch.rand(2, batch, generator=random).double().to(device)


def gates(x, dtype=None, seed=1):
    """One gate for all tokens of a sample, and one for each token."""
    random = torch.Generator().manual_seed(seed)
    batch, _, cols = x.shape
    for shape in ((batch, cols), x.shape):
        yield torch.randn(shape, generator=random).to(x.device, dtype or x.dtype)


def torch_projection(a, weight, bias, x, c_skip, c_out):
    """The two-pass peer: PyTorch's linear layer and skip."""
    return torch_skip(
        x, torch.nn.functional.linear(a, weight, bias).to(x.dtype), c_skip, c_out
    )


def torch_gated(a, weight, bias, x, gate):
    gate = gate[:, None] if gate.ndim == 2 else gate
    f = torch.nn.functional.linear(a, weight, bias)
    return (x + gate * f).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_agrees_with_float64(shape, dtype, device):
    args = inputs(shape, dtype, device)
    out = rcmlib.rcm_projection(*args)
    assert_close(out, reference.rcm_projection(*args), torch_projection(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gated_kernel_agrees_with_float64(shape, dtype, device):
    args = inputs(shape, dtype, device)[:4]
    for gate in gates(args[3]):
        out = rcmlib.gated_projection(*args, gate)
        ref = reference.gated_projection(*args, gate)
        assert_close(out, ref, torch_gated(*args, gate))


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 140, 80, 140))),
    biased=st.booleans(),
    per_token=st.booleans(),
)
def test_any_size_will_do(shape, biased, per_token):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, weight, bias, x, *c = inputs(shape, torch.float32, device, seed=sum(shape))
    args = (a, weight, bias if biased else None, x)
    out = rcmlib.rcm_projection(*args, *c)
    assert_close(out, reference.rcm_projection(*args, *c), out)
    gate = list(gates(x))[per_token]
    out = rcmlib.gated_projection(*args, gate)
    assert_close(out, reference.gated_projection(*args, gate), out)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_x_and_the_gate_may_stay_in_float32(dtype, device):
    """As in a Wan block, where the residual stream and the modulation are float32."""
    args = inputs((2, 45, 64, 96), dtype, device, x_dtype=torch.float32)
    a, weight, bias, x, c_skip, c_out = args
    out = rcmlib.rcm_projection(*args)
    assert out.dtype == torch.float32
    assert_close(out, reference.rcm_projection(*args), out)
    for gate_dtype in (dtype, torch.float32):
        for gate in gates(x, gate_dtype):
            out = rcmlib.gated_projection(*args[:4], gate)
            assert_close(out, reference.gated_projection(*args[:4], gate), out)
    gate = next(gates(x, torch.float32))
    narrow = x.to(dtype)
    out = rcmlib.gated_projection(a, weight, bias, narrow, gate)
    ref = reference.gated_projection(a, weight, bias, narrow, gate)
    assert_close(out, ref, torch_gated(a, weight, bias, narrow, gate))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_of_the_results_is_written(dtype, device, poisoned_outputs):
    for shape in SHAPES:
        args = inputs(shape, dtype, device)
        assert torch.isfinite(rcmlib.rcm_projection(*args)).all()
        c_skip, gate = torch.ones(()), next(gates(args[3]))
        for c in (args[4:], (c_skip, gate)):
            results = torch.ops.rcmlib.projection(*args[:4], *c, True)
            assert all(torch.isfinite(t).all() for t in results)
        for gate in gates(args[3]):
            f = torch.randn(gate.shape[0], *args[3].shape[1:]).to(device, dtype)
            grads = torch.ops.rcmlib.gate_backward(args[3], f, gate, dtype)
            assert all(torch.isfinite(t).all() for t in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_bias_nothing_is_added(dtype, device):
    a, weight, _, x, *c = inputs((2, 33, 40, 50), dtype, device)
    out = rcmlib.rcm_projection(a, weight, None, x, *c)
    assert torch.equal(
        out, rcmlib.rcm_projection(a, weight, torch.zeros_like(weight[:, 0]), x, *c)
    )
    ref = reference.rcm_projection(a, weight, None, x, *c)
    assert_close(out, ref, torch_projection(a, weight, None, x, *c))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_t_zero_the_result_is_x_bit_for_bit(dtype, device):
    a, weight, bias, x, *_ = inputs((2, 33, 40, 48), dtype, device)
    x[0, 0, :4] = torch.tensor(
        [-0.0, 0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny]
    )
    a[0] *= torch.finfo(dtype).max / 8  # finite, but its products overflow
    one, zero = torch.ones(2, device=device), torch.zeros(2, device=device)
    for out in (
        rcmlib.rcm_projection(a, weight, bias, x, 1.0, 0.0),
        rcmlib.rcm_projection(a, weight, bias, x, one, zero),
        rcmlib.gated_projection(a, weight, bias, x, torch.zeros_like(x[:, 0])),
        rcmlib.gated_projection(a, weight, bias, x, torch.zeros_like(x)),
    ):
        assert torch.equal(out, x) and torch.equal(out.signbit(), x.signbit())


def test_each_sample_has_its_own_coefficients_and_gate(device):
    args = inputs((4, 20, 24, 40), torch.float32, device)
    a, weight, bias, x, c_skip, c_out = args
    gate = next(gates(x))
    together = rcmlib.rcm_projection(*args), rcmlib.gated_projection(*args[:4], gate)
    for b in range(4):
        row = slice(b, b + 1)
        alone = (
            rcmlib.rcm_projection(
                a[row], weight, bias, x[row], c_skip[b].item(), c_out[b].item()
            ),
            rcmlib.gated_projection(a[row], weight, bias, x[row], gate[row]),
        )
        for one, all_ in zip(alone, together, strict=True):
            assert torch.equal(all_[row], one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_views_are_used_in_place(dtype, device):
    """Slices of wider tensors, a transposed batch, a gate expanded over the tokens."""
    wide = inputs((3, 40, 96, 128), dtype, device)
    a = wide[0].transpose(0, 1)[4:, :2, 16:80].transpose(0, 1)
    weight, bias, x = wide[1][8:72, :64], wide[2][:64], wide[3][:2, :-4, 64:]
    args = (a, weight, bias, x)
    assert not a.is_contiguous() and not x.is_contiguous()
    dense = [t.contiguous() for t in args]
    out = rcmlib.rcm_projection(*args, 0.3, 0.8)
    ref = reference.rcm_projection(*args, 0.3, 0.8)
    assert_close(out, ref, torch_projection(*dense, 0.3, 0.8))
    modulation = torch.randn(2, 6, 64, device=device, dtype=dtype)
    gate = modulation[:, 2]
    out = rcmlib.gated_projection(*args, gate)
    assert_close(
        out, reference.gated_projection(*args, gate), torch_gated(*dense, gate)
    )
    expanded = gate[:, None].expand(-1, 36, -1)
    again = rcmlib.gated_projection(*args, expanded)
    assert reference.relative_l2(again, out) <= torch.finfo(dtype).eps
    odd = wide[0][..., 1:65]  # rows that the copy engine cannot address
    args = (odd, weight, bias, wide[3][..., 1:65])
    out = rcmlib.rcm_projection(*args, 0.3, 0.8)
    ref = reference.rcm_projection(*args, 0.3, 0.8)
    assert_close(out, ref, torch_projection(*args, 0.3, 0.8))


# ---- gradients ----


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def check_gradients(args, gate=None, peer_at=None):
    """Every gradient of rcm_projection, or with a gate of gated_projection, on these inputs.

    peer_at: the c_out at which PyTorch's error is taken, if not at its own.
    """
    ours, spec, peer = rcmlib.rcm_projection, reference.rcm_projection, torch_projection
    if gate is not None:
        ours, spec, peer = (
            rcmlib.gated_projection,
            reference.gated_projection,
            torch_gated,
        )
        args = (*args[:4], gate)
    a, weight, bias, x = args[:4]
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    double = [t.double() for t in args]
    result = gradients(ours, args, g)
    ref = gradients(spec, double, g.double())
    at = lambda args: args if peer_at is None else (*args[:5], peer_at)  # noqa: E731
    low, low_ref = gradients(peer, at(args), g), gradients(spec, at(double), g.double())
    for name, t, r, p, q, arg in zip(
        GATED if gate is not None else NAMES,
        result,
        ref,
        low,
        low_ref,
        args,
        strict=True,
    ):
        assert t.dtype == arg.dtype and t.shape == arg.shape, name
        assert torch.isfinite(t).all(), name
        if arg.ndim == 1 and name != "bias":
            f = reference.projection(a, weight, bias) if name == "c_out" else x
            assert_sum_close(t, r, r if peer_at is not None else p, (g * f).to(a.dtype))
        elif not r.count_nonzero():
            assert not t.count_nonzero(), name
        elif a.dtype == torch.float32:
            assert reference.relative_l2(t, r) <= 1e-6, name
        else:
            rounded = r.to(a.dtype)
            bound = 2 * (
                reference.relative_l2(p, q) + reference.relative_l2(rounded, r)
            )
            assert reference.relative_l2(t, r) <= bound, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_gradients_agree_with_float64(shape, dtype, device):
    check_gradients(inputs(shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_gradients_of_the_gated_form_agree_with_float64(shape, dtype, device):
    args = inputs(shape, dtype, device)
    for gate in gates(args[3]):
        check_gradients(args, gate)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_keep_float32_where_x_and_the_gate_do(dtype, device):
    args = inputs((2, 70, 64, 96), dtype, device, x_dtype=torch.float32)
    check_gradients(args)
    for gate in gates(args[3]):
        check_gradients(args, gate)


@pytest.mark.parametrize("t", [1e-3, 1e-4, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_hold_near_and_at_t_zero(dtype, t, device):
    """F is saved: recovered from the output it would lose all its digits here."""
    *args, _, _ = inputs((2, 50, 64, 80), dtype, device)
    c = rcmlib.edm(torch.full((2,), t, dtype=torch.float64, device=device))
    args += [c.c_skip, c.c_out]
    check_gradients(args, peer_at=torch.ones_like(c.c_out))


def test_gradients_reach_t_through_the_coefficients(device):
    a, weight, bias, x, *_ = inputs((2, 20, 24, 32), torch.float32, device)

    def loss(function, t):
        c = rcmlib.edm(t)
        return function(a, weight, bias, x, c.c_skip, c.c_out).double().square().sum()

    t = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    ours, ref = (
        torch.func.grad(lambda t, f=f: loss(f, t))(t)
        for f in (rcmlib.rcm_projection, reference.rcm_projection)
    )
    assert reference.relative_l2(ours, ref) < 1e-6


def test_the_reference_passes_gradcheck():
    a, weight, bias, x, *c = inputs((2, 3, 4, 5), torch.float64, "cpu")
    gate = next(gates(x))
    assert torch.autograd.gradcheck(
        reference.rcm_projection, leaves((a, weight, bias, x, *c))
    )
    assert torch.autograd.gradcheck(
        reference.gated_projection, leaves((a, weight, bias, x, gate))
    )


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone_is_the_same(wanted, device):
    args = inputs((2, 20, 24, 32), torch.float32, device)
    g = torch.randn_like(args[3])
    expected = gradients(rcmlib.rcm_projection, args, g)[NAMES.index(wanted)]
    args = [
        t.detach().requires_grad_(name == wanted)
        for name, t in zip(NAMES, args, strict=True)
    ]
    rcmlib.rcm_projection(*args).backward(g)
    assert torch.equal(args[NAMES.index(wanted)].grad, expected)


def test_f_is_saved_only_for_the_gradient_of_its_factor(device, monkeypatch):
    args = inputs((2, 20, 24, 32), torch.float32, device)
    gate = next(gates(args[3]))
    saved = []

    def shapes(t):
        saved.append(tuple(t.shape))
        return t

    def run(function, *args):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(shapes, lambda t: t):
            function(*args)
        return (2, 20, 32) in saved

    a, weight, bias, x, c_skip, c_out = leaves(args)
    plain_c, plain_gate = args[4:], gate
    assert not run(rcmlib.rcm_projection, a, weight, bias, x, *plain_c)
    assert run(rcmlib.rcm_projection, a, weight, bias, x, plain_c[0], c_out)
    assert not run(rcmlib.gated_projection, a, weight, bias, x, plain_gate)
    assert run(rcmlib.gated_projection, a, weight, bias, x, *leaves([gate]))
    with torch.no_grad():
        assert not run(rcmlib.gated_projection, a, weight, bias, x, *leaves([gate]))


def test_two_runs_give_the_same_bits(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    args = inputs((2, 150, 64, 130), dtype, device)
    gate = next(gates(args[3]))
    g = torch.randn_like(args[3])
    for function, arguments in (
        (rcmlib.rcm_projection, args),
        (rcmlib.gated_projection, (*args[:4], gate)),
    ):
        assert torch.equal(function(*arguments), function(*arguments))
        runs = [gradients(function, arguments, g) for _ in range(2)]
        assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


# ---- how PyTorch calls it ----


@pytest.mark.parametrize("gated", [False, True], ids=["coefficients", "gate"])
def test_it_compiles_into_one_graph_with_its_gradients(gated, device):
    args = inputs((2, 30, 24, 40), torch.float32, device)
    function = rcmlib.rcm_projection
    if gated:
        function, args = rcmlib.gated_projection, (*args[:4], next(gates(args[3])))

    def layer(*args):
        return function(*args) * 2

    g = torch.randn_like(args[3])
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    assert torch.equal(compiled(*args), layer(*args))
    ours, eager = (gradients(f, args, g) for f in (compiled, layer))
    for one, two in zip(ours, eager, strict=True):
        assert reference.relative_l2(one, two) < 1e-6


def test_activation_checkpointing_changes_nothing(device):
    args = inputs((2, 30, 24, 40), torch.float32, device)
    g = torch.randn_like(args[3])

    def again(*args):
        return checkpoint(rcmlib.rcm_projection, *args, use_reentrant=False)

    plain = gradients(rcmlib.rcm_projection, args, g)
    for one, two in zip(gradients(again, args, g), plain, strict=True):
        assert torch.equal(one, two)


def test_autocast_casts_the_product_s_operands_alone(device):
    args = inputs((2, 30, 24, 40), torch.float32, device)
    a, weight, bias, x, *c = args
    gate = next(gates(x))
    half = [t.bfloat16() for t in (a, weight, bias)]
    with torch.autocast(device, torch.bfloat16):
        out = rcmlib.rcm_projection(*args)
        gated = rcmlib.gated_projection(a, weight, bias, x, gate)
        grads = gradients(rcmlib.gated_projection, (a, weight, bias, x, gate), x)
    assert torch.equal(out, rcmlib.rcm_projection(*half, x, *c))
    assert torch.equal(gated, rcmlib.gated_projection(*half, x, gate))
    assert all(t.dtype == torch.float32 for t in (out, gated, *grads))


def test_torch_func_grad_differentiates_it(device):
    args = inputs((2, 30, 24, 40), torch.float32, device)
    g = torch.randn_like(args[3])
    ours = torch.func.grad(
        lambda *args: (rcmlib.rcm_projection(*args) * g).sum(), tuple(range(6))
    )(*args)
    for one, two in zip(ours, gradients(rcmlib.rcm_projection, args, g), strict=True):
        assert torch.equal(one, two)


def test_the_operators_pass_opcheck(device):
    args = inputs((2, 9, 8, 12), torch.float32, device)
    one = torch.ones((), dtype=torch.float64)
    for save_f in (False, True):
        torch.library.opcheck(torch.ops.rcmlib.projection, (*args, save_f))
    for gate in gates(args[3]):
        with_gate = (*args[:4], one, gate, True)
        torch.library.opcheck(torch.ops.rcmlib.projection, with_gate)
        for f, dtype in (
            (args[3], torch.float32),
            (None, torch.float32),
            (args[3], None),
        ):
            torch.library.opcheck(
                torch.ops.rcmlib.gate_backward, (args[3] * 2, f, gate, dtype)
            )


def test_a_second_derivative_says_that_there_is_none(device):
    args = leaves(inputs((1, 3, 4, 5), torch.float32, device))
    loss = rcmlib.rcm_projection(*args).square().sum()
    (da,) = torch.autograd.grad(loss, args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        da.sum().backward()


@pytest.mark.gpu
def test_a_cuda_graph_can_hold_the_kernel():
    args = inputs((2, 100, 64, 128), torch.bfloat16, "cuda")
    expected = rcmlib.rcm_projection(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rcmlib.rcm_projection(*args)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [64, 8], ids=str)
def test_offsets_beyond_two_to_the_31_elements(depth, gpu_memory):
    """x and the result have 2.2·10⁹ elements; the last tokens sit beyond int32."""
    tokens, cols = 131_073, 16_512
    x = torch.zeros(1, tokens, cols, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    a = torch.randn(1, tokens, depth, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(cols, depth, device="cuda", dtype=torch.bfloat16)
    x[0, -1] = 3
    some = (a[:, -3:], weight[-256:], None, x[:, -3:, -256:], 1.0, 1.0)
    out = rcmlib.rcm_projection(a, weight, None, x, 1.0, 1.0)[:, -3:, -256:]
    assert_close(out, reference.rcm_projection(*some), torch_projection(*some))


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
def test_strides_between_tokens_may_be_huge(shift, gpu_memory):
    """Token stride 2²⁶ elements: row 40 of a tile lies beyond int32."""
    storage = torch.zeros(40 * 2**26 + 64, device="cuda", dtype=torch.float16)
    far = storage[shift:].as_strided((1, 41, 32), (32, 2**26, 1))
    far.normal_()
    _, weight, bias, x, *_ = inputs((1, 41, 32, 32), torch.float16, "cuda")
    for args in ((far, weight, bias, x, 0.5, 0.5), (x, weight, bias, far, 0.5, 0.5)):
        ref = reference.rcm_projection(*args)
        assert_close(rcmlib.rcm_projection(*args), ref, torch_projection(*args))


# ---- bad input ----


def good(device):
    names = dict(zip(NAMES, inputs((2, 5, 8, 16), torch.float32, device), strict=True))
    return names | {"c_skip": 0.5, "c_out": 0.5}


CASES = [  # the argument, what it becomes, the error, what the message says
    ("a", lambda a: a[0], ValueError, r"a must have 3 dimensions, got 2: \[5, 8\]"),
    ("a", lambda a: a.tolist(), TypeError, "a must be a torch.Tensor, got list"),
    ("a", lambda a: a.double(), TypeError, "a must be one of float32, .*float64"),
    ("a", lambda a: a[:, :0], ValueError, r"a must not be empty, got \[2, 0, 8\]"),
    ("a", lambda a: a.mT.contiguous().mT, ValueError, "a must have a contiguous last"),
    ("weight", lambda w: w[None], ValueError, "weight must have 2 dimensions, got 3"),
    ("weight", lambda w: w[:0], ValueError, r"weight must not be empty, got \[0, 8\]"),
    (
        "weight",
        lambda w: w[:, :4],
        ValueError,
        r"weight must be \[C, K\] with a's K = 8",
    ),
    ("weight", lambda w: w.half(), TypeError, "weight must have a's dtype .*float32"),
    ("weight", lambda w: w.to("meta"), ValueError, "weight must be on a's device"),
    ("weight", lambda w: w.mT.contiguous().mT, ValueError, "weight must have a contig"),
    ("bias", lambda b: b[:4], ValueError, r"bias must be None or \[C\] = \[16\], got"),
    ("bias", lambda b: b[None], ValueError, "bias must have 1 dimensions, got 2"),
    ("bias", lambda b: b.half(), TypeError, "bias must have a's dtype torch.float32"),
    ("bias", lambda b: 0.0, TypeError, "bias must be a torch.Tensor, got float"),
    (
        "bias",
        lambda b: b.repeat(2)[::2],
        ValueError,
        "bias must have a contiguous last",
    ),
    ("x", lambda x: x[:, :4], ValueError, r"x must be \[B, N, C\] = \[2, 5, 16\], got"),
    ("x", lambda x: x[0], ValueError, "x must have 3 dimensions, got 2"),
    (
        "x",
        lambda x: x.bfloat16(),
        TypeError,
        "x must have a's dtype torch.float32, got",
    ),
    ("x", lambda x: x.mT.contiguous().mT, ValueError, "x must have a contiguous last"),
    (
        "c_skip",
        lambda c: torch.ones(3),
        ValueError,
        r"c_skip .* shape \[2\], got \[3\]",
    ),
    (
        "c_out",
        lambda c: torch.ones(2, 16),
        ValueError,
        r"c_out .* shape \[2\], got \[2, ",
    ),
    ("c_out", lambda c: "1", TypeError, "c_out must be a number or a torch.Tensor"),
]
GATES = [
    (lambda g: 1.0, TypeError, "gate must be a torch.Tensor, got float"),
    (
        lambda g: g[:, :4],
        ValueError,
        r"gate must be \[B, C\] = \[2, 16\] or \[B, N, C\] =",
    ),
    (lambda g: g[:, None], ValueError, r"\[2, 5, 16\], got \[2, 1, 16\]"),
    (lambda g: g[:, 0], ValueError, r"gate must be \[B, C\]"),
    (lambda g: g.half(), TypeError, "gate must have a's dtype torch.float32, got"),
    (lambda g: g.to("meta"), ValueError, "gate must be on a's device .*, got meta"),
    (lambda g: g.mT.contiguous().mT, ValueError, "gate must have a contiguous last"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), CASES)
def test_rcm_projection_refuses(name, change, error, message, device):
    arguments = good(device)
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        rcmlib.rcm_projection(**arguments)


@pytest.mark.parametrize(("change", "error", "message"), GATES)
def test_gated_projection_refuses(change, error, message, device):
    arguments = good(device)
    del arguments["c_skip"], arguments["c_out"]
    arguments["gate"] = change(torch.randn(2, 16, device=device))
    with pytest.raises(error, match=message):
        rcmlib.gated_projection(**arguments)
