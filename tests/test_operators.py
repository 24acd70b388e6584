"""The registered operators: what torch.compile, opcheck and the dispatcher ask of them."""

import pytest
import torch

import rcmlib
from tests.inputs import heads

BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"  # a CPU may lack C++


@pytest.fixture(params=["numbers", "per sample"])
def coefficients(request, device):
    if request.param == "numbers":
        return 0.25, 0.75
    return torch.rand(2, 2, dtype=torch.float64, device=device).unbind(0)


def test_rcm_attention_compiles_into_one_graph(coefficients, device):
    q, k, v, x, *_ = heads((2, 2, 20, 30, 16), torch.float32, device)

    @torch.compile(fullgraph=True, backend=BACKEND)
    def layer(q, k, v, x):
        return rcmlib.rcm_attention(q, k, v, 2 * x, *coefficients) + 1

    expected = rcmlib.rcm_attention(q, k, v, 2 * x, *coefficients) + 1
    assert torch.equal(layer(q, k, v, x), expected)


def test_rcm_skip_compiles_into_one_graph(coefficients, device):
    x, f = torch.randn(2, 2, 5, 7, device=device).unbind(0)

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
