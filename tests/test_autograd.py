"""What autograd's users ask of rcm_attention: compile, checkpoint, func, autocast, opcheck."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rcmlib
from rcmlib import reference
from tests.inputs import gradients, heads

BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"  # a CPU may lack C++


class Called(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op._schema.name)
        return op(*args, **(kwargs or {}))


def test_only_a_call_that_wants_gradients_saves_anything(device):
    inputs = heads((1, 1, 20, 20, 16), torch.float32, device)
    with Called() as without:
        rcmlib.rcm_attention(*inputs)
    with Called() as under_no_grad, torch.no_grad():
        rcmlib.rcm_attention(inputs[0].requires_grad_(), *inputs[1:])
    with Called() as training:
        rcmlib.rcm_attention(*inputs)
    assert "rcmlib::attention_saving" not in without.names | under_no_grad.names
    assert "rcmlib::attention_saving" in training.names


def test_what_needs_no_gradient_is_not_computed(device):
    q, k, v, x, c_skip, c_out = heads((1, 1, 20, 20, 16), torch.float32, device)
    out = rcmlib.rcm_attention(q, k, v, x.requires_grad_(), c_skip, c_out)
    with Called() as called:
        (dx,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(dx, c_skip.float().view(-1, 1, 1).expand_as(x))
    assert "rcmlib::attention_backward" not in called.names


def test_it_trains_under_torch_compile_in_one_graph(device):
    inputs = heads((2, 2, 20, 30, 16), torch.float32, device)

    def layer(q, k, v, x, c_skip, c_out):
        return rcmlib.rcm_attention(q, k, v, 2 * x, c_skip, c_out).sin()

    g = torch.randn_like(inputs[3])
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    for a, b in zip(
        gradients(compiled, inputs, g), gradients(layer, inputs, g), strict=True
    ):
        assert reference.relative_l2(a, b) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_has_the_same_gradients(reentrant, device):
    inputs = heads((2, 2, 20, 30, 16), torch.float32, device)
    g = torch.randn_like(inputs[3])

    def stored(*a):
        return rcmlib.rcm_attention(*a)

    def recomputed(*a):
        return checkpoint(rcmlib.rcm_attention, *a, use_reentrant=reentrant)

    inputs = [a.detach().requires_grad_() for a in inputs]
    results = []
    for layer in (stored, recomputed):
        layer(*inputs).backward(g)
        results.append([a.grad for a in inputs])
        for a in inputs:
            a.grad = None
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_torch_func_grad_works(device):
    q, k, v, x, c_skip, c_out = heads((2, 2, 20, 30, 16), torch.float32, device)

    def loss(q, c_out):
        return rcmlib.rcm_attention(q, k, v, x, c_skip, c_out).square().sum()

    ours = torch.func.grad(loss, argnums=(0, 1))(q, c_out)
    expected = gradients(loss, (q, c_out), None)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_the_heads_and_leaves_the_residual(device):
    q, k, v, x, c_skip, c_out = heads((2, 2, 20, 30, 16), torch.float32, device)
    leaves = [a.requires_grad_() for a in (q, k, v, x)]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = rcmlib.rcm_attention(q, k, v, x, c_skip, c_out)
    assert out.dtype == torch.float32  # x's
    out.sum().backward()
    assert all(a.grad.dtype == torch.float32 for a in leaves)
    low = [a.detach().bfloat16() for a in (q, k, v)]
    expected = rcmlib.rcm_attention(*low, x.detach(), c_skip, c_out)
    assert torch.equal(out.detach(), expected)


def test_a_second_derivative_says_that_there_is_none(device):
    inputs = [
        a.requires_grad_() for a in heads((1, 1, 4, 4, 16), torch.float32, device)
    ]
    out = rcmlib.rcm_attention(*inputs)
    (dq,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()


def test_the_operators_pass_opcheck(device):
    q, k, v, x, c_skip, c_out = heads((2, 2, 9, 7, 16), torch.float32, device)
    ops = torch.ops.rcmlib
    for rest in ((x, c_skip, c_out, 0.25, True), (None, None, None, 0.25, False)):
        torch.library.opcheck(ops.attention_saving, (q, k, v, *rest))
    out, f, lse = ops.attention_saving(q, k, v, x, c_skip, c_out, 0.25, True)
    delta = torch.randn_like(lse)
    torch.library.opcheck(
        ops.attention_backward, (out, q, k, v, lse, delta, c_out, 0.25, True)
    )
    for asked in (
        (x, f, c_skip, c_out, 16, torch.float32, None),
        (None, None, c_skip, c_out, None, torch.float32, torch.float32),
    ):
        torch.library.opcheck(ops.skip_backward, (out, *asked))


@pytest.mark.gpu
def test_a_cuda_graph_can_hold_a_training_step():
    inputs = heads((2, 2, 100, 100, 64), torch.bfloat16, "cuda")
    g = torch.randn_like(inputs[3])
    expected = gradients(rcmlib.rcm_attention, inputs, g)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = gradients(rcmlib.rcm_attention, inputs, g)
    for t in results:
        t.fill_(float("nan"))
    graph.replay()
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
