"""The registered operators: what torch.compile, opcheck and the dispatcher ask of them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import rcmlib
from rcmlib import reference
from rcmlib.attention import attention
from tests.inputs import heads

BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"  # a CPU may lack C++


SKIP = 0.3, 0.6
EVERY_FUNCTION = {  # of q, k, v [2, 2, 6, 16], x [2, 6, 32] and a weight [32, 32]
    "rcm_attention": lambda q, k, v, x, w: rcmlib.rcm_attention(q, k, v, x, *SKIP),
    # A mean of squares: a sum of either sign may cancel, and then its roundings are not small.
    "attention": lambda q, k, v, x, w: attention(q, k, v) + x * w.square().mean(),
    "rcm_projection": lambda q, k, v, x, w: rcmlib.rcm_projection(
        reference.merge_heads(q), w, None, x, *SKIP
    ),
    "gated_projection": lambda q, k, v, x, w: rcmlib.gated_projection(
        reference.merge_heads(q), w, None, x, w[:2]
    ),
    "rcm_skip": lambda q, k, v, x, w: rcmlib.rcm_skip(
        x, reference.merge_heads(q), *SKIP
    ),
}
every_function = pytest.mark.parametrize(
    "function", EVERY_FUNCTION.values(), ids=EVERY_FUNCTION
)


def arguments(device, tokens=6):
    q, k, v, x, *_ = heads((2, 2, tokens, tokens, 16), torch.float32, device)
    random = torch.Generator().manual_seed(1)
    return q, k, v, x, torch.randn(32, 32, generator=random).to(device)


@pytest.fixture(params=["numbers", "per sample"])
def coefficients(request, device):
    if request.param == "numbers":
        return 0.25, 0.75
    random = torch.Generator().manual_seed(2)
    return torch.rand(2, 2, generator=random, dtype=torch.float64).to(device).unbind(0)


def test_rcm_attention_compiles_into_one_graph(coefficients, device):
    q, k, v, x, *_ = heads((2, 2, 20, 30, 16), torch.float32, device)

    @torch.compile(fullgraph=True, backend=BACKEND)
    def layer(q, k, v, x):
        return rcmlib.rcm_attention(q, k, v, 2 * x, *coefficients) + 1

    expected = rcmlib.rcm_attention(q, k, v, 2 * x, *coefficients) + 1
    assert torch.equal(layer(q, k, v, x), expected)


def test_rcm_skip_compiles_into_one_graph(coefficients, device):
    random = torch.Generator().manual_seed(3)
    x, f = torch.randn(2, 2, 5, 7, generator=random).to(device).unbind(0)

    @torch.compile(fullgraph=True, backend=BACKEND)
    def layer(x, f):
        return rcmlib.rcm_skip(x, f.relu(), *coefficients)

    assert torch.equal(layer(x, f), rcmlib.rcm_skip(x, f.relu(), *coefficients))


def test_the_operators_pass_opcheck(device):
    q, k, v, x, c_skip, c_out = heads((2, 2, 9, 7, 16), torch.float32, device)
    torch.library.opcheck(torch.ops.rcmlib.skip, (x, x * 2, c_skip, c_out))
    torch.library.opcheck(
        torch.ops.rcmlib.attention, (q, k, v, x, c_skip, c_out, 0.25, True)
    )


@every_function
def test_one_compiled_graph_trains_at_many_lengths(function, device):
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=BACKEND)
    for tokens in (6, 9, 70):
        leaves = [a.requires_grad_() for a in arguments(device, tokens)]
        out = compiled(*leaves)
        assert reference.relative_l2(out, function(*leaves)) < 1e-6
        out.sum().backward()


@every_function
def test_forward_mode_is_refused_and_never_a_zero_tangent(function, device):
    q, *rest = arguments(device)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: function(q, *rest), (q,), (torch.ones_like(q),))


@pytest.mark.parametrize(
    "name", ["rcm_attention", "attention", "rcm_projection", "gated_projection"]
)
def test_a_second_derivative_is_refused_after_a_linear_loss_too(name, device):
    """PyTorch's own once_differentiable would let it vanish: g depends on nothing."""
    q, *rest = (a.requires_grad_() for a in arguments(device))
    out = EVERY_FUNCTION[name](q, *rest)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()


def test_nested_torch_func_is_refused_and_never_zero(device):
    q, k, v, *_ = arguments(device)

    def slope(q):
        return torch.func.grad(lambda q: attention(q, k, v).square().sum())(q).sum()

    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.func.grad(slope)(q)


class Stopped(torch.autograd.Function):
    """The identity, which passes no gradient on."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_the_products_of_every_attention_are_counted_as_flops(device):
    q, k, v, x, _ = arguments(device)
    for function in (rcmlib.rcm_attention, rcmlib.rcm_sage_attention):
        with FlopCounterMode(display=False) as counter:
            function(q, k, v, x, *SKIP)
        assert counter.get_total_flops() == 2 * 2 * q.numel() * k.shape[2]


@every_function
def test_a_missing_gradient_is_no_gradient(function, device):
    leaves = [a.requires_grad_() for a in arguments(device)]
    (Stopped.apply(function(*leaves)).sum() + leaves[0].sum()).backward()
    assert torch.equal(leaves[0].grad, torch.ones_like(leaves[0]))


@every_function
def test_torch_s_default_device_does_not_matter(function, device):
    leaves = [a.requires_grad_() for a in arguments(device)]
    expected = function(*leaves)
    g = torch.ones_like(expected)
    with torch.device("meta"):
        out = function(*leaves)
        out.backward(g)
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_a_cuda_graph_can_hold_the_kernel():
    q, k, v, x, c_skip, c_out = heads((2, 2, 100, 100, 64), torch.bfloat16, "cuda")
    expected = rcmlib.rcm_attention(q, k, v, x, c_skip, c_out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rcmlib.rcm_attention(q, k, v, x, c_skip, c_out)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)


def test_a_backward_pass_through_an_operator_itself_raises(device):
    """The gradients belong to the functions: the operator alone must not drop them silently."""
    q, k, v, x, c_skip, c_out = heads((1, 2, 20, 20, 16), torch.float32, device)
    arguments = (q.requires_grad_(), k, v, x, c_skip, c_out, 0.25, False)
    out = torch.ops.rcmlib.attention(*arguments)
    with pytest.raises(RuntimeError, match="attention has no autograd formula"):
        out.sum().backward()
