"""The modules: one function, one state_dict, one gradient, the boundary condition."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rcmlib
from rcmlib import integrate, modules, reference
from tests.inputs import DTYPES, assert_close

LAYERS = {
    "naive": lambda: modules.BaselineRCMAttention(48, num_heads=3, naive=True),
    "sdpa": lambda: modules.BaselineRCMAttention(48, num_heads=3),
    "fused": lambda: modules.FusedRCMAttention(48, num_heads=3),
    "triton": lambda: modules.TritonFusedRCMAttention(48, num_heads=3),
    "triton, no projection": lambda: modules.TritonFusedRCMAttention(
        48, num_heads=3, out_proj=False
    ),
}


def make(name, device, dtype=torch.float32):
    """A layer whose parameters are the same for every name, rounded to dtype."""
    torch.manual_seed(0)
    return LAYERS[name]().to(device=device, dtype=dtype)


@pytest.fixture(params=LAYERS)
def layer(request, device):
    return make(request.param, device)


def tokens(batch, n, device, dtype=torch.float32, dim=48, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, dim, generator=random).to(device=device, dtype=dtype)


def by_hand(layer, x, t):
    """The attention module in float64, from the formula."""
    weights = {name: p.double() for name, p in layer.state_dict().items()}
    packed = x.double() @ weights["qkv.weight"].T + weights["qkv.bias"]
    q, k, v = packed.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    f = reference.merge_heads(reference.attention(q, k, v))
    if "proj.weight" in weights:
        f = f @ weights["proj.weight"].T + weights["proj.bias"]
    c = rcmlib.edm(t, layer.sigma_data)
    return reference.skip(x, f, c.c_skip, c.c_out)


def outcome(layer, x, t, grad):
    """The output and every gradient (of x, t and the parameters) for one backward pass."""
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    out = layer(x, t)
    layer.zero_grad()
    out.backward(grad.to(out.dtype))
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "t": t.grad} | gradients


def assert_outcomes_agree(out, ref, peer, dtype):
    """The tolerance policy for every entry; dtype is that of the products."""
    assert out.keys() == peer.keys() == ref.keys()
    for key in ref:
        assert out[key].dtype == peer[key].dtype
        # The gradient of t is wider than the numbers that it is made of.
        a, b = (t.to(dtype) for t in (out[key], peer[key]))
        assert_close(a, ref[key], b)


@pytest.mark.parametrize("t", [0.0, 0.7, torch.tensor([0.1, 2.0])], ids=str)
def test_every_implementation_is_the_formula(layer, t, device):
    x = tokens(2, 11, device)
    t = t.to(device) if isinstance(t, torch.Tensor) else t
    assert reference.relative_l2(layer(x, t), by_hand(layer, x, t)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_t_zero_the_module_is_the_identity(layer, dtype, device):
    x = tokens(2, 5, device, dtype)
    layer = layer.to(dtype)
    assert torch.equal(layer(x, 0.0), x)
    assert torch.equal(layer(x, torch.zeros(2, device=device)), x)


@pytest.mark.parametrize("name", ["naive", "fused", "triton"])
def test_weights_move_between_the_implementations(name, device):
    layer, other = make(name, device), modules.BaselineRCMAttention(48, num_heads=3)
    assert list(other.state_dict()) == [
        "qkv.weight",
        "qkv.bias",
        "proj.weight",
        "proj.bias",
    ]
    other.to(device).load_state_dict(layer.state_dict())
    x = tokens(2, 5, device)
    torch.testing.assert_close(other(x, 0.5), layer(x, 0.5))


def test_without_projection_there_are_no_parameters_for_it(device):
    layer = make("triton, no projection", device)
    assert list(layer.state_dict()) == ["qkv.weight", "qkv.bias"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fused", "triton"])
def test_outputs_and_all_gradients_agree_with_the_float64_module(name, dtype, device):
    baseline, layer = make("sdpa", device, dtype), make(name, device, dtype)
    exact = copy.deepcopy(baseline).double()
    x, grad = (tokens(8, 19, device, dtype, seed=seed) for seed in (1, 2))
    t = torch.linspace(0, 3, 8, device=device)  # one noise level a sample, 0 among them
    ref = outcome(exact, x.double(), t.double(), grad)
    peer, out = outcome(baseline, x, t, grad), outcome(layer, x, t, grad)
    assert_outcomes_agree(out, ref, peer, dtype)


def test_a_noise_level_for_the_whole_batch_has_a_gradient(device):
    layer, baseline = make("triton", device), make("sdpa", device).double()
    x, grad = (tokens(2, 7, device, seed=seed) for seed in (1, 2))
    t = torch.tensor(0.8)
    out, ref = outcome(layer, x, t, grad), outcome(baseline, x.double(), t, grad)
    assert reference.relative_l2(out["t"], ref["t"]) < 1e-6


@pytest.mark.parametrize("name", ["triton", "triton, no projection"])
def test_autocast_gives_what_it_gives_the_baseline(name, device):
    layer = make(name, device)
    baseline = make("sdpa", device)
    if layer.proj is None:  # the same function: a projection that changes nothing
        baseline.proj = nn.Identity()
    x, grad = (tokens(4, 19, device, seed=seed) for seed in (1, 2))
    t = torch.tensor([0.0, 0.3, 1.0, 4.0], device=device)
    ref = outcome(copy.deepcopy(baseline).double(), x.double(), t.double(), grad)
    with torch.autocast(device, torch.bfloat16):
        out, peer = outcome(layer, x, t, grad), outcome(baseline, x, t, grad)
    assert out["out"].dtype == torch.float32
    assert_outcomes_agree(out, ref, peer, torch.bfloat16)


def test_a_checkpointed_layer_has_the_same_bits(device):
    layer, x, t = make("triton", device), tokens(2, 7, device), torch.tensor(0.5)
    plain = outcome(layer, x, t, x)

    class Checkpointed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, t):
            return checkpoint(self.layer, x, t, use_reentrant=False)

    again = outcome(Checkpointed(layer), x, t, x)
    for a, b in zip(plain.values(), again.values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["triton", "triton, no projection"])
def test_the_module_compiles_without_a_graph_break(name, device):
    layer, x = make(name, device), tokens(2, 7, device)
    t = torch.tensor([0.2, 1.5], device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    expected = outcome(layer, x, t, x)
    torch.testing.assert_close(compiled(x, t), expected["out"])
    for key, value in outcome(compiled, x, t, x).items():
        torch.testing.assert_close(value, expected[key.removeprefix("_orig_mod.")])


def test_the_triton_module_refuses_what_the_others_refuse(device):
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads"):
        modules.TritonFusedRCMAttention(10, num_heads=3)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        modules.TritonFusedRCMAttention(16, num_heads=1, sigma_data=0.0)
    layer, x = make("triton", device), tokens(2, 3, device)
    with pytest.raises(ValueError, match=r"x must be \[B, N, 48\], got \[2, 3, 47\]"):
        layer(x[..., 1:], 0.5)
    with pytest.raises(ValueError, match=r"t must be a number or of shape \[2\]"):
        layer(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"t must be finite and in \[0, inf\], got -1"):
        layer(x, -1.0)
    with pytest.raises(TypeError, match="t must be a number or a torch.Tensor"):
        layer(x, "1")


def test_the_triton_module_refuses_what_its_kernels_cannot_do(device):
    x = tokens(2, 3, device)
    with pytest.raises(ValueError, match="head dimension of 16 to 256, got 12"):
        modules.TritonFusedRCMAttention(48, num_heads=4).to(device)(x, 0.5)
    with pytest.raises(TypeError, match="q must be one of float32, float16, bfloat16"):
        make("triton", device).double()(x.double(), 0.5)
    with pytest.raises(TypeError, match="x must have q's dtype torch.float16"):
        layer = make("triton, no projection", device, torch.float16)
        layer.norm = _Cast(torch.float16)
        layer(x.bfloat16(), 0.5)


class _Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


# ---- the block ----


@pytest.fixture(params=["in PyTorch", "fused"])
def block(request, device):
    torch.manual_seed(0)
    block = modules.TransformerBlock(48, num_heads=3, mlp_ratio=2.5).to(device)
    if request.param == "fused":
        assert len(integrate.fuse(block).replaced) == 1
    for norm in (block.attn.norm, block.norm):  # no longer the identity's 1 and 0
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return block


def test_the_block_is_attention_with_skip_then_mlp_with_residual(block, device):
    x, t = tokens(2, 7, device).double(), torch.tensor([0.3, 1.5], device=device)
    w = {name: p.double() for name, p in block.state_dict().items()}

    def normed(x, name):
        return F.layer_norm(x, (48,), w[f"{name}.weight"], w[f"{name}.bias"])

    attention = copy.deepcopy(block.attn).double()
    attention.norm = nn.Identity()
    f = by_hand(attention, normed(x, "attn.norm"), t)
    c = rcmlib.edm(t)
    # by_hand's skip carries norm(x); the block's carries x itself.
    h = f + reference.per_sample(c.c_skip, x) * (x - normed(x, "attn.norm"))
    inner = normed(h, "norm") @ w["mlp.0.weight"].T + w["mlp.0.bias"]
    inner = F.gelu(inner, approximate="tanh")
    expected = h + inner @ w["mlp.2.weight"].T + w["mlp.2.bias"]
    assert reference.relative_l2(block(x.float(), t), expected) < 1e-6


def test_at_t_zero_only_the_mlp_of_a_block_remains(block, device):
    x = tokens(2, 7, device)
    torch.testing.assert_close(block(x, 0.0), x + block.mlp(block.norm(x)))


def test_the_block_names_its_parameters():
    block = modules.TransformerBlock(16, num_heads=1)
    assert {name.rpartition(".")[0] for name in block.state_dict()} == {
        *("attn.norm", "attn.qkv", "attn.proj", "norm", "mlp.0", "mlp.2")
    }
    assert block.mlp[0].out_features == 64


def test_the_block_refuses_an_mlp_without_channels():
    with pytest.raises(ValueError, match="mlp_ratio must be at least 1/dim, got 0"):
        modules.TransformerBlock(16, num_heads=1, mlp_ratio=0)
