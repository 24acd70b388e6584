"""fuse and unfuse: what they replace, what they leave and why; nothing else changes."""

import copy
import io
import pickle

import matplotlib.image
import pytest
import torch
from matplotlib.cbook import get_sample_data
from torch import nn

from rcmlib import modules, reference
from rcmlib.integrate import fuse, unfuse
from rcmlib.wan import WanBlock, WanSelfAttention
from tests.inputs import DTYPES

GRID = (1, 2, 3)


class Model(nn.Module):
    """One of everything that fuse knows, at head dimension 16."""

    def __init__(self):
        super().__init__()
        self.baseline = modules.BaselineRCMAttention(32, num_heads=2)
        self.naive = modules.BaselineRCMAttention(32, num_heads=2, naive=True)
        self.addcmul = modules.FusedRCMAttention(32, num_heads=2)
        self.block = modules.TransformerBlock(32, num_heads=2)
        self.wan = WanBlock(32, 48, num_heads=2)

    def forward(self, x, t, e):
        for layer in (self.baseline, self.naive, self.addcmul, self.block):
            x = layer(x, t)
        return self.wan(x, e, GRID)


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return Model().to(device)


@pytest.fixture
def inputs(device):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 32, generator=random).to(device)
    e = torch.randn(2, 6, 32, generator=random).to(device)
    return x, torch.tensor([0.4, 1.3], device=device), e


def outcome(model, *inputs):
    """The output and every gradient of a sum of squares."""
    inputs = [
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x
        for x in inputs
    ]
    model.zero_grad()
    out = model(*inputs)
    out.square().sum().backward()
    grads = {f"input {i}": x.grad for i, x in enumerate(inputs) if hasattr(x, "grad")}
    grads |= {name: p.grad for name, p in model.named_parameters()}
    return {"out": out.detach()} | grads


def classes(model):
    return {name: type(module).__name__ for name, module in model.named_modules()}


# ---- the same function, before, fused and after ----


def photograph(frames, rows, columns):
    """Chapter 2's video, a window that moves across a photograph: tokens [1, N, 768]."""
    with get_sample_data("grace_hopper.jpg") as file:
        photo = matplotlib.image.imread(file, format="jpg")[::2, ::2]
    size = slice(16 * rows), slice(16 * columns)
    views = [photo[20 + 4 * i :, 16 + 20 * i :][size] for i in range(frames)]
    cut = torch.stack([torch.tensor(view) for view in views]).double()
    cut = cut.view(frames, rows, 16, columns, 16, 3).transpose(2, 3)
    return ((cut - cut.mean()) / cut.std()).reshape(1, -1, 768)


class VideoModel(nn.Module):
    """Four Wan blocks at the head shape of Wan 1.3B (12 × 128), from patches to patches."""

    def __init__(self, ffn_dim):
        super().__init__()
        self.patch_embedding = nn.Linear(768, 1536)
        self.blocks = nn.ModuleList(WanBlock(1536, ffn_dim, 12) for _ in range(4))
        self.head = nn.Linear(1536, 768)

    def forward(self, x, e, grid):
        x = self.patch_embedding(x)
        for block in self.blocks:
            x = block(x, e, grid)
        return self.head(x)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(torch.float32, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_four_wan_blocks_on_the_photograph_video_are_the_same_fused(dtype, device):
    # All of it, with Wan's FFN, on a GPU. Interpreted, it would take an hour: two frames of
    # a smaller window, so that all three axes of the grid still have a length.
    grid, ffn_dim = ((4, 12, 10), 8960) if device == "cuda" else ((2, 6, 5), 1536)
    torch.manual_seed(0)
    model = VideoModel(ffn_dim).to(device=device, dtype=dtype)
    x = photograph(*grid).to(device=device, dtype=dtype)
    e = torch.randn(1, 6, 1536).to(device)
    exact = copy.deepcopy(model).double()
    ref = outcome(exact, x.double(), e.double(), grid)
    del exact
    peer = outcome(model, x, e, grid)
    report = fuse(model)
    assert [row.became for row in report.rows] == ["FusedWanBlock"] * 4
    out = outcome(model, x, e, grid)
    assert out.keys() == ref.keys()
    for key in ref:
        bound = reference.error_bound(ref[key], peer[key].to(dtype))
        assert reference.relative_l2(out[key], ref[key]) <= bound, key
    unfuse(model)
    with torch.no_grad():
        assert torch.equal(model(x, e, grid), peer["out"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_known_module_computes_the_same_fused(model, inputs, dtype):
    x, t, e = inputs
    model, x = model.to(dtype), x.to(dtype)
    exact = copy.deepcopy(model).double()
    ref = outcome(exact, x.double(), t.double(), e.double())
    peer = outcome(model, x, t, e)
    fuse(model)
    out = outcome(model, x, t, e)
    for key in ref:
        assert out[key].dtype == peer[key].dtype
        bound = reference.error_bound(ref[key], peer[key].to(dtype))
        assert reference.relative_l2(out[key], ref[key]) <= bound, key


def test_unfuse_gives_the_original_back_bit_for_bit(model, inputs):
    before, names = outcome(model, *inputs), classes(model)
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    fuse(model)
    assert classes(model) != names
    unfuse(model)
    assert classes(model) == names
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    for key, value in outcome(model, *inputs).items():
        assert torch.equal(value, before[key])


def test_a_float32_stream_beside_bfloat16_products(model, inputs, device):
    x, _, e = inputs
    ref = outcome(copy.deepcopy(model.wan).double(), x.double(), e.double(), GRID)
    with torch.autocast(device, torch.bfloat16):
        peer = outcome(model.wan, x, e, GRID)
        fuse(model)
        out = outcome(model.wan, x, e, GRID)
    for key in ref:
        assert out[key].dtype == peer[key].dtype
        bound = reference.error_bound(ref[key], peer[key].bfloat16())
        assert reference.relative_l2(out[key], ref[key]) <= bound, key


# ---- nothing but the class changes ----


def test_parameters_names_mode_and_hooks_stay(model, inputs):
    calls = []
    model.wan.eval()
    model.wan.register_forward_hook(lambda *_: calls.append("block"))
    model.wan.self_attn.q.register_forward_hook(lambda *_: calls.append("q"))
    parameters, modules_ = dict(model.named_parameters()), dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    fuse(model)
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert dict(model.named_modules()) == modules_
    assert model.training and not model.wan.training
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    model(*inputs)
    assert calls == ["q", "block"]
    assert isinstance(model.wan, WanBlock)
    assert isinstance(model.baseline, modules.BaselineRCMAttention)


def test_fused_modules_are_copied_and_pickled(model, inputs):
    fuse(model)
    expected = model(*inputs)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(pickled, weights_only=False),
    ):
        assert classes(twin) == classes(model)
        assert torch.equal(twin(*inputs), expected)
        assert len(unfuse(twin).replaced) == 5
        assert classes(model) != classes(twin)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fused_model_compiles_without_a_graph_break(model, inputs, when, device):
    from torch._dynamo.backends.registry import lookup_backend  # loads Triton

    backend = lookup_backend("inductor" if device == "cuda" else "aot_eager")
    called = set()

    def recording(graph, examples):
        # An autograd.Function is a graph within the graph.
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                called.update(str(node.target) for node in module.graph.nodes)
        return backend(graph, examples)

    twin = copy.deepcopy(model)
    fuse(twin)
    expected = outcome(twin, *inputs)
    if when == "after":
        fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend=recording)
    if when == "before":  # what has been compiled notices that it was fused
        compiled(*inputs)
        assert not any("rcmlib.projection" in target for target in called)
        fuse(compiled)
    for key, value in outcome(compiled, *inputs).items():
        same = expected[key.removeprefix("_orig_mod.")]
        assert reference.relative_l2(value, same) < 1e-5, key
    assert any("rcmlib.projection" in target for target in called)


def test_fusing_twice_changes_nothing_more(model):
    first = fuse(model)
    assert len(first.replaced) == 5 and not first.left
    after = classes(model)
    again = fuse(model)
    assert classes(model) == after and not again.replaced
    assert {row.why for row in again.left} == {"it is fused already"}
    assert len(unfuse(model).replaced) == 5
    assert not unfuse(model).rows


def test_the_model_itself_is_replaced_and_reported():
    layer = modules.BaselineRCMAttention(32, num_heads=2)
    report = fuse(layer)
    assert type(layer).__name__ == "TritonFromBaseline"
    assert str(report).splitlines() == [
        "1 replaced, 0 left",
        "(the model)  BaselineRCMAttention  now TritonFromBaseline",
    ]


def test_the_report_is_a_table(model):
    model.baseline.proj.register_forward_hook(lambda *_: None)
    del model.naive, model.addcmul
    assert str(fuse(model)).splitlines() == [
        "2 replaced, 1 left",
        "baseline    BaselineRCMAttention  left: a hook on proj would no longer run",
        "block.attn  BaselineRCMAttention  now TritonFromBaseline",
        "wan         WanBlock              now FusedWanBlock",
    ]
    assert str(fuse(nn.Linear(2, 2))) == "0 replaced, 0 left"


def test_one_module_in_two_places_is_replaced_once(device):
    layer = modules.BaselineRCMAttention(32, num_heads=2)
    assert len(fuse(nn.ModuleList([layer, layer])).replaced) == 1


# ---- what is left, and the reason ----


class LoRA(nn.Linear):
    """An adapter in the place of a linear layer."""


class Tweaked(torch.Tensor):
    """A weight that is no plain tensor, as quantised ones are not."""


class OtherBlock(WanBlock):
    """It may compute anything."""


def _tweak_weight(model):
    weight = model.wan.self_attn.o.weight.detach().as_subclass(Tweaked)
    model.wan.self_attn.o.weight = nn.Parameter(weight)


def _hook(path, kind="register_forward_hook"):
    def attach(model):
        getattr(model.get_submodule(path), kind)(lambda *_: None)

    return attach


def _replace(path, module):
    return lambda model: model.set_submodule(path, module())


def _patch_forward(path):
    def patch(model):
        module = model.get_submodule(path)
        module.forward = module.forward

    return patch


LEFT = [
    ("wan", _hook("wan.self_attn.o"), "a hook on self_attn.o would no longer run"),
    ("wan", _hook("wan.self_attn"), "a hook on self_attn would no longer run"),
    (
        "wan",
        _hook("wan.self_attn", "register_forward_pre_hook"),
        "a hook on self_attn ",
    ),
    (
        "wan",
        _hook("wan.self_attn.o", "register_full_backward_hook"),
        "a hook on self_attn.o ",
    ),
    (
        "baseline",
        _hook("baseline.proj", "register_full_backward_pre_hook"),
        "a hook on proj ",
    ),
    ("baseline", _hook("baseline.proj"), "a hook on proj would no longer run"),
    (
        "wan",
        _replace("wan.self_attn.o", lambda: LoRA(32, 32)),
        "self_attn.o is a LoRA, not a plain Linear",
    ),
    (
        "baseline",
        _replace("baseline.proj", lambda: LoRA(32, 32)),
        "proj is a LoRA, not a plain Linear",
    ),
    (
        "wan",
        _replace("wan.self_attn", lambda: nn.Identity()),
        "self_attn is a Identity, not a plain WanSelfAttention",
    ),
    (
        "wan",
        lambda model: nn.utils.parametrizations.weight_norm(model.wan.self_attn.o),
        "self_attn.o is a ParametrizedLinear, not a plain Linear",
    ),
    (
        "wan",
        lambda model: delattr(model.wan.self_attn, "o"),
        "self_attn.o is missing, not a plain Linear",
    ),
    ("wan", _tweak_weight, "self_attn.o.weight is a Tweaked, not a plain tensor"),
    ("wan", _patch_forward("wan"), "its forward was replaced on the instance"),
    (
        "wan",
        _patch_forward("wan.self_attn"),
        "self_attn.forward was replaced on the instance",
    ),
    (
        "wan",
        lambda model: model.wan.double(),
        "modulation is torch.float64, the kernels take float32, float16, bfloat16",
    ),
    (
        "baseline",
        _replace("baseline", lambda: modules.BaselineRCMAttention(32, num_heads=4)),
        "head dimension 8, the kernels take 16 to 256",
    ),
    (
        "wan",
        _replace("wan", lambda: WanBlock(512, 16, num_heads=1)),
        "head dimension 512, the kernels take 16 to 256",
    ),
    (
        "wan",
        _replace("wan", lambda: OtherBlock(32, 48, 2)),
        "a subclass of WanBlock may compute something else",
    ),
    (
        "wan",
        _replace("wan", lambda: WanSelfAttention(32, 2)),
        "the residual to fuse is outside it: only a whole WanBlock is replaced",
    ),
    (
        "wan",
        _replace("wan", lambda: nn.MultiheadAttention(32, 2)),
        "attention of a kind that fuse does not know",
    ),
]


@pytest.mark.parametrize("name, change, why", LEFT, ids=[why for *_, why in LEFT])
def test_what_a_fused_forward_would_change_is_left_with_the_reason(
    model, name, change, why
):
    change(model)
    kind = type(model.get_submodule(name))
    report = fuse(model)
    assert type(model.get_submodule(name)) is kind
    (row,) = report.left
    assert row.name == name and row.kind == kind.__name__ and row.became is None
    assert row.why.startswith(why)


def test_an_adapter_on_what_is_still_called_does_not_stand_in_the_way(model, inputs):
    model.wan.self_attn.q = LoRA(32, 32).to(inputs[0].device)
    model.baseline.qkv.register_forward_hook(lambda *_: None)
    model.wan.ffn[2] = LoRA(48, 32).to(inputs[0].device)
    model.block.mlp.register_forward_hook(lambda *_: None)
    assert not fuse(model).left


def test_a_triton_module_that_was_built_as_one_stays():
    model = nn.Sequential(modules.TritonFusedRCMAttention(32, num_heads=2))
    assert fuse(model).left[0].why == "it is fused already"
    assert unfuse(model).left[0].why == "it was not made by fuse"
    assert type(model[0]) is modules.TritonFusedRCMAttention


@pytest.mark.parametrize("change", [fuse, unfuse])
def test_only_a_module_has_something_to_fuse(change):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        change("model")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got type"):
        change(WanBlock)
