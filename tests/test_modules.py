"""The PyTorch modules: one function, one state_dict, the boundary condition."""

import pytest
import torch

import rcmlib
from rcmlib import reference
from tests.inputs import DTYPES


@pytest.fixture(params=["naive", "sdpa", "fused"])
def layer(request):
    torch.manual_seed(0)
    if request.param == "fused":
        return rcmlib.FusedRCMAttention(48, num_heads=3)
    return rcmlib.BaselineRCMAttention(48, num_heads=3, naive=request.param == "naive")


def by_hand(layer, x, t):
    """The module in float64, from the formula."""
    weights = {name: p.double() for name, p in layer.state_dict().items()}
    packed = x.double() @ weights["qkv.weight"].T + weights["qkv.bias"]
    q, k, v = packed.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    f = reference.merge_heads(reference.attention(q, k, v))
    f = f @ weights["proj.weight"].T + weights["proj.bias"]
    c = rcmlib.edm(t, layer.sigma_data)
    return reference.skip(x, f, c.c_skip, c.c_out)


@pytest.mark.parametrize("t", [0.0, 0.7, torch.tensor([0.1, 2.0])], ids=str)
def test_every_implementation_is_the_formula(layer, t):
    x = torch.randn(2, 11, 48)
    assert reference.relative_l2(layer(x, t), by_hand(layer, x, t)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_t_zero_the_module_is_the_identity(layer, dtype, device):
    x = torch.randn(2, 5, 48).to(device=device, dtype=dtype)
    layer = layer.to(device=device, dtype=dtype)
    assert torch.equal(layer(x, 0.0), x)
    assert torch.equal(layer(x, torch.zeros(2, device=device)), x)


def test_weights_move_between_the_implementations(layer):
    other = rcmlib.BaselineRCMAttention(48, num_heads=3)
    assert list(other.state_dict()) == [
        "qkv.weight",
        "qkv.bias",
        "proj.weight",
        "proj.bias",
    ]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(other(x, 0.5), layer(x, 0.5))


def test_gradients_agree(layer):
    other = rcmlib.BaselineRCMAttention(48, num_heads=3)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 48)
    for module in (layer, other):
        module(x, torch.tensor([0.5, 1.5])).square().sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert reference.relative_l2(a.grad, b.grad) < 1e-5
